"""The grid of spans: every token once, in order, spans cut where chunks end, within the promised number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestlearn.memory import clock
from nestlearn.memory.clock import Clock, Grid, compaction, place, scatter_outputs, span_length


@st.composite
def grids(draw: st.DrawFn) -> dict:
    """Arguments of `place`."""
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    chunk = draw(st.integers(1, 16))
    # As `span_length` makes it: an equal part of a chunk, or the whole call.
    span = draw(st.sampled_from([n for n in range(1, chunk + 1) if chunk % n == 0]))

    def flags(chance: float) -> Tensor | None:
        if draw(st.booleans()):
            return None
        return torch.tensor([[draw(st.floats(0, 1)) < chance for _ in range(tokens)] for _ in range(rows)])

    return {
        "position": torch.tensor(draw(st.lists(st.integers(0, chunk - 1), min_size=rows, max_size=rows))),
        "tokens": tokens,
        "chunk_size": chunk,
        "span": min(span, tokens),
        "mask": flags(0.7),
        "reset": flags(0.3),
    }


def simulate(arguments: dict, row: int) -> tuple[list[list[int]], list[int], int]:
    """Spans of one row by the rule in words, the phase of each span's first token, and the final position."""
    mask, reset, position = arguments["mask"], arguments["reset"], int(arguments["position"][row])
    spans: list[list[int]] = []
    phases = []
    for token in range(arguments["tokens"]):
        if mask is not None and not mask[row, token]:
            continue
        restarts = reset is not None and bool(reset[row, token])
        position = 0 if restarts else position
        # A reset inside a span goes on in it; any other start of a chunk begins a span.
        begins = position % arguments["chunk_size"] == 0 and not restarts
        if not spans or begins or len(spans[-1]) == arguments["span"]:
            spans.append([])
            phases.append(position)
        spans[-1].append(token)
        position = (position + 1) % arguments["chunk_size"]
    return spans, phases, position


def check(grid: Grid, arguments: dict) -> None:
    for row in range(len(arguments["position"])):
        spans, phases, end = simulate(arguments, row)
        got = [index[valid].tolist() for index, valid in zip(grid.index[row], grid.valid[row], strict=True)]
        assert got[: len(spans)] == spans and not any(got[len(spans) :])
        assert grid.phase[row].tolist() == phases + [-1] * (len(got) - len(phases))
        assert int(grid.end[row]) == end
        # Valid slots of a span come first.
        assert torch.equal(grid.valid[row], grid.valid[row].cummin(-1).values)
        if arguments["reset"] is not None:
            assert grid.reset is not None
            flagged = grid.index[row][grid.reset[row]].tolist()
            wanted = [t for span in spans for t in span if arguments["reset"][row, t]]
            assert flagged == wanted


@settings(max_examples=150, deadline=None, derandomize=True)
@given(grids())
def test_every_token_once_in_order_in_the_right_span(arguments: dict):
    check(place(**arguments), arguments)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(grids())
def test_the_promised_number_of_spans_suffices(arguments: dict):
    """Off the CPU the number of spans is fixed before any value is known; nothing may be left over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "known_empty", lambda flags: False)
        grid = place(**arguments)
    check(grid, arguments)
    tokens, span, chunk = (arguments[name] for name in ("tokens", "span", "chunk_size"))
    assert grid.index.shape[1] <= tokens // span + tokens // chunk + 2


@settings(max_examples=50, deadline=None, derandomize=True)
@given(grids())
def test_outputs_return_to_their_tokens(arguments: dict):
    grid = place(**arguments)
    y = torch.where(grid.valid, grid.index + 1, -7).double().unsqueeze(-1)
    expected = torch.arange(1, arguments["tokens"] + 1).double().expand(len(arguments["position"]), -1)
    if arguments["mask"] is not None:
        expected = torch.where(arguments["mask"], expected, 0)
    assert torch.equal(scatter_outputs(y, grid, arguments["tokens"]).squeeze(-1), expected)


def test_compaction_moves_true_tokens_to_the_front():
    order, count = compaction(torch.tensor([[True, False, True], [False, False, False], [True, True, True]]))
    assert order.tolist() == [[0, 2, 0], [0, 0, 0], [0, 1, 2]] and count.tolist() == [2, 0, 3]


@pytest.mark.parametrize(
    ("chunk", "tokens", "length"),
    [(1, 9, 1), (64, 9, 9), (64, 64, 64), (128, 1000, 128), (192, 1000, 96), (256, 1000, 128), (131, 1000, 131)],
)
def test_span_length(chunk: int, tokens: int, length: int):
    """Equal parts of a long chunk; a chunk without a useful divisor stays whole."""
    assert span_length(chunk, tokens) == length


@settings(max_examples=150, deadline=None, derandomize=True)
@given(grids(), st.booleans())
def test_a_clock_knows_where_chunks_begin_and_end(arguments: dict, aligned: bool):
    """Against a count in words, and what is cut comes back in order."""
    if aligned:
        arguments["position"] = torch.zeros_like(arguments["position"])
    clock = Clock.start(aligned=aligned, **arguments)
    rows, tokens, chunk = len(arguments["position"]), arguments["tokens"], arguments["chunk_size"]
    x = torch.arange(1.0, tokens + 1).expand(rows, tokens)
    parts = clock.cut(x, -1)
    for row in range(rows):
        place, flags = int(arguments["position"][row]), []
        for token in range(tokens):
            if arguments["mask"] is not None and not arguments["mask"][row, token]:
                continue
            place = 0 if arguments["reset"] is not None and arguments["reset"][row, token] else place
            flags.append((token, place))
            place = (place + 1) % chunk
        found = []
        for span, part in zip(clock.spans, parts, strict=True):
            valid = span.valid[row] if span.valid is not None else torch.ones_like(part[row], dtype=torch.bool)
            places = span.places(x.device).expand(rows, -1)[row][valid].tolist()
            closing = span.closing(x.device).expand(rows, -1)[row][valid].tolist()
            assert closing == [p == chunk - 1 for p in places]
            each = (span.begins, span.ends)
            begins, ends = (bool(flag[row]) if isinstance(flag, Tensor) else flag for flag in each)
            if places:
                reset = span.reset is not None and bool(span.reset[row, 0])
                assert begins == (places[0] == 0) or reset
                assert ends == closing[-1]
                assert int(span.after(arguments["position"])[row]) == (places[-1] + 1) % chunk
            found += list(zip((part[row][valid] - 1).int().tolist(), places, strict=True))
        assert found == flags and int(clock.position[row]) == place
    kept = torch.ones_like(x, dtype=torch.bool) if arguments["mask"] is None else arguments["mask"]
    assert torch.equal(clock.join([part.unsqueeze(-1) for part in parts]).squeeze(-1), torch.where(kept, x, 0))


@pytest.mark.parametrize("masked", [False, True])
def test_spans_may_be_cut_at_resets(masked: bool) -> None:
    """Every reset then begins a span, and each real token stands in one span, in order."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(4, 23, generator=generator) > 0.3 if masked else None
    reset = torch.rand(4, 23, generator=generator) > 0.6
    clock = Clock.start(torch.tensor([0, 3, 5, 4]), False, 23, 6, 6, mask, reset, cut_resets=True)
    assert clock.grid is not None and clock.grid.reset is not None
    assert not clock.grid.reset[..., 1:].any()
    for row in range(4):
        real = range(23) if mask is None else mask[row].nonzero().flatten().tolist()
        places = clock.grid.index[row][clock.grid.valid[row]].tolist()
        assert places == list(real)
        assert int(clock.grid.reset[row].sum()) == sum(bool(reset[row, t]) for t in real)
