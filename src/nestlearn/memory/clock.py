"""The clock: which tokens form a span, and where chunks begin and end.

A span is a run of tokens of one row that share one anchor. Where all rows stand at the start of a chunk and every token
is real, spans are slices of the sequence. Rows inside a chunk, masked tokens and resets make the spans of the rows
differ; then a grid holds them all at fixed shapes, without asking the device for a value.

    clock = Clock.start(position, aligned, tokens, chunk_size, span_length(chunk_size, tokens), mask, reset)
    for span, x in zip(clock.spans, clock.cut(x)):
        ...                                        # span.begins, span.ends: rows whose chunk begins or ends
    y = clock.join(outputs)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from .types import Weights

LONGEST_SPAN = 128


def span_length(chunk_size: int, tokens: int, longest: int = LONGEST_SPAN) -> int:
    """Tokens processed at once: the chunk, or an equal part of a long one (its parts share one anchor)."""
    length = chunk_size
    if chunk_size > longest:
        divisor = next(n for n in range(longest, 0, -1) if chunk_size % n == 0)
        # A long chunk without a useful divisor is done in one piece.
        length = divisor if divisor >= longest // 4 else chunk_size
    return min(length, tokens)


def short_span(chunk_size: int, tokens: int, longest: int) -> int:
    """Tokens processed at once where that must be few: a large divisor of the chunk, or ``longest`` of any chunk."""
    longest = max(1, min(longest, chunk_size))
    divisor = next(n for n in range(longest, 0, -1) if chunk_size % n == 0)
    return min(divisor if 2 * divisor > longest else longest, tokens)


def looking_is_free(x: Tensor) -> bool:
    """Whether the host can see values without waiting: not on an accelerator, and not while compiling."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) is Tensor


def known_empty(flags: Bool[Tensor, "..."]) -> bool:
    """Whether no flag is set, if looking is free; else the answer is always False."""
    return looking_is_free(flags) and not bool(flags.any())


def beyond(x: Float[Tensor, "*b d"], limit: float) -> Bool[Tensor, "*b"]:
    """Vectors with an entry that is NaN or larger than ``limit``."""
    x = x.detach()
    if looking_is_free(x) and x.numel():
        # Nearly always there is none. NaN compares False.
        low, high = torch.aminmax(x)
        if -limit <= low and high <= limit:
            return torch.zeros(x.shape[:-1], dtype=torch.bool)
    return ~(x.abs() <= limit).all(-1)


class Grid(NamedTuple):
    """``n`` spans of ``c`` slots for each of ``b`` rows.

    ``index`` is the token in a slot, ``valid`` whether the slot holds one, ``reset`` whether its token resets the
    row, ``phase`` the position in the chunk of the span's first token (-1 in an empty span), ``end`` the position after
    the last token. Valid slots of a span come first.
    """

    index: Int[Tensor, "b n c"]  # type: ignore[assignment]  # hides tuple.index, which no grid needs
    valid: Bool[Tensor, "b n c"]
    reset: Bool[Tensor, "b n c"] | None
    phase: Int[Tensor, "b n"]
    end: Int[Tensor, "b"]


def compaction(mask: Bool[Tensor, "b t"]) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b"]]:
    """Indices that move the True tokens of every row to its front, in order, and how many there are.

    Entries beyond the count are 0.
    """
    rows, tokens = mask.shape
    slots = torch.arange(tokens, device=mask.device).expand(rows, tokens)
    rank = torch.where(mask, mask.cumsum(1) - 1, tokens)
    order = torch.zeros(rows, tokens + 1, dtype=torch.long, device=mask.device)
    return order.scatter(1, rank, slots)[:, :tokens], mask.sum(1)


def place(
    position: Int[Tensor, "b"],
    tokens: int,
    chunk_size: int,
    span: int,
    mask: Bool[Tensor, "b t"] | None,
    reset: Bool[Tensor, "b t"] | None,
    cut_resets: bool = False,
) -> Grid:
    """Assign the tokens of every row to spans that end where a chunk ends or after ``span`` tokens.

    Every chunk begins a span, so that the last span of a chunk is shorter where ``span`` does not divide it.

    A reset inside a span needs no new span: after it the anchor is the initial weights, known beforehand. So a row
    needs at most ``t // span + t // chunk_size + 2`` spans, however many resets it has. With ``cut_resets`` each reset
    begins a span.
    """
    rows, device = position.shape[0], position.device
    slots = torch.arange(tokens, device=device)
    order, count = slots.expand(rows, tokens), torch.full_like(position, tokens)
    if mask is not None:
        order, count = compaction(mask)
    present = slots < count[:, None]
    phase = (position[:, None] + slots) % chunk_size
    restart = None
    if reset is not None:
        restart = reset.gather(1, order) & present
        last = torch.where(restart, slots, -1).cummax(1).values
        phase = torch.where(last >= 0, slots - last, position[:, None] + slots) % chunk_size
    ends = phase % chunk_size == 0
    ends = ends if restart is None or cut_resets else ends & ~restart
    following = torch.where(ends, slots, tokens).flip(1).cummin(1).values.flip(1)
    following = torch.cat([following[:, 1:], following.new_full((rows, 1), tokens)], 1)

    ragged = chunk_size % span != 0 and span < tokens
    bound = tokens // span + 2 + (tokens // chunk_size if restart is not None or ragged else 0)
    firsts, lasts = _spans(following, count, tokens, span, tokens if cut_resets and restart is not None else bound)
    slot = firsts[..., None] + torch.arange(span, device=device)
    valid = slot < lasts[..., None]
    slot = slot.clamp(max=tokens - 1)

    def in_slots(x: Tensor) -> Tensor:
        return x.gather(1, slot.flatten(1)).view_as(slot)

    first_phase = torch.where(valid[..., 0], phase.gather(1, firsts.clamp(max=tokens - 1)), -1)
    last_phase = phase.gather(1, (count - 1).clamp(min=0)[:, None]).squeeze(1)
    end = torch.where(count > 0, (last_phase + 1) % chunk_size, position)
    return Grid(in_slots(order), valid, None if restart is None else in_slots(restart) & valid, first_phase, end)


def _spans(following: Tensor, count: Tensor, tokens: int, span: int, bound: int) -> tuple[Tensor, Tensor]:
    """First and one-past-last slot of every span, ``[b, n]``, at most ``bound`` of them."""
    first, firsts, lasts = torch.zeros_like(count), [], []
    for _ in range(min(bound, tokens)):
        # On a CPU reading the values costs nothing, and most grids need far fewer spans than the bound.
        if firsts and known_empty(first < count):
            break
        boundary = following.gather(1, first.clamp(max=tokens - 1)[:, None]).squeeze(1)
        last = torch.minimum(torch.minimum(first + span, boundary), count)
        last = torch.maximum(last, first)
        firsts.append(first)
        lasts.append(last)
        first = last
    return torch.stack(firsts, 1), torch.stack(lasts, 1)


def scatter_outputs(y: Tensor, grid: Grid, tokens: int) -> Tensor:
    """Slots back to tokens; tokens without a slot (masked) give 0."""
    rows, width = y.shape[0], y.shape[-1]
    target = torch.where(grid.valid, grid.index, tokens).flatten(1)
    out = y.new_zeros(rows, tokens + 1, width)
    return out.scatter(1, target.unsqueeze(-1).expand(-1, -1, width), y.flatten(1, 2))[:, :tokens]


Rows = bool | Bool[Tensor, "*b"]
"""A flag of every row: each row's own, or one that is known to hold for all."""


def choose(rows: Rows, yes: Weights, no: Weights) -> Weights:
    """The weights ``yes`` of the flagged rows, and ``no`` of the others."""
    if isinstance(rows, bool):
        return yes if rows else no
    flags = {w.dim(): rows.view(*rows.shape, *[1] * (w.dim() - rows.dim())) for w in no.values()}
    return {name: torch.where(flags[w.dim()], yes[name], w) for name, w in no.items()}


class Span(NamedTuple):
    """One span of a `Clock`, the same for every map of a memory.

    Args:
        phase: place of the first token in its chunk (-1 in a row whose span is empty); one number where it is the
            same in all rows.
        length: tokens, or slots of tokens.
        chunk_size: tokens of a chunk.
        valid: slots that hold a token (None: all). They come first.
        reset: tokens that reset their row (None: none).
    """

    phase: int | Int[Tensor, "*b"]
    length: int
    chunk_size: int
    valid: Bool[Tensor, "*b c"] | None = None
    reset: Bool[Tensor, "*b c"] | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Span:
        """``change`` applied to every tensor."""
        phase = self.phase if isinstance(self.phase, int) else change(self.phase)
        flags = (None if flag is None else change(flag) for flag in (self.valid, self.reset))
        return Span(phase, self.length, self.chunk_size, *flags)

    @property
    def begins(self) -> Rows:
        """Rows whose chunk begins with the first token."""
        return self.phase % self.chunk_size == 0 if isinstance(self.phase, int) else self.phase == 0

    @property
    def ends(self) -> Rows:
        """Rows whose chunk ends with the last token."""
        if self.valid is None:
            return (self.phase + self.length) % self.chunk_size == 0
        last = self.valid & ~torch.cat([self.valid[:, 1:], torch.zeros_like(self.valid[:, :1])], 1)
        return (self.closing(self.valid.device) & last).any(-1)

    def after(self, position: Int[Tensor, "*b"]) -> Int[Tensor, "*b"]:
        """The position of every row in its chunk after the span, given that before it."""
        if isinstance(self.phase, int):
            return torch.full_like(position, (self.phase + self.length) % self.chunk_size)
        places = self.places(position.device)
        if self.valid is None:
            return (places[..., -1] + 1) % self.chunk_size
        last = places.gather(-1, (self.valid.sum(-1, keepdim=True) - 1).clamp(min=0)).squeeze(-1)
        return torch.where(self.valid.any(-1), (last + 1) % self.chunk_size, position)

    def places(self, device: torch.device) -> Int[Tensor, "*#b c"]:
        """The place of every token in its chunk, where chunks are counted anew from a reset."""
        slots = torch.arange(self.length, device=device)
        place = (self.phase if isinstance(self.phase, int) else self.phase.unsqueeze(-1)) + slots.unsqueeze(0)
        if self.reset is None:
            return place
        last = torch.where(self.reset, slots, -1).cummax(-1).values
        return torch.where(last >= 0, slots - last, place)

    def closing(self, device: torch.device) -> Bool[Tensor, "*#b c"]:
        """The last token of a chunk. There is one at most: a span is no longer than a chunk, and goes on beyond the
        end of one only where its next token resets the row."""
        last = (self.places(device) + 1) % self.chunk_size == 0
        return last if self.valid is None else last & self.valid


@dataclass(frozen=True)
class Clock:
    """Where the tokens of one call go. Make one with `Clock.start`.

    Args:
        spans: one after another.
        tokens: of the call.
        position: of every row in its chunk, after the last token.
        aligned: whether all rows are known to stand at the start of a chunk then.
        grid: which token stands in which slot (None: spans are slices of the sequence).
    """

    spans: tuple[Span, ...]
    tokens: int
    position: Int[Tensor, "b"]
    aligned: bool
    grid: Grid | None = None

    @classmethod
    def start(
        cls,
        position: Int[Tensor, "b"],
        aligned: bool,
        tokens: int,
        chunk_size: int,
        span: int,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        cut_resets: bool = False,
    ) -> Clock:
        """The clock of ``tokens`` more tokens, in spans of at most ``span``.

        Args:
            position: of every row in its chunk, before the first token.
            aligned: whether all rows are known to stand at the start of a chunk.
            chunk_size: tokens of a chunk.
            mask: False marks tokens that take no part.
            reset: True starts a chunk with that token.
            cut_resets: whether that token also begins a span.
        """
        whole = chunk_size % span == 0 or span >= tokens
        if aligned and whole and mask is None and reset is None:
            firsts = range(0, tokens, span)
            spans = tuple(Span(first % chunk_size, min(span, tokens - first), chunk_size) for first in firsts)
            end = tokens % chunk_size
            return cls(spans, tokens, torch.full_like(position, end), end == 0)
        if tokens == 1 and mask is None and reset is None:
            return cls((Span(position, 1, chunk_size),), 1, (position + 1) % chunk_size, False)
        grid = place(position, tokens, chunk_size, span, mask, reset, cut_resets)
        flags = [None] * grid.index.shape[1] if grid.reset is None else grid.reset.unbind(1)
        columns = zip(grid.phase.unbind(1), grid.valid.unbind(1), flags, strict=True)
        length = grid.index.shape[2]
        spans = tuple(Span(phase, length, chunk_size, valid, flag) for phase, valid, flag in columns)
        return cls(spans, tokens, grid.end, False, grid)

    def cut(self, x: Shaped[Tensor, "b t ..."], empty: float = 0) -> Sequence[Tensor]:
        """The part ``[b, c, ...]`` of every span; slots without a token hold ``empty``.

        One operation for all spans, not slices: the gradient of a slice is a full-size tensor of zeros.
        """
        if self.grid is None:
            return x.split(self.spans[0].length, 1)
        row = torch.arange(x.shape[0], device=x.device)[:, None, None]
        valid = self.grid.valid.view(*self.grid.valid.shape, *[1] * (x.dim() - 2))
        return torch.where(valid, x[row, self.grid.index], empty).unbind(1)

    def join(self, parts: Sequence[Tensor]) -> Float[Tensor, "b t d"]:
        """The parts ``[b, c, d]`` of all spans in the order of their tokens; tokens without a slot (masked) give 0."""
        if self.grid is None:
            return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
        return scatter_outputs(torch.stack(list(parts), 1), self.grid, self.tokens)


def poisoned_from(
    bad: Bool[Tensor, "*b t"], mask: Bool[Tensor, "*b t"] | None, reset: Bool[Tensor, "*b t"] | None
) -> Bool[Tensor, "*b t"]:
    """Tokens at or after a ``bad`` one of their row, up to the next reset."""
    slots = torch.arange(bad.shape[-1], device=bad.device)
    last_bad = torch.where(bad, slots, -1).cummax(-1).values
    if reset is None:
        return last_bad >= 0
    restart = reset if mask is None else reset & mask
    return (last_bad >= 0) & (last_bad >= torch.where(restart, slots, -1).cummax(-1).values)


def before_reset(mask: Bool[Tensor, "*b t"] | None, reset: Bool[Tensor, "*b t"]) -> Bool[Tensor, "*b t"]:
    """Tokens before the first reset of their row. A reset at a masked token has no effect."""
    return (reset if mask is None else reset & mask).cumsum(-1) == 0
