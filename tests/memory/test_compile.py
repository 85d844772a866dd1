"""`scan` compiles in one graph: no Python branch on a tensor's value, with and without gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nestlearn.memory import KL, L2, MLP, Delta, Huber, Lq, Matrix, State, scan

from .cases import Case, Inputs, make_inputs, start, state_tensors

DEEP = Case(MLP(2), L2(), Delta(), "proximal", momentum=False, retain_to="initial", chunk_size=8, tokens=5)
MIRAS = Case(MLP(2), Huber("norm"), Lq(4), "raw", momentum=False, chunk_size=4, tokens=5)
LARGE = replace(DEEP, momentum=True, chunk_size=4, tokens=11)
LINEAR = Case(Matrix(), step_size="raw", momentum=False, read="chunk", flags="mask", tokens=5)
CASES = [
    pytest.param(replace(DEEP, momentum=True, chunk_size=4), "eager", id="aligned", marks=pytest.mark.slow),
    pytest.param(DEEP, "aot_eager", id="aligned-aot"),
    pytest.param(replace(DEEP, flags="both"), "eager", id="grid", marks=pytest.mark.slow),
    pytest.param(LINEAR, "aot_eager", id="grid-aot"),
    pytest.param(MIRAS, "eager", id="lq", marks=pytest.mark.slow),
    pytest.param(replace(MIRAS, retention=KL(), flags="both"), "eager", id="kl-grid"),
    pytest.param(LARGE, "aot_eager", id="aligned-large", marks=pytest.mark.slow),
    pytest.param(replace(LARGE, flags="both"), "aot_eager", id="grid-large", marks=pytest.mark.slow),
]

# The tracer itself looks at .grad of every input, and makes an instance of every autograd function.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def call(case: Case, inputs: Inputs, state: State) -> tuple[Tensor, State]:
    args, flags = inputs.cut(0, case.tokens)
    return scan(case.memory, state, *args, initial=inputs.initial, **flags)  # type: ignore[arg-type]


@pytest.mark.parametrize(("case", "backend"), CASES)
def test_scan_compiles_without_graph_breaks(case: Case, backend: str):
    inputs = make_inputs(case)
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    outcomes = []
    for function in (call, compiled):
        y, state = function(case, inputs, start(case, inputs))
        loss = y.square().sum() + sum(w.sum() for w in state.params.values())
        leaves = inputs.leaves
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
        outcomes.append({"y": y, **state_tensors(state), **named})
    assert outcomes[0].keys() == outcomes[1].keys()
    for name, expected in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], expected, rtol=1e-9, atol=1e-12, msg=name)


@torch.inference_mode()
def test_a_stream_compiles_for_no_new_position():
    """Where a row stands in its chunk is data: later pieces of a stream run the graph of the earlier ones."""
    case, graphs = replace(DEEP, tokens=12), 0
    inputs = make_inputs(case)

    def count(graph, examples):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def piece(state: State, q, k, v, gates) -> tuple[Tensor, State]:
        return scan(case.memory, state, q, k, v, gates, initial=inputs.initial)

    compiled = torch.compile(piece, backend=count, fullgraph=True)
    state = start(case, inputs)._replace(aligned=False)
    outputs, counts = [], []
    for first in range(0, 12, 3):
        y, state = compiled(state, *inputs.cut(first, first + 3)[0])
        outputs.append(y)
        counts.append(graphs)
    expected, _ = call(case, inputs, start(case, inputs))
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-9, atol=1e-12)
    # The first state shares its tensors (params, anchor and initial are one), which is a graph of its own.
    assert counts[1:] == [counts[1]] * 3 and counts[1] <= 2
