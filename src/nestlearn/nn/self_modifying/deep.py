"""Self-modifying Titans whose memories are perceptrons with two layers."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nestlearn.memory import State, Tokens
from nestlearn.memory.chunked import (
    LONGEST_WRITE,
    Prepared,
    at_anchor,
    find_factors,
    prepare_tokens,
    reset_nonfinite,
    run,
    write_rows,
)
from nestlearn.memory.clock import Clock, Span, choose, span_length
from nestlearn.memory.kernels.products import unit_norm
from nestlearn.memory.types import Weights
from nestlearn.nn.common import InitialWeights, wide_dtype
from nestlearn.nn.flops import self_modifying_flops

from .config import STREAMS, SelfModifyingConfig
from .layer import SelfModifyingState, SelfModifyingTitans, per_head


class SelfModifyingMLP(SelfModifyingTitans):
    """`SelfModifyingTitans` with MLP memories (``architecture="mlp"``): a main memory and one per adaptive stream."""

    def _add_memories(self, config: SelfModifyingConfig) -> None:
        self.projections = replace(self.memory, chunk_size=self.projection_chunk_size)
        names = (*self.adaptive, "memory")
        initial = {name: InitialWeights(self.memory, (self.num_heads,), self.d_head, self.d_head) for name in names}
        self.initial = nn.ModuleDict(initial)

    def _reset_memories(self) -> None:
        for weights in self.initial.values():
            weights.reset_parameters()  # type: ignore[operator]

    def _projections(self, state: State | None, batch: int, dtype: torch.dtype) -> tuple[State, Weights]:
        """The projection memories as rows ``[batch * heads, streams]``, and their initial weights."""
        made = [self.initial[name](dtype) for name in self.adaptive]
        initial = {m: torch.stack([weights[m] for weights in made], 1).repeat(batch, 1, 1, 1) for m in made[0]}
        state = self.projections.begin(initial) if state is None else state.flatten(2)
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

        Returns outputs ``[b, t, heads * d]``, the state after the last token, and the rows that came in broken.
        """
        streams = streams.to(wide_dtype(streams))
        (batch, count), dtype, heads = streams.shape[:2], streams.dtype, self.num_heads
        start = {m: w.repeat(batch, 1, 1) for m, w in self.initial["memory"](dtype).items()}
        main = self.memory.begin(start) if state is None else state.memory.flatten(2)
        main, broken = reset_nonfinite(main, start, None if reset is None else per_head(reset, heads))
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
            span = span.map(lambda x: per_head(x, heads))
            if group is not None and span.begins is not False:
                learned, initial = group
                group = learned._replace(anchor=choose(span.begins, learned.params, learned.anchor)), initial
            tokens = self._project(group, here, kept, span, writes)
            # What gates and keys alone decide: the main memory and the projections share both.
            ready = prepare_tokens(self.memory, tokens.k, tokens.gates) if clock.grid is None else None
            y, main = run(
                self.memory, main, tokens, start, fresh=state is None and i == 0, return_state=keep, prepared=ready
            )
            outputs.append(self._by_text(y, batch))
            if group is not None and keep:
                group = self._learn(group, tokens, span, ready, fresh=state is None and i == 0), group[1]
        y = clock.join(outputs)
        lost = None if broken is None else broken.view(batch, heads).any(1)
        return y, self._pack(None if group is None else group[0], main, batch), lost

    def _pack(self, projections: State | None, memory: State, batch: int) -> SelfModifyingState:
        """The states of both groups, by text and head."""
        learned, shape = None, (batch, self.num_heads)
        if projections is not None:
            position = projections.position.expand(-1, len(self.adaptive))
            learned = projections._replace(position=position).unflatten(shape)
        return SelfModifyingState(learned, memory.unflatten(shape), None)

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
        from .loop import token_loop

        return token_loop(self, x, state)

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token at this context length (multiply-add = 2), writes included."""
        width, longest = self.d_head, span_length(self.projection_chunk_size, context_length, LONGEST_WRITE)
        learning = max(0, 1 - self.projection_chunk_size / context_length)
        fast = self_modifying_flops(
            self.memory, width, len(self.adaptive), learning, longest, context_length, self_values=self.self_values
        )
        return super().flops_per_token(context_length) + self.num_heads * fast
