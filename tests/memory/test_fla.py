"""The engine of flash-linear-attention equals the token loop, on the device or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tests.interpreter import interpret_fla, kernel_device

from nestlearn.memory import L2, MLP, Decay, Delta, Gates, Matrix, Momentum, catalog, explain, scan, use_engine
from nestlearn.nn import MemoryMixerConfig

from .cases import Case, Inputs, assert_same, make_inputs, results, run

# In the interpreter NumPy warns of numbers that overflow before a kernel masks them.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def device() -> Iterator[str]:
    """Where fla's kernels run in these tests."""
    where = kernel_device("fla")
    with pytest.MonkeyPatch.context() as patch:
        if where == "cpu":
            interpret_fla(patch)
        yield where


def moved(inputs: Inputs, device: str) -> Inputs:
    """The same leaves on a device."""

    def move(x: torch.Tensor) -> torch.Tensor:
        return x.detach().to(device).requires_grad_(x.requires_grad)

    flags = (None if x is None else move(x) for x in (inputs.mask, inputs.reset))
    initial = {name: move(w) for name, w in inputs.initial.items()}
    return Inputs(move(inputs.q), move(inputs.k), move(inputs.v), inputs.gates.map(move), initial, *flags)


def scaled(found: dict[str, torch.Tensor], inputs: Inputs) -> dict[str, torch.Tensor]:
    """In float32 on the CPU; the gradient of a retention gate alpha as that of log alpha, which the kernels compute."""
    found = {name: x.cpu() if x.dtype == torch.long else x.float().cpu() for name, x in found.items()}
    name = "gradient of retain"
    return found | {name: found[name] * inputs.gates.retain.detach().float().cpu()}


def table() -> list[Case]:
    """Every rule with every kind of flags; the rest of the axes in turn."""
    plain = Case(Matrix(), retention=Delta(), step_size="raw", momentum=False, chunk_size=16, tokens=37)
    gated = Delta(gated=True)
    return [
        plain,
        replace(plain, retention=Decay(), tokens=64, chunk_size=64),
        replace(plain, retention=gated, tokens=32),
        replace(plain, step_size="proximal", retain_to="initial", flags="both"),
        replace(plain, step_size="normalized", flags="mask", tokens=20),
        replace(plain, retention=Decay(), retain_to="initial", flags="reset", tokens=70, chunk_size=64),
        replace(plain, retention=gated, step_size="proximal", flags="mask", retain_to="initial"),
        replace(plain, objective=L2(), retention=Decay(), tokens=33),
        replace(plain, objective=L2(), retain_to="initial", flags="reset", read="chunk"),
        replace(plain, read="chunk", tokens=40),
        replace(plain, tokens=1),
    ]


@pytest.mark.parametrize("case", table(), ids=str)
def test_equals_the_token_loop(case: Case, device: str):
    exact = make_inputs(case, d=16)
    expected = results(exact, *run(case, exact, "reference"))
    inputs = moved(make_inputs(case, d=16, dtype=torch.float32), device)
    got = results(inputs, *run(case, inputs, "fla"))
    assert_same(scaled(got, inputs), scaled(expected, exact), case, tolerance=1e-4)


DELTANET = Case(Matrix(), retention=Delta(), step_size="proximal", momentum=False, chunk_size=16, tokens=37)


@pytest.mark.parametrize("retention", [Decay(), Delta()], ids=["decay", "delta"])
def test_any_split_without_gradients(retention: Decay | Delta, device: str):
    """Single tokens take the kernels that loop over tokens; a state inside a chunk goes on with its anchor."""
    case = replace(DELTANET, retention=retention, step_size="raw")
    inputs = moved(make_inputs(case, d=16, dtype=torch.float32), device)
    with torch.no_grad():
        y, end = run(case, inputs, "chunked")
        for splits in ((16,), (5, 6, 7, 36)):
            got, state = run(case, inputs, "fla", splits)
            assert torch.allclose(got, y, atol=1e-5)
            assert torch.equal(state.position, end.position)
            for mine, its in ((state.params, end.params), (state.anchor, end.anchor)):
                assert torch.allclose(mine["W"], its["W"], atol=1e-5)


def test_widths_and_leading_dimensions(device: str):
    """Keys and values of unequal widths that are no power of two, in rows and heads."""
    shape = (2, 3, 20)
    q, k = (torch.nn.functional.normalize(torch.randn(*shape, 24, device=device), dim=-1) for _ in range(2))
    v = torch.randn(*shape, 40, device=device, requires_grad=True)
    gates = Gates(torch.rand(shape, device=device), torch.rand(shape, device=device))
    found = []
    for engine in ("chunked", "fla"):
        y, state = scan(catalog["gated_deltanet"], None, q, k, v, gates, engine=engine)
        found.append((y, state.params["W"], *torch.autograd.grad(y.square().sum(), v)))
    for want, have in zip(*found, strict=True):
        assert torch.allclose(have, want, atol=1e-4)


def test_without_a_state_masks_and_resets_are_one_call(device: str, monkeypatch: pytest.MonkeyPatch):
    """Packed texts in training: outputs and gradients as those of the chunked engine, NaN in padding included."""
    from nestlearn.memory import fla

    calls = []
    own = fla.Call.run
    monkeypatch.setattr(fla.Call, "run", lambda *args: calls.append(1) or own(*args))
    inputs = moved(make_inputs(replace(DELTANET, flags="both"), d=16, dtype=torch.float32), device)
    assert inputs.mask is not None and inputs.reset is not None
    k = torch.where(inputs.mask.unsqueeze(-1), inputs.k, torch.nan).detach()
    memory, found = replace(DELTANET.memory, chunk_size=4), []
    for engine in ("chunked", "fla"):
        flags = {"mask": inputs.mask, "reset": inputs.reset, "return_state": False}
        y, _ = scan(memory, None, inputs.q, k, inputs.v, inputs.gates, engine=engine, **flags)
        leaves = (inputs.q, inputs.v, inputs.gates.lr)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert len(calls) == 1
    for want, have in zip(*found, strict=True):
        assert torch.allclose(have, want, atol=1e-4)


def test_a_token_that_is_not_finite_stays_in_its_row(device: str):
    case = replace(DELTANET, batch=3)
    inputs = moved(make_inputs(case, d=16, dtype=torch.float32), device)
    inputs.k = inputs.k.detach().clone()
    inputs.k[1, 20] = torch.inf
    y, state = run(case, inputs, "fla")
    bad = y.isnan().any(-1)
    assert not bad[[0, 2]].any() and not bad[1, :20].any() and bad[1, 20:].all()
    assert state.params["W"][1].isnan().all() and state.params["W"][[0, 2]].isfinite().all()


@pytest.mark.gpu  # Triton's interpreter multiplies the bits of bfloat16 numbers.
def test_bfloat16_queries_make_bfloat16_products(device: str):
    """State and gates stay in float32: the error is that of rounded factors."""
    inputs = moved(make_inputs(DELTANET, d=16, dtype=torch.float32), device)
    memory, (_, k, v, gates) = DELTANET.memory, inputs.cut(0, 37)[0]
    exact, end = scan(memory, None, inputs.q, k, v, gates, engine="chunked")
    y, state = scan(memory, None, inputs.q.bfloat16(), k, v, gates, engine="fla")
    assert y.dtype == torch.bfloat16 and state.params["W"].dtype == torch.float32
    error = (state.params["W"] - end.params["W"]).norm() / end.params["W"].norm()
    assert 1e-5 < error < 1e-2
    assert (y.float() - exact).norm() / exact.norm() < 1e-2


@pytest.mark.gpu  # The same.
def test_a_layer_under_autocast_multiplies_in_bfloat16(device: str):
    layer = MemoryMixerConfig("gated_deltanet").build(64, num_heads=2).to(device)
    x = torch.randn(2, 200, 64, device=device)
    with use_engine("chunked"):
        exact = layer(x)[0]
    with use_engine("fla"), torch.autocast(device, torch.bfloat16):
        y, state = layer(x)
    assert y.dtype == torch.bfloat16 and state.memory.params["W"].dtype == torch.float32
    assert 1e-4 < (y.float() - exact).norm() / exact.norm() < 3e-2
    (y.float().square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_a_layer_takes_it_inside_the_context(device: str):
    """Also a layer whose resets bring weights back that are known to be zero."""
    layer = MemoryMixerConfig("gated_deltanet", chunk_size=8).build(32, num_heads=2).to(device)
    x = torch.randn(2, 20, 32, device=device)
    reset = torch.zeros(2, 20, dtype=torch.bool, device=device)
    reset[0, 7] = True
    with use_engine("chunked"):
        want, _ = layer(x, reset=reset)
    with use_engine("fla"):
        have, _ = layer(x, reset=reset)
    assert torch.allclose(have, want, atol=1e-4) and not torch.equal(have, want)


def test_a_second_derivative_raises(device: str):
    inputs = moved(make_inputs(DELTANET, d=16, dtype=torch.float32), device)
    y, _ = run(DELTANET, inputs, "fla")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), inputs.q, create_graph=True)


def call(memory, dtype=torch.float32, d=16, **options):
    """One call of the engine with neutral gates."""
    x, ones = torch.randn(1, 4, d, dtype=dtype), torch.ones(1, 4, dtype=dtype)
    momentum = 0.5 * ones if memory.has_momentum else None
    return scan(memory, None, x, x, x, Gates(ones, ones, momentum), engine="fla", **options)


@pytest.mark.parametrize("name", ["titans", "hope", "momentum", "channels", "proximal decay"])
def test_memories_without_a_kernel_are_refused(name: str):
    deltanet = catalog["deltanet"]
    others = {
        "momentum": replace(deltanet, algorithm=Momentum()),
        "channels": replace(deltanet, retention=Decay(per_channel=True)),
        "proximal decay": replace(catalog["ttt_linear"], step_size="proximal"),
    }
    memory = {**catalog, **others}[name]
    state = memory.init_state((1,), 16, 16)
    x, ones = torch.randn(1, 4, 16), torch.ones(1, 4)
    retain = torch.ones(1, 4, 16) if name == "channels" else ones
    gates = Gates(0.1 * ones, retain, 0.5 * ones if memory.has_momentum else None)
    have = "linear_attention, retnet, deltanet, gated_deltanet, ttt_linear"
    with pytest.raises(RuntimeError, match=f"no kernel there: .*{have}"):
        scan(memory, state, x, x, x, gates, initial=state.params, engine="fla")


def test_what_the_kernels_cannot_do_is_refused_with_the_fix():
    deltanet = catalog["deltanet"]
    with pytest.raises(RuntimeError, match="float32, but the state is float64"):
        call(deltanet, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="at most 256 entries, got 300"):
        call(deltanet, d=300)
    reset = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="cannot bring initial weights back"):
        call(deltanet, initial={"W": torch.ones(1, 16, 16)}, reset=reset)
    with pytest.raises(ValueError, match="unknown engine 'triton'"):
        use_engine("triton").__enter__()  # type: ignore[arg-type]


def test_without_the_package_or_a_device_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    from nestlearn.memory import fla

    monkeypatch.setattr(fla, "_installed", lambda: False)
    with pytest.raises(RuntimeError, match=r"flash-linear-attention is missing.*pip install 'nestlearn\[gpu\]'"):
        call(catalog["deltanet"])
    monkeypatch.setattr(fla, "_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"need a CUDA device, but the tokens are on cpu.*engine='auto'"):
        call(catalog["deltanet"])
    # The default falls back without a word.
    x, ones = torch.randn(1, 4, 16), torch.ones(1, 4)
    assert scan(catalog["deltanet"], None, x, x, x, Gates(ones, ones))[0].isfinite().all()


def test_explain_names_it():
    assert "engine='fla'" in str(explain(catalog["retnet"])) and "no kernel" not in str(explain(catalog["retnet"]))
    assert f"its architecture is {MLP(4)!r}" in str(explain(catalog["hope"]))
    proximal = replace(catalog["ttt_linear"], step_size="proximal")
    assert "its proximal steps let errors follow the weights" in str(explain(proximal))
