"""Which engine runs, for which shapes, dtypes and autograd modes."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from torch import Tensor

from nestlearn.memory import (
    L2,
    MLP,
    AssociativeMemory,
    Delta,
    Gates,
    Lq,
    Momentum,
    State,
    catalog,
    chunked,
    explain,
    reference,
    scan,
)
from nestlearn.memory.objectives import needs_threshold

from .cases import Case, make_inputs, run, start, state_tensors

GENERATOR_SEED = 3


def arguments(
    memory: AssociativeMemory, batch: tuple[int, ...], tokens: int, dtype: torch.dtype = torch.float32, d: int = 4
) -> tuple[Tensor, Tensor, Tensor, Gates]:
    """Random q, k, v and gates in (0, 1)."""
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    q, k, v = (0.5 * torch.randn(3, *batch, tokens, d, generator=generator)).to(dtype)
    lr, retain, momentum = (torch.rand(3, *batch, tokens, generator=generator) * 0.5 + 0.3).to(dtype)
    if isinstance(memory.retention, Lq):
        # What the printed form forgets makes its weights larger, and cubic errors follow.
        lr, retain = 0.1 * lr, 0.9 + 0.1 * retain
    gates = Gates(lr * 0.3, retain, momentum if isinstance(memory.algorithm, Momentum) else None)
    return q, k, v, gates._replace(threshold=retain) if needs_threshold(memory.objective) else gates


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of the engines, and how the chunked one's tokens were placed."""
    calls: Counter[str] = Counter()

    def watch(module, name: str, label: str) -> None:
        original = getattr(module, name)

        def counted(*args, **kwargs):
            calls[label] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    watch(reference, "scan", "reference")
    watch(chunked, "run", "chunked")
    start = chunked.Clock.start

    def placing(*args, **kwargs):
        clock = start(*args, **kwargs)
        calls["aligned" if clock.grid is None else "placed"] += 1
        return clock

    monkeypatch.setattr(chunked.Clock, "start", placing)
    return calls


@pytest.mark.parametrize("name", catalog)
def test_auto_runs_the_engine_that_explain_names(name: str, ran: Counter[str]):
    memory = catalog[name]
    explanation = explain(memory)
    state = memory.init_state((2,), 4, 4)
    scan(memory, state, *arguments(memory, (2,), 6), initial=state.params)
    assert ran == {explanation.engine: 1, "aligned": 1}
    assert explanation.engine == "chunked" and len(explanation.reasons) >= 3
    assert str(explanation).startswith("engine: chunked\n- ")


@pytest.mark.parametrize(("engine", "expected"), [("reference", {"reference"}), ("chunked", {"chunked", "aligned"})])
def test_a_named_engine_runs_and_no_other(engine: str, expected: set[str], ran: Counter[str]):
    memory = catalog["titans"]
    scan(memory, memory.init_state((2,), 4, 4), *arguments(memory, (2,), 6), engine=engine)  # type: ignore[arg-type]
    assert set(ran) == expected


def test_masks_resets_and_states_inside_a_chunk_take_the_grid(ran: Counter[str]):
    memory = dataclasses.replace(catalog["deltanet"], chunk_size=4)
    fresh, args = memory.init_state((2,), 4, 4), arguments(memory, (2,), 6)
    flags = torch.ones(2, 6, dtype=torch.bool)
    scan(memory, fresh, *args, mask=flags)
    scan(memory, fresh, *args, reset=~flags)
    _, inside = scan(memory, fresh, *args)
    assert ran["aligned"] == 1 and not inside.aligned
    scan(memory, inside, *args)
    assert ran == {"chunked": 4, "aligned": 1, "placed": 3}


def test_a_scan_of_whole_chunks_stays_aligned(ran: Counter[str]):
    memory = dataclasses.replace(catalog["deltanet"], chunk_size=3)
    state, args = memory.init_state((2,), 4, 4), arguments(memory, (2,), 6)
    for engine in ("chunked", "reference", "chunked"):
        _, state = scan(memory, state, *args, engine=engine)
        assert state.aligned
    assert ran["placed"] == 0


@pytest.mark.parametrize("name", ["deltanet", "titans", "hope"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (2, 1, 3), (0,)], ids=str)
@pytest.mark.parametrize("flagged", [False, True])
def test_any_leading_dimensions(name: str, batch: tuple[int, ...], flagged: bool):
    memory = dataclasses.replace(catalog[name], chunk_size=4)
    args = arguments(memory, batch, 6, torch.float64)
    params = memory.init_state((), 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).params
    flags = {}
    if flagged:
        generator = torch.Generator().manual_seed(1)
        flags["mask"] = torch.rand(*batch, 6, generator=generator) < 0.7
        flags["reset"] = torch.rand(*batch, 6, generator=generator) < 0.3
    outcomes = []
    for engine in ("reference", "chunked"):
        state = memory.init_state(batch, 4, 4, params=params, dtype=torch.float64)
        y, end = scan(memory, state, *args, initial=state.params, **flags, engine=engine)
        assert y.shape == (*batch, 6, 4) and end.position.shape == batch
        assert all(w.shape[: len(batch)] == batch for w in state_tensors(end).values())
        outcomes.append({"y": y, "position": end.position, **state_tensors(end)})
    for key, expected in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][key], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("flags", ["none", "both"])
@pytest.mark.parametrize("read", ["token", "chunk"])
@pytest.mark.parametrize("architecture", [MLP(2), MLP(2, "silu")], ids=["gelu", "silu"])
def test_no_autograd_is_needed(architecture, read: str, flags: str):
    case = Case(architecture, L2(), Delta(), "mixed", read=read, flags=flags)
    inputs = make_inputs(case)
    expected, state = run(case, inputs)
    assert expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y, end = run(case, inputs)
            again, _ = scan(case.memory, end, *inputs.cut(0, 5)[0], initial=inputs.initial)
        assert not y.requires_grad and not again.requires_grad and torch.equal(y, expected)
        assert all(torch.equal(state_tensors(end)[name], w) for name, w in state_tensors(state).items())


def test_outer_gradients_without_an_inner_graph():
    """Only the initial weights ask for a gradient, or only the gates: neither needs the other."""
    case = Case(MLP(2), L2(), Delta(), "proximal", flags="both")
    inputs = make_inputs(case)
    for name, leaf in inputs.leaves.items():
        for other in inputs.leaves.values():
            other.requires_grad_(other is leaf)
        y, _ = run(case, inputs)
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        assert torch.isfinite(gradient).all() and gradient.any(), name


@pytest.mark.parametrize("name", catalog)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_inputs_keep_wide_weights(name: str, dtype: torch.dtype):
    memory = dataclasses.replace(catalog[name], chunk_size=4)
    state = memory.init_state((2,), 4, 4, generator=torch.Generator().manual_seed(0))
    args = arguments(memory, (2,), 10, dtype)
    for x in args[:3]:
        x.requires_grad_()
    y, end = scan(memory, state, *args, initial=state.params)
    assert y.dtype == dtype
    assert all(w.dtype == torch.float32 for w in state_tensors(end).values()) and end.position.dtype == torch.long
    gradients = torch.autograd.grad(y.float().square().sum(), list(args[:3]))
    assert all(g.dtype == dtype and torch.isfinite(g).all() for g in gradients)
    exact, _ = scan(
        memory, state, *(x.detach().float() for x in args[:3]), args[3].map(Tensor.float), initial=state.params
    )
    torch.testing.assert_close(y.detach(), exact.to(dtype), rtol=0, atol=0)


def test_gates_in_float32_stay_exact_under_half_precision_inputs():
    """0.9997 rounds to 1 in bfloat16; a gate given in float32 must keep it."""
    memory = catalog["retnet"]
    state = memory.init_state((1,), 2, 2, params={"W": torch.eye(2)})
    zero = torch.zeros(1, 1, 2, dtype=torch.bfloat16)
    _, end = scan(memory, state, zero, zero, zero, Gates(torch.ones(1, 1), torch.full((1, 1), 0.9997)))
    assert end.params["W"][0, 0, 0].item() == pytest.approx(0.9997, abs=1e-7)


@pytest.mark.parametrize("name", catalog)
@torch.no_grad()
def test_single_precision_is_accurate(name: str):
    """256 tokens with unit keys, in chunks of 64: float32 keeps the answers of float64 to about four digits."""
    memory = catalog[name]
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.nn.functional.normalize(torch.randn(3, 2, 256, 16, generator=generator).double(), dim=-1)
    lr, retain, momentum = torch.rand(3, 2, 256, generator=generator).double()
    beta = 0.9 * momentum if isinstance(memory.algorithm, Momentum) else None
    # Anchored objectives without delta retention take small steps only.
    gates = Gates(lr if isinstance(memory.retention, Delta) else 0.02 * lr, 0.95 + 0.05 * retain, beta)
    if needs_threshold(memory.objective):
        gates = gates._replace(threshold=0.5 + retain)
    params = memory.init_state((), 16, 16, generator=generator, dtype=torch.float64).params
    wide = memory.init_state((2,), 16, 16, params=params, dtype=torch.float64)
    exact, _ = scan(memory, wide, q, k, v, gates, initial=params)
    narrow = memory.init_state((2,), 16, 16, params=params)
    y, _ = scan(memory, narrow, q.float(), k.float(), v.float(), gates.map(Tensor.float), initial=params)
    assert (y.double() - exact).norm() < 1e-4 * exact.norm()


def test_results_do_not_alias_the_inputs():
    """A state may be kept, forked and continued: no scan writes into it."""
    for flags in ("none", "both"):
        case = Case(MLP(2), tokens=9, flags=flags)
        inputs = make_inputs(case)
        before = start(case, inputs)
        kept = {name: w.clone() for name, w in state_tensors(before).items()}
        args, given = inputs.cut(0, 9)
        copies = [x.clone() for x in args[:3]]
        first, _ = scan(case.memory, before, *args, initial=inputs.initial, **given)  # type: ignore[arg-type]
        second, _ = scan(case.memory, before, *args, initial=inputs.initial, **given)  # type: ignore[arg-type]
        assert torch.equal(first, second)
        assert all(torch.equal(state_tensors(before)[name], w) for name, w in kept.items())
        assert all(torch.equal(x, copy) for x, copy in zip(args[:3], copies, strict=True))


def test_a_state_is_a_pytree_of_rows():
    memory = catalog["titans"]
    state = memory.init_state((3,), 4, 4)
    leaves = [x for x in torch.utils._pytree.tree_leaves(state) if isinstance(x, Tensor)]
    assert leaves and all(x.shape[0] == 3 for x in leaves)
    assert isinstance(torch.utils._pytree.tree_map(lambda x: x, state), State)


def test_a_state_from_larger_chunks_can_go_on_in_smaller_ones():
    case = Case(MLP(2), L2(), tokens=12, chunk_size=8)
    inputs = make_inputs(case)
    args, _ = inputs.cut(0, 6)
    _, state = scan(case.memory, start(case, inputs), *args)
    small, (rest, _) = dataclasses.replace(case.memory, chunk_size=4), inputs.cut(6, 12)
    outcomes = [scan(small, state, *rest, engine=engine) for engine in ("reference", "chunked")]
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0], rtol=1e-10, atol=1e-12)
    assert torch.equal(outcomes[0][1].position, outcomes[1][1].position)


@torch.no_grad()
def test_the_grid_never_looks_at_values_off_the_cpu(monkeypatch: pytest.MonkeyPatch):
    """With every look at the values refused, as on an accelerator, results are the same."""
    for flags in ("none", "both"):
        case = Case(MLP(2), L2(), Delta(), "raw", momentum=True, flags=flags, tokens=23)
        inputs = make_inputs(case)
        expected, state = run(case, inputs, splits=(9,))
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "__bool__", lambda self: pytest.fail("looked at a value"))
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            got, end = run(case, inputs, splits=(9,))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
        for name, w in state_tensors(state).items():
            torch.testing.assert_close(state_tensors(end)[name], w, rtol=1e-12, atol=1e-14)
