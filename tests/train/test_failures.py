"""What goes wrong ends the run with a clear error, and nothing already saved is lost."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import TrainerCallback

from nestlearn.train import (
    CheckpointError,
    NonFiniteError,
    TrainConfig,
    list_checkpoints,
    load_model,
    load_tokenizer,
    train,
    verify,
)
from nestlearn.train import engine as engine_module
from nestlearn.train import trainer as trainer_module
from nestlearn.train.checkpoint import publish_files, step_of
from nestlearn.train.folder import is_exported

Make = Callable[..., TrainConfig]


class Spoil(TrainerCallback):
    """Makes a parameter, or from then on a gradient, non-finite before a step."""

    def __init__(self, step: int, name: str, gradient: bool):
        self.step, self.name, self.gradient = step, name, gradient

    def on_step_begin(self, args, state, control, model=None, **_kwargs):
        if state.global_step + 1 != self.step:
            return
        parameter = model.get_parameter(self.name)
        if self.gradient:
            parameter.register_hook(lambda gradient: gradient * float("nan"))
        else:
            with torch.no_grad():
                parameter[0, 0] = float("inf")


def add_callback(monkeypatch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    build = engine_module.build_trainer

    def with_callback(*args, **kwargs):
        trainer = build(*args, **kwargs)
        trainer.add_callback(callback)
        return trainer

    monkeypatch.setattr(engine_module, "build_trainer", with_callback)


@pytest.mark.parametrize("gradient", [False, True], ids=["weight", "gradient"])
def test_a_non_finite_value_stops_the_run_before_it_spreads(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, gradient: bool
):
    name = "model.layers.0.mixer.q_proj.weight"
    config = tiny(steps=8)
    model = engine_module.prepare_model(config, engine_module.prepare_model_config(config, _tokenizer(config)))
    name = next(n for n, p in model.named_parameters() if ".mixer." in n and p.ndim == 2)
    add_callback(monkeypatch, Spoil(5, name, gradient))
    with pytest.raises(NonFiniteError) as caught:
        train(config)
    assert caught.value.step == 5
    assert name in caught.value.component
    assert caught.value.checkpoint == Path(config.out) / "checkpoint-3"
    assert "step 5" in str(caught.value) and "checkpoint-3" in str(caught.value) and name in str(caught.value)
    verify(caught.value.checkpoint)
    assert all(torch.isfinite(p).all() for p in load_model(caught.value.checkpoint).parameters())


def _tokenizer(config: TrainConfig):
    return engine_module.prepare_tokenizer(config)


def test_a_non_finite_activation_names_its_module(tiny: Make, monkeypatch: pytest.MonkeyPatch):
    config = tiny()

    class Overflow(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_kwargs):
            model.model.norm.register_forward_hook(lambda module, inputs, output: output / 0.0)

    add_callback(monkeypatch, Overflow())
    with pytest.raises(NonFiniteError, match=r"step 1.*model\.norm \(RMSNorm\).*No checkpoint had been saved"):
        train(config)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file"),
        SafetensorError("Error while serializing: No space left on device"),
    ],
    ids=["system", "torch", "safetensors"],
)
def test_a_full_disk_leaves_the_earlier_checkpoint(tiny: Make, monkeypatch: pytest.MonkeyPatch, error: Exception):
    config = tiny(steps=8)
    save = trainer_module.Trainer._save_optimizer_and_scheduler

    def fail(self, output_dir):
        if self.state.global_step == 6:
            raise error
        save(self, output_dir)

    monkeypatch.setattr(trainer_module.Trainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(CheckpointError, match=r"Could not write .*checkpoint-6.*checkpoint-3 is intact"):
        train(config)
    assert [path.name for path in list_checkpoints(config.out)] == ["checkpoint-3"]
    assert not list(Path(config.out).glob(".*.part"))
    verify(Path(config.out) / "checkpoint-3")
    monkeypatch.undo()
    assert train(config, resume=True).steps == 8


def test_a_full_disk_at_the_end_keeps_the_last_checkpoint(tiny: Make, monkeypatch: pytest.MonkeyPatch):
    def fail(staging, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(engine_module.checkpoint, "publish_files", fail)
    with pytest.raises(CheckpointError, match=r"No space left on device.*checkpoint-6 is intact"):
        train(tiny())
    verify(Path(tiny().out) / "checkpoint-6")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_checkpoint_is_refused(tiny: Make, name: str, damage: str):
    config = tiny()
    train(config)
    path = Path(config.out) / "checkpoint-6" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    message = {"missing": "is missing", "truncated": "truncated", "changed": "has changed"}[damage]
    with pytest.raises(CheckpointError, match=f"damaged: {name} .*{message}.*go on from .*checkpoint-3"):
        train(tiny(steps=8), resume=True)
    shutil.rmtree(path.parent)
    assert train(tiny(steps=8), resume=True).steps == 8


def test_a_foreign_or_missing_checkpoint_is_refused(tiny: Make, tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        train(tiny(), resume=True)
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(CheckpointError, match=r"no readable manifest\.json"):
        verify(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        verify(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="must be checkpoint-STEP"):
        step_of(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "config", "missing", "tokenizer"])
def test_a_damaged_model_folder_is_refused(tiny: Make, damage: str):
    config = tiny(steps=1)
    train(config)
    out = Path(config.out)
    weights = out / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif damage == "garbage":
        weights.write_bytes(b"not a safetensors file")
    elif damage == "config":
        (out / "config.json").write_text('{"model_type": "hope", "hidden')
    elif damage == "missing":
        weights.unlink()
    else:
        (out / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=str(out)):
        load_model(out)
        load_tokenizer(out)


def test_weights_that_do_not_fit_the_configuration_are_refused(tiny: Make):
    import json

    train(tiny(steps=1))
    path = Path(tiny().out) / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match="do not fit"):
        load_model(path.parent)


def test_no_pickle_is_left_beside_a_model(tiny: Make):
    train(tiny(steps=1))
    assert not list(Path(tiny().out).rglob("training_args.bin"))
    assert not [path for path in Path(tiny().out).iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_bad_data_is_refused(tiny: Make, tmp_path: Path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 10)
    for spec in (f"text:{tmp_path / 'empty.txt'}", f"text:{tmp_path / 'binary.bin'}", "text:/nonexistent", "nothing"):
        with pytest.raises(ValueError):
            train(tiny(corpus=spec))
    with pytest.raises(ValueError, match="too small"):
        train(tiny(batch_size=5000))
    for length, split in ((100_000, "train"), (4_000, "validation")):
        with pytest.raises(ValueError, match=rf"\({split}\) has .* tokens, not enough for one window of {length}"):
            train(tiny(sequence_length=length))
    assert not Path(tiny().out).exists()


def test_a_cache_that_holds_a_whole_training_sequence_is_refused_before_anything_is_written(tiny: Make, tmp_path: Path):
    mixer = {"type": "memory", "memory": "deltanet", "chunk_size": 8, "cache": 8}
    config = tiny(steps=1, sequence_length=16, model={"mixer": mixer}, out=str(tmp_path / "run"))
    with pytest.raises(
        ValueError, match=r"sequence_length=16 is too short for .*cache=8.* hold 16 tokens.*at least 17"
    ):
        train(config)
    assert not (tmp_path / "run").exists()
    train(replace(config, sequence_length=17))


def test_memories_that_learn_nothing_are_named_by_a_run_that_starts_only(tiny: Make, tmp_path: Path):
    """Before an error of the preparation the warning would look like its cause."""
    levels = [{"period": 64, "hidden": 4}, {"hidden": 4}]
    broken = tiny(corpus=f"text:{tmp_path / 'missing'}", steps=1)
    good = tiny(steps=1)
    for config, warned in ((broken, False), (good, True)):
        config = replace(config, model={**config.model, "cms": levels})
        console = Console(file=StringIO(), width=200)
        if warned:
            train(config, console=console)
        else:
            with pytest.raises((OSError, ValueError)):
                train(config, console=console)
        assert ("level of period 64: nothing written" in console.file.getvalue()) == warned


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tiny: Make):
    with pytest.raises(ValueError, match="Vocabulary mismatch"):
        train(tiny(model={"vocab_size": 200, "reset_token_id": None}))


def test_publishing_files_replaces_them_one_by_one(tmp_path: Path):
    staging, out = tmp_path / "staging", tmp_path / "out"
    (staging / "sub").mkdir(parents=True)
    (staging / "a").write_text("new")
    (staging / "sub" / "b").write_text("new")
    out.mkdir()
    (out / "a").write_text("old")
    publish_files(staging, out)
    assert (out / "a").read_text() == (out / "sub" / "b").read_text() == "new"
    assert not staging.exists()


def test_weights_are_published_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that is killed while its model is moved into place has not exported it, so it can be resumed."""
    staging, out, moved, rename = tmp_path / "staging", tmp_path / "out", [], os.replace
    staging.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (staging / name).touch()
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append((Path(a).name, is_exported(out))), rename(a, b)))
    publish_files(staging, out)
    assert [name for name, _ in moved] == ["config.json", "tokenizer.json", "model.safetensors"]
    assert not any(exported for _, exported in moved) and is_exported(out)
