"""Self-modifying Titans whose memories are matrices: one fast matrix per head serves them all."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nestlearn.memory import L2, State, Tokens
from nestlearn.memory.chunked import reset_nonfinite, run
from nestlearn.memory.clock import Clock, choose
from nestlearn.memory.kernels.products import unit_norm
from nestlearn.memory.types import Weights
from nestlearn.nn.flops import scan_flops

from .config import STREAMS, SelfModifyingConfig
from .layer import SelfModifyingState, SelfModifyingTitans, per_head

READ_BY_VECTOR = ("eta", "alpha")
"""Streams of which a gate reads one number: the vector that reads it stands for the memory's initial matrix."""


class SelfModifyingMatrix(SelfModifyingTitans):
    r"""`SelfModifyingTitans` with matrix memories (``architecture="matrix"``).

    Let every memory m of a head be a matrix that absorbs the same key k, each with its own target ``M_m u``. Then each
    changes by the same multiplication from the right: ``M_{m,t} = M_m H_t``, with one fast matrix H per head and
    ``H_0 = I``. With c the start of the chunk of t (NL Eq. 83-91; docs/equations.md):

        k_t = unit(M_k H_c x^k_t)     v_t = unit(M_v H_c x^v_t)     eta_t from m_eta . (H_c x^eta_t), alpha_t likewise
        u_t = unit(H_c v_t)           its own target (v_t itself without self_values)
        H_t = H_{t-1} (alpha_t I - eta'_t k_t k_t^T) + eta'_t u_t k_t^T      dot product (of H - I where retention
                                                                             goes to the initial weights)
        y_t = M_memory H_t q_t        with chunk reads, H_c

    A stream that is not adaptive skips ``M H_c``. One delta rule per head is what a layer of DeltaNet costs as well.
    The matrices ``M_m``, the vectors ``m`` and the projections of streams are trained by the outer loop only.

    **Bounds**, as in `SelfModifyingTitans`, but for these: keys have norm 1, so ``raw`` steps are stable up to
    max_step 1. The L2 objective feeds ``H_c k`` back. There the step is ``cap (1 - exp(-eta / cap))`` with
    ``cap = min((1 - alpha) / 2, 2 alpha)``, and the operator norm of H never exceeds 1 (retention to zero).

    Example:
        >>> import torch
        >>> from nestlearn.nn import SelfModifyingConfig
        >>> layer = SelfModifyingConfig(architecture="matrix", chunk_size=8).build(32, num_heads=2)
        >>> x = torch.randn(1, 20, 32)
        >>> y, state = layer(x[:, :13])
        >>> rest, state = layer(x[:, 13:], state)
        >>> torch.allclose(torch.cat([y, rest], 1), layer(x)[0], atol=1e-5)
        True
    """

    def _add_memories(self, config: SelfModifyingConfig) -> None:
        names = [name for name in self.adaptive if name not in READ_BY_VECTOR]
        shape = (self.num_heads, self.d_head, self.d_head)
        self.maps = nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name in (*names, "memory")})

    @torch.no_grad()
    def _reset_memories(self) -> None:
        for weights in self.maps.values():
            weights.normal_(0, self.d_head**-0.5)

    def _bounded(self, eta: Tensor, alpha: Tensor) -> Tensor:
        if not isinstance(self.memory.objective, L2):
            return super()._bounded(eta, alpha)
        # The smallest cap keeps the quotient and its gradient finite where alpha is 1.
        cap = torch.minimum((1 - alpha) / 2, 2 * alpha).clamp(min=1e-6)
        return -cap * torch.expm1(-eta / cap)

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
        """One chunk after another: project with H at its start, then read and write."""
        batch, heads = len(streams), self.num_heads
        eye = torch.eye(self.d_head, dtype=streams.dtype, device=streams.device)
        start = {"W": eye.expand(batch * heads, -1, -1)}
        now = self.memory.begin(start) if state is None else state.memory.flatten(2)
        now, broken = reset_nonfinite(now, start, None if reset is None else per_head(reset, heads))
        if self.adaptive:
            outputs, now = self._chunks(streams, beta, now, start, mask, reset, writes, return_state, state is None)
        else:
            # Nothing that the memory learns changes what a token is projected to: no chunk waits for another.
            valid, fresh = (None if flag is None else per_head(flag, heads) for flag in (mask, reset))
            tokens = self._tokens(streams, beta, None, valid, fresh, writes)
            y, now = run(self.memory, now, tokens, start, fresh=state is None, return_state=return_state)
            outputs = self._by_text(y, batch)
        read = torch.einsum("bthd,hed->bthe", outputs.unflatten(-1, (heads, -1)), self.maps["memory"].to(outputs.dtype))
        lost = None if broken is None else broken.view(batch, heads).any(1)
        return read.flatten(2), SelfModifyingState(None, now.unflatten((batch, heads)), None), lost

    def _chunks(
        self,
        streams: Tensor,
        beta: Tensor | None,
        now: State,
        start: Weights,
        mask: Tensor | None,
        reset: Tensor | None,
        writes: bool,
        return_state: bool,
        fresh: bool,
    ) -> tuple[Tensor, State]:
        """The chunks one after another; returns outputs ``[b, t, heads * d]`` and the state after the last."""
        (batch, count), heads, chunk = streams.shape[:2], self.num_heads, self.memory.chunk_size
        position = now.position.view(batch, heads)[:, 0]
        clock = Clock.start(position, now.aligned, count, chunk, min(chunk, count), mask, reset)
        gates = [None] * len(clock.spans) if beta is None else clock.cut(beta, 1)
        outputs = []
        for i, (span, here, kept) in enumerate(zip(clock.spans, clock.cut(streams), gates, strict=True)):
            span = span.map(lambda x: per_head(x, heads))
            now = now._replace(anchor=choose(span.begins, now.params, now.anchor))
            matrix = None if fresh and i == 0 and span.reset is None else now.anchor["W"]
            tokens = self._tokens(here, kept, matrix, span.valid, span.reset, writes)
            keep = return_state or i + 1 < len(clock.spans)
            y, now = run(self.memory, now, tokens, start, fresh=fresh and i == 0, return_state=keep)
            outputs.append(self._by_text(y, batch))
        return clock.join(outputs), now

    def _tokens(
        self,
        streams: Float[Tensor, "b c n h d"],
        beta: Tensor | None,
        matrix: Float[Tensor, "r d d"] | None,
        valid: Tensor | None,
        reset: Tensor | None,
        writes: bool,
    ) -> Tokens:
        """Queries, keys, values and gates of a chunk; ``matrix``: H at its start (None: I)."""
        batch, count = streams.shape[:2]
        rows = streams.permute(2, 0, 3, 1, 4).flatten(1, 2)  # [streams, b * heads, c, d]
        named = dict(zip(self.streams_order, rows.unbind(0), strict=True))
        if matrix is not None and self.adaptive:
            n = len(self.adaptive)
            stacked = rows[:n].transpose(0, 1).flatten(1, 2)
            moved = torch.bmm(stacked, matrix.mT)
            if reset is not None:
                # After a reset H is I again.
                after = reset.cummax(-1).values.repeat(1, n).unsqueeze(-1)
                moved = torch.where(after, stacked, moved)
            named.update(zip(self.adaptive, moved.unflatten(1, (n, count)).unbind(1), strict=True))
        for name, weights in self.maps.items():
            if name != "memory":
                x = named[name].unflatten(0, (batch, self.num_heads))
                named[name] = (x @ weights.to(x.dtype).mT).flatten(0, 1)
        q, k, v, eta, alpha = (named[name] for name in STREAMS)
        eta, alpha = (
            (x.unflatten(0, (batch, self.num_heads)) @ vector.to(x.dtype).unsqueeze(-1)).squeeze(-1)
            for x, vector in ((eta, self.eta_vector), (alpha, self.alpha_vector))
        )
        gates = self._gates(eta, alpha, None if beta is None else beta.mT.flatten(0, 1), writes)
        return Tokens(unit_norm(q), unit_norm(k), unit_norm(v), gates, valid, reset)

    def loop(
        self, x: Float[Tensor, "b t d"], state: SelfModifyingState | None = None
    ) -> tuple[Float[Tensor, "b t d"], SelfModifyingState]:
        from .loop import matrix_token_loop

        return matrix_token_loop(self, x, state)

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token at this context length (multiply-add = 2), writes included."""
        square = 2 * self.d_head**2
        fast = scan_flops(self.memory, self.d_head, self.d_head, context_length)
        fast += square * (self.self_values + len(self.adaptive) + len(self.maps))
        return super().flops_per_token(context_length) + self.num_heads * fast
