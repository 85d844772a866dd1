"""The level-health report of a training run of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .health import LevelHealth
from .measuring import Loss, measure
from .nested import nested_system


class LevelHealthCallback(TrainerCallback):
    """Measures the levels of a model while `transformers.Trainer` trains it, and writes the reports.

    ``levels.html`` and ``levels.json`` in the output folder are of the last measurement. Training goes on as without
    it: model, optimizer and random numbers are as before.

    Args:
        stream: batches that are the same at each measurement, as of `nestlearn.levels.measure`; a generator is used up.
        every: steps between two measurements; None measures at the end only.
        loss, tokens, switch_off: of `nestlearn.levels.measure`.

    Attributes:
        reports: ``(step, report)`` of each measurement.

    Raises:
        ValueError: an interval below 1; while training what `nestlearn.levels.measure` raises.

    Example:
        >>> callback = LevelHealthCallback([torch.arange(8).view(1, 8)], every=100)
        >>> callback.reports
        []
    """

    def __init__(
        self,
        stream: Iterable[Any],
        every: int | None = None,
        *,
        loss: Loss | None = None,
        tokens: int = 64,
        switch_off: bool = True,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every={every!r} must be a positive number of steps, or None for the end only.")
        self.batches, self.every = list(stream), every
        self.settings: dict[str, Any] = {"loss": loss, "tokens": tokens, "switch_off": switch_off}
        self.reports: list[tuple[int, LevelHealth]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            self._measure(args, state, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.reports or self.reports[-1][0] != state.global_step:
            self._measure(args, state, **kwargs)

    def _measure(self, args: Any, state: Any, model: Any = None, optimizer: Any = None, **_kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        system = nested_system(model, optimizer, accumulation=args.gradient_accumulation_steps)
        health = measure(system, self.batches, **self.settings)
        self.reports.append((state.global_step, health))
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("levels.html", "levels.json"):
            health.save(folder / name)
