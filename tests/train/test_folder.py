"""The folder of a run: one owner at a time, never in the way of a run that left nothing, and tied to its corpus."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from nestlearn.train import (
    CheckpointError,
    NonFiniteError,
    TrainConfig,
    TrainingInterrupted,
    list_checkpoints,
    load_model,
    train,
)
from nestlearn.train import engine as engine_module

Make = Callable[..., TrainConfig]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Run `action` in the middle of an update of the runs that follow."""

    class Act(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_kwargs):
            if state.global_step + 1 == step:
                action()

    build = engine_module.build_trainer

    def with_action(*args, **kwargs):
        trainer = build(*args, **kwargs)
        trainer.add_callback(Act())
        return trainer

    monkeypatch.setattr(engine_module, "build_trainer", with_action)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_died_before_its_first_checkpoint_begins_again(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
):
    def die() -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        at_step(patch, 2, die)
        with pytest.raises(MemoryError):
            train(tiny(log_interval=1))
    assert not list_checkpoints(tiny().out)
    assert train(tiny(log_interval=1), resume=resume).steps == 6
    train(tiny(log_interval=1, out=str(tmp_path / "other")))
    again, whole = (load_file(Path(out) / "model.safetensors") for out in (tiny().out, tmp_path / "other"))
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_run_that_died_before_its_export_is_finished(tiny: Make):
    train(tiny())
    model = Path(tiny().out) / "model.safetensors"
    before = load_file(model)
    model.unlink()
    assert train(tiny(), resume=True).steps == 6
    assert all(torch.equal(before[name], tensor) for name, tensor in load_file(model).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta1": 1.5}, r"beta1=1\.5 must be a finite number of at least 0 and below 1"),
        ({"beta2": -0.1}, r"beta2=-0\.1 must be"),
        ({"seed": 99999999999999999999}, "seed=9+ must be an integer of at least 0 and at most 4294967295"),
        ({"warmup": -1}, "warmup=-1 must be an integer of at least 0"),
        ({"threads": 0}, "threads=0 must be an integer of at least 1"),
        ({"optimizer": "m3", "optimizer_options": {"slow_period": 0}}, "slow_period"),
        ({"trainer": {"output_dir": "elsewhere"}}, "output_dir cannot be changed.*--out"),
        ({"trainer": {"max_steps": 3}}, "max_steps cannot be changed.*--steps"),
    ],
)
def test_settings_are_refused_before_anything_is_written(tiny: Make, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        train(tiny(**changes))
    assert not Path(tiny().out).exists()


def test_a_second_process_is_refused_and_the_lock_dies_with_its_owner(tiny: Make, tmp_path: Path):
    out = Path(tiny().out)
    code = (
        "import sys, pathlib; from nestlearn.train.folder import claim_folder\n"
        "with claim_folder(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="Another process is training into"):
            train(tiny())
        owner.kill()
    assert train(tiny(steps=1)).steps == 1
    assert not (out / ".lock").exists()


def test_resuming_on_a_changed_corpus_is_refused(tiny: Make, tmp_path: Path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"text number {number} " * 60)
    train(tiny(corpus=f"text:{texts}"))
    (texts / "3.txt").write_text("another text " * 90)
    with pytest.raises(ValueError, match="has changed since the run"):
        train(tiny(corpus=f"text:{texts}", steps=8), resume=True)
    (texts / "3.txt").write_text("text number 3 " * 60)
    assert train(tiny(corpus=f"text:{texts}", steps=8), resume=True).steps == 8


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_hup_saves_and_stops_and_usr1_saves_and_goes_on(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
        with pytest.raises(TrainingInterrupted) as stop:
            train(tiny(save_interval=100))
    assert stop.value.exit_code == 129
    assert [path.name for path in list_checkpoints(tiny().out)] == ["checkpoint-2"]
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    other = tiny(save_interval=100, out=str(tmp_path / "other"))
    assert train(other).steps == 6
    assert [path.name for path in list_checkpoints(other.out)] == ["checkpoint-2", "checkpoint-6"]


def test_weights_that_are_not_finite_are_a_failure(tiny: Make):
    config = tiny(steps=2, weight_decay=1e40, learning_rate=1.0)
    with pytest.raises(NonFiniteError):
        train(config)
    assert not list_checkpoints(config.out) and not (Path(config.out) / "model.safetensors").exists()


def test_a_saved_model_with_nan_weights_is_refused(tiny: Make):
    train(tiny(steps=1))
    model = load_model(tiny().out)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    model.save_pretrained(tiny().out)
    with pytest.raises(CheckpointError, match="holds NaN or infinite"):
        load_model(tiny().out)
