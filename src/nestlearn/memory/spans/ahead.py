"""What the gates and keys of many spans decide, computed together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..associative import AssociativeMemory
from ..retention import Delta
from ..types import Gates
from .base import Erasure, Kernels, Prepared, make_kernels
from .delta import delta_kernels, erase
from .proximal import following_kernels


def prepare(memory: AssociativeMemory, keys: Sequence[Tensor], gates: Sequence[Gates]) -> list[Prepared]:
    """Kernels and erasures of several spans without masks or resets, computed together where lengths agree.

    ``keys[i]: [b, c, d]``, ``gates[i]``: each ``[b, c]``. One large operation costs less than many small ones.
    """
    if len({k.shape[1] for k in keys}) > 1:
        return prepare(memory, keys[:-1], gates[:-1]) + prepare(memory, keys[-1:], gates[-1:])
    together = Gates(*(None if g[0] is None else torch.stack(g, 1) for g in zip(*gates, strict=True)))  # type: ignore[arg-type]
    retention, erasures = memory.retention, {}
    name = memory.architecture.query_map
    if isinstance(retention, Delta) or memory.follows_weights:
        delta = isinstance(retention, Delta)
        kernels = delta_kernels(retention, together, None, None) if delta else following_kernels(together, None, None)
        kind = memory.step_size_of(name)
        erasures[name] = erase(kernels, torch.stack(list(keys), 1), kind, together.lr, together.retain)
    else:
        kernels = make_kernels(together.retain, together.momentum, None, None)
    # One unbind a tensor: the gradient of a slice would be a full-size tensor of zeros.
    per_span = [Kernels(*x) for x in zip(*(_spans(x, len(keys)) for x in kernels), strict=True)]
    solved = {n: [Erasure(*x) for x in zip(*(y.unbind(1) for y in e), strict=True)] for n, e in erasures.items()}
    return [Prepared(here, {n: e[i] for n, e in solved.items()}) for i, here in enumerate(per_span)]


def _spans(x: Tensor | None, count: int) -> Sequence[Tensor | None]:
    return [None] * count if x is None else x.unbind(1)
