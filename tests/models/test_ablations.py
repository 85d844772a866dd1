"""The ablations of NL Table 6, and what Hope-Attention and the paper-literal Hope are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.memory import L2, Delta, Momentum
from nestlearn.models.flops import meta_model
from nestlearn.nn import CausalAttention, ContinuumMemory, SelfModifyingTitans

FULL_MIXER: dict[str, Any] = {
    "type": "self_modifying",
    "expansion": 2,
    "chunk_size": 4,
    "projection_chunk_size": 8,
    "momentum": True,
    "objective": "l2",
    "adaptive": ["q", "k", "v", "eta", "alpha"],
}
FULL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mixer": FULL_MIXER,
    "initializer_range": 0.3,
    "cms": [{"period": 4, "expansion": 1}, {"expansion": 3}],
}


def mixer(**changes: Any) -> dict[str, Any]:
    return {"mixer": FULL_MIXER | changes}


def without(stream: str) -> dict[str, Any]:
    return mixer(adaptive=[name for name in FULL_MIXER["adaptive"] if name != stream])


# Row of NL Table 6: what changes in the configuration, from all mechanisms on.
TABLE_6: dict[str, dict[str, Any]] = {
    "w/o DGD": mixer(delta=False),
    "w/o momentum": mixer(momentum=False),
    "w/o weight decay": mixer(retention=False),
    "w/o CMS": {"cms": [{"period": None, "expansion": 4}]},
    "w/o inner-projection k": without("k"),
    "w/o inner-projection v": without("v"),
    "w/o inner-projection q": without("q"),
}
# Not in the table: values given by the token, and the readings that docs/decisions.md names.
FURTHER: dict[str, dict[str, Any]] = {
    "given values": mixer(self_values=False),
    "chunk reads": mixer(read="chunk"),
    "retention to zero": mixer(retain_to="zero"),
    "dot product": mixer(objective="dot"),
    "w/o inner-projection eta": without("eta"),
    "w/o inner-projection alpha": without("alpha"),
    "static projections": mixer(adaptive=[]),
}


def model(**fields: Any) -> HopeForCausalLM:
    """A float64 model of the given settings; what it shares with another configuration has the same weights."""
    built = HopeForCausalLM(HopeConfig(**(FULL | fields))).double().eval()
    for name, parameter in built.named_parameters():
        torch.manual_seed(sum(map(ord, name)))
        torch.nn.init.normal_(parameter, std=0.5)
        if name.endswith("alpha_bias"):
            torch.nn.init.constant_(parameter, 2.0)
    return built


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 50, (2, 21), generator=torch.Generator().manual_seed(1))


Full = tuple[dict[str, Tensor], Tensor]


@pytest.fixture(scope="module")
def full(ids: Tensor) -> Full:
    """Parameters and logits of the model with all mechanisms."""
    built = model()
    with torch.no_grad():
        return dict(built.named_parameters()), built(ids).logits


@pytest.mark.parametrize("name", [*TABLE_6, *FURTHER])
def test_each_ablation_computes_another_function(name: str, ids: Tensor, full: Full) -> None:
    """Different outputs at equal shared weights, from the same weights that the full model has where it has them."""
    (shared, before), ablated = full, model(**(TABLE_6 | FURTHER)[name])
    for key, parameter in ablated.named_parameters():
        if key in shared and shared[key].shape == parameter.shape:
            assert torch.equal(shared[key], parameter)
    with torch.no_grad():
        after = ablated(ids).logits
    assert torch.isfinite(after).all()
    assert (before - after).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("name", [*TABLE_6, *FURTHER])
def test_each_ablation_learns(name: str, ids: Tensor) -> None:
    built = HopeForCausalLM(HopeConfig(**(FULL | {"initializer_range": 0.05} | (TABLE_6 | FURTHER)[name]))).train()
    loss = built(ids, labels=ids).loss
    loss.backward()
    dead = {key for key, p in built.named_parameters() if p.grad is None}
    assert all("alpha" in key for key in dead) and bool(dead) == (name == "w/o weight decay")
    assert all(p.grad.isfinite().all() for p in built.parameters() if p.grad is not None)
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        after = built(ids, labels=ids).loss
        after.backward()
    assert after < loss


def test_the_paper_literal_hope_is_as_printed() -> None:
    """L2, delta retention to zero, chunk reads, momentum, self-generated targets, five adaptive streams, 4 levels."""
    layer = meta_model(HopeConfig.from_preset("hope-paper")).model.layers[0].mixer
    assert isinstance(layer, SelfModifyingTitans)
    memory = layer.memory
    assert (memory.objective, memory.retention, memory.algorithm) == (L2(), Delta(), Momentum())
    assert (memory.read, memory.retain_to, layer.self_values) == ("chunk", "zero", True)
    assert layer.adaptive == ("q", "k", "v", "eta", "alpha")
    periods = [level["period"] for level in HopeConfig.from_preset("hope-paper").cms]
    assert periods == [512, 2048, 8192, 32768]


@pytest.mark.parametrize("size", ["tiny", "small", "340m", "760m", "1.3b"])
def test_hope_attention_is_softmax_attention_with_a_continuum_memory(size: str) -> None:
    built = meta_model(HopeConfig.from_preset(f"hope-attention-{size}"))
    for block in built.model.layers:
        assert isinstance(block.mixer, CausalAttention)
        assert block.mixer.window is None and block.mixer.conv is None
        assert isinstance(block.cms, ContinuumMemory)
        periods = block.cms.periods
        assert periods[-1] is None and len(periods) > 1 and all(periods[:-1])
