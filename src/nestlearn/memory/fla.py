"""The engine of flash-linear-attention (fla): matrix memories on its Triton kernels.

A span of a matrix memory is one call of a kernel. With eta' the step, e the error at the anchor and alpha the
retention, both relative to what retention pulls toward, ``W_t = alpha_t W_{t-1} - eta'_t W_{t-1} k k^T - eta'_t e k^T``
is

    Decay           chunk_simple_gla          decay alpha,  value -eta' e
    Delta           chunk_gated_delta_rule    decay alpha,  beta = eta' / alpha,  value -alpha e
    Delta(gated)    chunk_gated_delta_rule    decay alpha,  beta = eta',          value -e

since the kernel computes ``S_t = alpha_t S_{t-1} (I - beta_t k k^T) + beta_t v k^T``. A memory with given values and
the dot-product objective needs no anchor: all its tokens are one span. Products run in bfloat16 where q has that
dtype, else in float32 (as TF32, unless the environment has ``TRITON_F32_DEFAULT=ieee``); state and gates in float32.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import chunked
from .algorithms import Descent
from .architectures import Matrix
from .associative import AssociativeMemory
from .clock import Span, choose
from .objectives import DotProduct
from .retention import Delta, Oja, is_linear, is_per_channel
from .spans import Opened, Running, Update
from .spans.delta import step_size
from .types import Gates, State, Tokens, Weights

WIDEST_KEY = 256
"""Widest keys of fla's delta rule."""

SMALLEST = 1e-30
"""Retention gates are at least this, since the kernels take their logarithms. A product of two is 0 in float32."""

FEW_TOKENS = 16
"""Without gradients, so few tokens go to the kernels that loop over tokens; the others fill a block of 64."""

INSTALL = "pip install 'nestlearn[gpu]'"


def lacks_kernel(memory: AssociativeMemory) -> str | None:
    """Why fla has no kernel for a memory; None if it has one."""
    if type(memory.architecture) is not Matrix:
        return f"its architecture is {memory.architecture!r}, and the kernels hold matrices"
    if type(memory.algorithm) is not Descent:
        return f"its algorithm is {memory.algorithm!r}, and the kernels know Descent()"
    retention = memory.retention
    if not is_linear(retention) or is_per_channel(retention) or isinstance(retention, Oja):
        return f"its retention is {retention!r}, and the kernels know Decay() and Delta()"
    if memory.follows_weights:
        return "its proximal steps let errors follow the weights within a chunk"
    return None


def refusal(memory: AssociativeMemory, k: Tensor, state: State, *, restarts: bool) -> str | None:
    """Why this call cannot run here, with the usual fix; None if it can.

    ``restarts``: resets bring initial weights back that may differ from what retention pulls toward.
    """
    reason = lacks_kernel(memory)
    if reason is not None:
        from .catalog import catalog

        known = ", ".join(name for name, other in catalog.items() if lacks_kernel(other) is None)
        return f"this memory has no kernel there: {reason}. Of the catalog {known} have one; use engine='chunked'."
    if next(iter(state.params.values())).dtype == torch.float64:
        return "its kernels compute in float32, but the state is float64. Use engine='chunked', or a float32 state."
    if isinstance(memory.retention, Delta) and k.shape[-1] > WIDEST_KEY:
        return f"its delta rule takes keys of at most {WIDEST_KEY} entries, got {k.shape[-1]}. Use engine='chunked'."
    if restarts:
        return (
            "its kernels forget at a reset, but cannot bring initial weights back. "
            "Use engine='chunked', leave initial= out, or a memory with retain_to='initial'."
        )
    if torch._C._are_functorch_transforms_active():
        return "its kernels know no torch.func transforms. Use engine='chunked'."
    if not _installed():
        return f"the package flash-linear-attention is missing. Install it with {INSTALL}, or use engine='chunked'."
    if not k.is_cuda and not interpreted():
        return (
            f"its kernels need a CUDA device, but the tokens are on {k.device}. Move tokens and state to 'cuda', "
            "or use engine='auto', which takes these kernels where they run."
        )
    return None


@cache
def _installed() -> bool:
    return find_spec("fla") is not None and find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU, as the tests let it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def run(
    memory: AssociativeMemory,
    state: State,
    tokens: Tokens,
    initial: Weights,
    *,
    read_mode: str,
    fresh: bool = False,
    return_state: bool = True,
) -> tuple[Tensor, State]:
    """`chunked.run` with every span solved by a kernel. Tokens of rows ``[b, t, d]``; q may be of a narrower dtype."""
    count, chunk = tokens.k.shape[1], memory.chunk_size
    one_span = read_mode == "token" and type(memory.objective) is DotProduct and memory.values == "given"
    plain = tokens.mask is None and tokens.reset is None
    if not (one_span and (not return_state or (plain and (state.aligned or count == 1)))):
        return chunked.run(
            memory,
            state,
            tokens,
            initial,
            read_mode=read_mode,
            fresh=fresh,
            return_state=return_state,
            solve=open_kernel,
        )
    if not return_state:
        now = chunked.enter(memory, state, initial, fresh=fresh)
        return _read(memory, now, _masked(tokens), update=False)[0], state
    # The state holds the weights at the start of the chunk: up to there in one call, and the rest in another.
    now = chunked.enter(memory, state, initial, fresh=fresh)
    whole = count // chunk * chunk if state.aligned else 0
    outputs = []
    for part in (tokens.map(lambda x: x[:, :whole]), tokens.map(lambda x: x[:, whole:])):
        if part.k.shape[1] == 0:
            continue
        begins = True if state.aligned else state.position == 0
        now = now._replace(anchor=choose(begins, now.params(), now.anchor))
        y, now = _read(memory, now, part, update=True)
        outputs.append(y)
    position = (state.position + count) % chunk
    return torch.cat(outputs, 1), chunked.leave(now, position, state.aligned and count == whole)


def _masked(tokens: Tokens) -> Tokens:
    """Masked tokens as such that write nothing and keep everything; they may hold anything."""
    mask = tokens.mask
    if mask is None:
        return tokens
    q, k, v = (torch.where(mask.unsqueeze(-1), x, 0) for x in tokens[:3])
    lr, retain = tokens.gates.lr, tokens.gates.retain
    gates = Gates(torch.where(mask, lr, 0), torch.where(mask, retain, 1))
    return Tokens(q, k, v, gates, mask, None if tokens.reset is None else tokens.reset & mask)


def _read(memory: AssociativeMemory, now: Running, tokens: Tokens, *, update: bool) -> tuple[Tensor, Running]:
    """All tokens as one span."""
    q, k, v, gates, mask, reset = tokens
    count = k.shape[1]
    span = Span(1, count, count + 2, None, reset)  # neither begins nor ends a chunk
    y, now = chunked.run_span(memory, now, span, q, k, v, gates, "token", update, None, open_kernel)
    return y if mask is None else torch.where(mask.unsqueeze(-1), y, 0), now


def open_kernel(memory: AssociativeMemory, run: Running, update: Update) -> Opened:
    """A span by one call of a kernel, which gives what is read and the weights after it together."""
    (name, (x, error)), gates = next(iter(update.factors.items())), update.gates
    start = run.entering(name, update.reset)
    eta = step_size(memory.step_size_of(name), gates.lr, gates.retain, x)
    decay = retain = gates.retain.clamp(min=SMALLEST)
    if update.reset is not None:
        # What stands before a reset is neither kept nor erased from: beta is that of a gate of 1.
        decay, retain = torch.where(update.reset, SMALLEST, decay), torch.where(update.reset, 1, retain)
    if not isinstance(memory.retention, Delta):
        call = Call(x, -eta.unsqueeze(-1) * error, decay.log(), None)
    elif memory.retention.gated:
        call = Call(x, -error, decay.log(), eta)
    else:
        call = Call(x, -retain.unsqueeze(-1) * error, decay.log(), eta / retain)
    found: list[Tensor] = []

    def read(_: str, q: Tensor) -> Tensor:
        y, end = call.run(q, start.weights)
        found.append(end)
        return y if start.base is None else y + (q.to(start.base.dtype) @ start.base.mT).to(y.dtype)

    def advance() -> Running:
        if not found:
            read(name, x)
        return run._replace(weights={name: found[0]})

    return Opened(read, advance)


class Call(NamedTuple):
    """The arguments of a kernel: k, v ``[b, t, d]``, log decay and beta ``[b, t]`` (None: nothing is erased)."""

    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor | None

    def run(self, q: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """What q reads, in the dtype of the keys, and the weights ``[b, out, in]`` after the last token."""
        narrow = q.dtype if q.dtype == torch.bfloat16 else self.k.dtype
        wide = {"g": self.log_decay, "beta": self.beta}
        inputs = {"q": q.to(narrow), "k": self.k.to(narrow), "v": self.v.to(narrow), **wide}
        inputs = {name: x.unsqueeze(2) for name, x in inputs.items() if x is not None}  # one head a row
        if weights is not None:
            inputs["initial_state"] = weights.unsqueeze(1)
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in inputs.values())
        if trained:
            inputs = {name: FirstOrder.apply(x) for name, x in inputs.items()}
        kernel = _kernel(self.beta is not None, few=q.shape[1] <= FEW_TOKENS and not trained)
        y, end = kernel(**inputs, scale=1.0, output_final_state=True, state_v_first=True)
        return y.squeeze(2).to(self.k.dtype), end.squeeze(1)


class FirstOrder(torch.autograd.Function):
    """The identity. A gradient of the gradient, which the kernels would leave out without a word, raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the kernels of flash-linear-attention have no second derivative, but create_graph=True asks for one. "
                "Run the forward pass under nestlearn.memory.use_engine('chunked')."
            )
        return grad


def _kernel(delta: bool, few: bool) -> Any:
    """The kernel of a rule."""
    if delta:
        from fla.ops.gated_delta_rule import (  # pyright: ignore[reportMissingImports]
            chunk_gated_delta_rule,
            fused_recurrent_gated_delta_rule,
        )

        return fused_recurrent_gated_delta_rule if few else chunk_gated_delta_rule
    from fla.ops.simple_gla import (  # pyright: ignore[reportMissingImports]
        chunk_simple_gla,
        fused_recurrent_simple_gla,
    )

    return fused_recurrent_simple_gla if few else chunk_simple_gla
