"""`nested_system` tells what a model and its optimizer are from what they do, and refuses what has no answer."""

from __future__ import annotations

import itertools
import math
import re
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.levels import Frequency, NestedSystem, nested_system
from nestlearn.levels.algebra import average, compose, learner, nest
from nestlearn.nn import ContinuousThoughtConfig, Level
from nestlearn.optim import DGD, M3, MultiTimescale, NestedTransfer

TOKENS = torch.arange(12).remainder(7).view(1, 12)
PER_BATCH = Frequency(1, "batch")


def perceptron() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def adam(model: nn.Module, **settings: Any) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), 1e-2, **settings)


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()


def frequencies(system: NestedSystem) -> dict[str, Frequency]:
    return {component.name: component.frequency for component in system.components}


class Attend(nn.Module):
    """Attention that no list of names knows: written out, or by the fused kernel."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.mix, self.fused = nn.Linear(8, 24), fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = self.mix(x).chunk(3, -1)
        if self.fused:
            return F.scaled_dot_product_attention(a, b, c)
        share = torch.softmax(torch.einsum("bid,bjd->bij", a, b) / 3, -1)
        return F.dropout(share, 0.0, self.training) @ c


class Routed(nn.Module):
    """Softmax without attention: its scores come from a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.router(x).softmax(-1) @ self.experts


# -- what a forward pass shows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_found_by_what_it_computes(fused: bool) -> None:
    model = nn.Sequential(Attend(fused), Routed(), Attend(fused))
    system = nested_system(model, example=torch.randn(2, 5, 8))
    (found,) = [c for c in system.components if c.kind == "attention"]
    assert found.frequency == Frequency(0) and found.level == 1 and found.members == ("0", "2")
    assert found.transfer == ("direct, non-parametric",)


def test_a_language_model_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, use_cache=True
    )
    model = LlamaForCausalLM(config)
    system = nested_system(model, adam(model))
    assert system["self_attn · attention"].members == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    cache = system["key-value cache"]
    assert cache.kind == "cache" and "appends 128 bytes" in cache.rule  # 2 layers, keys and values of 8 floats
    assert sum(c.parameters for c in system.components) == sum(p.numel() for p in model.parameters())
    assert [len(level) for level in system.levels][:3] == [1, 1, 2]


def test_models_that_read_images_or_sound() -> None:
    from transformers import CLIPConfig, CLIPModel

    size: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = {"vocab_size": 20, **size}, {"image_size": 8, "patch_size": 4, **size}
    system = nested_system(CLIPModel(CLIPConfig(text_config=text, vision_config=vision)))  # type: ignore[arg-type]
    found = [c.name for c in system.components if c.kind == "attention"]
    assert len(found) == 2 and not system.notes
    assert all("self_attn" in name for name in found)


def test_a_recurrent_model_carries_a_state() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    system = nested_system(MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1)))
    assert system["carried state"].frequency == Frequency(1) and system["carried state"].bytes > 0
    assert nested_system(nn.GRU(3, 4))["model · memory"].frequency == Frequency(1)


def test_a_convolutional_network_keeps_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    system = nested_system(model, adam(model), example=torch.randn(2, 3, 3, 3))
    assert system["1 · statistics"].frequency == PER_BATCH
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training


def test_memories_of_the_package() -> None:
    levels = [{"period": 4, "hidden": 4}, {"period": 8, "hidden": 4}, {"hidden": 4}]
    deep = {"type": "self_modifying", "expansion": 2, "chunk_size": 2, "projection_chunk_size": 16}
    config = HopeConfig(
        vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=2, mixer=["attention", deep], cms=levels
    )
    system = nested_system(HopeForCausalLM(config))
    found = frequencies(system)
    assert found["model.layers.*.cms.networks.0"] == Frequency(4)
    assert found["model.layers.*.cms.networks.1"] == Frequency(8)
    assert found["model.layers.*.mixer.{k, v, eta, alpha}"] == Frequency(16)
    assert system["mixer · memory"].frequency == Frequency(1)
    assert "generation" in system["mixer · memory"].transfer
    assert system["mixer · attention"].frequency == Frequency(0)
    assert system["mixer · initial weights"].transfer[0] == "initialization"
    loss = nested_system(
        HopeForCausalLM(HopeConfig(**{**config.to_dict(), "cms_signal": "loss", "mixer": "attention"}))
    )
    assert loss["networks.0 · memory"].objective == "next-token loss of its segment"


def test_a_tick_is_faster_than_a_token() -> None:
    model = nn.Sequential(nn.LSTM(8, 8), ContinuousThoughtConfig(classes=2, neurons=16, memory_length=5).build(8))
    system = nested_system(model)
    ticks, tokens = system["1.synchronization · memory"], system["0 · memory"]
    assert ticks.frequency == Frequency(1, "tick") and str(ticks.frequency) == "1 / tick"
    assert system["1.attention · attention"].level < ticks.level < tokens.level
    assert (ticks.bytes, system["1.networks · cache"].bytes) == (2 * 4 * 64, 4 * 16 * 4)
    assert ticks.frequency.updates(tokens=7, batches=7, ticks=25) == 25


def test_levels_on_a_pretrained_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from nestlearn import stack_levels

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    )
    system = nested_system(stack_levels(model, [Level(period=4), Level(period=16)], mode="split"))
    found = frequencies(system)
    assert {f.period for name, f in found.items() if ".levels." in name} == {4, 16}


@pytest.mark.parametrize("long_term", ["learned", "random", "none"])
def test_working_and_long_term_memory_are_components(long_term: str) -> None:
    mixer = {"type": "pmi", "slots": 3, "topk": 2, "segments": 4, "chunk_size": 5, "long_term": long_term}
    sizes: dict[str, Any] = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    system = nested_system(HopeForCausalLM(HopeConfig(mixer=mixer, **sizes)))
    found = {c.name.removeprefix("model.layers.0.mixer."): c for c in system.components if c.kind == "memory"}
    assert set(found) == {"working"} | ({"long_term"} if long_term != "none" else set())
    assert all(c.frequency == Frequency(5) for c in found.values())
    assert found["working"].bytes == 4 * 3 * 8
    starts = [c for c in system.components if c.kind == "initial weights"]
    assert len(starts) == {"learned": 2, "random": 1, "none": 1}[long_term]
    attention = [c.name for c in system.components if c.kind == "attention"]
    if long_term == "none":
        assert not attention
        return
    assert found["long_term"].bytes == 4 * 4 * 3 * 8 and found["long_term"].objective == "−⟨M, a ⊗ M_w⟩"
    assert ("initialization" in found["long_term"].transfer) is (long_term == "learned")
    assert found["working"].depth > found["long_term"].depth
    # Of the attentions of the layer, one is no part of a memory: the long-term read over the working read.
    assert len(attention) == 1 and "infer.relate" in attention[0]


# -- what the optimizer does ----------------------------------------------------------------------------------------


def test_moments_share_a_level_before_the_weights_with_and_without_a_state() -> None:
    model = perceptron()
    optimizer = adam(model)
    fresh = nested_system(model, optimizer)
    assert [[c.name for c in level] for level in fresh.levels] == [["Adam.exp_avg", "Adam.exp_avg_sq"], ["0", "2"]]
    assert not optimizer.state
    step(model, optimizer)
    assert nested_system(model, optimizer) == fresh
    assert fresh["exp_avg"].bytes == 4 * sum(p.numel() for p in model.parameters())
    assert "squared" in fresh["exp_avg_sq"].objective and "squared" not in fresh["exp_avg"].objective


def test_bytes_of_states_follow_the_dtype_of_the_weights() -> None:
    model = perceptron().bfloat16()
    fresh = nested_system(model, adam(model))["exp_avg"].bytes
    optimizer = adam(model)
    model(torch.ones(3, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert fresh == nested_system(model, optimizer)["exp_avg"].bytes == 2 * sum(p.numel() for p in model.parameters())


def test_periods_of_optimizers_are_seen() -> None:
    model = perceptron()
    assert nested_system(model, M3(model.parameters(), slow_period=7))["slow_direction"].frequency.period == 7
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    found = frequencies(nested_system(model, MultiTimescale(torch.optim.SGD(groups, 0.1), [1, 5])))
    assert (found["0"].period, found["2"].period) == (1, 5)
    nested = nested_system(model, NestedTransfer(torch.optim.SGD(model.parameters(), 0.1), period=6))
    assert nested["slow"].frequency.period == 6


class Odd(torch.optim.Optimizer):
    """Steps every third time along an average, and keeps another one that nothing reads."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["t"] = state.get("t", 0) + 1
                for name in ("used", "vain"):
                    state.setdefault(name, torch.zeros_like(p)).add_(p.grad)
                if state["t"] % 3 == 0:
                    p.sub_(group["lr"] * state["used"])


def test_an_optimizer_of_any_class() -> None:
    model = perceptron()
    system = nested_system(model, Odd(model.parameters()))
    assert frequencies(system) == {
        "Odd.used": PER_BATCH, "Odd.vain": PER_BATCH, "0": Frequency(3, "batch"), "2": Frequency(3, "batch"),
    }  # fmt: skip
    assert any("Odd.vain never reaches the weights" in note for note in system.notes)
    assert system["used"].depth == 1


class Ahead(torch.optim.Optimizer):
    """Slow weights around any optimizer, written as such wrappers often are."""

    def __init__(self, optimizer: Any, every: int) -> None:
        self.optimizer, self.every, self.count = optimizer, every, 0
        self.param_groups, self.fast_state = optimizer.param_groups, optimizer.state
        self.defaults, self.slow = optimizer.defaults, {}

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.fast_state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.slow.setdefault(p, p.clone())
        self.optimizer.step()
        self.count += 1
        if self.count % self.every == 0:
            for p, slow in self.slow.items():
                p.copy_(slow.lerp_(p, 0.5))


class Twice(torch.optim.Optimizer):
    """Steps only with a closure, and asks it twice."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None, "a closure is needed"
        for p in self.param_groups[0]["params"]:
            p.grad = None
        closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(0.1 * self.state[p].setdefault("sum", torch.zeros_like(p)).add_(p.grad))


def test_wrappers_and_closures_of_other_packages() -> None:
    model = perceptron()
    ahead = Ahead(torch.optim.Adam(model.parameters(), 1e-2), every=4)
    found = frequencies(nested_system(model, ahead))
    assert found["Ahead.slow"].period == 4 and found["Ahead.exp_avg"] == found["0"] == PER_BATCH
    assert not ahead.slow and not ahead.optimizer.state
    assert frequencies(nested_system(model, Twice(model.parameters())))["Twice.sum"] == PER_BATCH


def test_accumulation_rates_and_frozen_parameters_change_frequencies() -> None:
    model = perceptron()
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias], "lr": 0.0}, {"params": [model[2].weight]}]
    optimizer = torch.optim.Adam(groups, 1e-2)
    model[2].weight.requires_grad_(False)
    system = nested_system(model, optimizer, accumulation=8)
    rules = {c.members: (c.frequency, c.rule) for c in system.components if c.kind == "weights"}
    assert rules["0.weight",] == (Frequency(8, "batch"), "Adam, lr 0.01")
    assert rules["0.bias",] == (Frequency(math.inf), "Adam, lr 0")
    assert rules["2.weight",] == (Frequency(math.inf), "none: frozen")
    assert rules["2.bias",] == (Frequency(math.inf), "none: in no group of the optimizer")
    assert system["exp_avg"].frequency == Frequency(8, "batch")  # also of the group at rate 0
    assert any("In no group of the optimizer, so never trained: 2.bias" in note for note in system.notes)
    assert str(system["exp_avg"].frequency) == "1 / 8 batches"


def test_a_scheduler_that_has_wrapped_step_counts_nothing() -> None:
    model = perceptron()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    system = nested_system(model, optimizer)
    assert system["0"].frequency.period == math.inf and system["exp_avg"].frequency == PER_BATCH
    assert scheduler.last_epoch == 0 and not optimizer.state
    with pytest.raises(TypeError, match="not the scheduler around it"):
        nested_system(model, scheduler)  # type: ignore[arg-type]


def test_an_optimizer_that_reads_the_model_is_shown_from_its_state() -> None:
    model = perceptron()
    optimizer = DGD(model.parameters(), model)
    step(model, optimizer)
    system = nested_system(model, optimizer)
    assert {c.name for c in system.components if c.kind == "optimizer state"} == {"DGD.layers.moment"}
    assert {c.frequency for c in system.components} == {PER_BATCH}
    assert any("cannot step alone (" in note for note in system.notes)


def test_what_is_found_does_not_depend_on_other_work_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock = perceptron(), itertools.count(step=5.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    system = nested_system(model, M3(model.parameters(), lr=1e-3, slow_period=10))
    assert system["M3.slow_direction"].frequency.period == 10 and not system.notes


def test_an_optimizer_whose_copy_takes_too_long_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = perceptron()
    monkeypatch.setattr("nestlearn.levels.probe.SECONDS", 0.0)
    (note, *_) = nested_system(model, adam(model)).notes
    assert "A copy of Adam cannot step alone (TimeoutError: some steps of it took more than 0 s)" in note


# -- parameters and wrappers ----------------------------------------------------------------------------------------


def test_shared_parameters_count_once() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    system = nested_system(model, adam(model))
    assert sum(c.parameters for c in system.components) == 16 + 4 + 4


def test_two_rules_for_one_parameter_are_refused() -> None:
    model = perceptron()
    with pytest.raises(ValueError, match=r"0.weight is in two groups .* two rules would step it"):
        nested_system(model, [adam(model), torch.optim.SGD([model[0].weight], 0.1)])
    both = nested_system(model, [torch.optim.SGD(model[0].parameters(), 0.1), adam(model[2])])
    assert (both["0"].rule, both["2"].rule) == ("SGD, lr 0.1", "Adam, lr 0.01")


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="has none of the model's 4 parameters"):
        nested_system(perceptron(), adam(perceptron()))
    model = perceptron()
    extra = nested_system(model, torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(2))], 0.1))
    assert "also steps 1 tensors that are not the model's" in extra.notes[0]


def test_lazy_modules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.weight is lazy.* Run the model on one batch first"):
        nested_system(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"model": "gpt2"}, TypeError, "model is a str; give a torch.nn.Module"),
        ({"model": nn.Linear(1, 1), "optimizer": 3}, TypeError, "optimizer is a int"),
        ({"model": nn.Linear(1, 1), "accumulation": 0}, ValueError, "accumulation=0"),
        ({"model": nn.Linear(1, 1), "example": torch.ones(2, 3)}, ValueError, "cannot run on example="),
    ],
)
def test_what_is_no_model_optimizer_or_example_is_refused(arguments: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        nested_system(**arguments)


def test_compiled_and_adapted_models() -> None:
    import peft

    model = perceptron()
    plain = nested_system(model, adam(model))
    compiled: Any = torch.compile(model, backend="eager")
    assert nested_system(compiled, adam(model)) == plain
    adapted: Any = peft.get_peft_model(perceptron(), peft.LoraConfig(r=2, target_modules=["0"]))  # type: ignore[arg-type]
    system = nested_system(adapted, torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 1e-2))
    trained = {n: c.frequency for c in system.components for n in c.members if c.kind == "weights"}
    assert {"lora_" in name for name, f in trained.items() if f == PER_BATCH} == {True}
    assert {"lora_" in name for name, f in trained.items() if f != PER_BATCH} == {False}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_on_a_language_model() -> None:
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    system = nested_system(peft.get_peft_model(LlamaForCausalLM(config), adapter))
    assert "appends 64 bytes" in system["key-value cache"].rule and system["self_attn · attention"].level == 1


def test_distributed_wrappers(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = perceptron()
        plain = nested_system(model, adam(model))
        assert nested_system(DistributedDataParallel(model), adam(model)) == plain
        sharded: Any = fully_shard(perceptron(), mesh=init_device_mesh("cpu", (1,)))
        system = nested_system(sharded, adam(sharded))
        assert frequencies(system) == frequencies(plain)
        assert sum(c.parameters for c in system.components) == sum(p.numel() for p in model.parameters())
    finally:
        dist.destroy_process_group()


def test_a_trainer_gives_optimizer_and_accumulation() -> None:
    model = perceptron()

    class Trainer:
        optimizer = adam(model)
        args = type("Arguments", (), {"gradient_accumulation_steps": 4})

    assert nested_system(model, trainer=Trainer)["0"].frequency.period == 4


# -- what is shown --------------------------------------------------------------------------------------------------


def test_a_system_of_the_algebra_is_shown_too() -> None:
    layers = [learner(torch.mul, torch.ones(3), partial(average, 0.9)) for _ in range(2)]
    system = nested_system(compose(layers[0], nest(layers[1], 4)))
    assert [(c.name, c.frequency.period, c.level) for c in system.components] == [
        ("0.rule", 1, 1), ("0.weights", 1, 2), ("1.rule", 4, 3), ("1.weights", 4, 4),
    ]  # fmt: skip


def test_pages_need_nothing_from_elsewhere_and_names_cannot_break_them() -> None:
    model = nn.ModuleDict({"</script><b>": nn.Linear(2, 2), "mlp": perceptron()})
    system = nested_system(model, adam(model))
    page, svg = system.to_html(), system.to_svg()
    assert "<b>" not in page and "src=" not in page and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert page.count('class="box"') == svg.count('class="box"') == len(system.components)
    assert "0.01" in str(system) and system.to_latex().count(r"\\") == len(system.components) + 1
    assert [c["level"] for c in system.as_dict()["components"]] == [c.level for c in system.components]
    with pytest.raises(KeyError, match="not the name of one component"):
        system["nothing"]


@pytest.mark.slow
def test_a_click_shows_details_and_buttons_zoom(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    model = perceptron()
    clicks = """<script>document.querySelectorAll(".box")[0].dispatchEvent(new Event("click"));
    document.querySelector(".zoom button").click();</script>"""
    page = nested_system(model, adam(model)).to_html()
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{clicks}</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", str(tmp_path / "page.html")]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "<strong>Adam.exp_avg</strong>" in shown and "<dt>context flow</dt><dd>gradients</dd>" in shown
    home = re.search(r'viewBox="([^"]+)"', page)
    assert home is not None and f'viewBox="{home[1]}"' not in shown
