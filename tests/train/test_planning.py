"""What a run is planned to take, against what it takes, and against counting without shortcuts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from nestlearn.cli import main
from nestlearn.models import HopeConfig, flops
from nestlearn.train import TrainConfig, build_config
from nestlearn.train.config import check_processes
from nestlearn.train.inspection import model_facts
from nestlearn.train.load import model_fields
from nestlearn.train.optimizers import build_optimizer
from nestlearn.train.planning import gpu, plan, step_cost
from nestlearn.train.planning import trace as tracing
from nestlearn.train.planning.plan import optimizer_cost


@pytest.mark.parametrize("preset", ["transformer-tiny", "hope-tiny"])
def test_flops_are_about_three_forward_passes(preset: str):
    config = HopeConfig.from_preset(preset)
    counted = step_cost(config, 2, 512).flops / (2 * 512)
    assert counted == pytest.approx(3 * flops(config, 512), rel=0.12)


@pytest.mark.parametrize(("preset", "length"), [("transformer-tiny", 320), ("hope-tiny", 320)])
def test_short_sequences_of_two_layers_tell_the_rest(preset: str, length: int, monkeypatch: pytest.MonkeyPatch):
    config = HopeConfig.from_preset(preset, num_hidden_layers=4, reset_token_id=None)
    told = step_cost(config, 2, length)
    whole = tracing._traced(config, 2, length, checkpointing=False)
    assert whole.flops > 0 and whole.peak > 0
    for name, value in whole._asdict().items():
        assert getattr(told, name) == pytest.approx(value, rel=0.03), name


def test_peak_holds_what_is_kept_for_backward():
    config = HopeConfig.from_preset("transformer-tiny")
    kept = model_facts(config, 512, 4).activation_bytes
    assert 0.9 * kept < step_cost(config, 4, 512).peak < 2 * kept


def test_checkpointing_keeps_less_and_computes_more():
    config = HopeConfig.from_preset("transformer-tiny", num_hidden_layers=12)
    plain, again = (step_cost(config, 4, 512, checkpointing=c) for c in (False, True))
    assert again.peak < plain.peak / 3
    assert again.flops == pytest.approx(plain.flops * 4 / 3, rel=0.1)
    # Scores of attention are not stored when a block is computed again: memory stays linear in the context.
    longer = step_cost(config, 4, 2048, checkpointing=True)
    assert longer.peak == pytest.approx(4 * again.peak, rel=0.05)


def test_kernels_walk_the_chunks_on_chip():
    config = HopeConfig.from_preset("hope-tiny", num_hidden_layers=1)
    loops, kernel = (step_cost(config, 1, 1024, kernels=k) for k in (False, True))
    assert kernel.operations < loops.operations / 4
    assert kernel.flops == loops.flops
    # The memories of Titans are networks, and no kernel knows them.
    assert not tracing._has_kernel(HopeConfig.from_preset("titans-tiny"))
    assert tracing._has_kernel(config)


def test_levels_that_learn_from_the_loss_are_refused():
    config = HopeConfig.from_preset("hope-attention-tiny", cms_signal="loss")
    with pytest.raises(ValueError, match="depend on the text"):
        step_cost(config, 1, 128)


@pytest.mark.parametrize("name", ["adamw", "m3", "delta-momentum"])
def test_state_of_an_optimizer_is_that_of_the_real_one(name: str):
    settings = TrainConfig(preset="hope-tiny", optimizer=name)
    config = HopeConfig.from_preset("hope-tiny", num_hidden_layers=3)
    update = optimizer_cost(settings, config)
    torch.manual_seed(0)
    from nestlearn.models import HopeForCausalLM

    model = HopeForCausalLM(config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    arguments = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    if name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        optimizer = build_optimizer(name, model, adamw_lr=1e-3, options={}, **arguments)  # pyright: ignore[reportArgumentType]
    optimizer.step()
    held = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor))
    assert update.state == pytest.approx(held, rel=0.01)


def test_an_optimizer_that_needs_data_is_refused():
    with pytest.raises(ValueError, match=r"dgd.*cannot be counted without data.*m3"):
        plan(TrainConfig(preset="transformer-tiny", optimizer="dgd"), gpu("h100"))


def test_more_devices_take_less_time_and_divided_ones_less_memory():
    settings = TrainConfig(preset="transformer-340m", sequence_length=2048, dtype="bfloat16")
    one, eight, divided = (
        plan(settings, gpu("h100"), n, tokens=1e9, strategy=s)  # pyright: ignore[reportArgumentType]
        for n, s in ((1, "auto"), (8, "ddp"), (8, "fsdp"))
    )
    assert one.days / 8 < eight.days < one.days / 6
    assert divided.chosen.memory.weights == one.chosen.memory.weights / 8
    assert divided.chosen.memory.optimizer == one.chosen.memory.optimizer / 8
    assert divided.chosen.memory.total < eight.chosen.memory.total
    assert one.days == pytest.approx(1e9 / one.chosen.tokens_per_second / 86_400)
    assert one.mfu is not None and 0.05 < one.mfu < 0.65


def test_what_does_not_fit_is_checkpointed_then_divided_then_refused():
    settings = TrainConfig(preset="transformer-1.3b", sequence_length=2048, dtype="bfloat16")
    alone = plan(settings, gpu("4090")).chosen
    assert alone.checkpointing and alone.strategy == "ddp"
    longer = TrainConfig(preset="transformer-1.3b", sequence_length=8192, dtype="bfloat16")
    assert plan(longer, gpu("4090"), 8).chosen.strategy == "fsdp"
    with pytest.raises(ValueError, match=r"does not fit.*activations.*shorter context than 262,144"):
        plan(TrainConfig(preset="transformer-1.3b", sequence_length=262_144, dtype="bfloat16"), gpu("4090"))


def test_many_machines_divide_within_each():
    settings = TrainConfig(preset="transformer-1.3b", sequence_length=2048, dtype="bfloat16")
    found = plan(settings, gpu("h100"), 64)
    assert (found.chosen.strategy, found.settings.shard_size) == ("hsdp", 8)
    check_processes(found.settings, 64)
    assert found.chosen.tokens == found.settings.tokens_per_step * 64
    with pytest.raises(ValueError, match="a multiple of 8 devices"):
        plan(settings, gpu("h100"), 12, strategy="hsdp")
    with pytest.raises(ValueError, match="more than one device"):
        plan(settings, gpu("h100"), 1, strategy="fsdp")


def test_command_writes_settings_that_train_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "plans" / "run.yaml"
    words = "plan transformer-340m --gpus 8 --gpu h200 --context 4096 --tokens 2B --optimizer m3 --json --out"
    with pytest.raises(SystemExit) as stop:
        main([*words.split(), str(out)])
    assert stop.value.code == 0
    report = json.loads(capsys.readouterr().out)
    settings = build_config(yaml.safe_load(out.read_text()), model_fields(), TrainConfig())
    assert (settings.preset, settings.optimizer, settings.dtype) == ("transformer-340m", "m3", "bfloat16")
    assert settings.steps * settings.tokens_per_step * 8 == pytest.approx(2e9, rel=0.01)
    assert report["chosen"]["memory"]["total"] < 141e9 and report["settings"]["sequence_length"] == 4096


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpu x100", "Did you mean"),
        ("--tokens many", "is no amount of tokens"),
        ("--tokens 0", "is no amount of tokens"),
        ("--strategy pipeline", "is none of auto, ddp, fsdp, hsdp"),
        ("--hidden-sise 3", "hidden_size"),
    ],
)
def test_wrong_arguments_are_one_message(words: str, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "hope-tiny", *words.split()])
    assert stop.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["hope-tiny", "transformer-tiny"])
def test_memory_is_that_of_a_process(preset: str):
    import subprocess
    import sys

    benchmarks = Path(__file__).parents[2] / "benchmarks"
    run = f"import plan, json; print(json.dumps([plan.planned('{preset}', 512), plan.measured('{preset}', 512)]))"
    done = subprocess.run([sys.executable, "-c", run], cwd=benchmarks, capture_output=True, text=True, check=True)
    planned, measured = json.loads(done.stdout.splitlines()[-1])
    assert planned["bytes"] == pytest.approx(measured["bytes"], rel=0.25)
