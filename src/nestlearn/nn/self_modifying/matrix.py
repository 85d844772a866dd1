"""Self-modifying Titans whose memories are matrices: one fast matrix per head serves them all."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nestlearn.memory import L2, Gates
from nestlearn.memory.chunked import (
    at_anchor,
    begin,
    enter,
    keep_untouched,
    leave,
    reset_nonfinite,
    run_span,
)
from nestlearn.memory.clock import Clock, known_empty
from nestlearn.memory.engine import span_solver
from nestlearn.memory.kernels.products import unit_norm
from nestlearn.memory.spans import longest_span, open_span
from nestlearn.memory.types import Weights
from nestlearn.nn.common import check_tokens, wide_dtype
from nestlearn.nn.conv import align_streams
from nestlearn.nn.flops import scan_flops

from . import kernel, token
from .config import SelfModifyingConfig
from .layer import SelfModifyingState, SelfModifyingTitans, per_head

GATES = ("eta", "alpha")

INITIAL_NOISE = 0.1
"""What is random in the maps at the start, beside the identity."""


class SelfModifyingMatrix(SelfModifyingTitans):
    r"""`SelfModifyingTitans` with matrix memories (``architecture="matrix"``).

    Let every memory m of a head be a matrix that absorbs the same key k, each with its own target ``M_m u``. Then each
    changes by the same multiplication from the right: ``M_{m,t} = M_m H_t``, with one fast matrix H per head and
    ``H_0 = I``. With c the start of the chunk of t (NL Eq. 83-91; docs/equations.md):

        k_t = unit(M_k H_c x^k_t)     v_t = unit(M_v H_c x^v_t)     eta_t from m_eta . (H_c x^k_t), alpha_t likewise
        u_t = unit(H_c v_t)           its own target (v_t itself without self_values)
        H_t = H_{t-1} (alpha_t I - eta'_t k_t k_t^T) + eta'_t u_t k_t^T      dot product (of H - I where retention
                                                                             goes to the initial weights)
        y_t = M_memory H_t q_t        with chunk reads, H_c

    From every stream the mean over its channels is taken: SiLU gives all tokens a common part, which would fill H
    (docs/decisions.md, 82). A stream that is not adaptive skips ``M H_c``. The gates read the keys' stream: streams of
    their own would add two thirds to the layer's projections (docs/log.md). One delta rule per head is what a layer of
    DeltaNet costs as well. The matrices ``M_m``, the vectors ``m`` and the projections of streams are trained by the
    outer loop only.

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

    center = True

    def _order(self) -> tuple[str, ...]:
        """Streams that pass through H come first; the gates read the keys' stream."""
        self.mapped = tuple(name for name in ("k", "v", "q") if name in self.adaptive)
        gates_move = any(name in self.adaptive for name in GATES)
        self.moving = (*self.mapped, "k") if gates_move and "k" not in self.mapped else self.mapped
        return (*self.moving, *(name for name in ("k", "v", "q") if name not in self.moving))

    def _add_memories(self, config: SelfModifyingConfig) -> None:
        shape = (self.num_heads, self.d_head, self.d_head)
        self.maps = nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name in (*self.mapped, "memory")})

    @torch.no_grad()
    def _reset_memories(self) -> None:
        """Near the identity, as the residual makes it for networks: what was written is read as it is."""
        for weights in self.maps.values():
            weights.normal_(0, INITIAL_NOISE * self.d_head**-0.5).diagonal(dim1=-2, dim2=-1).add_(1)

    def reset_parameters(self) -> None:
        """Initial values with which a memory already answers with what followed; see `align_streams`."""
        super().reset_parameters()
        align_streams(self.streams.weight, self.conv, self.num_heads, self.streams_order)

    def _bounded(self, eta: Tensor, alpha: Tensor) -> Tensor:
        if not isinstance(self.memory.objective, L2):
            return super()._bounded(eta, alpha)
        # The smallest cap keeps the quotient and its gradient finite where alpha is 1.
        cap = torch.minimum((1 - alpha) / 2, 2 * alpha).clamp(min=1e-6)
        return -cap * torch.expm1(-eta / cap)

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
        if state is not None and token.takes(self, x, state, mask, reset, writes):
            check_tokens(x, self.d_model)
            return token.read(self, x, state)
        return super().forward(x, state, mask, reset, writes=writes, return_state=return_state)

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
        if writes and kernel.takes(self, streams, state, mask, reset):
            return kernel.read(self, streams, state)
        streams = streams.to(wide_dtype(streams))
        (batch, count), heads, chunk = streams.shape[:2], self.num_heads, self.memory.chunk_size
        reset = None if reset is None or known_empty(reset) else reset
        start = {"W": torch.eye(self.d_head, dtype=streams.dtype, device=streams.device).expand(batch * heads, -1, -1)}
        now = self.memory.begin(start) if state is None else state.memory.flatten(2)
        now, broken = reset_nonfinite(now, start, None if reset is None else per_head(reset, heads))
        solve = span_solver(self.memory, streams, now, restarts=reset is not None)
        length = longest_span(self.memory, count, self.memory.read) if solve is open_span else min(chunk, count)
        clock = Clock.start(now.position[::heads], now.aligned, count, chunk, length, mask, reset)
        beta_of = [None] * len(clock.spans) if beta is None else clock.cut(beta, 1)
        weights = self._of_rows(batch, streams.dtype)
        running, outputs = enter(self.memory, now, start, fresh=state is None), []
        for span, here, kept in zip(clock.spans, self._pieces(clock, streams), beta_of, strict=True):
            span = span.map(lambda x: per_head(x, heads))
            running = begin(running, span)
            q, k, v, (eta, alpha) = self._project(here, weights, running.anchor, start, span.reset)
            gates = self._gates(eta, alpha, None if kept is None else kept.mT.flatten(0, 1), writes)
            if span.valid is not None:
                # An empty slot writes nothing and keeps everything.
                neutral = zip(gates, (0, 1, 1, 0), strict=True)
                kept = [None if x is None else torch.where(span.valid, x, empty) for x, empty in neutral]
                gates = Gates(*kept)  # type: ignore[arg-type]
            y, running = run_span(self.memory, running, span, q, k, v, gates, self.memory.read, True, None, solve)
            outputs.append(y)
        if clock.grid is None:
            outputs = [torch.cat(outputs, 1)]
        y = clock.join([self._by_text(torch.bmm(y, weights["memory"].mT), batch) for y in outputs])
        if return_state:
            end = leave(running, per_head(clock.position, heads), clock.aligned)
            now = keep_untouched(end, now, None if mask is None else per_head(mask, heads))
        lost = None if broken is None else broken.view(batch, heads).any(1)
        return y, SelfModifyingState(None, now.unflatten((batch, heads)), None), lost

    def _of_rows(self, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """The maps and the vectors of gates for every row ``batch * heads``."""
        named = {**self.maps, "eta": self.eta_vector.unsqueeze(1), "alpha": self.alpha_vector.unsqueeze(1)}
        return {name: weights.to(dtype).repeat(batch, 1, 1) for name, weights in named.items()}

    def _pieces(self, clock: Clock, streams: Float[Tensor, "b t n h d"]) -> list[dict[str, Float[Tensor, "r c d"]]]:
        """The streams of every span, as rows."""
        whole = [streams] if clock.grid is None else clock.cut(streams)
        rows = [part.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0) for part in whole]
        if clock.grid is None:
            # Views of one copy.
            rows = zip(*(stream.split(clock.spans[0].length, 1) for stream in rows[0]), strict=True)
        return [dict(zip(self.streams_order, part, strict=True)) for part in rows]

    def _project(
        self,
        streams: dict[str, Float[Tensor, "r c d"]],
        weights: dict[str, Tensor],
        anchor: Weights,
        initial: Weights,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Float[Tensor, "b h c"], Float[Tensor, "b h c"]]]:
        """Queries, keys and values ``[r, c, d]``, and the logits of eta and alpha.

        H is the ``anchor``; ``initial`` after a reset.
        """
        times_h, _ = at_anchor(anchor, initial, reset)
        moved = {name: times_h("W", streams[name]) for name in self.moving}
        made = {n: torch.bmm(moved[n], weights[n].mT) if n in self.mapped else x for n, x in streams.items()}
        read_by = {name: moved["k"] if name in self.adaptive else streams["k"] for name in GATES}
        eta, alpha = (
            torch.bmm(weights[name], x.mT).view(-1, self.num_heads, x.shape[1]) for name, x in read_by.items()
        )
        return unit_norm(made["q"]), unit_norm(made["k"]), unit_norm(made["v"]), (eta, alpha)

    def loop(
        self, x: Float[Tensor, "b t d"], state: SelfModifyingState | None = None
    ) -> tuple[Float[Tensor, "b t d"], SelfModifyingState]:
        from .loop import matrix_token_loop

        return matrix_token_loop(self, x, state)

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token at this context length (multiply-add = 2), writes included."""
        square = 2 * self.d_head**2
        fast = scan_flops(self.memory, self.d_head, self.d_head, context_length)
        fast += square * (self.self_values + len(self.moving) + len(self.maps)) + 2 * len(GATES) * self.d_head
        return super().flops_per_token(context_length) + self.num_heads * fast
