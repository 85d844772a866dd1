"""The public functions of an associative memory: `scan`, `scan_with_sizes`, `surprise`, `absorb`, `explain`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import chunked, fla, reference, windowed
from .algorithms import Momentum
from .associative import AssociativeMemory, Read
from .checks import Engine, check_engine, check_factors, check_maps, check_scan, check_tensors, check_threshold
from .clock import Span, before_reset, beyond, choose, compaction, known_empty, poisoned_from
from .retention import erases
from .spans import explain_span, longest_span, open_span
from .types import Factor, Gates, State, Tokens, Weights

LARGEST_KEPT = 1.25
"""Products of 128 larger kept fractions leave the range of float32."""

# A module variable, since torch.compile reads it (a ContextVar it cannot), and the threads of a backward pass see it.
_engine: Engine = "auto"


def current_engine() -> Engine:
    """What ``engine="auto"`` means here."""
    return _engine


@contextmanager
def use_engine(engine: Engine) -> Iterator[None]:
    """What ``engine="auto"`` means inside this context, for `scan` and every layer, in all threads of the process.

    ``reference`` is the token loop, ``chunked`` runs everywhere, ``fla`` are the kernels of flash-linear-attention for
    matrix memories (they need CUDA and the extra ``gpu``; docs/gpu.md). ``auto``, the usual one, takes ``fla`` where it
    runs and ``chunked`` elsewhere.

    The backward pass of a model with gradient checkpointing computes parts of the forward pass again, so it belongs
    into the same context.

    Raises:
        ValueError: for an unknown engine.

    Example:
        >>> from nestlearn.memory import use_engine
        >>> from nestlearn.nn import MemoryMixerConfig
        >>> layer = MemoryMixerConfig("deltanet").build(16, num_heads=2)
        >>> x = torch.randn(1, 20, 16)
        >>> with use_engine("reference"):
        ...     y, _ = layer(x)
        >>> torch.allclose(y, layer(x)[0], atol=1e-5)
        True
    """
    global _engine
    check_engine(engine)
    before, _engine = _engine, engine
    try:
        yield
    finally:
        _engine = before


def scan(
    memory: AssociativeMemory,
    state: State | None,
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
        memory: what to run.
        state: from `AssociativeMemory.init_state` or an earlier call; None starts at ``initial``.
        q, k, v: queries, keys, values. No scaling or normalization happens here.
        gates: step size, retention and momentum of every token, ``[*b, t]``.
        initial: the weights ``{map: [*b, out, in]}`` (or broadcastable) that a reset and ``retain_to="initial"`` go
            back to. None is zeros for a matrix; an MLP, which starts at random, needs ``init_state(...).params``.
        mask: False marks a token that changes nothing (padding); its output is 0.
        reset: True puts the row back to its initial state before that token.
        engine: ``reference`` (token loop), ``chunked``, ``fla`` (CUDA kernels) or ``auto``; see `use_engine`.
        read: overrides the memory's own ``token`` or ``chunk`` read.
        return_state: False lets an engine skip the state after the last token; the returned one is then unspecified.

    Returns:
        Outputs in the dtype of q, and the state after the last token. A key, value or gate that is not finite (or
        beyond the cube root of the dtype's largest number; retain or momentum beyond 1.25) makes the outputs of its
        row NaN from there to the next reset, and never touches an earlier one or another row. Gates under which the
        recurrence itself expands beyond the dtype's range are the caller's to avoid.

    Raises:
        ValueError, TypeError: shapes, dtypes or gates that do not fit. RuntimeError: ``fla`` where it cannot run.

    Example:
        >>> from nestlearn.memory import Gates, catalog, scan
        >>> memory = catalog["deltanet"]
        >>> k = torch.nn.functional.normalize(torch.randn(1, 5, 8), dim=-1)
        >>> gates = Gates(lr=torch.ones(1, 5), retain=torch.ones(1, 5))
        >>> y, state = scan(memory, None, k, k, k, gates)
        >>> torch.allclose(y, k, atol=1e-5)
        True
    """
    how = memory.read if read is None else read
    tokens, fresh = Tokens(q, k, v, gates, mask, reset), state is None
    state = _checked(memory, state, tokens, initial, how)
    chosen = _choose(engine, memory, k, state, restarts=reset is not None and initial is not None)
    y, end = _scan(memory, state, tokens, initial, how, chosen, fresh, return_state)
    return y.to(q.dtype), end


def _choose(engine: Engine, memory: AssociativeMemory, k: Tensor, state: State, *, restarts: bool) -> Engine:
    """The engine of a call, never ``auto``. ``restarts``: resets bring weights back that may differ from zero."""
    check_engine(engine)
    engine = current_engine() if engine == "auto" else engine
    if engine in ("reference", "chunked"):
        return engine
    if engine == "auto" and not k.is_cuda:
        return "chunked"
    reason = fla.refusal(memory, k, state, restarts=restarts and memory.retain_to == "zero")
    if reason is None:
        return "fla"
    if engine == "fla":
        raise RuntimeError(f"engine='fla' cannot run this call: {reason}")
    return "chunked"


def span_solver(memory: AssociativeMemory, like: Tensor, state: State, *, restarts: bool) -> chunked.Solve:
    """How a layer that runs spans of its own solves them: by the engine in force, see `use_engine`.

    ``like`` has the device of the tokens and the width of keys; ``restarts``: whether rows are reset. The token loop
    knows no spans, so ``reference`` means ``chunked`` here.
    """
    return fla.open_kernel if _choose("auto", memory, like, state, restarts=restarts) == "fla" else open_span


def scan_with_sizes(
    memory: AssociativeMemory,
    state: State | None,
    q: Float[Tensor, "*b t d_key"],
    k: Float[Tensor, "*b t d_key"],
    v: Float[Tensor, "*b t d_value"],
    gates: Gates,
    *,
    initial: Weights | None = None,
    mask: Bool[Tensor, "*b t"] | None = None,
    reset: Bool[Tensor, "*b t"] | None = None,
    return_state: bool = True,
) -> tuple[Float[Tensor, "*b t d_value"], State, Float[Tensor, "*b t"]]:
    """`scan`, and how much each token changed the memory: ``‖p_t‖`` of its write ``p_t k_t^T``.

    Under the delta rule ``p_t = eta_t (v_t - W_{t-1} k_t)`` for the dot-product objective: the step times what the
    memory did not know of the value yet. It is 0 at masked tokens, NaN where outputs are, and passes no gradient.
    The engine is always ``chunked``: the others do not tell it.

    Raises:
        ValueError: a memory whose writes are not of this form (`has_write_sizes`), and as `scan`.

    Example:
        >>> from nestlearn.memory import Gates, catalog
        >>> k = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # the second token brings nothing new
        >>> gates = Gates(lr=torch.ones(2), retain=torch.ones(2))
        >>> scan_with_sizes(catalog["deltanet"], None, k, k, 3 * k, gates)[2]
        tensor([3., 0.])
    """
    if not has_write_sizes(memory):
        raise ValueError(
            f"{memory!r} has no size of a single write; it needs Matrix(), Delta() retention and Descent(), as "
            'catalog["deltanet"] and catalog["gated_deltanet"] have.'
        )
    tokens, fresh = Tokens(q, k, v, gates, mask, reset), state is None
    state = _checked(memory, state, tokens, initial, memory.read)
    y, end = _scan(memory, state, tokens, initial, memory.read, "chunked", fresh, return_state, sizes=True)
    return y[..., :-1].to(q.dtype), end, y[..., -1]


def has_write_sizes(memory: AssociativeMemory) -> bool:
    """Whether `scan_with_sizes` can run the memory: one matrix under the delta rule, without momentum."""
    return chunked.is_plain_delta(memory) and memory.window == 1


def _checked(
    memory: AssociativeMemory, state: State | None, tokens: Tokens, initial: Weights | None, read_mode: str
) -> State:
    """The state of a call, a fresh one for None, after the checks of its arguments."""
    q, k, v, gates, mask, reset = tokens
    check_tensors(q=q, k=k, v=v)
    state = _start(memory, initial, q, k, v) if state is None else state
    check_scan(memory, state, q, k, v, gates, mask, reset, read_mode)
    return state


def _scan(
    memory: AssociativeMemory,
    state: State,
    tokens: Tokens,
    initial: Weights | None,
    read_mode: str,
    engine: str,
    fresh: bool,
    keep: bool,
    sizes: bool = False,
) -> tuple[Tensor, State]:
    """`scan` of checked arguments: what is not finite is taken out, and put back where it belongs.

    ``sizes``: outputs have one more column, as in `chunked.run`.
    """
    reset, mask = tokens.reset, tokens.mask
    whole = memory.full_initial(initial, state.params, needed=reset is not None or memory.retain_to == "initial")
    # A state may come from a variant with larger chunks.
    state, broken = chunked.reset_nonfinite(state._replace(position=state.position % memory.chunk_size), whole, reset)
    q = tokens.q
    tokens, poisoned = _admit(tokens, next(iter(state.params.values())).dtype, broken)
    outer, recent = memory, None
    if memory.window > 1:
        memory, state, tokens, recent = windowed.expand(memory, state, tokens)
        q = tokens.q if engine != "fla" else q.repeat_interleave(outer.window, -2)
    if engine == "reference":
        y, end = reference.scan(memory, state, tokens, whole, read_mode)
    else:
        run = partial(chunked.run, sizes=True) if sizes else chunked.run
        if engine == "fla":
            # The dtype of q is that of the kernel's products.
            run, tokens = fla.run, tokens._replace(q=q)
        y, end = _run_rows(run, memory, state, tokens, whole, read_mode, fresh, keep)
    if recent is not None:
        y, end = windowed.collapse(outer, y, end, recent)
    return (y, end) if known_empty(poisoned) else _spread(y, end, poisoned, mask)


def _run_rows(
    run: Callable[..., tuple[Tensor, State]],
    memory: AssociativeMemory,
    state: State,
    tokens: Tokens,
    initial: Weights,
    read_mode: str,
    fresh: bool,
    keep: bool,
) -> tuple[Tensor, State]:
    """A fast engine on any leading dimensions: it sees them as one."""
    batch = state.position.shape
    rows, whole = state.flatten(len(batch)), {name: _flat(w, len(batch)) for name, w in initial.items()}
    flat = tokens.map(lambda x: _flat(x, len(batch)))
    y, end = run(memory, rows, flat, whole, read_mode=read_mode, fresh=fresh, return_state=keep)
    return y.reshape((*batch, *y.shape[1:])), end.unflatten(batch)


def _start(memory: AssociativeMemory, initial: Weights | None, q: Tensor, k: Tensor, v: Tensor) -> State:
    """A fresh state for these tokens."""
    known = {} if initial is None else initial
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    dtype = next((w.dtype for w in known.values()), dtype)
    shapes = memory.architecture.shapes(k.shape[-1], v.shape[-1])
    like = {name: k.new_zeros((), dtype=dtype).expand(*k.shape[:-2], *shape) for name, shape in shapes.items()}
    return memory.begin(memory.full_initial(initial, like, needed=True))


def surprise(
    memory: AssociativeMemory,
    params: Weights,
    k: Float[Tensor, "*b t d_key"],
    v: Float[Tensor, "*b t d_value"],
    threshold: Float[Tensor, "*b t"] | None = None,
) -> dict[str, Factor]:
    """The local surprise signal of every map: its input and the error ``d loss / d (W x)`` at weights ``params``.

    ``params[name]: [*b, out, in]`` (accumulators, where the retention is a mirror map); the gradient of a map for
    token t is ``error_t input_t^T`` (NL Eq. 29-31). ``threshold`` as in `Gates`, for objectives that need it. Proximal
    steps without delta retention divide errors by the curvature of their model (`nestlearn.memory.proximal`).

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
    linear, adjoint = chunked.at_anchor(chunked.seen_weights(memory, params), {}, None)
    return chunked.find_factors(memory, linear, adjoint, k, v, threshold)


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
    if memory.window > 1:
        raise ValueError(f"window={memory.window} writes tokens of earlier chunks again; use scan, or window=1.")
    shape, tokens = state.position.shape, gates.lr.shape[-1]
    initial = memory.full_initial(initial, state.params, needed=memory.retain_to == "initial")

    def flat(x: Tensor) -> Tensor:
        return _flat(x, len(shape))

    valid = None
    if mask is not None:
        # Tokens that count come first, as spans want them.
        order, count = compaction(flat(mask))
        valid = torch.arange(tokens, device=mask.device) < count[:, None]
        row = torch.arange(len(order), device=mask.device)[:, None]
        factors = {
            n: Factor(*(torch.where(valid[..., None], flat(x)[row, order], 0) for x in f)) for n, f in factors.items()
        }
        gates = _neutral(gates.map(lambda gate: flat(gate)[row, order]), valid)
    else:
        factors, gates = {n: Factor(*map(flat, f)) for n, f in factors.items()}, gates.map(flat)
    rows = state.flatten(len(shape))
    span = Span(0 if state.aligned and valid is None else rows.position, tokens, memory.chunk_size, valid)
    there = {name: flat(w) for name, w in initial.items()}
    return chunked.write_rows(memory, rows, factors, gates, there, span=span).unflatten(shape)


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
        + (" and one triangular solve per map" if memory.follows_weights or erases(memory.retention) else ""),
    ]
    span = longest_span(memory, chunk, memory.read)
    if span < chunk:
        reasons.append(f"a chunk is computed in {-(-chunk // span)} spans of {span} tokens that share its anchor")
    reasons.extend(explain_span(memory))
    if memory.window > 1:
        reasons.append(f"every token writes the last {memory.window} tokens: that many tokens for one")
    if memory.follows_weights:
        reasons.append("proximal steps: errors follow the weights within a chunk, by one more product per map")
    if chunked.changes_at_close(memory.retention):
        reasons.append(f"{type(memory.retention).__name__} changes the accumulators when a chunk ends")
    if isinstance(memory.algorithm, Momentum):
        reasons.append("momentum needs one more kernel, the product of both decays")
    reason = fla.lacks_kernel(memory)
    if reason is None:
        reasons.append("on CUDA, with the extra gpu, flash-linear-attention's kernels run it: engine='fla'")
    else:
        reasons.append(f"engine='fla' has no kernel for it: {reason}")
    reasons.append("a fresh state runs aligned; masks, resets and a state inside a chunk place tokens on a grid")
    return Explanation("chunked", tuple(reasons))


def _admit(tokens: Tokens, dtype: torch.dtype, broken: Tensor | None) -> tuple[Tokens, Tensor]:
    """Tokens in the dtype of the weights, those that matrix products cannot hold as zeros, and which they poison.

    In a product over tokens a future NaN meets a zero coefficient and gives NaN in the past, which a loop would not.
    Values whose products over a span would overflow count as well. ``broken`` rows are poisoned up to their reset.
    """
    q, k, v, gates, mask, reset = tokens
    k, v, gates = k.to(dtype), v.to(dtype), gates.map(lambda g: g.to(dtype))
    limit = torch.finfo(dtype).max ** (1 / 3)
    bad = beyond(k, limit) | beyond(v, limit)
    for gate, largest in zip(gates, (limit, LARGEST_KEPT, LARGEST_KEPT, limit), strict=True):
        if gate is not None:
            bad = bad | beyond(gate.unsqueeze(-1) if gate.dim() == bad.dim() else gate, largest)
    bad = bad if mask is None else bad & mask
    if not known_empty(bad):
        gates = gates.map(lambda g: torch.where(bad if g.dim() == bad.dim() else bad.unsqueeze(-1), 0, g))
        k, v = (torch.where(bad[..., None], 0, x) for x in (k, v))
    poisoned = poisoned_from(bad, mask, reset)
    if broken is not None and reset is not None:
        poisoned = poisoned | (broken.unsqueeze(-1) & before_reset(mask, reset))
    return Tokens(q.to(dtype), k, v, gates, mask, reset), poisoned


def _spread(y: Tensor, end: State, poisoned: Tensor, mask: Tensor | None) -> tuple[Tensor, State]:
    """Make poisoned outputs and states NaN."""
    here = poisoned if mask is None else poisoned & mask

    def spoil(weights: Weights) -> Weights:
        return choose(poisoned[..., -1], {n: torch.full_like(w, torch.nan) for n, w in weights.items()}, weights)

    momentum = None if end.momentum is None else spoil(end.momentum)
    end = end._replace(params=spoil(end.params), anchor=spoil(end.anchor), momentum=momentum)
    return torch.where(here[..., None], torch.nan, y), end


def _flat(x: Tensor, leading: int) -> Tensor:
    return x.reshape(-1, *x.shape[leading:])
