"""Segments: the unit in which levels learn from the next-token loss, in Hope (signal "loss") and in stacked models.

A segment of Hope is ``segment_length`` real tokens of one row, from the row's first token or its last reset on. When it
is complete, the gradient of its next-token losses is written into the levels, and later tokens read the result:

    losses = -sum_{t < S} ln p(x_{t+1} | tokens up to t),   errors = d losses / d (outputs of the levels' maps)

Targets are inside the segment only, so nothing is learned from a token that has not been read. A segment that is given
whole is read once and written. A segment that came in pieces (token by token, rows of different phase) is read again
from its start, with gradients, by the rows that complete it; the state at its start and its ids are kept for that. Both
ways give the same function of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.models.cache import LayerState, Segment
from nestlearn.nn.cms import ContinuumMemory, WriteLevels
from nestlearn.nn.cms.tape import Factors, Tape, gradients, segment_factors, usable
from nestlearn.nn.state import detach, index_rows, put_rows

if TYPE_CHECKING:
    from nestlearn.models.modeling import HopeModel

Layers = list[LayerState]
S = TypeVar("S")


def next_token_nats(logits: Float[Tensor, "b _ v"], ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t-1"]:
    """``-ln p(x_{t+1} | x_{<=t})`` of every token but the first of a segment, in float32 or wider.

    Args:
        logits: of the first ``t - 1`` tokens or more.
        ids: the tokens of the segment; a negative one, behind the end of a shorter row, counts 0.

    Example:
        >>> next_token_nats(torch.zeros(1, 2, 4), torch.tensor([[0, 3, -1]]))
        tensor([[1.3863, 0.0000]])
    """
    logits = logits[:, : ids.shape[1] - 1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = ids[:, 1:].flatten().long().clamp(min=-1).to(wide.device)
    nats = F.cross_entropy(wide.flatten(0, 1), targets, reduction="none", ignore_index=-1)
    return nats.view(ids.shape[0], -1)


def learn_segment(
    run: Callable[[Tape], tuple[Tensor, S]],
    logits_of: Callable[[Tensor], Tensor],
    absorb: Callable[[S, dict[Hashable, Factors]], S],
    ids: Int[Tensor, "b t"],
    *,
    second_order: bool = False,
    keep_graph: bool = False,
) -> tuple[Tensor, Float[Tensor, "b t-1"], S]:
    """Read a segment, and write the gradient of its next-token losses into the levels. Gradients must be on.

    Args:
        run: reads the segment with a tape: ``(output, state)``.
        logits_of: from the output to logits, of the first ``t - 1`` tokens or more.
        absorb: the state after factors are written.
        ids: the tokens of the segment, as of `next_token_nats`.
        second_order: whether outer gradients go through the factors.
        keep_graph: whether the graph of the segment is used again (an outer loss on its outputs).

    Returns:
        The output, `next_token_nats`, and the state.
    """
    tape = Tape(second_order)
    output, state = run(tape)
    nats = next_token_nats(logits_of(output), ids)
    return output, nats, absorb(state, segment_factors(nats.sum(), tape, keep_graph=keep_graph))


class Part(NamedTuple):
    """Columns that are read in one call. Inside of them no row completes a segment, starts a document, or changes
    between text and padding. ``real`` are the rows with text, ``starts`` the rows that start a document."""

    first: int
    last: int
    real: list[int]
    starts: list[int]


class SegmentReader:
    """Reads columns of tokens with a Hope model whose levels learn from the loss.

    Args:
        model: embedding, blocks and final norm.
        output_layer: from hidden states to logits.
        length: tokens of a segment.
    """

    def __init__(self, model: HopeModel, output_layer: nn.Module, length: int) -> None:
        self.model, self.output_layer, self.length = model, output_layer, length
        self.second_order = model.config.cms_meta == "second"

    def read(
        self,
        x: Float[Tensor, "b t d"],
        ids: Int[Tensor, "b t"],
        layers: Layers,
        segments: list[Segment],
        mask: Bool[Tensor, "b t"] | None,
        reset: Bool[Tensor, "b t"] | None,
        writes: WriteLevels,
        keep: bool,
        visit: bool = False,
    ) -> tuple[Float[Tensor, "b t d"], Layers, list[Segment], list[Tensor] | None]:
        """Read all columns.

        Args:
            keep: whether the state is used later. False leaves out writes that no later token reads.
            visit: whether to return the hidden states of all blocks.

        Returns:
            Hidden states of the last block, the states after it, unfinished segments, and the hidden states of all
            blocks.
        """
        self.x, self.ids, self.mask, self.reset, self.writes = x, ids, mask, reset, writes
        self.layers, self.segments, self.keep, self.fresh = layers, list(segments), keep, not layers
        self.visited: list[list[Tensor]] | None = [] if visit else None
        hidden, first = [], 0
        changes = self._changes()
        while first < x.shape[1]:
            piece = self._begin(first, changes)
            hidden.append(self._read_whole(piece) if self._is_whole(piece) else self._read_part(piece))
            first = piece.last
        visited = None
        if self.visited is not None:
            visited = [torch.cat(parts, 1) for parts in zip(*self.visited, strict=True)]
        if visited is not None and not torch.is_grad_enabled():
            visited = [part.detach() for part in visited]
        return torch.cat(hidden, 1), self.layers, self.segments, visited

    # -- which columns ------------------------------------------------------------------------------------------

    def _changes(self) -> list[int]:
        """Columns at which some row starts a document or changes between text and padding; and the end."""
        time, found = self.x.shape[1], torch.zeros(self.x.shape[1], dtype=torch.bool)
        if self.reset is not None:
            found |= self.reset.any(0).cpu()
        if self.mask is not None:
            found[1:] |= (self.mask[:, 1:] != self.mask[:, :-1]).any(0).cpu()
        return [*found.nonzero().flatten().tolist(), time]

    def _begin(self, first: int, changes: list[int]) -> Part:
        """The next piece. Rows that begin a segment there get a new `Segment`."""
        batch = range(self.x.shape[0])
        real = list(batch) if self.mask is None else self.mask[:, first].nonzero().flatten().tolist()
        starts = [] if self.reset is None else self.reset[:, first].nonzero().flatten().tolist()
        begun = [row for segment in self.segments for row in segment.rows.tolist()]
        new = [row for row in real if row in starts or row not in begun]
        self._divide(set(real), set(new))
        if new:
            rows = torch.tensor(new, device=self.x.device)
            state = self.layers if len(new) == len(batch) else index_rows(self.layers, rows)
            self.segments.append(
                Segment(
                    rows,
                    self.ids.new_zeros(len(new), 0),
                    torch.zeros(len(new), 0, dtype=torch.bool, device=self.x.device),
                    torch.tensor([row in starts for row in new], device=self.x.device),
                    tuple(state),
                )
            )
        free = [self.length - s.ids.shape[1] for s in self.segments if s.rows.tolist()[0] in real]
        # Where every row is padding there is no segment, and only the next change ends the piece.
        last = min([next(c for c in changes if c > first), *(first + n for n in free)])
        return Part(first, last, real, starts)

    def _divide(self, real: set[int], new: set[int]) -> None:
        """Split segments whose rows differ here: padding (stays), text (goes on), or a new document (is dropped)."""
        divided = []
        for segment in self.segments:
            rows = segment.rows.tolist()
            stay = [i for i, row in enumerate(rows) if row not in real]
            go = [i for i, row in enumerate(rows) if row in real and row not in new]
            for part in (stay, go):
                if len(part) == len(rows):
                    divided.append(segment)
                elif part:
                    divided.append(index_rows(segment, torch.tensor(part, device=segment.rows.device)))
        self.segments = divided

    def _is_whole(self, piece: Part) -> bool:
        """Whether all rows read the same whole segment here and learn from it."""
        one = len(self.segments) == 1 and len(self.segments[0].rows) == self.x.shape[0]
        return (
            one
            and self.writes is not False
            and self.segments[0].ids.shape[1] == 0
            and piece.last - piece.first == self.length
            and self._is_read_again(piece)
        )

    def _is_read_again(self, piece: Part) -> bool:
        return self.keep or piece.last < self.x.shape[1]

    # -- reading and learning -----------------------------------------------------------------------------------

    def _flags(self, piece: Part) -> tuple[Tensor | None, Tensor | None]:
        columns = slice(piece.first, piece.last)
        everyone = len(piece.real) == self.x.shape[0]
        mask = None if self.mask is None or everyone else self.mask[:, columns]
        reset = None if self.reset is None or not piece.starts else self.reset[:, columns]
        return mask, reset

    def _run(
        self, x: Tensor, layers: Layers, mask: Tensor | None, reset: Tensor | None, tape: Tape | None, visit: bool
    ) -> tuple[Tensor, Layers]:
        visited: list[Tensor] | None = [x] if visit and self.visited is not None else None
        hidden, layers = self.model.run_blocks(x, layers, mask, reset, self.writes, True, visited, tape)
        if visited is not None and self.visited is not None:
            self.visited.append(visited)
        return hidden, layers

    def _read_part(self, piece: Part) -> Tensor:
        """Read, and write the segments that are complete."""
        columns = slice(piece.first, piece.last)
        mask, reset = self._flags(piece)
        hidden, self.layers = self._run(self.x[:, columns], self.layers, mask, reset, None, True)
        for i, segment in enumerate(self.segments):
            if segment.rows.tolist()[0] in piece.real:
                ids = torch.cat((segment.ids, self.ids[segment.rows, columns]), 1)
                added = ids[:, segment.learns.shape[1] :]
                learns = torch.full_like(added, self.writes is not False, dtype=torch.bool)
                self.segments[i] = segment._replace(ids=ids, learns=torch.cat((segment.learns, learns), 1))
        due = [segment for segment in self.segments if segment.ids.shape[1] == self.length]
        self.segments = [segment for segment in self.segments if segment.ids.shape[1] < self.length]
        for segment in due if self._is_read_again(piece) else []:
            self._learn(segment)
        return hidden

    def _learn(self, segment: Segment) -> None:
        """Read a complete segment again from its start, and write it."""
        everyone = len(segment.rows) == self.x.shape[0]
        if bool(segment.learns.any()):
            after = self._read_again(segment)
        else:
            now = self.layers if everyone else index_rows(self.layers, segment.rows)
            after = [
                state._replace(cms=self._cms(i).advance_clock(state.cms, self.length)) for i, state in enumerate(now)
            ]
        self.layers = [
            now._replace(cms=new.cms if everyone else put_rows(now.cms, segment.rows, new.cms))
            for now, new in zip(self.layers, after, strict=True)
        ]

    def _read_again(self, segment: Segment) -> Layers:
        """The states of a segment's rows after it is written."""
        outer, reset = torch.is_grad_enabled(), None
        if bool(segment.begins.any()):
            reset = torch.zeros_like(segment.learns)
            reset[:, 0] = segment.begins
        with gradients():
            ids, learns, before, reset = usable((segment.ids, segment.learns, list(segment.layers), reset))
            x = self.model.embed_tokens(ids)
            _, _, after = learn_segment(
                lambda tape: self._run(x, before, None, reset, tape, False),
                self._logits,
                lambda layers, factors: self._absorb(factors, layers, learns),
                ids,
                second_order=outer and self.second_order,
            )
        return after if outer else detach(after)

    def _read_whole(self, piece: Part) -> Tensor:
        """Read a segment that is given whole, and write it."""
        outer, columns = torch.is_grad_enabled(), slice(piece.first, piece.last)
        _, reset = self._flags(piece)
        with gradients():
            ids, before, reset = usable((self.ids[:, columns], self.layers, reset))
            x = self.x[:, columns] if outer else self.model.embed_tokens(ids)
            hidden, _, self.layers = learn_segment(
                lambda tape: self._run(x, before, None, reset, tape, True),
                self._logits,
                lambda layers, factors: self._absorb(factors, layers, None, self._idle(piece)),
                ids,
                second_order=outer and self.second_order,
                keep_graph=outer,
            )
        self.segments = []
        if not outer:
            self.layers, hidden = detach(self.layers), hidden.detach()
        return hidden

    def _logits(self, hidden: Float[Tensor, "b s d"]) -> Float[Tensor, "b _ v"]:
        """Of the tokens that have a next one."""
        return self.output_layer(self.model.norm(hidden[:, :-1]))

    def _idle(self, piece: Part) -> list[int]:
        """Periods that do not end again in these columns, if all rows started here and no state is kept."""
        time, periods = self.x.shape[1], {p for p in self._cms(0).periods if p is not None}
        if self.keep or not self.fresh or self.mask is not None or self.reset is not None:
            return []
        return [period for period in periods if piece.last > (time - 1) // period * period]

    def _absorb(
        self, factors: dict[Hashable, Factors], layers: Layers, learns: Tensor | None, idle: Collection[int] = ()
    ) -> Layers:
        """The states after a segment is written into the levels of every layer."""
        return [
            state._replace(cms=self._cms(i).absorb(state.cms, factors, i, learns, idle, self.writes))
            for i, state in enumerate(layers)
        ]

    def _cms(self, layer: int) -> ContinuumMemory:
        return cast(ContinuumMemory, self.model.layers[layer].cms)
