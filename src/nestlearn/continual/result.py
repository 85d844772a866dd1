"""The result of a learner on a stream: the matrix of scores, the cost, and the settings."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from nestlearn.continual.metrics import Metrics, continual_metrics


@dataclass(frozen=True, kw_only=True)
class ContinualResult:
    """One learner on one stream.

    Attributes:
        stream, method: names.
        tasks: the tasks' names in order.
        score: what R holds: "accuracy" in [0, 1], or "bits", minus bits per target (larger is better in both).
        matrix: `R[i][j]`, the score on task j after learning task i; NaN in rows that were not measured.
        initial: the scores before anything was learned.
        seed: of the order of the examples and of the method's choices.
        steps: updates of the optimizer.
        examples: examples that gradients were computed for, replayed ones and those for a Fisher matrix included.
        stored_examples: how many examples of earlier tasks were kept.
        seconds: wall time of learning, without the tests.
        config: settings of stream, method and learner.
    """

    stream: str
    method: str
    tasks: tuple[str, ...]
    score: str
    matrix: tuple[tuple[float, ...], ...]
    initial: tuple[float, ...]
    seed: int
    steps: int
    examples: int
    stored_examples: int
    seconds: float
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> Metrics:
        """Average accuracy, transfers and forgetting."""
        return continual_metrics(self.matrix, self.initial)

    def measured(self) -> dict[str, float]:
        """The metrics that exist, by name."""
        values = dataclasses.asdict(self.metrics)
        return {name: value for name, value in values.items() if not math.isnan(value)}
