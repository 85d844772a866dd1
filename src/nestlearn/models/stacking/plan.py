"""What a stacked model is made of: levels, how they share an MLP, and which MLPs have them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from nestlearn.nn.cms.level import Level

from .families import MapNames

Mode = Literal["add", "split", "copy"]


@dataclass(frozen=True, eq=False)
class StackPlan:
    """The description of a stacked model, kept in its configuration as plain data.

    Args:
        levels: levels with strictly increasing periods, None (frozen) last; every period a multiple of the first.
        mode: ``add`` zero-output networks beside the frozen MLP, ``split`` its hidden units over the levels, ``copy``
            the whole MLP for every level, averaged.
        paths: the stacked MLP modules.
        names: how they name their maps.
        split: fractions of the hidden units, one for each level (mode ``split``; None divides evenly).

    Raises:
        ValueError: levels, mode and fractions that do not fit each other.
    """

    levels: tuple[Level, ...]
    mode: Mode
    paths: tuple[str, ...]
    names: MapNames
    split: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r} does not exist; use 'add', 'split' or 'copy'.")
        check_levels(self.levels)
        if self.split is not None:
            self._check_split(self.split)
        if self.mode != "add" and any(level.expansion != Level().expansion for level in self.levels):
            raise ValueError(
                "expansion= sizes the networks of mode='add'. In 'split' use hidden= or split=; 'copy' takes the "
                "whole MLP."
            )
        if self.mode == "copy" and any(level.hidden is not None for level in self.levels):
            raise ValueError(
                "mode='copy' gives every level the whole MLP: bound its fast weights by rank=, not hidden=."
            )

    def _check_split(self, split: tuple[float, ...]) -> None:
        if self.mode != "split" or any(level.hidden is not None for level in self.levels):
            raise ValueError(f"split={split} is for mode='split' with levels that do not set hidden= themselves.")
        if len(split) != len(self.levels) or min(split) <= 0 or abs(sum(split) - 1) > 1e-6:
            raise ValueError(f"split={split} must be {len(self.levels)} positive fractions that sum to 1.")

    @property
    def segment(self) -> int:
        """Tokens between two writes: the smallest period."""
        return min(period for period in self.periods if period is not None)

    @property
    def periods(self) -> tuple[int | None, ...]:
        return tuple(level.period for level in self.levels)

    def learning(self) -> list[int]:
        """Indices of the levels that have a period."""
        return [i for i, period in enumerate(self.periods) if period is not None]

    def units(self, hidden: int) -> list[range]:
        """Hidden units of each level in mode ``split``, for an MLP of so many; those of no level stay frozen.

        Example:
            >>> plan = StackPlan((Level(8), Level(16)), "split", ("mlp",), MapNames("up", "down"), (0.25, 0.75))
            >>> plan.units(8)
            [range(0, 2), range(2, 8)]
        """
        if self.split is not None:
            sizes = [fraction * hidden for fraction in self.split]
        else:
            fixed = sum(level.hidden or 0 for level in self.levels)
            free = sum(level.hidden is None for level in self.levels)
            sizes = [level.hidden or (hidden - fixed) / max(free, 1) for level in self.levels]
        ends = [round(sum(sizes[: i + 1])) for i in range(len(sizes))]
        found = [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        if ends[-1] > hidden or min(map(len, found)) < 1:
            raise ValueError(
                f"{hidden} hidden units cannot be divided into {[len(part) for part in found]} for the levels "
                f"{list(self.levels)}: every level needs at least one. Use fewer levels, or a smaller hidden=."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a configuration file."""
        plain = asdict(self)
        return {**plain, "levels": list(plain["levels"]), "paths": list(self.paths), "split": self._plain_split()}

    def _plain_split(self) -> list[float] | None:
        return None if self.split is None else list(self.split)

    @classmethod
    def from_dict(cls, data: Any) -> StackPlan:
        """The plan of a configuration file.

        Raises:
            ValueError: it is none.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(f"a configuration of a stacked model needs `stacking` with {sorted(names)}, got {data!r}.")
        known = {field.name for field in fields(Level)}
        for level in data["levels"]:
            if set(level) - known:
                raise ValueError(f"this version of nestlearn does not know {sorted(set(level) - known)} of a Level.")
        split = data["split"]
        return cls(
            tuple(Level(**level) for level in data["levels"]),
            data["mode"],
            tuple(data["paths"]),
            MapNames(**data["names"]),
            None if split is None else tuple(split),
        )


def check_levels(levels: Sequence[Level]) -> None:
    """Raise ValueError unless levels can be taught by the loss of the next token."""
    if not levels or not all(isinstance(level, Level) for level in levels):
        raise ValueError(f"levels must be a non-empty sequence of Level, got {levels!r}; for a mapping use Level(**m).")
    periods = [level.period for level in levels if level.period is not None]
    if not periods:
        raise ValueError("no level has a period, so nothing would ever learn. Give at least one Level(period=...).")
    if None in [level.period for level in levels[:-1]]:
        raise ValueError(f"at most one level is frozen (period=None), and it comes last; got {list(levels)}.")
    if any(a >= b for a, b in itertools.pairwise(periods)):
        raise ValueError(f"levels go from fastest to slowest, with strictly increasing periods; got {periods}.")
    if periods[0] < 2:
        raise ValueError("the smallest period must be at least 2: a write needs one next token inside its segment.")
    wrong = [period for period in periods if period % periods[0]]
    if wrong:
        fixed = [max(1, round(period / periods[0])) * periods[0] for period in periods]
        raise ValueError(
            f"periods {wrong} are no multiples of the smallest, {periods[0]}: levels are written segment by segment. "
            f"Use {fixed}, for example."
        )
