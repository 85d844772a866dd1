"""The configuration of an adapter of levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from peft import PeftConfig

from nestlearn.fields import from_mapping
from nestlearn.models.stacking import MapNames
from nestlearn.models.stacking.plan import Mode, StackPlan
from nestlearn.nn import Level

METHOD = "CONTINUUM"
"""The name of the method in ``adapter_config.json``."""

MODES = ("add", "split")
PERIODS = (64, 512)


def _default_levels(mode: str) -> list[Level]:
    return [Level(period, rank=8) if mode == "split" else Level(period, hidden=16) for period in PERIODS]


@dataclass
class ContinuumConfig(PeftConfig):
    """Configuration of an adapter of levels on the feed-forward networks M of a pretrained model.

    ``add``, levels beside M:  ``y = M(x) + sum_l M_l(x)``, each M_l a network of the kind of M, its last map 0 at first

    ``split``, levels inside M:  the hidden units of M are divided over the levels, and the maps of the units of level l
    are ``W_0 + B_l A_l`` with B_l 0 at first

    So the model computes at first what it computed before. Only levels of ``split`` can be merged into M.

    Args:
        levels: `nestlearn.nn.Level` or mappings of its fields, fastest first, each period a multiple of the first.
            ``hidden`` (or ``expansion``) sizes a level of ``add``, ``rank`` one of ``split``. ``rule``, ``lr``,
            ``retain``, ``clip`` and ``momentum`` say how a level writes after `stack_adapter`; in training the
            optimizer writes. None: periods 64 and 512, with 16 hidden units or rank 8.
        mode: ``"add"`` or ``"split"``.
        split: fractions of the hidden units, one for each level (mode ``split``; None divides evenly).
        target_modules: names of the feed-forward networks, as peft reads them (``["mlp"]``, or one regular expression).
            None: all that `nestlearn.models.stacking.find_networks` finds.
        exclude_modules, layers_to_transform, layers_pattern: leave out modules, as in the other methods of peft.
        modules_to_save: names of modules that are trained in full and saved, such as a new head.

    Raises:
        ValueError: levels that cannot be an adapter.

    Example:
        >>> config = ContinuumConfig(levels=[Level(period=8, hidden=4), {"period": 32, "hidden": 4}])
        >>> config.plan().periods, config.steps
        ((8, 32), [1, 4])
    """

    levels: list[Any] | None = None
    mode: Mode = "add"
    split: list[float] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = cast(Any, METHOD)
        if self.mode not in MODES:
            raise ValueError(
                f"mode={self.mode!r} is not one of an adapter. Use 'add' (networks beside the feed-forward network) or "
                "'split' (low-rank changes inside it)."
            )
        given: Sequence[Any] = _default_levels(self.mode) if self.levels is None else self.levels
        levels = [x if isinstance(x, Level) else from_mapping(Level, x, "field of a level") for x in given]
        self.levels = [asdict(level) for level in levels]
        self._check(levels)

    def _check(self, levels: Sequence[Level]) -> None:
        self.plan()
        if any(level.period is None for level in levels):
            raise ValueError(
                "a level of an adapter needs a period; the pretrained network that it is added to is the level that "
                "never changes. Leave the level with period=None out."
            )
        if self.mode == "split" and any(level.rank is None for level in levels):
            raise ValueError(
                "mode='split' trains changes of low rank, and a level without rank= would train and save whole "
                "matrices. Give each level a rank, such as rank=8."
            )
        if self.mode == "add" and any(level.rank is not None for level in levels):
            raise ValueError(
                "rank= belongs to mode='split'. A level of mode='add' is a network of its own, which hidden= makes "
                "small; use hidden=16, for example."
            )

    def plan(self, names: MapNames | None = None) -> StackPlan:
        """The levels as a plan of `nestlearn.stack_levels`, for networks with these names of maps."""
        names = names or MapNames("up", "down")
        levels = tuple(Level(**level) for level in self.levels or ())
        return StackPlan(levels, self.mode, (), names, None if self.split is None else tuple(self.split))

    @property
    def steps(self) -> list[int]:
        """Optimizer steps between two changes of each level: its period over that of the fastest."""
        periods = [cast(int, level["period"]) for level in self.levels or ()]
        return [period // periods[0] for period in periods]
