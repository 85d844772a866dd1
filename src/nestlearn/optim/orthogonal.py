"""Orthogonalized directions: Newton-Schulz over stacks of matrices, and the size of the update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nestlearn.memory.kernels.newton_schulz import COEFFICIENTS, POLAR_EXPRESS, Coefficients, newton_schulz
from nestlearn.optim.matrices import Matrices, Stack, together
from nestlearn.optim.sharding import shared

Named = Literal["quintic", "polar_express"]
AdjustLr = Literal["match_rms_adamw", "original"]

CPU_ELEMENTS = 2**18
"""Elements orthogonalized at once on a CPU: stacking saves calls for small matrices and costs time for large ones."""

NAMED: dict[str, tuple[Coefficients, ...]] = {"quintic": (COEFFICIENTS,), "polar_express": POLAR_EXPRESS}


def coefficients(given: Named | Sequence[Coefficients]) -> tuple[Coefficients, ...]:
    """One triple per Newton-Schulz step, the last repeating.

    Raises:
        ValueError: an unknown name, or no triples of numbers.
    """
    if isinstance(given, str):
        if given not in NAMED:
            raise ValueError(f"ns_coefficients is {given!r}; it must be one of {', '.join(NAMED)}, or triples.")
        return NAMED[given]
    try:
        triples = tuple(tuple(float(value) for value in triple) for triple in given)
    except TypeError:  # numbers in place of triples
        triples = ()
    if not triples or any(len(triple) != 3 for triple in triples):
        raise ValueError(f"ns_coefficients is {given}; it must be a sequence of triples (a, b, c), one per step.")
    return triples  # pyright: ignore[reportReturnType]


def iteration_dtype(like: Tensor) -> torch.dtype:
    """bfloat16 where the device is fast in it, except for float64; otherwise the type given."""
    if like.dtype == torch.float64:
        return like.dtype
    if like.device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = like.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()  # torch has no public query
    return torch.bfloat16 if fast else like.dtype


def orthogonalize(
    matrices: Matrices, parts: Sequence[Stack], steps: int, triples: Sequence[Coefficients]
) -> list[Stack]:
    """Newton-Schulz of matrices that may be distributed; returns this process's parts in the type of the iterations.

    Divided matrices are collected on every process. Processes that have the same matrices share the work
    (`Matrices.workers`): each orthogonalizes some, and all get the results.
    """
    complete = parts if matrices.undivided else matrices.whole(parts)
    results = shared(list(complete), matrices.workers, lambda own: _orthogonalize(own, steps, triples))
    return results if matrices.undivided else matrices.own_parts(results)


def _orthogonalize(complete: list[Stack], steps: int, triples: Sequence[Coefficients]) -> list[Stack]:
    first = complete[0]
    count = max(1, CPU_ELEMENTS // max(1, first.numel())) if first.device.type == "cpu" else len(complete)
    results: list[Stack] = []
    for place in range(0, len(complete), count):
        stacked, counts = together(complete[place : place + count])
        result = newton_schulz(stacked, steps, triples, dtype=iteration_dtype(stacked))
        results += result.split(counts)
    return results


def average(momenta: list[Stack], gradients: list[Stack], beta: float, nesterov: bool) -> list[Stack]:
    """``M ← β M + (1 - β) g`` in place. Returns M, or with Nesterov's step ``β M + (1 - β) g``; do not change it."""
    torch._foreach_lerp_(momenta, gradients, 1 - beta)
    return list(torch._foreach_lerp(gradients, momenta, beta)) if nesterov else momenta


def lr_factor(adjust_lr: AdjustLr | None, shape: Sequence[int]) -> float:
    """The factor of the learning rate for an orthogonal update of this shape (as in `torch.optim.Muon`).

    ``"match_rms_adamw"``: 0.2 √max(m, n), which gives the update a root mean square of 0.2, about that of AdamW, so
    that one learning rate serves both. ``"original"``: √max(1, m / n). None: 1.
    """
    rows, columns = shape[-2:]
    if adjust_lr == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns)) if adjust_lr == "original" else 1.0


def check_orthogonal(group: Mapping[str, Any]) -> None:
    """Raises ValueError for settings of Newton-Schulz that cannot work."""
    steps = group["ns_steps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 < steps < 100:
        raise ValueError(f"ns_steps is {steps!r}; it must be a whole number from 1 to 99: Newton-Schulz iterations.")
    if group["adjust_lr"] is not None and group["adjust_lr"] not in get_args(AdjustLr):
        raise ValueError(f"adjust_lr is {group['adjust_lr']!r}; it must be None or {' or '.join(get_args(AdjustLr))}.")
    coefficients(group["ns_coefficients"])
