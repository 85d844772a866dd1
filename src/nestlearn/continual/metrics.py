"""Metrics of a learner on a stream of tasks, from the matrix R: the score on task j after learning task i.

Definitions (Lopez-Paz & Ranzato 2017 for BWT and FWT, Chaudhry et al. 2018 for forgetting), tasks counted from 1:

    ACC         mean over j of R[T, j]
    BWT         mean over j < T of R[T, j] - R[j, j]
    FWT         mean over j >= 2 of R[j-1, j] - b[j], b = the score before anything was learned
    forgetting  mean over j < T of max over i < T of R[i, j], minus R[T, j]
    average incremental accuracy   mean over i of the mean over j <= i of R[i, j]
    learning accuracy              mean over j of R[j, j]

Other libraries differ: mammoth's forgetting takes the maximum over all i, T included (never negative); continuum's BWT
averages over all pairs i > j; avalanche's stream BWT is minus a forgetting of the form R[T, j] - R[j, j].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """All metrics of one matrix; NaN for those that do not exist (one task, or rows that were not measured)."""

    average_accuracy: float
    backward_transfer: float
    forward_transfer: float
    forgetting: float
    average_incremental_accuracy: float
    learning_accuracy: float


def continual_metrics(matrix: Sequence[Sequence[float]] | Tensor, initial: Sequence[float] | None = None) -> Metrics:
    """The metrics of a matrix of scores; larger scores are better.

    Args:
        matrix: R, one row per task learned, one column per task tested; NaN where nothing was measured.
        initial: b, the scores before anything was learned, for the forward transfer.

    Raises:
        ValueError: R is not square, or `initial` is not one score per task.

    Example:
        >>> metrics = continual_metrics([[0.9, 0.2], [0.5, 0.8]], initial=[0.1, 0.1])
        >>> round(metrics.average_accuracy, 3), round(metrics.backward_transfer, 3), round(metrics.forward_transfer, 3)
        (0.65, -0.4, 0.1)
    """
    scores = torch.as_tensor(matrix, dtype=torch.float64)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or not len(scores):
        raise ValueError(f"R has shape {tuple(scores.shape)}; it must be square: a row and a column per task.")
    count = len(scores)
    if initial is not None and len(initial) != count:
        raise ValueError(f"{len(initial)} initial scores for {count} tasks; give one per task.")
    final, learned = scores[-1], scores.diagonal()
    incremental = torch.stack([scores[i, : i + 1].mean() for i in range(count)])
    forward = backward = forgetting = math.nan
    if count > 1:
        backward = float((final - learned)[:-1].mean())
        forgetting = float((scores[:-1, :-1].amax(0) - final[:-1]).mean())
        if initial is not None:
            start = torch.as_tensor(initial, dtype=torch.float64)
            forward = float((scores.diagonal(1) - start[1:]).mean())
    return Metrics(
        average_accuracy=float(final.mean()),
        backward_transfer=backward,
        forward_transfer=forward,
        forgetting=forgetting,
        average_incremental_accuracy=float(incremental.mean()),
        learning_accuracy=float(learned.mean()),
    )
