"""Stacking: the model stays what it was until it writes, is saved and loaded as ever, and can be undone."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

from nestlearn import HopeConfig, HopeForCausalLM, Level, LevelState, freeze_backbone, stack_levels, unstack_levels
from nestlearn.data import byte_tokenizer
from nestlearn.models import level_parameters, load_stacked
from nestlearn.models.stacking import MapNames, families, read_segment, register_family

from .conftest import FAMILIES

MODES = ["add", "split", "copy"]
LEVELS = [Level(4, lr=20, rank=2), Level(8, lr=20), Level(None)]


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def read(model, ids, state=None, **kwargs):
    """All segments of 4 tokens."""
    keys = ()
    for part in ids.split(4, 1):
        _, keys, state, _ = read_segment(model, part, state, keys, **kwargs)
    return state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_until_the_first_write_and_undoing_restores_everything(make, ids, family, mode):
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        model = make(family, dtype)
        kind, config, before = type(model), model.config.to_dict(), logits(model, ids)
        weights = {name: w.clone() for name, w in model.state_dict().items()}
        assert stack_levels(model, LEVELS, mode=mode) is model
        after = logits(model, ids)
        if mode == "add":
            assert torch.equal(after, before)
        assert (after - before).abs().max() <= bound * (before.max() - before.min())
        empty = logits(model, ids, level_state=LevelState())
        assert torch.equal(empty, after)

        state = read(model, ids)
        learned = logits(model, ids, level_state=state)
        assert (learned - before).abs().max() > 1e-3
        assert torch.equal(logits(model, ids), after)  # nothing of it is in the model

        assert unstack_levels(model) is model
        assert type(model) is kind and type(model.config) is kind.config_class and model.config.to_dict() == config
        assert torch.equal(logits(model, ids), before)
        now = model.state_dict()
        assert list(now) == list(weights) and all(torch.equal(now[name], w) for name, w in weights.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_in_segments_equals_one_forward_pass(make, ids, family):
    """The keys and values carried from segment to segment, sliding windows included."""
    model = make(family, torch.float64)
    whole = logits(model, ids)
    stack_levels(model, LEVELS, mode="split")
    keys, parts = (), []
    for part in ids.split(4, 1):
        found = read_segment(model, part, None, keys, writes=False)
        keys = found.keys
        parts.append(found.logits)
    bound = 1e-5 if family.startswith("gemma") else 1e-9  # its norms compute in float32
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=bound, atol=bound)


@pytest.mark.parametrize("mode", MODES)
def test_split_has_no_new_parameters_and_the_others_say_which(make, mode):
    model = make("llama")
    before = {name for name, _ in model.named_parameters()}
    stack_levels(model, [Level(4), Level(8)], mode=mode)
    new = {name for name, _ in model.named_parameters()} - before
    assert before <= {name for name, _ in model.named_parameters()}
    assert bool(new) == (mode != "split") and all(".mlp.levels." in name for name in new)


def perturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_save_and_load(make, ids, tmp_path, family, mode):
    model = perturb(stack_levels(make(family), LEVELS, mode=mode, layers=[1]))
    state, expected = read(model, ids), logits(model, ids)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for load in (type(model).from_pretrained, AutoModelForCausalLM.from_pretrained, load_stacked):
        other = load(tmp_path)
        assert type(other) is type(model) and other.stack_plan.to_dict() == model.stack_plan.to_dict()
        assert not other.training
        assert torch.equal(logits(other, ids), expected)
        torch.testing.assert_close(
            logits(other, ids, level_state=state), logits(model, ids, level_state=state), rtol=0, atol=0
        )
    assert AutoConfig.from_pretrained(tmp_path).model_type.startswith("stacked_")
    plain = unstack_levels(load_stacked(tmp_path))
    plain.save_pretrained(tmp_path / "plain")
    saved = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "stacking" not in saved and not saved["model_type"].startswith("stacked_")
    assert saved["architectures"] == [type(plain).__name__]


def test_a_fresh_process_knows_stacked_models(make, ids, tmp_path):
    for family in ("llama", "gpt2"):
        model = stack_levels(make(family), LEVELS, mode="split")
        model.save_pretrained(tmp_path / family)
        torch.save(logits(model, ids), tmp_path / f"{family}.pt")
    torch.save(ids, tmp_path / "ids.pt")
    program = """
import sys, torch, nestlearn
assert not any(name.endswith("modeling_llama") for name in sys.modules), "import is not cheap any more"
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
folder = sys.argv[1]
for family in ("llama", "gpt2"):
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{family}")
    ids, expected = torch.load(f"{folder}/ids.pt"), torch.load(f"{folder}/{family}.pt")
    assert type(model).__name__.startswith("Stacked") and type(model).from_pretrained(f"{folder}/{family}")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
print("same")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "same", done.stderr


def phi():
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return PhiForCausalLM(PhiConfig(**shape, num_attention_heads=2, partial_rotary_factor=0.5)).eval()


NAMED = {"path": "model.layers.*.mlp", "up": "fc1", "down": "fc2", "act": "activation_fn"}


def test_maps_of_other_models_are_named_by_the_caller(ids, tmp_path):
    with pytest.raises(ValueError, match="`mlp`"):
        stack_levels(phi(), LEVELS)
    with pytest.raises(ValueError, match=r"fc1, fc2.*mlp="):
        stack_levels(phi(), LEVELS, mlp="model.layers.*.mlp")
    model = phi()
    before = logits(model, ids)
    stack_levels(model, LEVELS, mode="add", mlp=NAMED)
    assert torch.equal(logits(model, ids), before)
    assert (logits(model, ids, level_state=read(model, ids)) - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_stacked(tmp_path), ids), before)


def test_a_family_is_registered_from_outside(ids, tmp_path, monkeypatch):
    names = MapNames(up="fc1", down="fc2", act="activation_fn")
    monkeypatch.delitem(families.FAMILIES, names, raising=False)  # and again after the test
    with pytest.raises(ValueError, match=r"register_family\(MapNames"):
        stack_levels(phi(), LEVELS)
    register_family(names, PhiConfig)
    model = stack_levels(phi(), LEVELS)
    assert model.stack_plan.paths == ("model.layers.0.mlp", "model.layers.1.mlp")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_mlps_chosen_by_pattern_or_function(make):
    model = make("llama")
    stack_levels(model, LEVELS, mlp="model.layers.1.*mlp")
    assert model.stack_plan.paths == ("model.layers.1.mlp",)
    unstack_levels(model)
    stack_levels(model, LEVELS, mlp=lambda path, module: path.endswith("0.mlp"))
    assert model.stack_plan.paths == ("model.layers.0.mlp",)


@pytest.mark.parametrize(
    ("layers", "numbers"), [(None, [0, 1]), ("all", [0, 1]), ("last:1", [1]), ([0], [0]), ([-1], [1])]
)
def test_layers(make, layers, numbers):
    model = stack_levels(make("qwen3"), LEVELS, layers=layers)
    assert model.stack_plan.paths == tuple(f"model.layers.{number}.mlp" for number in numbers)


def test_hidden_bounds_the_fast_weights_and_the_rest_stays_frozen(make, ids):
    model = make("llama", torch.float64)
    before = logits(model, ids)
    stack_levels(model, [Level(4, hidden=3, lr=20), Level(8, hidden=2, lr=20)], mode="split")
    assert model.stack_plan.units(24) == [range(3), range(3, 5)]
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-9, atol=1e-9)
    state = read(model, ids)
    shapes = [w.shape for level in state.networks["model.layers.0.mlp"] for w in level.weights.params.values()]
    assert [tuple(shape) for shape in shapes[:3]] == [(2, 3, 16), (2, 3, 16), (2, 16, 3)]
    assert (logits(model, ids, level_state=state) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": []}, "non-empty"),
        ({"levels": [Level(None)]}, "nothing would ever learn"),
        ({"levels": [Level(8), Level(4)]}, "increasing"),
        ({"levels": [Level(8), Level(8)]}, "increasing"),
        ({"levels": [Level(None), Level(8)]}, "comes last"),
        ({"levels": [Level(1), Level(8)]}, "at least 2"),
        ({"levels": [Level(6), Level(15)]}, r"Use \[6, 12\]|Use \[6, 18\]"),
        ({"mode": "join"}, "'add', 'split' or 'copy'"),
        ({"mode": "copy", "levels": [Level(4, hidden=3)]}, "rank="),
        ({"mode": "split", "split": [0.5, 0.2]}, "sum to 1"),
        ({"mode": "add", "split": [0.5, 0.5]}, "mode='split'"),
        ({"mode": "split", "levels": [Level(4, hidden=30)]}, "cannot be divided"),
        ({"layers": [5]}, "0 to 1"),
        ({"layers": "first:1"}, "last:N"),
        ({"layers": []}, "must name some"),
        ({"mlp": "model.blocks.*.mlp"}, "no module that mlp="),
        ({"mlp": {"path": "model.layers.*.mlp", "up": "up_proj"}}, "lacks"),
        (
            {"mlp": {"path": "model.layers.*.mlp", "up": "up_proj", "down": "down_proj", "act": "act_fn"}},
            "does not compute",
        ),
    ],
)
def test_what_cannot_work_is_refused_and_the_model_left_alone(make, arguments, message):
    model = make("llama")
    with pytest.raises(ValueError, match=message):
        stack_levels(model, **{"levels": [Level(4), Level(8)]} | arguments)
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model.config, "stacking")


def test_models_that_cannot_be_stacked(make):
    with pytest.raises(TypeError, match="transformers"):
        stack_levels(nn.Linear(2, 2), LEVELS)
    hope = HopeForCausalLM(HopeConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match=r"levels of its own.*HopeConfig\(cms="):
        stack_levels(hope, LEVELS)
    small = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    with pytest.raises(ValueError, match="`mlp`"):
        stack_levels(OPTForCausalLM(OPTConfig(**small, word_embed_proj_dim=16)), LEVELS)
    model = make("llama")
    model.is_quantized = True
    with pytest.raises(ValueError, match="dequantize"):
        stack_levels(model, LEVELS)
    model = make("llama")
    model.model.layers[0].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match="wrapped forward"):
        stack_levels(model, LEVELS)
    model = stack_levels(make("llama"), LEVELS)
    with pytest.raises(ValueError, match="unstack_levels"):
        stack_levels(model, LEVELS)
    with pytest.raises(ValueError, match="no levels"):
        unstack_levels(make("llama"))
    with pytest.raises(ValueError, match="stack_levels"):
        read_segment(make("llama"), torch.zeros(1, 4, dtype=torch.long))


def test_tied_maps_have_levels_of_their_own(make, ids):
    """A level learns the change of a map, so two MLPs may share the map itself."""
    model = make("llama", torch.float64)
    first, second = (layer.mlp for layer in model.model.layers)
    first.up_proj.weight = second.up_proj.weight
    untied = copy.deepcopy(model)
    untied.model.layers[0].mlp.up_proj.weight = nn.Parameter(second.up_proj.weight.detach().clone())
    for each in (model, untied):
        stack_levels(each, [Level(4, lr=20), Level(8, lr=20)], mode="split")
    torch.testing.assert_close(
        logits(model, ids, level_state=read(model, ids)), logits(untied, ids, level_state=read(untied, ids))
    )


def test_states_of_another_model_or_batch_are_refused(make, ids):
    model, other = stack_levels(make("llama"), LEVELS), stack_levels(make("gpt2"), LEVELS)
    state = read(model, ids)
    with pytest.raises(ValueError, match="another model"):
        other(ids, level_state=state)
    with pytest.raises(ValueError, match="2 rows"):
        read_segment(model, ids[:1, :4], state)
    with pytest.raises(ValueError, match="2 rows"):
        model(torch.cat([ids, ids[:1]]), level_state=state)
    with pytest.raises(ValueError, match="1 to 4"):
        read_segment(model, ids[:, :5], state)
    model.train()
    with pytest.raises(ValueError, match="eval"):
        read_segment(model, ids[:, :4], state)


def test_generate_reads_with_a_state_also_in_beams(make, ids):
    model = stack_levels(make("llama"), LEVELS, mode="split")
    state = read(model, ids)
    prompt = ids[:, :5]
    with torch.inference_mode():
        out = model.generate(prompt, level_state=state, max_new_tokens=4, do_sample=False, eos_token_id=None)
        beams = model.generate(prompt, level_state=state, max_new_tokens=4, num_beams=3, do_sample=False)
    assert beams.shape[0] == 2
    expected = prompt
    for _ in range(4):
        next_token = logits(model, expected, level_state=state)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, next_token], 1)
    assert torch.equal(out, expected)


def test_threads_read_with_their_own_states(make, ids):
    model = stack_levels(make("llama"), LEVELS, mode="split")
    states = [None, read(model, ids), read(model, ids.flip(1))]
    expected = [logits(model, ids, level_state=state) for state in states]
    wrong, start = [], threading.Barrier(3)

    def work(number):
        start.wait()
        for _ in range(20):
            if not torch.equal(logits(model, ids, level_state=states[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_signature_is_the_pretrained_models_with_a_state(make):
    plain = list(inspect.signature(make("llama").forward).parameters)
    stacked = list(inspect.signature(stack_levels(make("llama"), LEVELS).forward).parameters)
    assert [name for name in stacked if name != "level_state"] == plain and "level_state" in stacked


def test_a_deep_copy_is_a_model_of_its_own(make, ids):
    model = stack_levels(make("llama"), LEVELS, mode="split")
    state, other = read(model, ids), copy.deepcopy(model)
    perturb(model)
    assert not torch.equal(logits(other, ids, level_state=state), logits(model, ids, level_state=state))
    assert torch.equal(logits(other, ids, level_state=read(other, ids)), logits(other, ids, level_state=state))


@pytest.mark.parametrize("mode", MODES)
def test_freeze_backbone_trains_levels_only(make, ids, mode):
    model = stack_levels(make("llama"), LEVELS, mode=mode)
    chosen = freeze_backbone(model)
    assert chosen and {name for name, p in model.named_parameters() if p.requires_grad} == set(chosen)
    assert all(".mlp." in name for name in chosen)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(chosen.values(), lr=0.3)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= set(chosen)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked for by peft
def test_lora_beside_levels(make, ids):
    peft = pytest.importorskip("peft")
    model = stack_levels(make("llama"), LEVELS, mode="split")
    before = logits(model, ids)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    adapted.eval()
    assert torch.equal(logits(adapted, ids), before)
    assert not any(p.requires_grad for p in level_parameters(adapted).values())
    state = read(adapted, ids)
    assert (logits(adapted, ids, level_state=state) - before).abs().max() > 1e-3
    loss = adapted(ids, labels=ids, level_state=state).loss
    loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_" in name)
    with torch.inference_mode():
        assert adapted.generate(input_ids=ids[:, :5], level_state=state, max_new_tokens=2).shape[0] == 2


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # the old name is in 5.20
def test_recomputed_activations_would_lose_the_state_and_are_refused(make, ids):
    model = stack_levels(make("llama"), LEVELS, mode="split")
    state = read(model, ids)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="checkpointing"):
        model(ids, labels=ids, level_state=state)
    model(ids, labels=ids).loss.backward()  # without a state it is the pretrained model


def test_trainer_and_pipeline(make, ids, tmp_path):
    model = stack_levels(make("llama", vocab_size=259), LEVELS, mode="add")
    chosen = freeze_backbone(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.1, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= set(chosen)
    write = pipeline("text-generation", model=model.eval(), tokenizer=byte_tokenizer())
    text = write("The ", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith("The ") and text == write("The ", max_new_tokens=3, do_sample=False)[0]["generated_text"]
