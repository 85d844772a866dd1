"""The further objectives, retentions and algorithms: the chunked engine equals the token loop, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from nestlearn.memory import absorb, scan, surprise

from .cases import MIRAS_AXES, Case, assert_same, covering, legal, make_inputs, product, results, run, state_tensors
from .test_engines import check
from .test_resume import assert_equal_runs, check_splits

COVERING = [Case(**setting) for setting in covering(MIRAS_AXES, 2)]

SHORT = {**MIRAS_AXES, "chunk_size": (1, 4, 6, 16), "tokens": (13,), "batch": (2,)}
STREAMS = [Case(**setting) for setting in covering(SHORT, 2)]

PARTS = ("architecture", "objective", "retention", "step_size", "momentum")
GROUPS = list(product({name: MIRAS_AXES[name] for name in PARTS}))


def test_the_covering_set_contains_every_pair():
    settings = [vars(case) for case in COVERING]
    for a, b in itertools.combinations(MIRAS_AXES, 2):
        wanted = {(x, y) for x in MIRAS_AXES[a] for y in MIRAS_AXES[b] if legal({a: x, b: y})}
        assert wanted == {(setting[a], setting[b]) for setting in settings}, (a, b)


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_engines_agree_on_every_two_settings(case: Case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS, ids=lambda g: str(Case(**g)).split("-to.")[0])
def test_engines_agree_on_the_full_product_of_parts(group):
    """Every objective with every retention and algorithm; a quarter of the pairwise rest of the axes each, in turn."""
    rest = {name: values for name, values in MIRAS_AXES.items() if name not in (*PARTS, "tokens", "batch")}
    for number, setting in list(enumerate(covering(rest, 2)))[GROUPS.index(group) % 4 :: 4]:
        check(
            Case(**group, **setting, tokens=(70, 23, 1, 40)[number // 4 % 4], batch=1 + 2 * (number // 8 % 2)),
            seed=number,
            conditioned=True,
        )


@pytest.mark.parametrize("case", STREAMS, ids=str)
@torch.no_grad()
def test_every_split_equals_one_scan(case: Case):
    check_splits(case, (1, 4, 6, 11))  # within a chunk, and at its end


@pytest.mark.parametrize("case", STREAMS, ids=str)
def test_token_by_token_equals_one_scan_in_gradients_too(case: Case):
    inputs = make_inputs(case)
    whole = results(inputs, *run(case, inputs))
    assert_same(results(inputs, *run(case, inputs, splits=range(1, 13))), whole, case)


@pytest.mark.parametrize("case", [c for c in STREAMS if c.flags == "none"], ids=str)
def test_surprise_and_absorb_chunk_by_chunk_equal_scan(case: Case):
    inputs, memory = make_inputs(case), case.memory
    expected, state = run(case, inputs)[1], memory.init_state((2,), 3, 3, params=inputs.initial, dtype=torch.float64)
    for first in range(0, 13, case.chunk_size):
        (_, k, v, gates), _ = inputs.cut(first, min(first + case.chunk_size, 13))
        state = absorb(
            memory, state, surprise(memory, state.anchor, k, v, gates.threshold), gates, initial=inputs.initial
        )
    y = torch.zeros(2, 13, 3, dtype=torch.float64)
    assert_same(results(inputs, y, state), results(inputs, y, expected), case)


@pytest.mark.parametrize("case", STREAMS[::3], ids=str)
@torch.no_grad()
def test_engines_may_take_turns(case: Case):
    inputs = make_inputs(case)
    state, outputs = case.memory.init_state((2,), 3, 3, params=inputs.initial, dtype=torch.float64), []
    for engine, first, last in (("reference", 0, 5), ("chunked", 5, 8), ("reference", 8, 13)):
        args, flags = inputs.cut(first, last)
        y, state = scan(case.memory, state, *args, initial=inputs.initial, **flags, engine=engine)  # type: ignore[arg-type]
        outputs.append(y)
    assert_equal_runs((torch.cat(outputs, 1), state), run(case, inputs), case)


@pytest.mark.parametrize("case", STREAMS[::4], ids=str)
@torch.no_grad()
def test_single_precision_and_inference_mode(case: Case):
    inputs = make_inputs(case)
    exact, _ = run(case, inputs)
    with torch.inference_mode():
        again, state = run(case, inputs)
    assert torch.equal(again, exact) and all(w.dtype == torch.float64 for w in state_tensors(state).values())
