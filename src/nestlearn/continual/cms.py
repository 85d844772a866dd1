"""The Continuum Memory System over any model: levels with periods, a memory of inputs, nested transfer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nestlearn.continual.methods import Method, OptimizerFactory
from nestlearn.data.continual import Examples
from nestlearn.optim import InputProjection, MultiTimescale, NestedTransfer, timescale_groups
from nestlearn.optim.projection import ApplyTo, Unit

Levels = Callable[[nn.Module], Sequence[tuple[nn.Module | list[nn.Module], int]]]
"""From a model to its levels: (modules, period in steps)."""


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Settings of `nestlearn.optim.InputProjection`.

    Attributes:
        alpha: α, at which a direction of the inputs is half closed.
        unit: of alpha: "squares", or "steps" of average inputs of the map, for models of unlike maps.
        period: steps between two refreshes of the copy in use; None: at each task's end, which needs boundaries.
        apply_to: "update" or "gradient".
        last_epoch_only: inputs are stored in each task's last epoch only, which needs boundaries.
    """

    alpha: float = 300.0
    unit: Unit = "squares"
    period: int | None = 215
    apply_to: ApplyTo = "update"
    last_epoch_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Settings of `nestlearn.optim.NestedTransfer`."""

    rate: float = 0.5
    period: int = 86


class CMS(Method):
    """Levels that step at their own period, a memory of each map's inputs, and nested transfer; each can be left out.

    Args:
        levels: the modules and periods of the levels; None: all parameters step at every step.
        projection: recursive least squares over each map's inputs (orthogonal weights modification, arXiv 1810.01256),
            a preconditioner in the sense of NL Eq. 38-41 and 47, which learn theirs from gradients.
        transfer: slow weights behind the fast ones (NL Eq. 72).
        name: for tables; by default the ingredients, after "CMS: " where there are levels.

    Example:
        >>> from functools import partial
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        >>> method = CMS(projection=Projection(period=50), transfer=Transfer())
        >>> method.name
        'projection, transfer'
        >>> type(method.make_optimizer(model, partial(torch.optim.Adam, lr=1e-3))).__name__
        'NestedTransfer'
    """

    makes_optimizer = True
    without_boundaries = "Give the projection a period, and last_epoch_only=False."

    def __init__(
        self,
        *,
        levels: Levels | None = None,
        projection: Projection | None = None,
        transfer: Transfer | None = None,
        name: str | None = None,
    ) -> None:
        self.levels, self.projection, self.transfer = levels, projection, transfer
        parts = {"levels": levels, "projection": projection, "transfer": transfer}
        given = ", ".join(part for part, setting in parts.items() if setting)
        # Without levels it is not called a Continuum Memory System, and without ingredients it is fine-tuning.
        self.name = name or ("CMS: " if levels else "") + (given or "fine-tuning")
        # If the projection waits for the ends of tasks.
        self.needs_boundaries = projection is not None and (projection.period is None or projection.last_epoch_only)
        self._projecting: InputProjection | None = None
        self._periods: list[int] = []

    def config(self) -> dict[str, Any]:
        """The ingredients, and the periods of the parameter groups."""
        settings = {"projection": self.projection, "transfer": self.transfer}
        chosen = {name: None if part is None else dataclasses.asdict(part) for name, part in settings.items()}
        return chosen | {"periods": self._periods}

    def make_optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        """The factory's optimizer in its wrappers: levels inside, then the projection, then the transfer."""
        if self.levels is None:
            optimizer = super().make_optimizer(model, factory)
        else:
            groups = timescale_groups(model, self.levels(model))
            self._periods = [group["update_period"] for group in groups]
            optimizer = MultiTimescale(factory(groups))
        if self.projection is not None:
            given = self.projection
            self._projecting = InputProjection(
                optimizer, model, alpha=given.alpha, unit=given.unit, period=given.period, apply_to=given.apply_to
            )
            optimizer = self._projecting
        if self.transfer is not None:
            optimizer = NestedTransfer(optimizer, rate=self.transfer.rate, period=self.transfer.period)
        return optimizer

    def begin_epoch(self, epoch: int, epochs: int, boundaries: bool) -> None:
        """Stores inputs in the last epoch only, with `last_epoch_only`."""
        if self._projecting is not None and self.projection is not None:
            self._projecting.recording = not self.projection.last_epoch_only or epoch == epochs - 1

    def end_task(self, model: nn.Module, train: Examples, generator: torch.Generator) -> int:
        """Refreshes the projection if it has no period."""
        if self._projecting is not None and self._projecting.period is None:
            self._projecting.refresh()
        return 0
