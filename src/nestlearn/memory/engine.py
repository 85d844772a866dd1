"""The public functions of an associative memory: `scan`, `surprise`, `absorb`, `explain`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import chunked, reference
from .algorithms import Momentum
from .associative import AssociativeMemory, Read
from .layout import nobody, poisoned_from
from .retention import Delta
from .types import Factor, Gates, State, Weights

LARGEST_KEPT = 1.25
"""Products of 128 larger kept fractions leave the range of float32."""

Engine = Literal["auto", "reference", "chunked", "triton"]


def scan(
    memory: AssociativeMemory,
    state: State,
    q: Float[Tensor, "*b t d_key"],
    k: Float[Tensor, "*b t d_key"],
    v: Float[Tensor, "*b t d_value"],
    gates: Gates,
    *,
    mask: Bool[Tensor, "*b t"] | None = None,
    reset: Bool[Tensor, "*b t"] | None = None,
    engine: Engine = "auto",
    read: Read | None = None,
    return_state: bool = True,
) -> tuple[Float[Tensor, "*b t d_value"], State]:
    """Let a memory read t tokens: write every (key, value), answer every query.

        S_t = beta_t S_{t-1} - eta'_t e_t x_t^T,     W_t = retention(W_{t-1}) + S_t,     y_t = M_t(q_t)

    (NL Eq. 57, 88; Titans Eq. 9-14). ``scan(a)`` then ``scan(b)`` equals ``scan(a + b)`` for any split.

    Args:
        q, k, v: queries, keys, values. No scaling or normalization happens here.
        gates: step size, retention and momentum of every token, ``[*b, t]``.
        mask: False marks a token that changes nothing (padding); its output is 0.
        reset: True puts the row back to its initial state before that token.
        engine: ``reference`` (token loop), ``chunked``, ``triton`` (GPU kernels; raises where it cannot run),
            ``auto`` the fastest that can run.
        read: overrides the memory's own ``token`` or ``chunk`` read.
        return_state: False lets an engine skip the state after the last token; the returned one is then unspecified.

    Returns:
        Outputs in the dtype of q, and the state after the last token. A token whose key, value or gate is not
        finite (or absurd: beyond the cube root of the dtype's largest number; retain or momentum beyond 1.25) makes
        the outputs of its row NaN from there to the next reset, and never touches an earlier one.

    Raises:
        ValueError, TypeError: for shapes, dtypes or gates that do not fit.

    Example:
        >>> import torch
        >>> from nestlearn.memory import Gates, catalog, scan
        >>> memory = catalog["deltanet"]
        >>> k = torch.nn.functional.normalize(torch.randn(1, 5, 8), dim=-1)
        >>> gates = Gates(lr=torch.ones(1, 5), retain=torch.ones(1, 5))
        >>> y, state = scan(memory, memory.init_state((1,), 8, 8), k, k, k, gates)
        >>> torch.allclose(y, k, atol=1e-5)
        True
    """
    how = memory.read if read is None else read
    _check(memory, state, q, k, v, gates, mask, reset, how)
    if engine == "triton":
        raise ValueError("engine='triton' cannot run: this build has no Triton kernels. Use engine='auto'.")
    if engine not in ("auto", "reference", "chunked"):
        raise ValueError(f"unknown engine {engine!r}: use 'auto', 'reference', 'chunked' or 'triton'")
    # A state may come from a variant with larger chunks.
    state = state._replace(position=state.position % memory.chunk_size)
    compute = next(iter(state.params.values())).dtype
    out_dtype = q.dtype
    q, k, v = (x.to(compute) for x in (q, k, v))
    gates = gates.map(lambda g: g.to(compute))
    k, v, gates, poisoned = _quarantine(k, v, gates, mask, reset)
    if engine == "reference":
        y, end = reference.scan(memory, state, q, k, v, gates, mask, reset, how)
        aligned = state.aligned and mask is None and reset is None and q.shape[-2] % memory.chunk_size == 0
        end = end._replace(aligned=aligned)
    else:
        y, end = _scan_rows(memory, state, q, k, v, gates, mask, reset, how, return_state)
    if not nobody(poisoned):
        y, end = _spread(y, end, poisoned, mask)
    return y.to(out_dtype), end


def surprise(memory: AssociativeMemory, params: Weights, k: Tensor, v: Tensor) -> dict[str, Factor]:
    """The local surprise signal of every map: its input and the error ``d loss / d (W x)`` at weights ``params``.

    ``k: [*b, t, d_key]``, ``v: [*b, t, d_value]``, ``params[name]: [*b, out, in]``; the gradient of a map for token t
    is ``error_t input_t^T`` (NL Eq. 29-31).

    Example:
        >>> import torch
        >>> from nestlearn.memory import catalog, surprise
        >>> memory = catalog["ttt_linear"]
        >>> factors = surprise(memory, {"W": torch.zeros(4, 4)}, torch.ones(3, 4), torch.ones(3, 4))
        >>> factors["W"].error.tolist() == (-torch.ones(3, 4)).tolist()
        True
    """
    _check_maps(memory, params, k, v, k.shape[:-2])
    linear, adjoint = chunked.anchored(params, params, None)
    return memory.architecture.factors(linear, adjoint, k, v, memory.objective)


def absorb(memory: AssociativeMemory, state: State, factors: dict[str, Factor], gates: Gates) -> State:
    """Write the surprise of t tokens, all measured at ``state.anchor``, into the memory.

    The tokens must belong to one chunk: ``position + t <= chunk_size``. ``scan`` is ``surprise`` and ``absorb``
    chunk by chunk, with reads.

    Raises:
        ValueError: if t exceeds the chunk, or the factors do not fit the memory's maps.

    Example:
        >>> import torch
        >>> from nestlearn.memory import Gates, absorb, catalog, surprise
        >>> memory = catalog["ttt_linear"]
        >>> state = memory.init_state((), 4, 4)
        >>> factors = surprise(memory, state.anchor, torch.eye(4)[:3], torch.ones(3, 4))
        >>> state = absorb(memory, state, factors, Gates(lr=torch.ones(3), retain=torch.ones(3)))
        >>> state.params["W"].sum(0).tolist(), state.position.item()
        ([4.0, 4.0, 4.0, 0.0], 3)
    """
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
    _check_momentum(memory, gates)
    empty = next(iter(factors.values())).input
    span = chunked.Tokens(None, empty, empty, gates)
    kernels, starts, writes = chunked.absorb_span(memory, state, factors, span)
    end = chunked.advance_span(memory, state, kernels, starts, writes, None)
    position = (state.position + tokens) % memory.chunk_size
    finished = (position == 0)[..., None, None]
    anchor = {n: torch.where(finished, w, state.anchor[n]) for n, w in end.params.items()}
    aligned = state.aligned and tokens % memory.chunk_size == 0
    return end._replace(anchor=anchor, position=position, extra={}, aligned=aligned)


@dataclass(frozen=True)
class Explanation:
    """Which engine ``engine="auto"`` takes, and why."""

    engine: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"engine: {self.engine}\n" + "\n".join(f"- {reason}" for reason in self.reasons)


def explain(memory: AssociativeMemory) -> Explanation:
    """Say how ``scan`` will run this memory.

    Example:
        >>> from nestlearn.memory import catalog, explain
        >>> explain(catalog["hope"]).engine
        'chunked'
    """
    chunk = memory.chunk_size
    reasons = [
        "errors have a closed form, taken at the weights at the start of each chunk",
        f"{chunk} tokens a chunk: the recurrence inside runs as matrix products"
        + (" and one triangular solve per map" if isinstance(memory.retention, Delta) else ""),
    ]
    span = chunked.span_length(chunk, chunk)
    if span < chunk:
        reasons.append(f"a chunk is computed in {chunk // span} spans of {span} tokens that share its anchor")
    if isinstance(memory.algorithm, Momentum):
        reasons.append("momentum needs one more kernel, the product of both decays")
    reasons.append("a fresh state runs aligned; masks, resets and a state inside a chunk place tokens on a grid")
    reasons.append("no Triton kernel exists for this memory")
    return Explanation("chunked", tuple(reasons))


def _check(
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
    if how not in ("token", "chunk"):
        raise ValueError(f"read must be 'token' or 'chunk', got {how!r}")
    if q.dim() < 2 or q.shape[-2] == 0:
        raise ValueError(f"scan needs at least one token: q has shape {tuple(q.shape)}, expected [*b, t >= 1, d]")
    batch, tokens = q.shape[:-2], q.shape[-2]
    weights = next(iter(state.params.values()))
    if q.shape != k.shape or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must agree but for v's width")
    _check_maps(memory, state.params, k, v, batch)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
        if x.dtype == torch.float64 and weights.dtype != torch.float64:
            raise TypeError(
                f"{name} is float64 but the state is {weights.dtype}. "
                "Make the state with init_state(..., dtype=torch.float64), or pass float32 inputs."
            )
    _check_momentum(memory, gates)
    if isinstance(memory.algorithm, Momentum) and state.momentum is None:
        raise ValueError("this state was made without momentum; make it with this memory's init_state")
    for name, x in (*gates._asdict().items(), ("mask", mask), ("reset", reset)):
        if x is not None and x.shape != (*batch, tokens):
            raise ValueError(f"{name} must have shape {(*batch, tokens)}, got {tuple(x.shape)}")
    for name, x in (("mask", mask), ("reset", reset)):
        if x is not None and x.dtype != torch.bool:
            raise TypeError(f"{name} must be a bool tensor, got {x.dtype}")


def _check_maps(memory: AssociativeMemory, weights: Weights, k: Tensor, v: Tensor, batch: tuple[int, ...]) -> None:
    have = {name: tuple(w.shape) for name, w in weights.items()}
    for name, shape in memory.architecture.shapes(k.shape[-1], v.shape[-1]).items():
        if have.get(name) != (*batch, *shape):
            raise ValueError(
                f"the state does not fit: map {name!r} must be {(*batch, *shape)}, the state has {have}. "
                "Make it with memory.init_state(batch_shape, d_key, d_value)."
            )


def _check_momentum(memory: AssociativeMemory, gates: Gates) -> None:
    needed = isinstance(memory.algorithm, Momentum)
    if needed and gates.momentum is None:
        raise ValueError("algorithm=Momentum() needs gates.momentum; pass it, or use Descent()")
    if not needed and gates.momentum is not None:
        raise ValueError("gates.momentum was given but algorithm=Descent() has no momentum; drop it, or use Momentum()")


def _quarantine(
    k: Tensor, v: Tensor, gates: Gates, mask: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Gates, Tensor]:
    """Replace tokens that matrix products cannot hold by zeros, and say which outputs they poison.

    In a product over tokens a future NaN meets a zero coefficient and gives NaN in the past, which a loop would not.
    Values whose products over a span would overflow count as well.
    """
    # NaN compares False.
    bad = ~(k.abs() <= _limit(k)).all(-1) | ~(v.abs() <= _limit(v)).all(-1)
    for gate, limit in ((gates.lr, _limit(k)), (gates.retain, LARGEST_KEPT), (gates.momentum, LARGEST_KEPT)):
        if gate is not None:
            bad = bad | ~(gate.abs() <= limit)
    if mask is not None:
        bad = bad & mask
    clean = gates.map(lambda g: torch.where(bad, 0, g))
    k, v = (torch.where(bad[..., None], 0, x) for x in (k, v))
    return k, v, clean, poisoned_from(bad, mask, reset)


def _limit(x: Tensor) -> float:
    return torch.finfo(x.dtype).max ** (1 / 3)


def _spread(y: Tensor, end: State, poisoned: Tensor, mask: Tensor | None) -> tuple[Tensor, State]:
    """Make poisoned outputs and states NaN."""
    here = poisoned if mask is None else poisoned & mask
    lost = poisoned[..., -1, None, None]

    def spoil(weights: Weights) -> Weights:
        return {n: torch.where(lost, torch.nan, w) for n, w in weights.items()}

    momentum = None if end.momentum is None else spoil(end.momentum)
    end = end._replace(params=spoil(end.params), anchor=spoil(end.anchor), momentum=momentum)
    return torch.where(here[..., None], torch.nan, y), end


def _scan_rows(
    memory: AssociativeMemory,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    mask: Tensor | None,
    reset: Tensor | None,
    how: str,
    return_state: bool,
) -> tuple[Tensor, State]:
    """The chunked engine on any leading dimensions: it sees them as one."""
    batch = gates.lr.shape[:-1]

    def rows(x: Tensor) -> Tensor:
        return x.reshape(-1, *x.shape[len(batch) :])

    flat_mask, flat_reset = (None if flag is None else rows(flag) for flag in (mask, reset))
    flat_state, flat_gates = _flatten_state(state, len(batch)), gates.map(rows)
    y, end = chunked.scan(
        memory, flat_state, rows(q), rows(k), rows(v), flat_gates, flat_mask, flat_reset, how, return_state=return_state
    )
    return y.reshape((*batch, *y.shape[1:])), _unflatten_state(end, batch)


def _map_rows(state: State, change: Callable[[Tensor], Tensor]) -> State:
    def weights(group: Weights) -> Weights:
        return {n: change(w) for n, w in group.items()}

    return state._replace(
        params=weights(state.params),
        momentum=None if state.momentum is None else weights(state.momentum),
        anchor=weights(state.anchor),
        initial=weights(state.initial),
        position=change(state.position),
    )


def _flatten_state(state: State, leading: int) -> State:
    return _map_rows(state, lambda x: x.reshape(-1, *x.shape[leading:]))


def _unflatten_state(state: State, batch: tuple[int, ...]) -> State:
    return _map_rows(state, lambda x: x.reshape((*batch, *x.shape[1:])))
