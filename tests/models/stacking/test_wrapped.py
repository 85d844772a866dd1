"""Stacked models whose maps are wrapped, replaced or moved: adapters, hooks, quantized and offloaded weights."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from nestlearn import Level, stack_levels, unstack_levels
from nestlearn.continual.session.file import fingerprint
from nestlearn.models import load_stacked
from nestlearn.models.stacking import read_segment

MODES = ["add", "split", "copy"]
LEVELS = [Level(4, lr=20, rank=2), Level(8, lr=20), Level(None)]
MAPS = {"llama": ["gate_proj", "up_proj", "down_proj"], "gpt2": ["c_fc", "c_proj"]}
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def learned(model, ids):
    """The state after all segments of 4 tokens, and the logits that it gives."""
    keys, state = (), None
    for part in ids.split(4, 1):
        _, keys, state, _ = read_segment(model, part, state, keys)
    with torch.no_grad():
        return state, model(ids, level_state=state).logits


def changes(state):
    return [w for levels in state.networks.values() for x in levels if x for w in x.weights.params.values()]


def assert_same_learning(one, two, ids):
    """Two models read the same, learn the same and then read the same."""
    (first, a), (second, b) = learned(one, ids), learned(two, ids)
    for x, y in zip(changes(first), changes(second), strict=True):
        torch.testing.assert_close(x, y, **EXACT)
    torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_on_the_maps_acts_as_if_it_were_merged(make, ids, family, mode, when):
    peft = pytest.importorskip("peft")
    model = make(family, torch.float64)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=MAPS[family], init_lora_weights=False, fan_in_fan_out=family == "gpt2"
    )
    if when == "before":
        model.add_adapter(config)
        model.to(torch.float64)
        plain = copy.deepcopy(model)
        torch.manual_seed(0)
        stack_levels(model, LEVELS, mode=mode)
        for layer in plain.model.layers if family == "llama" else plain.transformer.h:
            for name in MAPS[family]:
                part = getattr(layer.mlp, name)
                part.merge()
                setattr(layer.mlp, name, part.get_base_layer())
        torch.manual_seed(0)
        assert_same_learning(model, stack_levels(plain, LEVELS, mode=mode), ids)
        return
    stack_levels(model, LEVELS, mode=mode)
    before = learned(model, ids)[1]
    adapted = peft.get_peft_model(model, config).double().eval()
    apart = learned(adapted, ids)[1]
    assert (apart - before).abs().max() > 1e-3
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert_same_learning(adapted, merged, ids)


@pytest.mark.parametrize("mode", MODES)
def test_every_map_is_called(make, ids, mode):
    """So a hook of anyone runs, once for each network that the map belongs to."""
    model, calls = stack_levels(make("llama"), LEVELS, mode=mode), []
    state, _ = learned(model, ids)
    mlp = model.model.layers[0].mlp
    for name in MAPS["llama"]:
        getattr(mlp, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        model(ids, level_state=state)
    assert calls == MAPS["llama"] * (len(LEVELS) if mode == "copy" else 1)


class Int8Linear(nn.Module):
    """A linear map with weights of 8 bits, as quantizing libraries put in the place of nn.Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def dequantized(self) -> torch.Tensor:
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x):
        return F.linear(x, self.dequantized(), self.bias)


@pytest.mark.parametrize("mode", MODES)
def test_quantized_maps_stay_and_the_levels_learn(make, ids, mode):
    """As on a model with the dequantized weights."""
    quantized = make("llama", torch.float64)
    for layer in quantized.model.layers:
        for name in MAPS["llama"]:
            setattr(layer.mlp, name, Int8Linear(getattr(layer.mlp, name)))
    plain = make("llama", torch.float64)
    with torch.no_grad():
        for layer, other in zip(plain.model.layers, quantized.model.layers, strict=True):
            for name in MAPS["llama"]:
                getattr(layer.mlp, name).weight.copy_(getattr(other.mlp, name).dequantized())
    for model in (quantized, plain):
        torch.manual_seed(0)
        stack_levels(model, LEVELS, mode=mode)
    assert_same_learning(quantized, plain, ids)
    assert type(unstack_levels(quantized).model.layers[0].mlp.up_proj) is Int8Linear


def test_maps_without_a_gradient_are_refused(make):
    class Frozen(Int8Linear):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    model = make("llama")
    model.model.layers[0].mlp.down_proj = Frozen(model.model.layers[0].mlp.down_proj)
    with pytest.raises(ValueError, match=r"passes no gradient to its input.*dequantize"):
        stack_levels(model, LEVELS)
    model.model.layers[0].mlp.down_proj = nn.Identity()
    with pytest.raises(ValueError, match=r"down_proj is a Identity.*in_features"):
        stack_levels(model, LEVELS)


# ------------------------------------------------------------------------------------------------------ offloading


@pytest.mark.parametrize("mode", MODES)
def test_offloaded_weights_learn_the_same(make, ids, mode):
    accelerate = pytest.importorskip("accelerate")
    model = stack_levels(make("llama", torch.float64), LEVELS, mode=mode)
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in away.model.layers.parameters())
    assert_same_learning(away, model, ids)


@pytest.mark.parametrize("mode", MODES)
def test_a_stacked_model_loads_over_devices(make, ids, tmp_path, mode):
    """The way that the error names for a model that is spread before it is stacked."""
    pytest.importorskip("accelerate")
    model = stack_levels(make("llama"), LEVELS, mode=mode)
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    away = load_stacked(tmp_path, device_map=places, offload_folder=str(tmp_path / "disk"))
    assert next(away.model.layers[1].parameters()).is_meta
    state, expected = learned(model, ids)
    found, logits = learned(away, ids)
    torch.testing.assert_close(logits, expected)
    assert len(changes(found)) == len(changes(state)) and fingerprint(away) == fingerprint(model)
    with pytest.raises(ValueError, match=r"wrapped forward.*load_stacked\(folder, device_map="):
        stack_levels(unstack_levels(away), LEVELS)


# ---------------------------------------------------------------------------------------------------- other processes


def test_a_process_without_this_package_loads_a_saved_model(make, ids, tmp_path):
    """By the file that is saved beside the weights; the classes come from the installed package."""
    for family in ("llama", "gpt2"):
        model = stack_levels(make(family), LEVELS, mode="split")
        model.save_pretrained(tmp_path / family)
        with torch.no_grad():
            torch.save(model(ids).logits, tmp_path / f"{family}.pt")
    torch.save(ids, tmp_path / "ids.pt")
    program = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
folder = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(f"{folder}/llama", trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
for family in ("llama", "gpt2"):
    assert AutoConfig.from_pretrained(f"{folder}/{family}", trust_remote_code=True).model_type == f"stacked_{family}"
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{family}", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(model(torch.load(f"{folder}/ids.pt")).logits, torch.load(f"{folder}/{family}.pt"))
    model.save_pretrained(f"{folder}/{family}-again")
print("same")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "same", done.stderr
    assert sorted(p.name for p in (tmp_path / "llama-again").glob("*.py")) == ["nestlearn_model.py"]
    plain = unstack_levels(AutoModelForCausalLM.from_pretrained(tmp_path / "llama-again"))
    plain.save_pretrained(tmp_path / "plain")
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_attention_weights_are_those_of_the_pretrained_model(make, ids):
    model = make("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
        found = stack_levels(model, LEVELS, mode="split")(ids, output_attentions=True).attentions
    assert len(found) == 2 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
