"""Perception, memory, inference: a mixer that reads a working memory and a long-term memory (PMI)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.fields import Between, Count, Positive, Size
from nestlearn.memory.clock import Clock, Span, choose
from nestlearn.memory.types import Weights
from nestlearn.nn.common import Mixer, RMSNorm, admit, check_tokens, largest_factor, poison, wide_dtype
from nestlearn.nn.config import MixerConfig, register_mixer
from nestlearn.nn.conv import ShortConv
from nestlearn.nn.cross_attention import CrossAttention, check_sets
from nestlearn.nn.long_term_memory import LongTermMemory, Merge
from nestlearn.nn.state import record
from nestlearn.nn.working_memory import WorkingMemory, check_competition


@register_mixer("pmi")
@dataclass(frozen=True)
class PMIConfig(MixerConfig):
    """Configuration of `PMI`.

    Args:
        slots: N, slots of the working memory, and of each segment of the long-term memory.
        topk: tokens of a chunk that a slot takes in; at most ``slots`` and ``chunk_size``.
        segments: C, segments of the long-term memory.
        chunk_size: tokens between two writes.
        share: part of the working read in what is read; the rest is that of the long-term memory.
        merge: how working memory enters long-term memory: by an ``"outer"`` product, or by a ``"sum"`` as in the
            published code.
        long_term: the long-term memory before the first token: ``"learned"``; ``"random"``, drawn anew for every batch
            as in the published code, so that two calls differ; or ``"none"``, no long-term memory.
        persistent: whether long-term memory outlasts the documents of a stream: a reset then forgets the working memory
            only. It lasts as long as the caller keeps the state.
        conv_size: width of the depthwise causal convolution on the inputs; 0 for none.
        norm_eps: epsilon of the norm.

    Raises:
        ValueError: ``topk`` larger than the slots or the chunk, or a persistent memory that is not there.
    """

    slots: Size = 8
    topk: Size = 5
    segments: Size = 5
    chunk_size: Size = 16
    share: Annotated[float, Between(0, 1)] = 0.7
    merge: Merge = "outer"
    long_term: Literal["learned", "random", "none"] = "learned"
    persistent: bool = False
    conv_size: Count = 4
    norm_eps: Positive = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_competition(self.slots, self.topk)
        if self.topk > self.chunk_size:
            raise ValueError(
                f"topk={self.topk} is larger than chunk_size={self.chunk_size}: every token of a chunk would win. Use "
                "a smaller topk or longer chunks."
            )
        if self.persistent and self.long_term == "none":
            raise ValueError("persistent=True needs a long-term memory; use long_term='learned' or persistent=False.")

    @property
    def outlasts_documents(self) -> bool:
        return self.persistent

    @property
    def work_period(self) -> int:
        return self.chunk_size

    def build(self, d_model: int, num_heads: int) -> PMI:
        return PMI(d_model, num_heads, self)


@record("pmi")
class PMIState(NamedTuple):
    """Streaming state of `PMI`, of constant size.

    Args:
        params: the memories, ``working`` ``[b, n, d]`` and, if there is one, ``long_term`` ``[b, c, n, d]``.
        chunk: inputs of the unfinished chunk, each at its place; later places hold what nothing reads.
        position: tokens of each row in the unfinished chunk.
        conv: the tail of the convolution.
        aligned: True only where every row is known to stand at the start of a chunk.
    """

    params: Weights
    chunk: Float[Tensor, "b s d"]
    position: Int[Tensor, "b"]
    conv: Float[Tensor, "b w d"] | None
    aligned: bool = False


class TwoSourceRead(nn.Module):
    """``U = α U_w + (1 - α) U_wl``, and U_wl is the attention of the long-term read over the working read (PMI).

    Args:
        d_model: width of both reads.
        num_heads: heads; must divide ``d_model``.
        share: α.

    Raises:
        ValueError: reads of unequal length or width, or heads that do not divide the width.

    Example:
        >>> both = TwoSourceRead(8, num_heads=2)
        >>> both(torch.randn(1, 5, 8), torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, d_model: int, num_heads: int, share: float = 0.7) -> None:
        super().__init__()
        self.share = share
        self.relate = CrossAttention(d_model, num_heads)

    def forward(
        self, working: Float[Tensor, "b t d"], long_term: Float[Tensor, "b t d"], causal: bool = False
    ) -> Float[Tensor, "b t d"]:
        """U of every token; ``causal``: the long-term read of a token sees the working reads up to its own."""
        check_sets(self.relate.d_model, working=working, long_term=long_term)
        if working.shape != long_term.shape:
            raise ValueError(
                f"reads of unequal length: working {tuple(working.shape)}, long-term {tuple(long_term.shape)}. Read "
                "both memories with the same tokens."
            )
        tokens, allowed = working.shape[1], None
        if causal:
            allowed = torch.ones(1, tokens, tokens, dtype=torch.bool, device=working.device).tril()
        return self.share * working + (1 - self.share) * self.relate(long_term, working, allowed)

    def reset_parameters(self) -> None:
        """PyTorch's default initial values."""
        self.relate.reset_parameters()


class PMI(Mixer):
    r"""Perception, memory, inference over a stream (PMI, arXiv 2310.09297), in chunks of ``chunk_size`` tokens.

        h_t = conv(x)_t
        U_w,t = read(M_w, h_t),  U_l,t = read(M_l, h_t)                  memories as the chunk of t began
        U_wl,t = attention of U_l,t over U_w,s of its chunk, s <= t
        y_t = W_o norm(α U_w,t + (1 - α) U_wl,t)
        at the end of a chunk: M_w ← write(M_w, all h of the chunk),  M_l ← LN(M_l + a ⊗ M_w)

    So tokens are grouped by their place in the document: chunk i holds tokens ``i c .. i c + c - 1``, all of them read
    the memories as chunks before i have left them, and an unfinished chunk writes nothing. A reset begins a chunk, and
    masked tokens have no place. `WorkingMemory`, `LongTermMemory` and `TwoSourceRead` are the parts.

    PMI counts steps by layers and reads one whole input per step; here a step is a chunk, so that no token sees a
    later one.

    Args:
        d_model: width of input, output and slots.
        num_heads: heads of every attention; must divide ``d_model``.
        config: sizes, and what is left out; `PMIConfig`.

    Raises:
        ValueError: for sizes that do not fit, with the fix.

    Example:
        >>> import torch
        >>> from nestlearn.nn import PMIConfig
        >>> layer = PMIConfig(slots=4, topk=2, chunk_size=8).build(16, num_heads=2)
        >>> x = torch.randn(1, 20, 16)
        >>> y, state = layer(x[:, :13])
        >>> rest, state = layer(x[:, 13:], state)
        >>> torch.allclose(torch.cat([y, rest], 1), layer(x)[0], atol=1e-5)
        True
    """

    def __init__(self, d_model: int, num_heads: int, config: PMIConfig) -> None:
        super().__init__()
        config.check_sizes(d_model, num_heads)
        self.d_model, self.chunk_size, self.persistent = d_model, config.chunk_size, config.persistent
        self.conv = ShortConv(d_model, config.conv_size) if config.conv_size else None
        self.working = WorkingMemory(d_model, config.slots, num_heads, config.topk)
        self.long_term: LongTermMemory | None = None
        self.infer: TwoSourceRead | None = None
        if config.long_term != "none":
            self.long_term = LongTermMemory(
                d_model, config.slots, config.segments, num_heads, config.merge, config.long_term
            )
            self.infer = TwoSourceRead(d_model, num_heads, config.share)
        self.norm = RMSNorm(d_model, eps=config.norm_eps)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: PMIState | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        *,
        writes: bool = True,
        return_state: bool = True,
    ) -> tuple[Float[Tensor, "b t d"], PMIState | None]:
        """Read tokens, answer each, and write finished chunks; the protocol of `nestlearn.nn.Mixer`."""
        check_tokens(x, self.d_model)
        x, bad = admit(x, mask, largest_factor(x))
        reset = reset if reset is None or mask is None else reset & mask
        h, tail = x, None
        if self.conv is not None:
            h, tail = self.conv(x, None if state is None else state.conv, mask, reset)
        h = poison(h, bad)
        fresh = self._fresh(x) if state is None or reset is not None else None
        state = self._start(h, fresh) if state is None else state
        held, tokens, chunk = state.params, x.shape[1], state.chunk
        span = min(self.chunk_size, tokens)
        clock = Clock.start(state.position, state.aligned, tokens, self.chunk_size, span, mask, reset, cut_resets=True)
        outputs = []
        for here, piece in zip(clock.spans, clock.cut(h), strict=True):
            if here.reset is not None and fresh is not None:
                held = self._restart(here.reset.any(1), held, fresh)
            chunk = _put(chunk, piece, here)
            outputs.append(_take(self._read(held, chunk), here, piece.shape[1]))
            if writes and here.ends is not False:
                held = choose(here.ends, self._write(held, chunk), held)
        y = self.out(self.norm(clock.join(outputs)))
        if not return_state:
            return y, None
        return y, PMIState(held, chunk.contiguous(), clock.position, tail, clock.aligned)

    def _fresh(self, x: Float[Tensor, "b t d"]) -> Weights:
        """Both memories before the first token."""
        parts = {"working": self.working, "long_term": self.long_term}
        return {name: part.start(len(x), wide_dtype(x)) for name, part in parts.items() if part is not None}

    def _start(self, h: Float[Tensor, "b t d"], fresh: Weights | None) -> PMIState:
        assert fresh is not None
        chunk = h.new_zeros(len(h), self.chunk_size, self.d_model)
        position = torch.zeros(len(h), dtype=torch.long, device=h.device)
        return PMIState(fresh, chunk, position, None, True)

    def _restart(self, rows: Bool[Tensor, "b"], held: Weights, fresh: Weights) -> Weights:
        """Memories of the rows whose document begins. What a token that is not finite has destroyed never persists."""
        new = choose(rows, fresh, held)
        if self.persistent:
            lost = ~held["long_term"].isfinite().flatten(1).all(1)
            new |= choose(rows & lost, {"long_term": fresh["long_term"]}, {"long_term": held["long_term"]})
        return new

    def _read(self, held: Weights, chunk: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """U for every place of the chunk; those after a token that is not finite are NaN."""
        bad = ~chunk.isfinite().all(-1)
        h = torch.where(bad.unsqueeze(-1), 0, chunk)
        u = self.working.read(held["working"], h)
        if self.long_term is not None and self.infer is not None:
            u = self.infer(u, self.long_term.read(held["long_term"], h), causal=True)
        return poison(u, bad.cummax(1).values)

    def _write(self, held: Weights, chunk: Float[Tensor, "b s d"]) -> Weights:
        """Both memories after a whole chunk."""
        new = {"working": self.working.write(held["working"], chunk)}
        if self.long_term is not None:
            new["long_term"] = self.long_term.write(held["long_term"], new["working"])
        return new

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token at this context length (multiply-add = 2), writes included."""
        tokens, d = min(self.chunk_size, context_length), self.d_model
        total = self.working.flops(tokens)
        if self.long_term is not None and self.infer is not None:
            total += self.long_term.flops(tokens) + self.infer.relate.flops(tokens, tokens)
        conv = 0 if self.conv is None else self.conv.flops_per_token(context_length)
        return total // tokens + conv + 2 * d * d


def _put(chunk: Float[Tensor, "b s d"], piece: Float[Tensor, "b c d"], span: Span) -> Float[Tensor, "b s d"]:
    """The chunk with the tokens of a span at their places."""
    if isinstance(span.phase, int):
        end = span.phase + piece.shape[1]
        return torch.cat([chunk[:, : span.phase].to(piece.dtype), piece, chunk[:, end:].to(piece.dtype)], 1)
    size = chunk.shape[1]
    places = span.places(piece.device).expand(piece.shape[:2])
    slot = places if span.valid is None else torch.where(span.valid, places, size)
    padded = F.pad(chunk.to(piece.dtype), (0, 0, 0, 1))
    return padded.scatter(1, slot.unsqueeze(-1).expand_as(piece), piece)[:, :size]


def _take(u: Float[Tensor, "b s d"], span: Span, count: int) -> Float[Tensor, "b c d"]:
    """What was computed at the places of the span's tokens."""
    if isinstance(span.phase, int):
        return u[:, span.phase : span.phase + count]
    places = span.places(u.device).expand(len(u), count).clamp(0, u.shape[1] - 1)
    return u.gather(1, places.unsqueeze(-1).expand(-1, -1, u.shape[-1]))
