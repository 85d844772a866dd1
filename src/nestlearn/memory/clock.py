"""Where tokens go: the static grid of spans that the chunked engine runs over.

A span is a run of tokens of one row that share one anchor. Rows of different phase, masked tokens and resets make
the spans of the rows differ; the grid holds them all at fixed shapes, without asking the device for a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

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


def known_empty(flags: Bool[Tensor, "..."]) -> bool:
    """Whether no flag is set, if looking is free: on an accelerator, or while compiling, the answer is always False."""
    if flags.device.type != "cpu" or torch.compiler.is_compiling() or type(flags) is not Tensor:
        return False
    return not bool(flags.any())


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

    def repeat(self, heads: int) -> Grid:
        """The grid of ``heads`` rows for every row."""

        def each(x: Tensor) -> Tensor:
            return x.repeat_interleave(heads, 0)

        reset = None if self.reset is None else each(self.reset)
        return Grid(each(self.index), each(self.valid), reset, each(self.phase), each(self.end))


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
    boundary: int | None = None,
) -> Grid:
    """Assign the tokens of every row to spans that end where a chunk ends or after ``span`` tokens.

    Every chunk begins a span, so that the last span of a chunk is shorter where ``span`` does not divide it.
    ``boundary`` also ends spans at its multiples inside a chunk (memories of two chunk sizes share a grid).

    A reset inside a span needs no new span: after it the anchor is the initial weights, known beforehand. So a row
    needs at most ``t // span + t // boundary + 2`` spans, however many resets it has.
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
    boundary = chunk_size if boundary is None else boundary
    ends = phase % boundary == 0
    ends = ends if restart is None else ends & ~restart
    following = torch.where(ends, slots, tokens).flip(1).cummin(1).values.flip(1)
    following = torch.cat([following[:, 1:], following.new_full((rows, 1), tokens)], 1)

    ragged = boundary % span != 0 and span < tokens
    firsts, lasts = _spans(following, count, tokens, boundary, span, several=restart is not None or ragged)
    slot = firsts[..., None] + torch.arange(span, device=device)
    valid = slot < lasts[..., None]
    slot = slot.clamp(max=tokens - 1)

    def in_slots(x: Tensor) -> Tensor:
        return x.gather(1, slot.flatten(1)).view_as(slot)

    first_phase = torch.where(valid[..., 0], phase.gather(1, firsts.clamp(max=tokens - 1)), -1)
    last_phase = phase.gather(1, (count - 1).clamp(min=0)[:, None]).squeeze(1)
    end = torch.where(count > 0, (last_phase + 1) % chunk_size, position)
    return Grid(in_slots(order), valid, None if restart is None else in_slots(restart) & valid, first_phase, end)


def _spans(
    following: Tensor, count: Tensor, tokens: int, chunk_size: int, span: int, several: bool
) -> tuple[Tensor, Tensor]:
    """First and one-past-last slot of every span, ``[b, n]``."""
    bound = tokens // span + 2 + (tokens // chunk_size if several else 0)
    first, firsts, lasts = torch.zeros_like(count), [], []
    for _ in range(min(bound, tokens)):
        # On a CPU looking at the values costs nothing, and most grids need far fewer spans than the bound.
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
