"""The public functions of an associative memory: `scan`, `surprise`, `absorb`, `explain`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import chunked, general, reference
from .algorithms import Momentum
from .associative import AssociativeMemory, Read
from .checks import Engine, check_engine, check_factors, check_maps, check_scan, check_threshold
from .clock import known_empty, poisoned_from
from .objectives import with_threshold
from .retention import Delta
from .types import Factor, Gates, Running, State, Weights

LARGEST_KEPT = 1.25
"""Products of 128 larger kept fractions leave the range of float32."""


def scan(
    memory: AssociativeMemory,
    state: State,
    q: Float[Tensor, "*b t d_key"],
    k: Float[Tensor, "*b t d_key"],
    v: Float[Tensor, "*b t d_value"],
    gates: Gates,
    *,
    initial: Weights | None = None,
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
        initial: the weights ``{map: [*b, out, in]}`` (or broadcastable) that a reset and ``retain_to="initial"`` go
            back to. None is zeros for a matrix; an MLP, which starts at random, needs ``init_state(...).params``.
        mask: False marks a token that changes nothing (padding); its output is 0.
        reset: True puts the row back to its initial state before that token.
        engine: ``reference`` (token loop), ``chunked``, or ``auto``, the fastest.
        read: overrides the memory's own ``token`` or ``chunk`` read.
        return_state: False lets an engine skip the state after the last token; the returned one is then unspecified.

    Returns:
        Outputs in the dtype of q, and the state after the last token. A key, value or gate that is not finite (or
        beyond the cube root of the dtype's largest number; retain or momentum beyond 1.25) makes the outputs of its
        row NaN from there to the next reset, and never touches an earlier one.

    Raises:
        ValueError, TypeError: for shapes, dtypes or gates that do not fit.

    Example:
        >>> from nestlearn.memory import Gates, catalog, scan
        >>> memory = catalog["deltanet"]
        >>> k = torch.nn.functional.normalize(torch.randn(1, 5, 8), dim=-1)
        >>> gates = Gates(lr=torch.ones(1, 5), retain=torch.ones(1, 5))
        >>> y, state = scan(memory, memory.init_state((1,), 8, 8), k, k, k, gates)
        >>> torch.allclose(y, k, atol=1e-5)
        True
    """
    how = memory.read if read is None else read
    check_engine(engine)
    check_scan(memory, state, q, k, v, gates, mask, reset, how)
    compute, out_dtype = next(iter(state.params.values())).dtype, q.dtype
    q, k, v, gates = q.to(compute), k.to(compute), v.to(compute), gates.map(lambda g: g.to(compute))
    k, v, gates, poisoned = _quarantine(k, v, gates, mask, reset)
    run = _scan_loop if engine == "reference" else _scan_rows
    y, end = run(memory, _begin(memory, state, initial, reset), q, k, v, gates, mask, reset, how, return_state)
    if not known_empty(poisoned):
        y, end = _spread(y, end, poisoned, mask)
    return y.to(out_dtype), end.state()


def _begin(memory: AssociativeMemory, state: State, initial: Weights | None, reset: Tensor | None) -> Running:
    """The state with the weights that resets and retention go back to."""
    full = memory.full_initial(initial, state, reset is not None or memory.retain_to == "initial")
    # A state may come from a variant with larger chunks.
    return Running.of(state._replace(position=state.position % memory.chunk_size), full)


def surprise(
    memory: AssociativeMemory,
    params: Weights,
    k: Float[Tensor, "*b t d_key"],
    v: Float[Tensor, "*b t d_value"],
    threshold: Float[Tensor, "*b t"] | None = None,
) -> dict[str, Factor]:
    """The local surprise signal of every map: its input and the error ``d loss / d (W x)`` at weights ``params``.

    ``params[name]: [*b, out, in]`` (accumulators, where the retention is a mirror map); the gradient of a map for
    token t is ``error_t input_t^T`` (NL Eq. 29-31). ``threshold`` as in `Gates`, for objectives that need it.

    Example:
        >>> import torch
        >>> from nestlearn.memory import catalog, surprise
        >>> memory = catalog["ttt_linear"]
        >>> factors = surprise(memory, {"W": torch.zeros(4, 4)}, torch.ones(3, 4), torch.ones(3, 4))
        >>> factors["W"].error.tolist() == (-torch.ones(3, 4)).tolist()
        True
    """
    check_maps(memory, params, k, v, k.shape[:-2])
    check_threshold(memory, threshold)
    weights = {name: memory.retention.anchored(a) for name, a in params.items()}
    linear, adjoint = chunked.anchored(weights, weights, None)
    return memory.architecture.factors(linear, adjoint, k, v, with_threshold(memory.objective, threshold))


def absorb(
    memory: AssociativeMemory,
    state: State,
    factors: dict[str, Factor],
    gates: Gates,
    *,
    initial: Weights | None = None,
    mask: Bool[Tensor, "*b t"] | None = None,
) -> State:
    """Write the surprise of t tokens, all measured at ``state.anchor``, into the memory.

    The tokens of a row must belong to one chunk: ``position + t <= chunk_size``. ``scan`` is ``surprise`` and
    ``absorb`` chunk by chunk, with reads. ``mask`` is False at tokens that change nothing (padding), wherever they are.
    ``initial``: the weights that ``retain_to="initial"`` keeps toward, as in `scan`.

    Raises:
        ValueError: if t exceeds the chunk, or the factors or the mask do not fit.

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
    check_factors(memory, state, factors, gates, mask)
    tokens = gates.lr.shape[-1]
    if mask is not None:
        factors = {name: Factor(*(torch.where(mask[..., None], x, 0) for x in f)) for name, f in factors.items()}
        gates = _neutral(gates, mask)
    count = tokens if mask is None else mask.sum(-1)
    position = (state.position + count) % memory.chunk_size
    finished = position == 0 if mask is None else (position == 0) & mask.any(-1)
    begin = Running.of(state, memory.full_initial(initial, state, memory.retain_to == "initial"))
    if memory.is_plain:
        empty = next(iter(factors.values())).input
        span = chunked.Tokens(None, empty, empty, gates, mask)
        kernels, starts, writes = chunked.absorb_span(memory, begin, factors, span)
        end = chunked.advance_span(memory, begin, kernels, starts, writes, mask)
    else:
        leading = position.dim()
        rows = _flatten_state(begin, leading)
        flat = {name: Factor(*(_flat(x, leading) for x in factor)) for name, factor in factors.items()}
        flat_gates, flat_mask = gates.map(lambda g: _flat(g, leading)), None if mask is None else _flat(mask, leading)
        end = general.absorb_span(memory, rows, flat, flat_gates, finished.reshape(-1), flat_mask)
        end = _unflatten_state(end, position.shape)
    anchor = {n: torch.where(finished[..., None, None], w, state.anchor[n]) for n, w in end.params.items()}
    aligned = state.aligned and mask is None and tokens % memory.chunk_size == 0
    return end.state()._replace(anchor=anchor, position=position, aligned=aligned)


def _neutral(gates: Gates, mask: Tensor) -> Gates:
    """Gates that change nothing at masked tokens."""

    def fill(gate: Tensor | None, value: float) -> Tensor | None:
        if gate is None:
            return None
        return torch.where(mask if gate.dim() == mask.dim() else mask.unsqueeze(-1), gate, value)

    return Gates(*(fill(gate, value) for gate, value in zip(gates, (0, 1, 1, 0), strict=True)))  # type: ignore[arg-type]


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
    if not memory.is_plain:
        reasons.extend(general.explain_general(memory))
    if isinstance(memory.algorithm, Momentum):
        reasons.append("momentum needs one more kernel, the product of both decays")
    reasons.append("a fresh state runs aligned; masks, resets and a state inside a chunk place tokens on a grid")
    return Explanation("chunked", tuple(reasons))


def _quarantine(
    k: Tensor, v: Tensor, gates: Gates, mask: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Gates, Tensor]:
    """Replace tokens that matrix products cannot hold by zeros, and say which outputs they poison.

    In a product over tokens a future NaN meets a zero coefficient and gives NaN in the past, which a loop would not.
    Values whose products over a span would overflow count as well.
    """
    # NaN compares False.
    bad = ~(k.abs() <= _limit(k)).all(-1) | ~(v.abs() <= _limit(v)).all(-1)
    for gate, limit in zip(gates, (_limit(k), LARGEST_KEPT, LARGEST_KEPT, _limit(k)), strict=True):
        if gate is not None:
            here = gate.abs() <= limit
            bad = bad | ~(here if here.dim() == bad.dim() else here.all(-1))
    if mask is not None:
        bad = bad & mask
    clean = gates.map(lambda g: torch.where(bad if g.dim() == bad.dim() else bad.unsqueeze(-1), 0, g))
    k, v = (torch.where(bad[..., None], 0, x) for x in (k, v))
    return k, v, clean, poisoned_from(bad, mask, reset)


def _limit(x: Tensor) -> float:
    return torch.finfo(x.dtype).max ** (1 / 3)


def _spread(y: Tensor, end: Running, poisoned: Tensor, mask: Tensor | None) -> tuple[Tensor, Running]:
    """Make poisoned outputs and states NaN."""
    here = poisoned if mask is None else poisoned & mask
    lost = poisoned[..., -1, None, None]

    def spoil(weights: Weights) -> Weights:
        return {n: torch.where(lost, torch.nan, w) for n, w in weights.items()}

    momentum = None if end.momentum is None else spoil(end.momentum)
    end = end._replace(params=spoil(end.params), anchor=spoil(end.anchor), momentum=momentum)
    return torch.where(here[..., None], torch.nan, y), end


def _scan_loop(
    memory: AssociativeMemory,
    state: Running,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    mask: Tensor | None,
    reset: Tensor | None,
    how: str,
    return_state: bool,
) -> tuple[Tensor, Running]:
    """The reference engine; it has the state at hand whether anybody asks for it or not."""
    y, end = reference.scan(memory, state, q, k, v, gates, mask, reset, how)
    aligned = state.aligned and mask is None and reset is None and q.shape[-2] % memory.chunk_size == 0
    return y, end._replace(aligned=aligned)


def _scan_rows(
    memory: AssociativeMemory,
    state: Running,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    mask: Tensor | None,
    reset: Tensor | None,
    how: str,
    return_state: bool,
) -> tuple[Tensor, Running]:
    """The chunked engine on any leading dimensions: it sees them as one."""
    batch = gates.lr.shape[:-1]

    def rows(x: Tensor) -> Tensor:
        return x.reshape(-1, *x.shape[len(batch) :])

    flat_mask, flat_reset = (None if flag is None else rows(flag) for flag in (mask, reset))
    flat_state, flat_gates = _flatten_state(state, len(batch)), gates.map(rows)
    run = chunked.scan if memory.is_plain else general.scan
    y, end = run(
        memory, flat_state, rows(q), rows(k), rows(v), flat_gates, flat_mask, flat_reset, how, return_state=return_state
    )
    return y.reshape((*batch, *y.shape[1:])), _unflatten_state(end, batch)


def _map_rows(state: Running, change: Callable[[Tensor], Tensor]) -> Running:
    def weights(group: Weights) -> Weights:
        return {n: change(w) for n, w in group.items()}

    return state._replace(
        params=weights(state.params),
        momentum=None if state.momentum is None else weights(state.momentum),
        anchor=weights(state.anchor),
        initial=weights(state.initial),
        position=change(state.position),
        pending=None if state.pending is None else change(state.pending),
    )


def _flat(x: Tensor, leading: int) -> Tensor:
    return x.reshape(-1, *x.shape[leading:])


def _flatten_state(state: Running, leading: int) -> Running:
    return _map_rows(state, lambda x: _flat(x, leading))


def _unflatten_state(state: Running, batch: tuple[int, ...]) -> Running:
    return _map_rows(state, lambda x: x.reshape((*batch, *x.shape[1:])))
