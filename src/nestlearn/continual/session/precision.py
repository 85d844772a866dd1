"""The precision of what a session has learned: 16 bits a number between documents, 8 bits its momentum.

Inside a document everything is kept in float32. A file holds every tensor in the shortest type that has its exact
values. So files between documents are small, files inside of one are exact, and no session changes by being saved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nestlearn.models.stacking import LevelFast, LevelState
from nestlearn.nn.state import Tree, map_tensors


def round_levels(state: LevelState) -> LevelState:
    """The state with numbers that take half of their bytes in a file, and a momentum that takes a quarter."""

    def change(_: int, level: LevelFast) -> LevelFast:
        weights = level.weights
        params = map_tensors(_rounded, weights.params)
        anchor = params if weights.aligned else map_tensors(_rounded, weights.anchor)
        momentum = map_tensors(_rounded_momentum, weights.momentum)
        return level._replace(weights=weights._replace(params=params, anchor=anchor, momentum=momentum))

    return state.map_levels(change)


def shorten(level: LevelFast) -> LevelFast:
    """A level without what follows from the rest (an anchor at the end of a period, a momentum of zero), its numbers in
    the shortest type that holds them exactly."""
    weights = level.weights
    anchor = {} if weights.aligned else map_tensors(_shortest, weights.anchor)
    momentum = weights.momentum
    if momentum:
        used = any(bool(s.any()) for s in momentum.values())
        momentum = {name: _shortest_momentum(s) for name, s in momentum.items()} if used else {}
    return level._replace(
        weights=weights._replace(params=map_tensors(_shortest, weights.params), anchor=anchor, momentum=momentum)
    )


def _shortest(x: Tensor) -> Tensor:
    short = x.to(torch.bfloat16)
    return short if x.dtype == torch.float32 and torch.equal(short.to(x.dtype), x) else x


def _shortest_momentum(x: Tensor) -> Tree:
    return to_8_bits(x) if x.dtype == torch.float32 and torch.equal(_rounded_momentum(x), x) else x


def widen(level: LevelFast) -> LevelFast:
    """Inverse of `shorten`."""
    weights = level.weights
    params = map_tensors(_widest, weights.params)
    anchor = params if weights.aligned else map_tensors(_widest, weights.anchor)
    momentum: Any = weights.momentum
    if momentum is not None:
        kept = {name: from_8_bits(*s) if isinstance(s, tuple) else s for name, s in momentum.items()}
        momentum = kept or map_tensors(torch.zeros_like, params)
    return level._replace(weights=weights._replace(params=params, anchor=anchor, momentum=momentum))


def _widest(x: Tensor) -> Tensor:
    return x.to(torch.float32) if x.dtype == torch.bfloat16 else x


def _rounded(x: Tensor) -> Tensor:
    """A float32 tensor with the precision of bfloat16 (8 bits); the same one if it has it, and others stay."""
    return x if x.dtype != torch.float32 or torch.equal(short := x.to(torch.bfloat16).to(x.dtype), x) else short


def _rounded_momentum(x: Tensor) -> Tensor:
    """A float32 tensor with the precision of 8-bit numbers, of which 4 bits are of the mantissa; others stay."""
    return from_8_bits(*to_8_bits(x)) if x.dtype == torch.float32 else x


def to_8_bits(x: Tensor) -> tuple[Tensor, int]:
    """``(y, n)`` with y a float8 tensor and ``x = 2^n y``, but for rounding; y uses the range of its format.

    Example:
        >>> from_8_bits(*to_8_bits(torch.tensor([1.0, 0.3, -2.0])))
        tensor([ 1.0000,  0.3125, -2.0000])
    """
    largest, limit = float(x.abs().max()) if x.numel() else 0.0, torch.finfo(torch.float8_e4m3fn).max
    # 2^100 still fits float32: the inverse of the scale must.
    power = max(-100, math.ceil(math.log2(largest / limit))) if largest and math.isfinite(largest) else 0
    return (x * 2.0**-power).to(torch.float8_e4m3fn), power


def from_8_bits(y: Tensor, power: int) -> Tensor:
    """Inverse of `to_8_bits`, in float32."""
    return y.to(torch.float32) * 2.0**power
