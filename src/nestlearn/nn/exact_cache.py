"""A bounded exact cache: the tokens that a memory knew least about, kept as they are, and read by attention."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nestlearn.memory.clock import Clock, Span

from .state import record

Keep = Literal["surprise", "recent"]


@record("kept_tokens")
class KeptTokens(NamedTuple):
    """Tokens as the memory got them. A size of 0 marks an empty slot."""

    k: Float[Tensor, "b n h d"]
    v: Float[Tensor, "b n h d"]
    size: Float[Tensor, "b n h"]

    def take(self, index: Int[Tensor, "b n h"]) -> KeptTokens:
        """The tokens in these slots, for each head its own."""
        wide = index.unsqueeze(-1).expand(*index.shape, self.k.shape[-1])
        return KeptTokens(self.k.gather(1, wide), self.v.gather(1, wide), self.size.gather(1, index))

    def join(self, other: KeptTokens) -> KeptTokens:
        """These tokens and then the others."""
        return KeptTokens(*(torch.cat(pair, 1) for pair in zip(self, other, strict=True)))

    def where(self, rows: Bool[Tensor, "b"], other: KeptTokens) -> KeptTokens:
        """These tokens in the given rows, the others elsewhere."""
        flags = (rows.view(-1, *[1] * (x.dim() - 1)) for x in self)
        return KeptTokens(*(torch.where(f, x, y) for f, x, y in zip(flags, self, other, strict=True)))


@record("exact_cache")
class CacheState(NamedTuple):
    """Streaming state of an `ExactCache`, of constant size.

    Args:
        kept: the tokens of the cache, in the order of the text.
        chunk: the tokens of the unfinished chunk, each in the slot of its place.
        position: tokens of each row in the unfinished chunk.
        aligned: True only where every row is known to stand at the start of a chunk.
    """

    kept: KeptTokens
    chunk: KeptTokens
    position: Int[Tensor, "b"]
    aligned: bool = False


class ExactCache(nn.Module):
    """Softmax attention to the tokens of the query's own chunk, and to W tokens before it that are worth it.

    The size of a token's write, ``‖p_t‖`` with ``p_t = eta_t (v_t - what the memory held for k_t)``, says how much the
    memory did not know yet (`nestlearn.memory.scan_with_sizes`). At the end of each chunk every head keeps, of what it
    had and of the chunk, the W tokens with the largest sizes, their keys and values exactly. A query reads the cache
    and the tokens of its own chunk up to itself:

        y_t = Σ_s softmax_s(γ_h ⟨q_t, k_s⟩) v_s,        γ_h > 0 learned, q and k of unit norm

    The choice passes no gradient; keys, values and γ get theirs. A text read in any pieces gives the same outputs,
    since the choice is made at chunk ends only. (After arXiv 2607.02303, which keeps exact tokens beside a delta rule.)

    Args:
        size: W.
        chunk_size: of the memory.
        num_heads: heads.
        keep: ``"surprise"`` as above, or ``"recent"``: the most recent tokens that wrote anything, as a control.
    """

    def __init__(self, size: int, chunk_size: int, num_heads: int, keep: Keep = "surprise") -> None:
        super().__init__()
        self.size, self.chunk_size, self.num_heads, self.keep = size, chunk_size, num_heads, keep
        self.log_scale = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def vector_parameters(self) -> list[nn.Parameter]:
        """Parameters that are no linear maps: an optimizer applies no matrix rule to them."""
        return [self.log_scale]

    def reset_parameters(self) -> None:
        """A scale at which a key that equals the query has e^8 times the weight of an orthogonal one."""
        nn.init.constant_(self.log_scale, math.log(8.0))

    def forward(
        self,
        q: Float[Tensor, "b h t d"],
        k: Float[Tensor, "b h t d"],
        v: Float[Tensor, "b h t d"],
        sizes: Float[Tensor, "b h t"],
        state: CacheState | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
    ) -> tuple[Float[Tensor, "b h t d"], CacheState]:
        """What the queries read, 0 at masked tokens, and the state after the last token.

        A reset empties the cache of its row. Tokens without a finite size are read by nobody after their own chunk.
        """
        q, k, v, sizes = (x.transpose(1, 2) for x in (q, k, v, sizes))
        # A later token that is not finite would reach earlier outputs as 0 * NaN; the memory's own read is NaN there.
        k, v = (torch.where(x.isfinite().all(-1, keepdim=True), x, 0) for x in (k, v))
        state = self.start(k) if state is None else state
        count = k.shape[1]
        span = min(self.chunk_size, count)
        clock = Clock.start(state.position, state.aligned, count, self.chunk_size, span, mask, reset)
        kept, chunk = state.kept, state.chunk
        outputs = []
        cut = [clock.cut(x) for x in (q, k, v, sizes.nan_to_num(0.0, 0.0, 0.0))]
        for here, q_i, *token in zip(clock.spans, *cut, strict=True):
            tokens = KeptTokens(*token)
            outputs.append(self._read(q_i, tokens, kept, chunk, here).flatten(2))
            kept, chunk = self._advance(tokens, kept, chunk, here)
        y = clock.join(outputs).unflatten(-1, (self.num_heads, -1))
        chunk = KeptTokens(*(x.contiguous() for x in chunk))  # no view of a larger tensor
        return y.transpose(1, 2), CacheState(kept, chunk, clock.position, clock.aligned)

    def start(self, like: Float[Tensor, "b t h d"]) -> CacheState:
        """The state before the first token."""
        rows, _, heads, width = like.shape

        def empty(slots: int) -> KeptTokens:
            zeros = like.new_zeros(rows, slots, heads, width)
            return KeptTokens(zeros, zeros, zeros[..., 0])

        position = torch.zeros(rows, dtype=torch.long, device=like.device)
        return CacheState(empty(self.size), empty(self.chunk_size), position, True)

    def _read(self, q: Tensor, tokens: KeptTokens, kept: KeptTokens, chunk: KeptTokens, span: Span) -> Tensor:
        """The answers to the queries ``[b, c, h, d]`` of one span."""
        length = q.shape[1]
        own = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[None]
        before = torch.ones(1, length, 1, dtype=torch.bool, device=q.device)
        if span.valid is not None:
            own = own & span.valid.unsqueeze(1) | torch.eye(length, dtype=torch.bool, device=q.device)
        if span.reset is not None:
            document = (span.reset if span.valid is None else span.reset & span.valid).cumsum(1)
            own = own & (document.unsqueeze(2) == document.unsqueeze(1))
            before = (document == 0).unsqueeze(2)
        pieces = [(tokens, own.unsqueeze(1)), (kept, (before.unsqueeze(1) & (kept.size > 0).mT.unsqueeze(2)))]
        if not isinstance(span.phase, int):
            earlier = torch.arange(self.chunk_size, device=q.device) < span.phase.unsqueeze(1)
            pieces.append((chunk, (before & earlier.unsqueeze(1)).unsqueeze(1)))
        shape = (q.shape[0], self.num_heads, length)
        seen = torch.cat([flags.expand(*shape, flags.shape[-1]) for _, flags in pieces], -1)
        keys, values = (torch.cat([x[i] for x, _ in pieces], 1).transpose(1, 2) for i in (0, 1))
        scale = self.log_scale.to(q.dtype).exp().view(-1, 1, 1)
        answers = nn.functional.scaled_dot_product_attention(q.transpose(1, 2) * scale, keys, values, seen, scale=1.0)
        return answers.transpose(1, 2)

    def _advance(
        self, tokens: KeptTokens, kept: KeptTokens, chunk: KeptTokens, span: Span
    ) -> tuple[KeptTokens, KeptTokens]:
        """The cache and the unfinished chunk after a span."""
        if span.valid is None and tokens.k.shape[1] == self.chunk_size:
            return self._choose(kept, tokens), chunk
        # Tokens of the last document go to the slot of their place in its chunk; others to one that is cut off.
        places = span.places(tokens.k.device).expand(tokens.k.shape[:2])
        counted = torch.ones_like(places, dtype=torch.bool) if span.valid is None else span.valid
        if span.reset is not None:
            begun = (span.reset & counted).cumsum(1)
            counted = counted & (begun == begun[:, -1:])
            kept = kept._replace(size=torch.where((begun[:, -1] > 0).view(-1, 1, 1), 0, kept.size))
        slot = torch.where(counted, places, self.chunk_size)
        row = torch.arange(len(slot), device=slot.device).unsqueeze(1)

        def put(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat([old, old[:, :1]], 1).index_put((row, slot), new)[:, :-1]

        chunk = KeptTokens(*(put(old, new) for old, new in zip(chunk, tokens, strict=True)))
        ends = span.ends
        if isinstance(ends, bool):
            return (self._choose(kept, chunk) if ends else kept), chunk
        return self._choose(kept, chunk).where(ends, kept), chunk

    def _choose(self, kept: KeptTokens, chunk: KeptTokens) -> KeptTokens:
        """The tokens that the cache keeps when a chunk has ended, in the order of the text."""
        both = kept.join(chunk)
        score = both.size.detach()
        if self.keep == "recent":
            order = torch.arange(1, score.shape[1] + 1, device=score.device, dtype=score.dtype).view(1, -1, 1)
            score = torch.where(score > 0, order, 0)
        return both.take(score.topk(self.size, 1).indices.sort(1).values)

    def flops_per_token(self, context_length: int, width: int) -> int:
        """Forward FLOPs per token of all heads of this width: products with keys and values."""
        seen = min(self.size, context_length) + min(self.chunk_size, context_length) / 2
        return int(4 * self.num_heads * width * seen)

    def extra_repr(self) -> str:
        return f"{self.size}, chunk_size={self.chunk_size}, keep={self.keep!r}"
