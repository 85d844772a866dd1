"""Self-modifying Titans: the projections of a memory are memories themselves (NL Eq. 83-91)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.memory import (
    L2,
    Delta,
    Gates,
    State,
    Tokens,
)
from nestlearn.memory.chunked import LONGEST_WRITE, Prepared, at_anchor, find_factors, prepare_tokens, run, write_rows
from nestlearn.memory.clock import Clock, Span, choose, known_empty, poisoned_from, span_length
from nestlearn.memory.engine import flatten_state, reset_nonfinite, unflatten_state
from nestlearn.memory.kernels.products import unit_norm
from nestlearn.memory.types import Weights

from .bounds import MAX_MOMENTUM, check_self_modifying_step
from .common import HeadNorm, InitialWeights, check_tokens, full_precision, wide_dtype
from .conv import ShortConv
from .flops import self_modifying_flops
from .self_modifying_state import STREAMS, SelfModifyingState, quarantine

if TYPE_CHECKING:
    from .self_modifying_config import SelfModifyingConfig


class SelfModifyingTitans(nn.Module):
    r"""A sequence layer whose keys, values, step sizes and retention come from memories that learn in context.

    At the weights of the last chunk boundary (NL Eq. 83-91; docs/decisions.md for what the paper leaves open):

        k_t = M_k(x^k_t)   v_t = M_v(x^v_t)   eta_t = M_eta(x^eta_t)   alpha_t = M_alpha(x^alpha_t)
        v^_{m,t} = M_m(v_t)      every memory m generates its own target (v_t itself without self_values)
        W_m <- W_m (alpha_t I - eta'_t x x^T) - eta'_t e x^T  for every map of every memory (retention to initial)
        y_t = M_memory,t(q_t)    or, with chunk reads, the memory at the start of the chunk of t

    Each stream ``x^m`` is a linear map of the input, a causal convolution of width 4 and SiLU, split in heads.
    q, k, v and the targets are L2-normalized per head. All initial states are meta-learned parameters.

    **Bounds** (no gate the layer can emit makes the recurrence expand): alpha in (0, 1], momentum beta in (0, 0.9), and
    ``eta < max_step (1 - beta)``. Proximal steps contract at any max_step. ``normalized`` steps have max_step <= 2,
    eigenvalues in [-1, 1]. The L2 objective feeds back the error at the anchor, so eta is also divided by
    projection_chunk_size. Without delta retention ``eta < max_step (1 - alpha)`` with max_step <= 1/2: what is written
    stays smaller than the initial weights. A memory that writes its own targets is bounded but can be chaotic, with
    eigenvalues near -1 above all: gradients through it grow exponentially. The gradient of the weights that pass from
    one span to the next is therefore scaled down to norm 1e6 where it is larger; below it is exact.

    Args:
        d_model: width of input and output.
        num_heads: heads; d_model must be divisible by it.
        config: the memories and their rule; `SelfModifyingConfig`.

    Raises:
        ValueError: for sizes that do not fit.

    Example:
        >>> import torch
        >>> from nestlearn.nn import SelfModifyingConfig
        >>> layer = SelfModifyingConfig(chunk_size=8, projection_chunk_size=16).build(32, num_heads=2)
        >>> x = torch.randn(1, 20, 32)
        >>> y, state = layer(x[:, :13])
        >>> rest, state = layer(x[:, 13:], state)
        >>> torch.allclose(torch.cat([y, rest], 1), layer(x)[0], atol=1e-5)
        True
    """

    def __init__(self, d_model: int, num_heads: int, config: SelfModifyingConfig) -> None:
        super().__init__()
        config.check_sizes(d_model, num_heads)
        self.memory = config.memory
        self.projections = replace(self.memory, chunk_size=config.projection_chunk_size)
        self.max_step = check_self_modifying_step(self.memory, config.max_step)
        self.d_model, self.num_heads, self.d_head = d_model, num_heads, d_model // num_heads
        self.projection_chunk_size = config.projection_chunk_size
        self.adaptive = tuple(name for name in STREAMS if name in config.adaptive)
        self.streams_order = (*self.adaptive, *(name for name in STREAMS if name not in config.adaptive))
        self.retention, self.self_values = config.retention, config.self_values
        self.streams = nn.Linear(d_model, len(STREAMS) * d_model, bias=False)
        self.conv = ShortConv(len(STREAMS) * d_model, config.conv_size, silu=True) if config.conv_size else None
        names = (*self.adaptive, "memory")
        initial = {name: InitialWeights(self.memory, (num_heads,), self.d_head, self.d_head) for name in names}
        self.initial = nn.ModuleDict(initial)
        self.eta_vector = nn.Parameter(torch.empty(num_heads, self.d_head))
        self.eta_bias = nn.Parameter(torch.empty(num_heads))
        self.alpha_vector = nn.Parameter(torch.empty(num_heads, self.d_head))
        self.alpha_bias = nn.Parameter(torch.empty(num_heads))
        self.beta_gate = nn.Linear(d_model, num_heads) if config.momentum else None
        self.norm, self.norm_eps = HeadNorm(self.d_head, eps=config.norm_eps), config.norm_eps
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def vector_parameters(self) -> list[nn.Parameter]:
        """Parameters whose rows are vectors and no linear map: no matrix rule of an optimizer suits them."""
        return [self.eta_vector, self.alpha_vector]

    def reset_parameters(self) -> None:
        """Initial values: random memories (both maps non-zero), gates that read a little and keep nearly everything."""
        for weights in self.initial.values():
            weights.reset_parameters()  # type: ignore[operator]
        # Small streams keep SiLU in its linear range: keys then have mean zero and do not erase each other
        # (docs/log.md: recall is learned in a third of the steps).
        nn.init.normal_(self.streams.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=self.d_model**-0.5)
        if self.conv is not None:
            self.conv.reset_parameters()
        for vector in (self.eta_vector, self.alpha_vector):
            nn.init.normal_(vector, std=0.02)
        nn.init.zeros_(self.eta_bias)
        # alpha = sigmoid(8) = 0.9997: with less the memories forget before they can be read (design trial).
        nn.init.constant_(self.alpha_bias, 8.0 if isinstance(self.memory.retention, Delta) else 4.0)
        if self.beta_gate is not None:
            nn.init.normal_(self.beta_gate.weight, std=0.02)
            nn.init.zeros_(self.beta_gate.bias)
        nn.init.ones_(self.norm.weight)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: SelfModifyingState | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        *,
        writes: bool = True,
        return_state: bool = True,
    ) -> tuple[Float[Tensor, "b t d"], SelfModifyingState | None]:
        """Read tokens, answer each, and learn from them.

        Args:
            x: inputs; masked tokens may hold anything.
            state: from an earlier call; None starts fresh.
            mask: False marks padding: it changes nothing and its output is 0.
            reset: True forgets everything of the row before that token.
            writes: False computes the same with step size 0.
            return_state: False skips the work only the next call would need.

        Returns:
            Outputs and the state after the last token (None if not asked for). A non-finite token makes the outputs of
            its row NaN from there to the next reset.
        """
        check_tokens(x, self.d_model)
        x, poisoned = quarantine(x, mask, reset)
        streams, beta, tail = self._streams(x, None if state is None else state.conv, mask, reset)
        with full_precision(x):
            y, new, broken = self._read(streams, beta, state, mask, reset, writes, return_state)
        y = self._merge(y, x)
        if broken is not None:
            poisoned = poisoned | poisoned_from(broken, mask, reset)
        if not known_empty(poisoned):
            visible = poisoned if mask is None else poisoned & mask
            y = torch.where(visible.unsqueeze(-1), float("nan"), y)
        if mask is not None:
            y = torch.where(mask.unsqueeze(-1), y, 0)
        if not return_state:
            return y, None
        params = new.memory.params
        params = choose(poisoned[:, -1], {m: torch.full_like(w, torch.nan) for m, w in params.items()}, params)
        return y, SelfModifyingState(new.projections, new.memory._replace(params=params), tail)

    def _streams(
        self, x: Tensor, tail: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Streams ``[b, t, streams, heads, d]``, momentum gate ``[b, t, heads]``, both wide, and the new tail."""
        mixed, end = self.streams(x), None
        if self.conv is None:
            mixed = F.silu(mixed)
        else:
            mixed, end = self.conv(mixed, tail, mask, reset)
        wide = wide_dtype(x)
        split = mixed.to(wide).unflatten(-1, (len(STREAMS), self.num_heads, self.d_head))
        beta = None
        if self.beta_gate is not None:
            beta = MAX_MOMENTUM * torch.sigmoid(self.beta_gate(x).to(wide))
        return split, beta, end

    def _merge(self, y: Tensor, x: Tensor) -> Tensor:
        """Heads back together, in the dtype of the inputs: ``[b, t, heads * d] -> [b, t, d_model]``."""
        return self.out(self.norm(y.unflatten(-1, (self.num_heads, -1))).flatten(2).to(x.dtype))

    def _projections(self, state: State | None, batch: int, dtype: torch.dtype) -> tuple[State, Weights]:
        """The projection memories as rows ``[batch * heads, streams]``, and their initial weights."""
        made = [self.initial[name](dtype) for name in self.adaptive]
        initial = {m: torch.stack([weights[m] for weights in made], 1).repeat(batch, 1, 1, 1) for m in made[0]}
        state = self.projections.begin(initial) if state is None else flatten_state(state, 2)
        return state._replace(position=state.position[:, :1]), initial

    def _read(
        self,
        streams: Tensor,
        beta: Tensor | None,
        state: SelfModifyingState | None,
        mask: Tensor | None,
        reset: Tensor | None,
        writes: bool,
        return_state: bool,
    ) -> tuple[Tensor, SelfModifyingState, Tensor | None]:
        """One span of the projections' chunk after another: project, read and write, then learn to project.

        Returns outputs ``[b, t, heads * d]``, the state after the last token, and the tokens up to a reset of rows
        that came in broken.
        """
        (batch, count), dtype, heads = streams.shape[:2], streams.dtype, self.num_heads
        start = {m: w.repeat(batch, 1, 1) for m, w in self.initial["memory"](dtype).items()}
        main = self.memory.begin(start) if state is None else flatten_state(state.memory, 2)
        main, broken = reset_nonfinite(main, start, None if reset is None else _per_head(reset, heads))
        group = self._projections(None if state is None else state.projections, batch, dtype) if self.adaptive else None
        chunk, aligned = self.projection_chunk_size, state is None or state.clock.aligned
        position = torch.zeros(batch, dtype=torch.long, device=streams.device)
        if state is not None:
            position = state.clock.position.flatten(1)[:, 0]
        clock = Clock.start(position, aligned, count, chunk, min(chunk, count), mask, reset)
        gates = [None] * len(clock.spans) if beta is None else clock.cut(beta, 1)
        outputs = []
        for i, (span, here, kept) in enumerate(zip(clock.spans, clock.cut(streams), gates, strict=True)):
            keep = return_state or i + 1 < len(clock.spans)
            span = span.map(lambda x: _per_head(x, heads))
            if group is not None and span.begins is not False:
                learned, initial = group
                group = learned._replace(anchor=choose(span.begins, learned.params, learned.anchor)), initial
            tokens = self._project(group, here, kept, span, writes)
            # What gates and keys alone decide: the main memory and the projections share both.
            ready = prepare_tokens(self.memory, tokens.k, tokens.gates) if clock.grid is None else None
            y, main = run(
                self.memory, main, tokens, start, fresh=state is None and i == 0, return_state=keep, prepared=ready
            )
            outputs.append(y.unflatten(0, (batch, heads)).transpose(1, 2).flatten(2))
            if group is not None and keep:
                group = self._learn(group, tokens, span, ready, fresh=state is None and i == 0), group[1]
        y = clock.join(outputs)
        bad = None if broken is None else broken.view(batch, heads)[:, :1] & (torch.arange(count, device=y.device) == 0)
        return y, self._pack(None if group is None else group[0], main, batch), bad

    def _pack(self, projections: State | None, memory: State, batch: int) -> SelfModifyingState:
        """The states of both groups, by text and head."""
        learned, shape = None, (batch, self.num_heads)
        if projections is not None:
            position = projections.position.expand(-1, len(self.adaptive))
            learned = unflatten_state(projections._replace(position=position), shape)
        return SelfModifyingState(learned, unflatten_state(memory, shape), None)

    def _project(
        self, group: tuple[State, Weights] | None, streams: Tensor, beta: Tensor | None, span: Span, writes: bool
    ) -> Tokens:
        """Keys, values, queries, gates of a span at the projection anchor; ``streams: [b, c, streams, heads, d]``."""
        sizes = (len(self.adaptive), len(STREAMS) - len(self.adaptive))
        adaptive, static = (x.permute(0, 3, 2, 1, 4).flatten(0, 1) for x in streams.split(sizes, 2))
        made = static.unbind(1)
        if group is not None:
            linear, _ = at_anchor(group[0].anchor, group[1], None if span.reset is None else span.reset.unsqueeze(1))
            made = (*self.memory.architecture(linear, adaptive).unbind(1), *made)
        named = dict(zip(self.streams_order, made, strict=True))
        q, k, v, eta, alpha = (named[name] for name in STREAMS)
        batch = streams.shape[0]
        eta_logit, alpha_logit = (
            torch.bmm(x, vector.to(x.dtype).repeat(batch, 1).unsqueeze(-1)).view(batch, self.num_heads, -1)
            for x, vector in ((eta, self.eta_vector), (alpha, self.alpha_vector))
        )
        gates = self._gates(eta_logit, alpha_logit, None if beta is None else beta.mT.flatten(0, 1), writes)
        if span.valid is not None:
            lr, retain = torch.where(span.valid, gates.lr, 0), torch.where(span.valid, gates.retain, 1)
            gates = gates._replace(lr=lr, retain=retain)
        return Tokens(unit_norm(q), unit_norm(k), unit_norm(v), gates, span.valid, span.reset)

    def _gates(self, eta_logit: Tensor, alpha_logit: Tensor, beta: Tensor | None, writes: bool) -> Gates:
        """Bounded gates (see the class docstring) from their logits ``[b, heads, c]``; returns rows ``[r, c]``."""
        alpha = torch.sigmoid(alpha_logit + self.alpha_bias.to(alpha_logit.dtype).unsqueeze(-1))
        eta = self.max_step * torch.sigmoid(eta_logit + self.eta_bias.to(eta_logit.dtype).unsqueeze(-1))
        alpha, eta = alpha.flatten(0, 1), eta.flatten(0, 1)
        if not isinstance(self.memory.retention, Delta):
            eta = eta * (1 - alpha)
        if beta is not None:
            eta = eta * (1 - beta)
        if self.memory.objective == L2():
            eta = eta / self.projection_chunk_size
        if not self.retention:
            alpha = torch.ones_like(alpha)
        if not writes:
            eta = torch.zeros_like(eta)
        return Gates(eta, alpha, beta)

    def _learn(
        self, group: tuple[State, Weights], tokens: Tokens, span: Span, prepared: list[Prepared] | None, fresh: bool
    ) -> State:
        """Write a span into the projection memories; errors at their anchor."""
        state, initial = group
        span = span.map(lambda x: x.unsqueeze(1))
        linear, adjoint = at_anchor(state.anchor, initial, span.reset)
        k, v = tokens.k.unsqueeze(1), tokens.v.unsqueeze(1).expand(-1, len(self.adaptive), -1, -1)
        factors = find_factors(self.projections, linear, adjoint, k, v, None)
        count, shared = k.shape[-2], None
        if prepared is not None:
            same = span_length(self.projection_chunk_size, count, longest=LONGEST_WRITE)
            if same == span_length(self.memory.chunk_size, count):
                shared = [here.map(lambda x: x.unsqueeze(1)) for here in prepared]
        gates = tokens.gates.map(lambda g: g.unsqueeze(1))
        return write_rows(self.projections, state, factors, gates, initial, span=span, prepared=shared, fresh=fresh)

    def loop(
        self, x: Float[Tensor, "b t d"], state: SelfModifyingState | None = None
    ) -> tuple[Float[Tensor, "b t d"], SelfModifyingState]:
        """The definition: the same layer token by token with inner gradients by autograd. The oracle of `forward`."""
        from .self_modifying_loop import token_loop

        return token_loop(self, x, state)

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token at this context length (multiply-add = 2), writes included."""
        width, longest = self.d_head, span_length(self.projection_chunk_size, context_length, LONGEST_WRITE)
        learning = max(0, 1 - self.projection_chunk_size / context_length)
        fast = self_modifying_flops(
            self.memory, width, len(self.adaptive), learning, longest, context_length, self_values=self.self_values
        )
        linear = 2 * self.d_model * (len(STREAMS) + 1) * self.d_model
        return linear + self.num_heads * fast + (0 if self.conv is None else self.conv.flops_per_token(context_length))

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, adaptive={self.adaptive}, "
            f"projection_chunk_size={self.projection_chunk_size}, max_step={self.max_step}, memory={self.memory}"
        )


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Flags of texts ``[b, ...]`` as those of rows ``[b * heads, ...]``."""
    return x.repeat_interleave(heads, 0)
