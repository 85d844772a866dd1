"""Each trainable parameter of a model is in exactly one group, of the rule that fits what the parameter is."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nestlearn.models import HopeConfig, HopeForCausalLM, presets
from nestlearn.optim import M3, param_groups


def placed(model: nn.Module) -> dict[str, str]:
    """Name to rule ("kernel" for kernels of convolutions); every trainable parameter once, no other."""
    found: dict[Tensor, str] = {}
    for group in param_groups(model):
        for parameter in group["params"]:
            assert parameter not in found
            found[parameter] = "kernel" if group.get("kernels") else group["rule"]
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert set(found) == {parameter for parameter in model.parameters() if parameter.requires_grad}
    return {names[parameter]: rule for parameter, rule in found.items()}


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.bag = nn.EmbeddingBag(10, 4)
        self.linear = nn.Linear(4, 6)
        self.row = nn.Linear(4, 1)
        self.column = nn.Linear(1, 4)
        self.stack = nn.Parameter(torch.zeros(3, 4, 5))
        self.row_stack = nn.Parameter(torch.zeros(3, 1, 5))
        self.conv1d = nn.Conv1d(4, 6, 3)
        self.conv2d = nn.Conv2d(4, 6, 3)
        self.thin = nn.Conv2d(1, 6, (3, 1))
        self.depthwise = nn.Conv1d(4, 4, 3, groups=4)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_parameters_go_by_what_they_are():
    rules = placed(Everything())
    assert {name for name, rule in rules.items() if rule == "matrix"} == {"linear.weight", "stack"}
    assert {name for name, rule in rules.items() if rule == "kernel"} == {
        "conv1d.weight", "conv2d.weight", "thin.weight"
    }  # fmt: skip
    adamw = {name for name, rule in rules.items() if rule == "adamw"}
    assert {"embedding.weight", "bag.weight", "row.weight", "column.weight", "row_stack", "depthwise.weight"} <= adamw
    assert {"norm.weight", "norm.bias", "linear.bias", "conv1d.bias", "scale"} <= adamw


def test_only_vectors_and_scalars_are_without_weight_decay():
    for group in param_groups(Everything(), lr=0.1, adamw_lr=0.2, weight_decay=0.3):
        assert group["lr"] == (0.1 if group["rule"] == "matrix" else 0.2)
        assert group["weight_decay"] == (0.0 if all(p.ndim < 2 for p in group["params"]) else 0.3)
    assert all("lr" not in group for group in param_groups(Everything()))


def test_a_kernel_of_one_dimension_is_a_matrix_and_not_a_stack():
    """[out, in, width] by out: the update is that of the matrix [out, in · width]."""
    model = nn.Conv1d(4, 6, 3, bias=False).double()
    matrix = nn.Parameter(model.weight.detach().flatten(1).clone())
    optimizers = M3(param_groups(model), slow_period=2), M3([matrix], slow_period=2)
    for _ in range(5):
        model.weight.grad = torch.randn_like(model.weight)
        matrix.grad = model.weight.grad.flatten(1).clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(model.weight.flatten(1), matrix, rtol=1e-9, atol=1e-12)


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    ))  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied: bool):
    rules = placed(tiny_llama(tied))
    assert all(rule == "matrix" for name, rule in rules.items() if name.endswith("_proj.weight"))
    assert sum(rule == "matrix" for rule in rules.values()) == 2 * 7
    assert rules["model.embed_tokens.weight"] == "adamw"
    assert rules.get("lm_head.weight") == (None if tied else "adamw")
    assert all(rule == "adamw" for name, rule in rules.items() if "norm" in name)


def test_gpt2():
    """Its linear maps are transformers' `Conv1D`: matrices [in, out], no kernels."""
    rules = placed(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)))
    assert sum(rule == "matrix" for rule in rules.values()) == 2 * 4
    assert rules["transformer.wte.weight"] == rules["transformer.wpe.weight"] == "adamw"


@pytest.mark.parametrize("preset", [name for name in presets() if name.endswith("-tiny")])
def test_hope(preset: str):
    rules = placed(HopeForCausalLM(HopeConfig.from_preset(preset)))
    assert "matrix" in rules.values() and "adamw" in rules.values()
    assert "kernel" not in rules.values()  # all its convolutions are depthwise


def test_a_tied_head_is_an_embedding_whichever_comes_first():
    class Tied(nn.Module):
        def __init__(self, head_first: bool) -> None:
            super().__init__()
            layers = {"head": nn.Linear(4, 10, bias=False), "embedding": nn.Embedding(10, 4)}
            for name in sorted(layers, reverse=head_first):
                setattr(self, name, layers[name])
            self.head.weight = self.embedding.weight
            self.middle = nn.Linear(4, 4, bias=False)

    for head_first in (False, True):
        rules = placed(Tied(head_first))
        assert sorted(rules.values()) == ["adamw", "matrix"]
        assert rules["middle.weight"] == "matrix"


def test_a_rate_of_0_for_the_rest_is_0():
    groups = param_groups(nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 3)), lr=0.1, adamw_lr=0.0)
    assert [(group["rule"], group["lr"]) for group in groups] == [("matrix", 0.1), ("adamw", 0.0), ("adamw", 0.0)]


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.Linear(2, 2).requires_grad_(False))


def test_a_language_model_learns_with_them():
    model = tiny_llama(tied=True)
    optimizer = M3(param_groups(model), lr=0.02)
    tokens = torch.arange(24).remainder(7).view(2, 12)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(later < first for first, later in pairwise(losses[::10]))
