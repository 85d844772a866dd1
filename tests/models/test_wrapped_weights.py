"""Layers work whatever wraps or moves their weights: adapters, hooks, offloading, export."""

import copy
from typing import Any

import pytest
import torch
from tests.mixers import SMALL
from torch import Tensor, nn

from nestlearn import HopeConfig, HopeForCausalLM

MIXERS = (
    "attention", "deltanet", "titans", "moneta", "self_modifying", "titans_mac", "titans_mag", "titans_mal",
    "tnt", "pmi",
)  # fmt: skip
SEEN = 20


def build(mixer: str) -> HopeForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = HopeForCausalLM(HopeConfig(mixer=SMALL[mixer], **sizes))
    return model.double().eval()


def ids() -> Tensor:
    return torch.randint(0, 259, (2, SEEN), generator=torch.Generator().manual_seed(1))


class Logits(nn.Module):
    def __init__(self, model: HopeForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_low_rank_adapter_acts_the_same_merged_or_not(mixer: str) -> None:
    peft = pytest.importorskip("peft")
    model = build(mixer)
    plain = model(ids()).logits
    names = [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:  # one at a time: a large effect of one must not hide that another has none
        config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=[f"model.{name}"], init_lora_weights=False)
        adapted = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
        apart = adapted(ids()).logits
        merged = adapted.merge_and_unload()(ids()).logits
        assert not torch.equal(apart, plain), name
        torch.testing.assert_close(apart, merged, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_every_module_that_owns_a_parameter_is_called(mixer: str) -> None:
    model, called = build(mixer), set()
    owners = {n: m for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}
    for name, module in owners.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(ids())
    assert called == set(owners)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_offloaded_weights_give_the_same_logits(mixer: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build(mixer)
    first, second = ids()[:, :13], ids()[:, 13:]
    before = model(first, use_cache=True)
    want = model(second, past_key_values=before.past_key_values).logits
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert next(away.model.layers.parameters()).is_meta
    after = away(first, use_cache=True)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(away(second, past_key_values=after.past_key_values).logits, want)


LEVELS = {
    "local": {"cms": [{"period": 4, "rank": 2}, {"period": 8, "expansion": 1}, {"expansion": 1}]},
    "momentum": {"cms": [{"period": 4, "rule": "momentum", "retain": 0.9}, {"expansion": 1}]},
    "nested": {"cms": [{"period": 2, "rank": 2}, {"period": 4}], "cms_variant": "nested"},
    "nested by gradient": {
        "cms": [{"period": 2}, {"period": 4}],
        "cms_variant": "nested",
        "cms_transfer_by": "gradient",
    },
    "independent": {"cms": [{"period": 4, "rank": 2}, {"expansion": 1}], "cms_variant": "independent"},
    "loss": {"cms": [{"period": 4, "rank": 2}, {"period": 8, "expansion": 1}], "cms_signal": "loss"},
    "loss nested": {"cms": [{"period": 2}, {"period": 4}], "cms_signal": "loss", "cms_variant": "nested"},
}


def levels(case: str) -> HopeForCausalLM:
    """A model whose levels write."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = HopeForCausalLM(HopeConfig(mixer="attention", **sizes, **LEVELS[case])).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("value", "_B")):
                parameter.normal_()
    return model


@pytest.mark.parametrize("case", LEVELS)
@torch.no_grad()
def test_offloaded_levels_give_the_same_logits(case: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = levels(case)
    first, second = ids()[:, :13], ids()[:, 13:]
    before = model(first, use_cache=True)
    want = model(second, past_key_values=before.past_key_values).logits
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in away.model.layers.parameters())
    after = away(first, use_cache=True)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(away(second, past_key_values=after.past_key_values).logits, want)
    assert not torch.equal(away(second).logits, want)


@pytest.mark.parametrize("case", LEVELS)
@torch.no_grad()
def test_every_module_of_a_level_that_owns_a_parameter_is_called(case: str) -> None:
    model, called = levels(case), set()
    owners = {n: m for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}
    for name, module in owners.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(ids())
    assert called == set(owners)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_export_equals_eager(mixer: str) -> None:
    model = build(mixer)
    exported = torch.export.export(Logits(model), (ids(),)).module()
    other = ids().flip(1)
    assert torch.equal(exported(other), model(other).logits)
