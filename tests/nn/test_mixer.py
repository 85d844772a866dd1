"""MemoryMixer: equal to a per-token computation, and finite whatever its gates emit; see also tests/contracts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.memory.oracle import Rule, scan_row
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.memory import L2, MLP, AssociativeMemory, Decay, Delta, Descent, Gates, Matrix, Momentum, catalog, scan
from nestlearn.nn import GateRule, MemoryMixer, MemoryMixerConfig, MixerState
from nestlearn.nn import mixer as mixer_module
from nestlearn.nn.bounds import bounded_momentum, outgrown
from nestlearn.nn.common import unit
from nestlearn.nn.state import tensors_of

NAMES = sorted(catalog)
# Memories that `tests.memory.oracle` knows; tests/nn/test_miras_mixer.py has the others.
LINEAR = [name for name in NAMES if name not in ("moneta", "yaad", "memora", "oja", "ggd", "omega")]
DEEP = [name for name in NAMES if isinstance(catalog[name].architecture, MLP)]
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def make(name: str | AssociativeMemory, d: int = 8, heads: int = 2, **options) -> MemoryMixer:
    """A small float64 layer whose gates differ from token to token."""
    options.setdefault("expansion", 2)
    layer = MemoryMixerConfig(name, **({"chunk_size": 4} | options)).build(d, heads).double()
    if layer.gates is not None:
        with torch.no_grad():
            layer.gates.weight.normal_(0, 1)
    return layer


def run(layer: MemoryMixer, *pieces: Tensor, state: MixerState | None = None, **flags) -> tuple[Tensor, MixerState]:
    outputs = []
    for piece in pieces:
        y, state = layer(piece, state, **flags)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, 1), state


# ---------------------------------------------------------------------------------------------------- the oracle


def naive_gates(layer: MemoryMixer, x: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gates of one token and head from the tables of `nestlearn.nn.bounds`, written out again."""
    rule, heads = layer.rule, layer.num_heads
    logits = None if layer.gates is None else layer.gates.weight @ x + layer.gates.bias
    names = [] if layer.gates is None else list(layer.gates.biases)

    def sigma(name: str) -> Tensor:
        assert logits is not None
        return torch.sigmoid(logits[names.index(name) * heads + head])

    one = torch.ones((), dtype=x.dtype)
    retain = {"one": one, "retnet": one * (1 - 2.0 ** (-5 - head))}.get(rule.retain)
    retain = sigma("retain") if retain is None else retain
    beta = 0.5 * retain * sigma("momentum") if "momentum" in names else None
    return (one if rule.lr == "one" else layer.max_step * sigma("lr")), retain, beta


def naive(layer: MemoryMixer, x: Tensor) -> Tensor:
    """The layer for one row ``[t, d]`` in plain loops, its memory by `tests.memory.oracle`."""
    memory, width, heads, time = layer.memory, layer.d_head, layer.num_heads, len(x)
    deep = isinstance(memory.architecture, MLP)
    projected = x @ layer.qkv.weight.mT
    assert layer.conv is not None
    mixed = torch.stack(
        [
            sum(
                (layer.conv.weight[3 - j] * projected[t - j] for j in range(4) if t >= j),
                torch.zeros_like(projected[0]),
            )
            for t in range(time)
        ]
    )
    q, k, v = F.silu(mixed).view(time, 3, heads, width).unbind(1)
    retention = memory.retention
    kind = "decay" if isinstance(retention, Decay) else "gated" if retention.gated else "delta"
    names = list(memory.architecture.shapes(width, width))
    rule = Rule(
        deep=deep,
        activation="gelu",
        objective="l2" if isinstance(memory.objective, L2) else "dot",
        retention=kind,
        step={name: memory.step_size_of(name) for name in names},
        momentum=isinstance(memory.algorithm, Momentum),
        to_initial=memory.retain_to == "initial",
        chunk_size=memory.chunk_size,
        read=memory.read,
    )
    outputs = []
    for head in range(heads):
        gates = [naive_gates(layer, token, head) for token in x]
        lr, retain = (torch.stack([g[i] for g in gates]) for i in (0, 1))
        beta = torch.stack([g[2] for g in gates]) if rule.momentum else None
        if layer.initial is not None:
            initial = {name: weight[head] for name, weight in layer.initial.items()}
        else:
            initial = {"W": torch.zeros(width, width, dtype=x.dtype, requires_grad=True)}
        keys, queries, values = unit(k[:, head]), unit(q[:, head]), v[:, head]
        values = unit(values) if deep else values
        y, _ = scan_row(rule, initial, queries, keys, values, lr, retain, beta, None, None)
        outputs.append(y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight)
    return torch.cat(outputs, -1) @ layer.out.weight.mT


@pytest.mark.parametrize("name", LINEAR)
def test_equals_the_token_loop_with_all_outer_gradients(name):
    layer = make(name)
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 9, 8, dtype=torch.float64)
    wanted = [x, *layer.parameters()]
    expected = torch.stack([naive(layer, row) for row in x])
    gradients = torch.autograd.grad((expected * target).sum(), wanted)
    y, _ = layer(x)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    for got, want in zip(torch.autograd.grad((y * target).sum(), wanted), gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", DEEP)
def test_gradient_of_each_initial_state_matches_finite_differences(name):
    layer = make(name, heads=1)
    x, target = torch.randn(2, 1, 9, 8, dtype=torch.float64)
    assert layer.initial is not None
    for weight in layer.initial.values():
        direction = torch.randn_like(weight)
        layer.zero_grad()
        (layer(x)[0] * target).sum().backward()
        slope = (weight.grad * direction).sum()
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight.add_(direction, alpha=step)
                losses.append((layer(x)[0] * target).sum())
                weight.sub_(direction, alpha=step)
        torch.testing.assert_close(slope, (losses[0] - losses[1]) / 2e-5, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------- streams of rows; tests/contracts/test_layers.py has more


def test_gradients_do_not_come_from_padding():
    layer = make("titans")
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    results = []
    for filler in (0.0, float("nan")):
        layer.zero_grad()
        filled = torch.where(mask[..., None], x, filler).requires_grad_()
        layer(filled, mask=mask)[0].square().sum().backward()
        results.append([filled.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (results[0][0][~mask] == 0).all()


def test_the_state_holds_no_initial_weights_and_no_past_tokens():
    layer = make("hope")
    _, state = layer(torch.randn(1, 40, 8, dtype=torch.float64))
    assert state.conv is not None
    assert state.conv.untyped_storage().nbytes() == state.conv.numel() * 8
    assert set(state.memory._fields) == {"params", "momentum", "anchor", "position", "aligned", "pending", "recent"}
    assert state.memory.recent is None
    assert state.memory.pending is None


# ------------------------------------------------------------------------------------------------- modes and types


@pytest.mark.parametrize("name", DEEP)
def test_writes_off_reads_the_initial_memory(name):
    layer = make(name, gates=GateRule(retain="one"))
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    y, state = layer(x, writes=False)
    assert layer.initial is not None
    for map_name, weight in layer.initial.items():
        torch.testing.assert_close(state.memory.params[map_name], weight.expand(2, -1, -1, -1), **TOLERANCE)
    assert not torch.allclose(y, layer(x)[0])


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_keeps_gates_and_fast_weights_in_float32(autocast, monkeypatch):
    seen = {}

    def spy(memory, state, q, k, v, gates, **options):
        seen.update(q=q.dtype, lr=gates.lr.dtype, retain=gates.retain.dtype)
        y, end = scan(memory, state, q, k, v, gates, **options)
        seen.update(weights={w.dtype for w in end.params.values()})
        return y, end

    monkeypatch.setattr(mixer_module, "scan", spy)
    layer = MemoryMixerConfig("hope", chunk_size=4, output_gate=True).build(8, 2)
    x = torch.randn(2, 9, 8)
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, _ = layer(x)
    assert seen == {"q": torch.float32, "lr": torch.float32, "retain": torch.float32, "weights": {torch.float32}}
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_state_dict_round_trip():
    layer, other = make("titans", output_gate=True), make("titans", output_gate=True)
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    assert {"initial.map_in", "initial.map_out", "gates.weight", "gates.bias"} <= set(layer.state_dict())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], other(x)[0])


def test_reset_parameters_restores_the_special_starts():
    layer = MemoryMixerConfig("gated_deltanet", learn_initial=True).build(16, 4)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(7.0)
    layer.reset_parameters()
    assert layer.initial is not None and layer.gates is not None
    assert (layer.initial["W"] == 0).all()
    retain = torch.sigmoid(layer.gates.bias[4:])
    torch.testing.assert_close(1 / (1 - retain), torch.tensor([16.0, 64.0, 256.0, 1024.0]), rtol=1e-3, atol=0)


def test_retnet_decays_by_a_constant_per_head():
    layer = make("retnet", heads=2, conv_size=0)
    assert layer.gates is None
    gates = layer._gates(torch.zeros(1, 3, 8), {}, True)
    assert gates.retain.tolist() == [[[1 - 2**-5] * 3, [1 - 2**-6] * 3]]
    assert (gates.lr == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_flops_grow_with_the_chunk_but_not_beyond(name):
    short, long, longer = (MemoryMixerConfig(name).build(32, 2).flops_per_token(n) for n in (8, 64, 4096))
    assert 0 < short < long == longer
    weights = sum(p.numel() for p in MemoryMixerConfig(name).build(32, 2).qkv.parameters())
    assert long > 2 * weights


# ------------------------------------------------------------------------------------------ how much one token writes


SMALL_SHARES = {
    # Rows of its weights are positive and sum to 1: hidden units are averages of the same key and nearly equal, so that
    # weight moved from one to another changes little of what is read.
    "memora": 1e-4,
}


def share_written(name: str, seed: int, d: int = 64) -> float:
    """How far one write moves the read of its own key toward its value, 1 being all of the way.

    A fresh layer with chunks of 64 tokens and fully open gates: every gate at its upper bound, but retain at 0.999.
    Key and value are random and of unit norm. With y the read of the key by the token that writes, and y_0 the same
    without the write, the share is ``<y - y_0, v - y_0> / ||v - y_0||^2``.
    """
    torch.manual_seed(seed)
    layer = MemoryMixerConfig(name, chunk_size=64).build(d, 1).double()
    x, (k, v) = torch.zeros(1, 1, d, dtype=torch.float64), unit(torch.randn(2, 1, 1, 1, d, dtype=torch.float64))
    if layer.gates is not None:
        with torch.no_grad():
            layer.gates.weight.zero_()
            layer.gates.bias.fill_(30)
            if "retain" in layer.gates.biases:
                layer.gates.bias[list(layer.gates.biases).index("retain")] = math.log(0.999 / 0.001)
    initial = layer.initial_weights(k)
    gates = layer._gates(x, initial, True)
    y, y0 = (
        scan(layer.memory, None, k, k, v, gates._replace(lr=lr), initial=initial)[0]
        for lr in (gates.lr, torch.zeros_like(gates.lr))
    )
    return (((y - y0) * (v - y0)).sum() / (v - y0).square().sum()).item()


@pytest.mark.parametrize("name", NAMES)
def test_one_write_moves_the_read_toward_its_value(name):
    share = sum(share_written(name, seed) for seed in range(4)) / 4
    assert SMALL_SHARES.get(name, 0.3) <= share <= 1.0001
    assert name not in SMALL_SHARES or share < 0.3, "this memory writes now: take it from SMALL_SHARES"


@torch.no_grad()
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_no_gates_expand_a_matrix_with_the_l2_objective(chunk, momentum):
    """The proof of `nestlearn.memory.proximal`: distances to a map that fits all values never grow."""
    memory = AssociativeMemory(Matrix(), L2(), Decay(), Momentum() if momentum else Descent(), "proximal")
    layer = MemoryMixerConfig(replace(memory, chunk_size=chunk)).build(4, 1).double()
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    keys = unit(draw(256, 4, 4))[torch.arange(256)[:, None], torch.randint(0, 4, (256, 300), generator=generator)]
    gates = [torch.sigmoid(30 * draw(256, 300)) for _ in range(3)]
    lr, retain = 50 * gates[0], gates[1]
    beta = bounded_momentum(layer.memory, gates[2], retain) if momentum else None
    # Values of 0: the target is the zero matrix, which decay pulls toward as well.
    start = {"W": draw(256, 4, 4)}
    state = layer.memory.init_state((256,), 4, 4, params=start, dtype=torch.float64)
    norm = torch.linalg.matrix_norm(start["W"], 2)
    for t in range(300):
        now = slice(t, t + 1)
        here = Gates(lr[:, now], retain[:, now], None if beta is None else beta[:, now])
        _, state = scan(layer.memory, state, keys[:, now], keys[:, now], torch.zeros(256, 1, 4).double(), here)
        assert (torch.linalg.matrix_norm(state.params["W"], 2) <= norm * (1 + 1e-9)).all()


# ------------------------------------------------------------------------------------------------------- stability


def saturated(layer: MemoryMixer, mode: str) -> MemoryMixer:
    """Gates driven to their ends: everything open, or each token's gate at one end or the other."""
    with torch.no_grad():
        if layer.gates is not None:
            layer.gates.weight.normal_(0, 0 if mode == "open" else 30)
            layer.gates.bias.fill_(30 if mode == "open" else 0)
    return layer


def inputs(tokens: int, *scales: float, d: int = 8) -> Tensor:
    """A random text, a constant one and one that alternates in sign at every scale, as rows."""
    x = torch.randn(tokens, d)
    constant = x[:1].expand(tokens, d)
    texts = torch.stack([x, constant, constant * torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0)[:, None]])
    return torch.cat([scale * texts for scale in scales]).to(torch.bfloat16).float()


def assert_finite(layer: nn.Module, x: Tensor) -> None:
    x = x.requires_grad_()
    y, state = layer(x)
    y.square().mean((1, 2)).sum().backward()
    assert y.isfinite().all()
    assert all(w.isfinite().all() for w in tensors_of(state) if w.is_floating_point())
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("tokens", [1024, pytest.param(32768, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("name", NAMES)
def test_finite_at_saturated_gates(name, tokens):
    for mode in ("open", "mixed"):
        assert_finite(saturated(MemoryMixerConfig(name).build(8, 1), mode), inputs(tokens, 1.0, 1e2, 1e4))


OWN = {
    "yaad_momentum": replace(catalog["yaad"], algorithm=Momentum()),
    "titans_linear": AssociativeMemory(Matrix(), L2(), algorithm=Momentum()),
    "titans_linear_small_chunk": AssociativeMemory(Matrix(), L2(), algorithm=Momentum(), chunk_size=4),
    "titans_to_initial": AssociativeMemory(MLP(2), L2(), algorithm=Momentum(), retain_to="initial"),
    "dla_momentum": AssociativeMemory(MLP(2), algorithm=Momentum(), retain_to="initial"),
    "deep_delta_l2": AssociativeMemory(MLP(2), L2(), Delta(), step_size="proximal", retain_to="initial"),
    "deep_delta_normalized": replace(catalog["hope"], architecture=MLP(2), step_size="normalized"),
    "deep_delta_l2_momentum": AssociativeMemory(
        MLP(2), L2(), Delta(), Momentum(), step_size="proximal", retain_to="initial", chunk_size=8
    ),
    "delta_momentum": AssociativeMemory(Matrix(), retention=Delta(), algorithm=Momentum()),
}


@pytest.mark.parametrize("name", OWN)
def test_finite_for_memories_outside_the_catalog(name):
    for mode in ("open", "mixed"):
        assert_finite(saturated(MemoryMixerConfig(OWN[name]).build(8, 1), mode), inputs(512, 1.0))


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("name", ["ttt_mlp", "titans", "yaad", "moneta"])
def test_finite_when_the_initial_weights_have_grown(name, chunk):
    """Outer training may enlarge the initial weights, also in a single direction."""
    for growing in (lambda w: 3 * w, lambda w: w + 4 * torch.ones_like(w) / math.sqrt(w[0].numel())):
        layer = saturated(MemoryMixerConfig(name, chunk_size=chunk).build(8, 1), "open")
        assert layer.initial is not None
        with torch.no_grad():
            for weight in layer.initial.values():
                weight.copy_(growing(weight))
        assert_finite(layer, inputs(512, 1.0))


def test_growth_is_one_at_the_start_and_bounds_the_spectral_norm():
    start = {"in": torch.randn(5, 256, 64) / 8, "out": torch.randn(5, 64, 256) / 16}
    torch.testing.assert_close(outgrown(start), torch.ones(5), rtol=0.03, atol=0)
    torch.testing.assert_close(outgrown({n: 2 * w for n, w in start.items()}), torch.full((5,), 4.0), rtol=0.03, atol=0)
    assert (outgrown({n: w / 2 for n, w in start.items()}) == 1).all()
    one_direction = {n: w + 100 * torch.ones_like(w) / 128 for n, w in start.items()}
    spectral = sum(torch.linalg.matrix_norm(w, 2).square() for w in one_direction.values())
    at_start = sum(torch.linalg.matrix_norm(w, 2).square() for w in start.values())
    assert (outgrown(one_direction) > 0.5 * spectral / at_start).all()


def test_a_deep_hebbian_memory_with_raw_steps_never_outgrows_its_start():
    """The bound of the tied step: neither map's norm passes the larger initial norm."""
    memory = AssociativeMemory(MLP(2), retention=Decay(per_channel=True))
    layer = saturated(MemoryMixerConfig(memory).build(8, 1), "mixed")
    assert layer.initial is not None
    start = max(torch.linalg.matrix_norm(w.detach(), 2).max() for w in layer.initial.values())
    for _ in range(8):
        with torch.no_grad():
            _, state = layer(inputs(512, 1.0))
        assert max(torch.linalg.matrix_norm(w, 2).max() for w in state.memory.params.values()) <= start * 1.0001


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "deltanets"}, "Did you mean 'deltanet'"),
        ({"memory": "zzz"}, "Known: "),
        ({"conv_size": -1}, "conv_size"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"max_step": 0.0}, "max_step"),
        ({"max_step": 2.5}, "at most 2"),
        ({"memory": AssociativeMemory(MLP(2), L2(), Decay(per_channel=True)), "max_step": 1.5}, "at most 1"),
        ({"memory": "titans", "gates": GateRule(lr="one")}, "Use lr='learned'"),
        (
            {
                "memory": AssociativeMemory(MLP(2), retention=Decay(per_channel=True)),
                "gates": GateRule(retain="one"),
            },
            "would never write",
        ),
        ({"memory": replace(catalog["ggd"], values=L2())}, "no bounded gradient.*Use Huber"),
        ({"memory": replace(catalog["hope"], algorithm=Momentum())}, "delta retention and momentum together"),
        ({"memory": replace(catalog["hope"], step_size="normalized", retain_to="zero")}, "activations that vanish"),
        ({"memory": AssociativeMemory(MLP(2), retention=Delta())}, "hidden activations have no bounded norm"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryMixerConfig(**({"memory": "deltanet"} | options))


def test_impossible_sizes_are_refused():
    for sizes in ((9, 2), (8, 0), (0, 1)):
        with pytest.raises(ValueError, match="divisible"):
            MemoryMixerConfig("deltanet").build(*sizes)


def test_bad_arguments_are_refused():
    layer = MemoryMixerConfig("deltanet").build(8, 2)
    with pytest.raises(ValueError, match="tokens >= 1"):
        layer(torch.zeros(1, 0, 8))
    with pytest.raises(ValueError, match="expected x of shape"):
        layer(torch.zeros(1, 3, 9))
    with pytest.raises(TypeError, match="not token ids"):
        layer(torch.zeros(1, 3, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="memory=3 must be a string or of the class AssociativeMemory"):
        MemoryMixerConfig(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown gate"):
        GateRule(lr="two")  # pyright: ignore[reportArgumentType]


def test_proximal_steps_have_no_largest_value():
    assert MemoryMixerConfig("hope", max_step=50.0).build(8, 2).max_step == 50.0
    assert MemoryMixerConfig("hope").build(8, 2).max_step == MemoryMixerConfig("titans").build(8, 2).max_step == 4.0
    assert math.isclose(MemoryMixerConfig("deltanet", max_step=2).build(8, 2).max_step, 2.0)
