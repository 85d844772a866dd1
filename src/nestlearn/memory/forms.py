"""What a span offers to the general engine: a read of every token, and the state after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .types import Running


class Span(NamedTuple):
    """``read(name, x)`` applies map ``name`` with the weights of each token; ``advance()`` gives the state after."""

    read: Callable[[str, Tensor], Tensor]
    advance: Callable[[], Running]


def keep_empty(valid: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """``new`` but in rows without a valid token, which keep the old weights to the last bit."""
    return new if valid is None else torch.where(valid.any(-1)[..., None, None], new, old)
