"""A published folder is loaded where the package is not installed, and gives the same logits."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.llama import tiny_llama
from torch import nn

from nestlearn import HopeConfig, HopeForCausalLM, Level, stack_levels
from nestlearn.cli import main
from nestlearn.data import byte_tokenizer
from nestlearn.models.standalone import collect_modules
from nestlearn.nn import MixerConfig, register_mixer
from nestlearn.train import CheckpointError, train
from nestlearn.train.publishing import EXPECTED, publish, run_card


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def test_a_trained_model_is_published(tiny, tmp_path):
    config = tiny(preset="hope-tiny", model={"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2})
    train(config)
    out = tmp_path / "published"
    text = publish(config.out, out)  # its example checks the logits in a process that cannot import the package
    expected = load_file(out / EXPECTED)
    model = HopeForCausalLM.from_pretrained(config.out).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(expected["input_ids"]).logits[:, -4:], expected["logits"])
    prompt = torch.tensor([byte_tokenizer()("A memory that is")["input_ids"]])
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert text == byte_tokenizer().decode(made[0]).strip()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"| corpus | `{config.corpus}` |" in card and "| last step | 6 |" in card and "self_modifying" in card
    code = "\n".join(file.read_text() for file in out.glob("*.py"))
    assert not re.search(r"^\s*(from|import) nestlearn\b", code, re.MULTILINE)

    # Other weights are seen: the check of the card can fail.
    weights = load_file(out / "model.safetensors")
    save_file({name: 1.1 * x for name, x in weights.items()}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="not close"):
        run_card(out)


def test_a_stacked_model_is_published(tmp_path):
    model = stack_levels(tiny_llama(vocab_size=259, max_position_embeddings=256), [Level(period=16, rank=2)]).eval()
    save(model, tmp_path / "stacked")
    out = tmp_path / "published"
    publish(tmp_path / "stacked", out)
    expected = load_file(out / EXPECTED)
    with torch.inference_mode():
        torch.testing.assert_close(model(expected["input_ids"]).logits[:, -4:], expected["logits"])


@register_mixer("tests.published")
@dataclass(frozen=True)
class AverageConfig(MixerConfig):
    def build(self, d_model, num_heads):
        return nn.Identity()


def test_what_cannot_be_published_is_refused(tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        publish(tmp_path, out)
    save(tiny_llama(vocab_size=259), folder / "llama")
    with pytest.raises(CheckpointError, match="'llama', which transformers loads without"):
        publish(folder / "llama", out)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    save(HopeForCausalLM(HopeConfig(mixer="tests.published", **sizes)), folder / "outside")
    with pytest.raises(ValueError, match=r"'tests\.published' comes from tests\.train\.test_publishing"):
        publish(folder / "outside", out)
    assert not out.exists()
    with pytest.raises(SystemExit):
        main(["publish", str(folder / "outside"), "--out", str(tmp_path)])
    assert "not empty; choose another --out" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"nestlearn\.nothing is no module"):
        collect_modules(["nestlearn.nothing"])


def test_an_upload_that_fails_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    save(HopeForCausalLM(HopeConfig(mixer="attention", **sizes)), tmp_path / "model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        main(["publish", str(tmp_path / "model"), "--out", str(out), "--repo", "me/mine"])
    assert f"hf upload me/mine {out}" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["auto_map"] and Path(out / "README.md").exists()
