"""The description of a stacked model: its levels, how they share an MLP, and which MLPs have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from nestlearn.nn.cms.level import Level, check_order, check_segments

from .families import MapNames

Mode = Literal["add", "split", "copy"]

SETTINGS = ("rule", "lr", "retain", "clip", "momentum")
"""Fields of `Level` that change no shape of a model: a session may have its own."""


@dataclass(frozen=True, eq=False)
class StackPlan:
    """The description of a stacked model, kept in its configuration as plain data.

    Args:
        levels: levels with strictly increasing periods, a frozen one (None) last; every period a multiple of the first.
        mode: see `nestlearn.models.stacking.network.StackedMLP`.
        paths: of the stacked MLP modules.
        names: of their maps.
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
        check_order(self.levels)
        if not self.learning():
            raise ValueError("no level has a period, so nothing would ever learn. Give at least one Level(period=...).")
        check_segments(self.levels)
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

    def with_settings(self, **settings: Any) -> tuple[Level, ...]:
        """The levels with other settings: each is one value, or a sequence with one for every level that has a period.

        Raises:
            TypeError: a name that is no setting (`SETTINGS`).
            ValueError: a sequence of another length, or a value that cannot work.

        Example:
            >>> plan = StackPlan((Level(8), Level(16)), "split", ("mlp",), MapNames("up", "down"))
            >>> [(level.lr, level.retain) for level in plan.with_settings(lr=[4.0, 1.0], retain=1.0)]
            [(4.0, 1.0), (1.0, 1.0)]
        """
        if unknown := sorted(set(settings) - set(SETTINGS)):
            raise TypeError(
                f"{', '.join(unknown)} is no setting of a level that a session can change; those are "
                f"{', '.join(SETTINGS)}. Periods, ranks and sizes belong to the model: stack_levels(model, levels)."
            )
        learning, levels = self.learning(), list(self.levels)
        for name, value in settings.items():
            values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
            if values is not None and len(values) != len(learning):
                raise ValueError(
                    f"{name}={value!r} needs one value, or one for each of the {len(learning)} levels that learn."
                )
            for i, index in enumerate(learning):
                levels[index] = replace(levels[index], **{name: value if values is None else values[i]})
        return tuple(levels)

    def units(self, hidden: int) -> list[range]:
        """Hidden units of each level in mode ``split``, for an MLP with ``hidden`` units. Other units stay frozen.

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
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Any) -> StackPlan:
        """The plan of a configuration file.

        Raises:
            ValueError: the data do not describe a plan.
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
