"""Files of models: pickles are refused before anything of them is read, NaN and infinite weights by name."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn import HopeConfig, HopeForCausalLM, Level, stack_levels
from nestlearn.continual.pretrained import pretrained
from nestlearn.continual.progress import StreamProgress
from nestlearn.data import byte_tokenizer
from nestlearn.models.stacking import load_stacked
from nestlearn.train.errors import CheckpointError
from nestlearn.train.load import load_model

SIZES = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self):
        return Path.touch, (self.sprung,)


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    HopeForCausalLM(HopeConfig(**SIZES)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("load", "kind"), [(pretrained, ValueError), (load_model, CheckpointError)])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, load, kind: type[Exception], value: float
) -> None:
    model = HopeForCausalLM(HopeConfig(**SIZES))
    torch.nn.init.constant_(model.model.norm.weight, value)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(kind, match=r"parameter model\.norm\.weight holds NaN or infinite numbers"):
        load(tmp_path)


def test_stacked_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    base = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=16))
    stacked = stack_levels(base, [Level(4)])
    torch.nn.init.constant_(stacked.model.norm.weight, float("nan"))
    stacked.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"parameter model\.norm\.weight holds NaN"):
        load_stacked(tmp_path)


@pytest.mark.parametrize(
    ("load", "kind"),
    [(HopeForCausalLM.from_pretrained, ValueError), (pretrained, ValueError), (load_model, CheckpointError)],
)
@pytest.mark.parametrize("content", ["pickle", "garbage", "weights"])
def test_weights_in_a_pickle_are_refused(pickled: Path, load, kind: type[Exception], content: str) -> None:
    file = pickled / "pytorch_model.bin"
    if content == "garbage":
        file.write_bytes(b"garbage" * 100)
    if content == "weights":
        torch.save(HopeForCausalLM(HopeConfig(**SIZES)).state_dict(), file)
    with pytest.raises(kind, match=r"pytorch_model.bin is a pickle.*safe_serialization=True") as caught:
        load(str(pickled))
    assert "weights_only" not in str(caught.value)
    assert not (pickled.parent / "sprung").exists()


def test_a_pickle_of_a_stacked_model_is_refused(tmp_path: Path) -> None:
    base = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24))
    stack_levels(base, [Level(16, lr=1.0)], mode="split").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle"):
        load_stacked(tmp_path)


def test_safetensors_beside_a_pickle_are_read(pickled: Path) -> None:
    model = HopeForCausalLM(HopeConfig(**SIZES))
    model.save_pretrained(pickled)
    loaded = load_model(pickled)
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


def test_a_foreign_checkpoint_of_a_learner_gives_no_advice_to_unpickle_it(tmp_path: Path) -> None:
    file = tmp_path / "progress.pt"
    torch.save({"x": Trap(tmp_path / "sprung")}, file)
    with pytest.raises(ValueError, match="no checkpoint of a continual learner") as caught:
        StreamProgress(file, {}).resume(None)  # pyright: ignore[reportArgumentType]
    assert "weights_only" not in str(caught.value)
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)
    assert not (tmp_path / "sprung").exists()
