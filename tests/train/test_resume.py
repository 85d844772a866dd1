"""A run that stops and goes on ends where an uninterrupted one ends, to the bit."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from nestlearn.train import TrainConfig, TrainingInterrupted, list_checkpoints, read_log, train
from nestlearn.train import engine as engine_module


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_same_bits(left: Path | str, right: Path | str) -> None:
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class SignalAt(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, number: int):
        self.step, self.number = step, number

    def on_pre_optimizer_step(self, args, state, control, **_kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def interrupt(monkeypatch: pytest.MonkeyPatch, config: TrainConfig, step: int, number: int = signal.SIGINT):
    """Train until a signal in step `step`; returns the error that ended the run."""
    build = engine_module.build_trainer

    def with_signal(*args, **kwargs):
        trainer = build(*args, **kwargs)
        trainer.add_callback(SignalAt(step, number))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "build_trainer", with_signal)
        with pytest.raises(TrainingInterrupted) as caught:
            train(config)
    return caught.value


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "transformer-tiny"},
        {"preset": "hope-tiny"},
        {"preset": "hope-tiny", "gradient_accumulation": 2, "gradient_checkpointing": True},
        # More steps than one pass over the corpus has batches, so that the run crosses an epoch.
        {"preset": "transformer-tiny", "sequence_length": 256, "batch_size": 16, "steps": 7},
    ],
    ids=["transformer", "hope", "accumulation", "epochs"],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    tiny: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
):
    whole = tiny(out=str(tmp_path / "whole"), **changes)
    train(whole)
    parts = tiny(out=str(tmp_path / "parts"), **changes)
    stop = interrupt(monkeypatch, parts, step=4)
    assert (stop.step, stop.exit_code) == (4, 130)
    assert stop.resume_command == f"nestlearn train --resume --out {parts.out}"
    torch.manual_seed(12345)  # the state of the process must not matter
    result = train(parts, resume=True)
    assert result.steps == whole.steps
    assert_same_bits(whole.out, parts.out)
    timeless = [[{k: v for k, v in line.items() if k != "seconds"} for line in read_log(c.out)] for c in (whole, parts)]
    assert timeless[0] == timeless[1]


def test_a_termination_signal_saves_too(tiny: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch):
    stop = interrupt(monkeypatch, tiny(), step=2, number=signal.SIGTERM)
    assert stop.exit_code == 143
    assert [path.name for path in list_checkpoints(tiny().out)] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_more_steps_may_be_asked_for_and_nothing_else_may_change(tiny: Callable[..., TrainConfig]):
    train(tiny(schedule="constant"))
    with pytest.raises(ValueError, match="6 of 6 steps"):
        train(tiny(schedule="constant"), resume=True)
    with pytest.raises(ValueError, match="batch_size cannot change: saved 2, received 4"):
        train(tiny(schedule="constant", steps=8, batch_size=4), resume=True)
    result = train(tiny(schedule="constant", steps=8), resume=True)
    assert result.steps == 8
    assert result.tokens == 8 * 2 * 32


def test_a_run_is_not_overwritten(tiny: Callable[..., TrainConfig]):
    train(tiny())
    before = weights(tiny().out)
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny(seed=1))
    assert all(torch.equal(before[name], after) for name, after in weights(tiny().out).items())


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not(tiny: Callable[..., TrainConfig], tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny(out=str(tmp_path / name), seed=seed, steps=2))
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    assert any(not torch.equal(x, weights(tmp_path / "c")[name]) for name, x in weights(tmp_path / "a").items())
