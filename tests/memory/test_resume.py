"""Scanning a sequence in any pieces equals scanning it at once; `surprise` and `absorb` are the same recurrence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from nestlearn.memory import L2, MLP, Decay, Delta, Gates, Matrix, State, absorb, scan, surprise

from .cases import AXES, Case, assert_same, covering, make_inputs, results, run, state_tensors

TOKENS = 13
SHORT = {**AXES, "chunk_size": (1, 4, 6, 16), "tokens": (TOKENS,), "batch": (2,)}
CASES = [Case(**setting) for setting in covering(SHORT, 2)]


def assert_equal_runs(a, b, label: object) -> None:
    """Outputs, every weight and the clock of two runs, without gradients."""
    named = [{"y": y, "position": state.position, **state_tensors(state)} for y, state in (a, b)]
    assert_same(*named, label)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_every_split_equals_one_scan(case: Case):
    check_splits(case, range(1, TOKENS))


def check_splits(case: Case, splits: Sequence[int]) -> None:
    """The chunked engine is cut in two at each of ``splits``, the token loop after every token at once."""
    inputs = make_inputs(case)
    whole, loop = run(case, inputs, "chunked"), run(case, inputs, "reference")
    for split in splits:
        assert_equal_runs(run(case, inputs, "chunked", (split,)), whole, split)
    assert_equal_runs(run(case, inputs, "reference", range(1, case.tokens)), loop, "after every token")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_token_by_token_equals_one_scan_in_gradients_too(case: Case):
    inputs = make_inputs(case)
    whole = results(inputs, *run(case, inputs))
    pieces = results(inputs, *run(case, inputs, splits=range(1, TOKENS)))
    assert_same(pieces, whole, case)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_engines_may_take_turns(case: Case):
    inputs = make_inputs(case)
    state, outputs = case.memory.init_state((2,), 3, 3, params=inputs.initial, dtype=torch.float64), []
    for engine, first, last in (("reference", 0, 5), ("chunked", 5, 8), ("reference", 8, TOKENS)):
        args, flags = inputs.cut(first, last)
        y, state = scan(case.memory, state, *args, initial=inputs.initial, **flags, engine=engine)  # type: ignore[arg-type]
        outputs.append(y)
    assert_equal_runs((torch.cat(outputs, 1), state), run(case, inputs), case)


@pytest.mark.parametrize("case", [c for c in CASES if c.flags in ("reset", "both")], ids=str)
@torch.no_grad()
def test_rows_of_different_phase_equal_separate_runs(case: Case):
    """Rows that have read 0, 3 and 7 tokens go on together, under their own masks and resets."""
    case = dataclasses.replace(case, batch=3)
    inputs, memory = make_inputs(case), case.memory
    (q, k, v, gates), flags = inputs.cut(0, TOKENS)

    def one(row: int, first: int, last: int, state: State):
        def cut(x):
            return None if x is None else x[row : row + 1, first:last]

        here = Gates(*map(cut, gates))  # type: ignore[arg-type]
        own = {name: w[row : row + 1] for name, w in inputs.initial.items()}
        return scan(memory, state, cut(q), cut(k), cut(v), here, initial=own, **{n: cut(f) for n, f in flags.items()})

    ends = []
    for row, read in enumerate((0, 3, 7)):
        params = {name: w[row : row + 1] for name, w in inputs.initial.items()}
        state = memory.init_state((1,), 3, 3, params=params, dtype=torch.float64)
        ends.append(one(row, 0, read, state)[1] if read else state)
    # The same six tokens follow for all, so that the rows form one batch.
    alone = [one(row, 7, TOKENS, end) for row, end in enumerate(ends)]
    args, late = inputs.cut(7, TOKENS)
    y, state = scan(memory, join(ends), *args, initial=inputs.initial, **late)
    assert_equal_runs((y, state), (torch.cat([a[0] for a in alone]), join([a[1] for a in alone])), case)


def join(states: list[State]) -> State:
    """Rows of several states as one batch."""

    def stack(group: str):
        parts = [getattr(state, group) for state in states]
        return None if parts[0] is None else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    groups = {group: stack(group) for group in ("params", "anchor", "momentum")}
    return State(**groups, position=torch.cat([s.position for s in states]))  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [0, 4, 5])
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_outputs_do_not_need_the_final_state(case: Case, first: int):
    inputs = make_inputs(case)
    state = case.memory.init_state((2,), 3, 3, params=inputs.initial, dtype=torch.float64)
    if first:
        args, flags = inputs.cut(0, first)
        state = scan(case.memory, state, *args, initial=inputs.initial, **flags)[1]
    args, flags = inputs.cut(first, TOKENS)
    y, _ = scan(case.memory, state, *args, initial=inputs.initial, **flags, return_state=False)
    assert torch.equal(y, scan(case.memory, state, *args, initial=inputs.initial, **flags)[0])


@pytest.mark.parametrize("case", [c for c in CASES if c.flags == "none"], ids=str)
def test_surprise_and_absorb_chunk_by_chunk_equal_scan(case: Case):
    inputs, memory = make_inputs(case), case.memory
    expected, state = run(case, inputs)[1], memory.init_state((2,), 3, 3, params=inputs.initial, dtype=torch.float64)
    for first in range(0, TOKENS, case.chunk_size):
        (_, k, v, gates), _ = inputs.cut(first, min(first + case.chunk_size, TOKENS))
        state = absorb(memory, state, surprise(memory, state.anchor, k, v), gates, initial=inputs.initial)
    y = torch.zeros(2, TOKENS, 3, dtype=torch.float64)
    assert_same(results(inputs, y, state), results(inputs, y, expected), case)
    assert state.aligned == expected.aligned


@pytest.mark.parametrize("retention", [Decay(), Delta(), Delta(gated=True)], ids=["decay", "delta", "gated"])
@torch.no_grad()
def test_absorb_in_parts_of_a_chunk(retention):
    """Tokens of one chunk may arrive in several calls: all are measured at the chunk's anchor."""
    case = Case(MLP(2), L2(), retention, "raw", chunk_size=5, tokens=10, retain_to="initial")
    inputs, memory = make_inputs(case), case.memory
    state = memory.init_state((2,), 3, 3, params=inputs.initial, dtype=torch.float64)
    for first, last in ((0, 2), (2, 5), (5, 6), (6, 10)):
        (_, k, v, gates), _ = inputs.cut(first, last)
        state = absorb(memory, state, surprise(memory, state.anchor, k, v), gates, initial=inputs.initial)
    y, expected = run(case, inputs)
    assert_equal_runs((y, state), (y, expected), case)


@pytest.mark.parametrize("chunk", [131, 192, 256])
@pytest.mark.parametrize("flags", ["none", "both"])
@torch.no_grad()
def test_resume_inside_a_chunk_that_is_split_in_spans(chunk: int, flags: str):
    """Two spans of a long chunk share its anchor, wherever a call begins; 131 has no equal parts and stays whole."""
    case = Case(MLP(2), L2(), chunk_size=chunk, flags=flags, tokens=300)
    inputs = make_inputs(case)
    whole = run(case, inputs)
    for splits in ((50,), (100, 150), (96, 192), (130, 290)):
        assert_equal_runs(run(case, inputs, splits=splits), whole, splits)


@torch.no_grad()
def test_detached_states_continue_the_same_numbers():
    case = Case(Matrix(), momentum=True, step_size="normalized", tokens=TOKENS)
    inputs = make_inputs(case)
    with torch.enable_grad():
        _, state = run(case, inputs)
    cut = state.detach()
    assert not any(w.requires_grad for w in state_tensors(cut).values())
    assert all(torch.equal(state_tensors(cut)[name], w) for name, w in state_tensors(state).items())
