"""Levels as an adapter of peft: the formula, what trains, files, several adapters, merging, and training."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tests.llama import tiny_llama
from tests.models.stacking.conftest import FAMILIES, tiny, tokens
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaMLP

from nestlearn import Level, MemorySession, stack_levels
from nestlearn.data import byte_tokenizer
from nestlearn.models.stacking import MapNames
from nestlearn.peft import ContinuumConfig, ContinuumLayer, continuum_optimizer, stack_adapter

LEVELS = {
    "add": [Level(period=4, hidden=3), Level(period=12, hidden=5)],
    "split": [Level(period=4, hidden=5, rank=2), Level(period=12, hidden=7, rank=1)],  # units 12 to 23 have no level
}
MODES = sorted(LEVELS)
IDS = torch.arange(5, 29)[None]
LLAMA = MapNames("up_proj", "down_proj", "gate_proj", "act_fn")


def config(mode: str, **fields: Any) -> ContinuumConfig:
    given: dict[str, Any] = {"levels": LEVELS[mode], "mode": mode, "task_type": "CAUSAL_LM"}
    return ContinuumConfig(**given | fields)


def adapted(mode: str, model: Any = None, **fields: Any) -> Any:
    base = tiny_llama(num_hidden_layers=2) if model is None else model
    return get_peft_model(base, config(mode, **fields)).eval()


@torch.no_grad()
def moved(model: Any, seed: int = 1) -> Any:
    """The model with other values of all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def beside_by_hand(mlp: Any, levels: list[Any], token: Tensor) -> Tensor:
    """M(x) and the network of every level, with the matrices written out."""
    networks = [(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)]
    networks += [(level.gate, level.up, level.down) for level in levels]
    outputs = []
    for gate, up, down in networks:
        z = gate @ token
        outputs.append(down @ (z / (1 + torch.exp(-z)) * (up @ token)))
    return torch.stack(outputs).sum(0)


def inside_by_hand(mlp: Any, levels: list[Any], token: Tensor) -> Tensor:
    """M(x), one hidden unit after the other, with the changes of the level that has the unit."""
    y = torch.zeros_like(token)
    for unit in range(mlp.up_proj.weight.shape[0]):
        gate, up, down = mlp.gate_proj.weight[unit], mlp.up_proj.weight[unit], mlp.down_proj.weight[:, unit]
        for level in levels:
            if unit in level.units:
                i = unit - level.units.start
                gate = gate + sum(b * a for b, a in zip(level.gate_B[i], level.gate_A, strict=True))
                up = up + sum(b * a for b, a in zip(level.up_B[i], level.up_A, strict=True))
                down = down + sum(b * a for b, a in zip(level.down_B.T, level.down_A[:, i], strict=True))
        z = gate @ token
        y = y + down * (z / (1 + torch.exp(-z)) * (up @ token))
    return y


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_and_all_its_gradients_equal_the_formula_token_by_token(mode: str) -> None:
    mlp = LlamaMLP(tiny_llama().config).double()
    layer = ContinuumLayer(mlp, LLAMA, "default")
    layer.update_layer("default", config(mode))
    moved(layer)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    by_hand = beside_by_hand if mode == "add" else inside_by_hand
    expected = torch.stack([torch.stack([by_hand(mlp, layer.levels("default"), token) for token in row]) for row in x])
    got = layer(x)
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
    weights = torch.randn_like(got)
    grads = [torch.autograd.grad((y * weights).sum(), leaves) for y in (got, expected)]
    for a, b in zip(*grads, strict=True):
        assert b.abs().max() > 0 and (a - b).abs().max() <= 1e-11 * b.abs().max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_as_the_base_and_only_the_adapter_learns(family: str, mode: str) -> None:
    base, ids = tiny(family), tokens()
    frozen = dict(base.named_parameters())
    before, values = logits(base, ids), {name: w.clone() for name, w in frozen.items()}
    model = adapted(mode, base)
    assert (logits(model, ids) - before).abs().max() <= (0 if mode == "add" else 1e-5)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("continuum_levels.default" in name for name in trainable)
    moved(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable.values())
    assert all(p.grad is None and torch.equal(p, values[name]) for name, p in frozen.items())
    assert (logits(model, ids) - before).abs().max() > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_at_the_start_the_last_maps_have_gradients(mode: str) -> None:
    """Outputs start at zero: only what multiplies them learns from the first step, and that is not nothing."""
    model = adapted(mode)
    model(input_ids=IDS, labels=IDS).loss.backward()
    last = "down" if mode == "add" else "_B"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert bool(parameter.grad.abs().max() > 0) == name.endswith(last), name


@pytest.mark.parametrize("mode", MODES)
def test_saved_and_loaded(mode: str, tmp_path: Path) -> None:
    model = moved(adapted(mode))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    found = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(found, ContinuumConfig) and found.plan().levels == tuple(LEVELS[mode])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "CONTINUUM"
    again = PeftModel.from_pretrained(tiny_llama(num_hidden_layers=2), tmp_path)
    assert torch.equal(logits(again), expected)
    assert not any(p.requires_grad for p in again.parameters())
    go_on = PeftModel.from_pretrained(
        tiny_llama(num_hidden_layers=2), tmp_path, is_trainable=True, low_cpu_mem_usage=True
    )
    assert torch.equal(logits(go_on), expected) and any(p.requires_grad for p in go_on.parameters())
    # The file holds the numbers of the levels, and a header.
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * numbers + 4096


def test_two_adapters_and_none() -> None:
    base = logits(tiny_llama(num_hidden_layers=2))
    model = moved(adapted("add"))
    first = logits(model)
    model.add_adapter("other", config("split", target_modules=["layers.1.mlp"]))
    assert torch.equal(logits(model), first)  # another adapter is not active before it is chosen
    model.set_adapter("other")
    assert (logits(model) - base).abs().max() <= 1e-6
    second = logits(moved(model, seed=2))
    assert min((first - second).abs().max(), (second - base).abs().max()) > 1e-3
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all("layers.1.mlp.continuum_levels.other" in name for name in trainable)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert min((both - x).abs().max() for x in (first, second)) > 1e-3
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)


def test_levels_inside_are_merged_and_taken_off_again() -> None:
    model = moved(adapted("split"))
    expected, kept = logits(model), {name: w.clone() for name, w in model.state_dict().items()}
    model.merge_adapter(safe_merge=True)
    assert (logits(model) - expected).abs().max() <= 1e-6
    assert any(not torch.equal(w, kept[name]) for name, w in model.state_dict().items() if "base_layer" in name)
    model.unmerge_adapter()
    assert all((w - kept[name]).abs().max() <= 1e-6 for name, w in model.state_dict().items())
    merged = model.merge_and_unload()
    assert type(merged) is type(tiny_llama()) and not any("continuum" in name for name, _ in merged.named_modules())
    assert (logits(merged) - expected).abs().max() <= 1e-6


def test_merging_transposed_maps() -> None:
    model = moved(adapted("split", tiny("gpt2")))
    expected = logits(model)
    assert (logits(model.merge_and_unload()) - expected).abs().max() <= 1e-5


def test_levels_beside_cannot_be_merged_and_nothing_changes() -> None:
    model = moved(adapted("add"))
    expected = logits(model)
    with pytest.raises(ValueError, match="cannot be merged: its levels are networks of their own beside .* activation"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="Use it unmerged"):
        model.merge_and_unload()
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), logits(tiny_llama(num_hidden_layers=2)))


def test_a_merge_that_cannot_be_is_refused() -> None:
    class Quantized(nn.Linear):
        """Stands for a map whose weights are no plain matrix."""

    base: Any = tiny_llama()
    base.model.layers[0].mlp.up_proj.__class__ = Quantized
    model = adapted("split", base)
    with pytest.raises(ValueError, match="without a plain matrix of weights"):
        model.merge_adapter()
    broken = adapted("split")
    with torch.no_grad():
        next(p for p in broken.parameters() if p.requires_grad).fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite; it was not merged"):
        broken.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("mode", MODES)
def test_the_trained_levels_go_on_learning_while_they_read(mode: str) -> None:
    model = moved(adapted(mode))
    expected, weights = (
        logits(model),
        {name: w.clone() for name, w in tiny_llama(num_hidden_layers=2).state_dict().items()},
    )
    stacked = stack_adapter(model)
    assert (logits(stacked) - expected).abs().max() <= 1e-6
    if mode == "add":  # the base is as it was; the levels hold what was trained
        assert all(torch.equal(w, weights[name]) for name, w in stacked.state_dict().items() if name in weights)
    session = MemorySession(stacked, byte_tokenizer(), compare="none")
    session.read("a red lamp, a blue lamp, " * 4)
    assert all(row.change > 0 for row in session.diff())


@pytest.mark.parametrize("mode", MODES)
def test_a_level_changes_at_the_end_of_its_period_by_the_mean_gradient(mode: str) -> None:
    model = moved(adapted(mode))
    optimizer = continuum_optimizer(model, partial(torch.optim.SGD, lr=0.1))
    layers = [module for module in model.modules() if isinstance(module, ContinuumLayer)]
    fast, slow = ([p for layer in layers for p in layer.levels("default")[i].parameters()] for i in (0, 1))
    start = [p.detach().clone() for p in slow]
    sums = [torch.zeros_like(p) for p in slow]
    for step in range(1, 7):
        before = [p.detach().clone() for p in fast]
        optimizer.zero_grad()
        model(input_ids=IDS + step, labels=IDS + step).loss.backward()
        if step <= 3:
            sums = [total + cast(Tensor, p.grad) for total, p in zip(sums, slow, strict=True)]
        optimizer.step()
        assert not any(torch.equal(p, old) for p, old in zip(fast, before, strict=True))
        if step in (2, 5):  # not at the end of a period of 3 steps
            assert all(torch.equal(p, x) for p, x in zip(slow, start, strict=True))
        if step == 3:
            for p, old, total in zip(slow, start, sums, strict=True):
                assert total.abs().max() > 0 and torch.allclose(p, old - 0.1 * total / 3, atol=1e-7)
            start = [p.detach().clone() for p in slow]
    assert not any(torch.equal(p, x) for p, x in zip(slow, start, strict=True))


def lines(count: int = 32) -> list[dict[str, list[int]]]:
    text = b"the lamp is red and the door is blue. "
    ids = [list(text[i % 7 :] + text[: i % 7]) for i in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("mode", MODES)
def test_the_trainer_trains_it_and_saves_the_adapter_alone(mode: str, tmp_path: Path) -> None:
    model = adapted(mode)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=24, per_device_train_batch_size=8, logging_steps=4, save_steps=24,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    optimizer = continuum_optimizer(model, partial(torch.optim.AdamW, lr=0.03))
    trainer = Trainer(model, arguments, train_dataset=lines(), optimizers=(optimizer, None))  # type: ignore[arg-type]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1  # the frozen random head, of small weights, allows no more
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    folder = tmp_path / "checkpoint-24"
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()
    again = PeftModel.from_pretrained(tiny_llama(num_hidden_layers=2), folder)
    assert torch.equal(logits(again), logits(model.eval()))


@pytest.mark.filterwarnings("ignore")
def test_trls_trainer_trains_it(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="pip install trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "the lamp is red and the door is blue."}] * 16)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=16, per_device_train_batch_size=4, logging_steps=4, save_strategy="no",
        report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, learning_rate=0.03, gradient_checkpointing=False,
        dataset_num_proc=None, max_length=64,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        tiny_llama(num_hidden_layers=2), arguments, train_dataset=rows, processing_class=byte_tokenizer(),
        peft_config=config("add"),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1  # the frozen random head, of small weights, allows no more


def test_a_base_in_bfloat16_has_levels_in_float32() -> None:
    model = moved(adapted("add", tiny_llama(num_hidden_layers=2).bfloat16()))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_modules_to_save_and_layers_to_transform() -> None:
    model = adapted("add", modules_to_save=["lm_head"], target_modules=["mlp"], layers_to_transform=[1])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head.modules_to_save" in name for name in trainable)
    assert {name.split("layers.")[1][0] for name in trainable if "continuum" in name} == {"1"}
    groups = continuum_optimizer(model, partial(torch.optim.SGD, lr=0.1)).param_groups
    assert [group["update_period"] for group in groups] == [1, 3, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "copy"}, "mode='copy' is not one of an adapter"),
        ({"levels": [Level(period=8, hidden=4), Level()]}, "needs a period"),
        ({"levels": [Level(period=8)], "mode": "split"}, "Give each level a rank"),
        ({"levels": [Level(period=8, rank=2)]}, "rank= belongs to mode='split'"),
        ({"levels": [Level(period=8), Level(period=12)]}, "must be a multiple of the smallest"),
        ({"levels": [{"perod": 8}]}, "perod"),
    ],
)
def test_levels_that_cannot_be_an_adapter(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinuumConfig(**fields)


def test_models_that_cannot_have_the_adapter() -> None:
    with pytest.raises(ValueError, match="has levels already"):
        adapted("add", stack_levels(tiny_llama(), [Level(period=8)]))
    with pytest.raises(ValueError, match="no module with maps of known names"):
        adapted("add", nn.Sequential(nn.Linear(2, 2)), task_type=None)
    with pytest.raises(ValueError, match="no maps of known names"):
        adapted("add", target_modules=["up_proj"])
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["up_proj"]))
    for use in (stack_adapter, partial(continuum_optimizer, factory=torch.optim.Adam)):
        with pytest.raises(ValueError, match="not the name of one adapter of levels"):
            use(lora)
