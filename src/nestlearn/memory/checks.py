"""Arguments that cannot work are refused by name: what was received, why, and the usual fix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .associative import AssociativeMemory
from .objectives import ThresholdObjective, needs_threshold
from .retention import is_per_channel
from .types import Factor, Gates, State, Weights

Engine = Literal["auto", "reference", "chunked", "fla"]


def check_engine(engine: str) -> None:
    """A known one."""
    if engine not in get_args(Engine):
        raise ValueError(f"unknown engine {engine!r}: use 'auto', 'reference', 'chunked' or 'fla'")


def check_tensors(**inputs: object) -> None:
    """Every input is a tensor."""
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}. Use torch.as_tensor({name}).")


def check_scan(
    memory: AssociativeMemory,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    mask: Tensor | None,
    reset: Tensor | None,
    how: str,
) -> None:
    """Shapes, dtypes and gates of one call fit each other, the memory and the state."""
    if how not in ("token", "chunk"):
        raise ValueError(f"read must be 'token' or 'chunk', got {how!r}")
    check_types(state, gates, {"q": q, "k": k, "v": v}, {"mask": mask, "reset": reset})
    if q.dim() < 2 or q.shape[-2] == 0:
        raise ValueError(f"scan needs at least one token: q has shape {tuple(q.shape)}, expected [*b, t >= 1, d]")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"keys and values need a width of at least 1: q is {tuple(q.shape)}, v is {tuple(v.shape)}")
    batch, tokens = q.shape[:-2], q.shape[-2]
    weights = next(iter(state.params.values()))
    if q.shape != k.shape or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must agree but for v's width")
    check_maps(memory, state.params, k, v, batch)
    given = {"q": q, "k": k, "v": v, **{f"gates.{n}": x for n, x in gates._asdict().items() if x is not None}}
    for name, x in given.items():
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
        if x.dtype == torch.float64 and weights.dtype != torch.float64:
            raise TypeError(
                f"{name} is float64 but the state is {weights.dtype}. "
                "Make the state with init_state(..., dtype=torch.float64), or pass float32 inputs."
            )
    check_momentum(memory, gates)
    check_threshold(memory, gates.threshold)
    if memory.algorithm.carries and state.momentum is None:
        raise ValueError("this state was made without momentum; make it with this memory's init_state")
    channels = is_per_channel(memory.retention)
    for name, x in (*gates._asdict().items(), ("mask", mask), ("reset", reset)):
        expected = (*batch, tokens, q.shape[-1]) if channels and name == "retain" else (*batch, tokens)
        if x is not None and x.shape != expected:
            raise ValueError(
                f"{name} must have shape {expected}, got {tuple(x.shape)}"
                + ("" if name != "retain" else f" for {memory.retention!r}; a gate per channel needs per_channel=True")
            )
    for name, x in (("mask", mask), ("reset", reset)):
        if x is not None and x.dtype != torch.bool:
            raise TypeError(f"{name} must be a bool tensor, got {x.dtype}")


def check_types(state: object, gates: object, inputs: Mapping[str, object], flags: Mapping[str, object | None]) -> None:
    """Records and tensors, all on the device of the state."""
    if not isinstance(state, State):
        raise TypeError(
            f"state must be a nestlearn.memory.State, got {type(state).__name__}. "
            "Start with memory.init_state(batch_shape, d_key, d_value)."
        )
    if not isinstance(gates, Gates):
        raise TypeError(f"gates must be a nestlearn.memory.Gates, got {type(gates).__name__}. Use Gates(lr, retain).")
    named = {f"gates.{name}": x for name, x in gates._asdict().items()}
    for name in ("gates.lr", "gates.retain"):
        if named[name] is None:
            raise TypeError(f"{name} is None, but every token needs one; ones keep everything and write fully.")
    optional = {name: x for name, x in (*named.items(), *flags.items()) if x is not None}
    device = next(iter(state.params.values())).device
    given: dict[str, Any] = {**inputs, **optional}
    check_tensors(**given)
    for name, x in given.items():
        if x.device != device:
            raise ValueError(
                f"{name} is on {x.device}, but the state is on {device}. Move one of them, or make the state with "
                f"init_state(..., device={str(x.device)!r})."
            )


def check_maps(memory: AssociativeMemory, weights: Weights, k: Tensor, v: Tensor, batch: tuple[int, ...]) -> None:
    """Weights are those of this memory for keys and values of these widths."""
    have = {name: tuple(w.shape) for name, w in weights.items()}
    for name, shape in memory.architecture.shapes(k.shape[-1], v.shape[-1]).items():
        if have.get(name) != (*batch, *shape):
            raise ValueError(
                f"the state does not fit: map {name!r} must be {(*batch, *shape)}, the state has {have}. "
                "Make it with memory.init_state(batch_shape, d_key, d_value)."
            )


def check_momentum(memory: AssociativeMemory, gates: Gates) -> None:
    """The momentum gate is there exactly if the algorithm has momentum."""
    name = type(memory.algorithm).__name__
    if memory.has_momentum and gates.momentum is None:
        raise ValueError(f"algorithm={name}() needs gates.momentum; pass it, or use Descent()")
    if not memory.has_momentum and gates.momentum is not None:
        raise ValueError(f"gates.momentum was given but algorithm={name}() has no momentum; drop it, or use Momentum()")


def check_threshold(memory: AssociativeMemory, threshold: Tensor | None) -> None:
    """Thresholds of the tokens are there exactly if the objective takes them from there."""
    objective = memory.objective
    if needs_threshold(objective) and threshold is None:
        raise ValueError(
            f"{objective!r} has no constant threshold and needs one for every token; "
            "pass Gates(threshold=...), or make the objective with a constant one"
        )
    if not needs_threshold(objective) and threshold is not None:
        fix = "drop it, or make the objective with threshold=None"
        raise ValueError(
            f"thresholds were given but {objective!r} "
            + (f"has a constant one; {fix}" if isinstance(objective, ThresholdObjective) else "has none; drop them")
        )


def check_factors(
    memory: AssociativeMemory, state: State, factors: dict[str, Factor], gates: Gates, mask: Tensor | None = None
) -> None:
    """Factors of one chunk, of this memory's maps."""
    if set(factors) != set(state.params):
        raise ValueError(f"factors name the maps {sorted(factors)}, this memory has {sorted(state.params)}")
    tokens = gates.lr.shape[-1]
    if not 0 < tokens <= memory.chunk_size:
        raise ValueError(
            f"{tokens} tokens cannot be absorbed at one anchor with chunk_size={memory.chunk_size}. "
            "Call surprise and absorb once per chunk."
        )
    for name, (x, error) in factors.items():
        rows, columns = state.params[name].shape[-2:]
        if x.shape != (*gates.lr.shape, columns) or error.shape != (*gates.lr.shape, rows):
            raise ValueError(
                f"factor {name!r} has input {tuple(x.shape)} and error {tuple(error.shape)}, "
                f"expected {(*gates.lr.shape, columns)} and {(*gates.lr.shape, rows)}"
            )
    if mask is not None and (mask.shape != gates.lr.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be a bool tensor of shape {tuple(gates.lr.shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    check_momentum(memory, gates)
