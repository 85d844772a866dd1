"""No output depends on a later token or on another row, to the last bit; what is not finite stays where it belongs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from nestlearn.memory import L2, MLP, Gates, Huber, catalog, scan

from .cases import AXES, MIRAS_AXES, Case, Inputs, covering, make_inputs, run, state_tensors

TOKENS, CHANGED = 24, 13
FEW = {**AXES, "chunk_size": (4, 16), "tokens": (TOKENS,), "batch": (3,)}
MIRAS = {**MIRAS_AXES, "chunk_size": (4,), "tokens": (TOKENS,), "batch": (3,), "objective": (L2(), Huber("norm"))}
CASES = [Case(**setting) for axes in (FEW, MIRAS) for setting in covering(axes, 2)]
PARTS = ("q", "k", "v", "lr", "retain", "momentum", "threshold")
HUGE, NAN = 1e30, float("nan")


def changed(inputs: Inputs, parts: tuple[str, ...], rows: Tensor | slice | int, tokens: slice, value: float) -> Inputs:
    """Inputs with ``value`` written over some tokens; 0 stands for other random values."""
    generator = torch.Generator().manual_seed(5)

    def write(name: str, x: Tensor | None) -> Tensor | None:
        if x is None or name not in parts:
            return x
        x = x.detach().clone()
        old = x[rows, tokens]
        x[rows, tokens] = value if value else torch.rand(old.shape, generator=generator).to(x.dtype)
        return x

    gates = Gates(**{name: write(name, gate) for name, gate in inputs.gates._asdict().items()})  # type: ignore[arg-type]
    qkv = {name: write(name, getattr(inputs, name)) for name in ("q", "k", "v")}
    return dataclasses.replace(inputs, gates=gates, **qkv)  # type: ignore[arg-type]


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_the_past_and_the_other_rows_stay_bit_identical(case: Case, dtype: torch.dtype):
    last, rest = slice(CHANGED, CHANGED + 1), slice(CHANGED, None)
    huge = 10 * torch.finfo(dtype).max ** (1 / 3)  # beyond what a scan takes
    edits = [(PARTS, where, value) for where in (last, rest) for value in (0.0, huge, NAN)]
    edits += [((part,), rest, value) for part in PARTS for value in (0.0, huge)]
    # One row for each edit; the first and the last row stay as they are.
    case = dataclasses.replace(case, batch=len(edits) + 2)
    edited = inputs = make_inputs(case, dtype=dtype)
    for row, edit in enumerate(edits, 1):
        edited = changed(edited, edit[0], row, *edit[1:])
    (y, state), (other, other_state) = run(case, inputs), run(case, edited)
    for row, edit in enumerate(edits, 1):
        assert torch.equal(other[row, :CHANGED], y[row, :CHANGED]), edit
    for row in (0, -1):
        assert torch.equal(other[row], y[row])
        for name, w in state_tensors(state).items():
            assert torch.equal(state_tensors(other_state)[name][row], w[row]), name


@pytest.mark.parametrize("engine", ["reference", "chunked"])
@pytest.mark.parametrize("case", [c for c in CASES if c.flags == "both"], ids=str)
def test_a_masked_token_may_hold_anything(case: Case, engine: str):
    inputs = make_inputs(case)
    assert inputs.mask is not None
    y, state = run(case, inputs, engine)
    filled = inputs
    for row, value in enumerate((0.0, HUGE, NAN)):
        filled = changed(filled, PARTS, row, ~inputs.mask[row], value)  # type: ignore[arg-type]
    for leaf in filled.leaves.values():
        leaf.requires_grad_()
    other, other_state = run(case, filled, engine)
    assert torch.equal(other, y)
    assert torch.equal(other[~inputs.mask], torch.zeros_like(other[~inputs.mask]))
    assert all(torch.equal(state_tensors(other_state)[name], w) for name, w in state_tensors(state).items())
    wanted = [filled.k, filled.v, filled.gates.lr, filled.gates.retain, *inputs.initial.values()]
    for gradient in torch.autograd.grad(other.square().sum(), wanted, allow_unused=True):
        assert gradient is None or torch.isfinite(gradient).all()
        if gradient is not None and gradient.shape[:2] == inputs.mask.shape:
            assert not gradient[~inputs.mask].any()


@pytest.mark.parametrize(("engine", "splits"), [("reference", ()), ("chunked", ()), ("chunked", (9, 15, 20))])
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_nan_lasts_from_its_token_to_the_next_reset(case: Case, engine: str, splits: tuple[int, ...]):
    """Row 0 has no reset, row 1 one in the middle of a chunk, row 2 one on the poisoned token itself."""
    reset = torch.zeros(3, TOKENS, dtype=torch.bool)
    reset[1, 18], reset[2, 8] = True, True
    inputs = dataclasses.replace(make_inputs(dataclasses.replace(case, flags="none")), mask=None, reset=reset)
    clean, _ = run(case, inputs, engine, splits)
    poisoned, state = run(case, changed(inputs, ("v",), slice(None), slice(8, 9), NAN), engine, splits)
    assert torch.equal(poisoned[:, :8], clean[:, :8])
    assert poisoned[0, 8:].isnan().all() and poisoned[1, 8:18].isnan().all() and poisoned[2, 8:].isnan().all()
    torch.testing.assert_close(poisoned[1, 18:], clean[1, 18:], rtol=1e-12, atol=1e-12)
    for name, w in state_tensors(state).items():
        # Pending step sizes are sums of gates: they stay finite while the weights are lost.
        if name != "pending":
            assert w[0].isnan().all() and w[2].isnan().all() and torch.isfinite(w[1]).all(), name


@pytest.mark.parametrize("read", ["token", "chunk"])
@torch.no_grad()
def test_a_lost_state_goes_on_as_nan_and_a_reset_clears_it(read: str):
    case = Case(MLP(2), L2(), read=read, chunk_size=4, tokens=12, batch=2)
    inputs = make_inputs(case)
    (args, _), memory = inputs.cut(0, 12), case.memory
    _, lost = run(case, changed(inputs, ("k",), 0, slice(5, 6), NAN))
    y, state = scan(memory, lost, *args)
    assert y[0].isnan().all() and torch.isfinite(y[1]).all()
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 6] = True
    y, state = scan(memory, lost, *args, initial=inputs.initial, reset=reset)
    assert y[0, :6].isnan().all() and torch.isfinite(y[0, 6:]).all() and torch.isfinite(state.params["in"]).all()
    (late, _), fresh = inputs.cut(6, 12), case.memory.init_state((2,), 3, 3, params=inputs.initial, dtype=torch.float64)
    torch.testing.assert_close(y[0, 6:], scan(memory, fresh, *late)[0][0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_poisoned_query_spoils_its_own_answer_only():
    memory = catalog["hope"]
    state = memory.init_state((1,), 4, 4, generator=torch.Generator().manual_seed(0))
    q, k, v = torch.randn(3, 1, 9, 4, generator=torch.Generator().manual_seed(1)).unbind()
    gates = Gates(torch.full((1, 9), 0.5), torch.ones(1, 9))
    y, end = scan(memory, state, q, k, v, gates, initial=state.params)
    q[0, 4] = NAN
    other, other_end = scan(memory, state, q, k, v, gates, initial=state.params)
    assert equal(other[:, [0, 1, 2, 3, 5, 6, 7, 8]], y[:, [0, 1, 2, 3, 5, 6, 7, 8]]) and other[0, 4].isnan().all()
    assert torch.equal(end.params["out"], other_end.params["out"])
