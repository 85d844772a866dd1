"""`nestlearn levels`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.cli import main
from nestlearn.data import byte_tokenizer


def run(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> str:
    """What the command prints, errors included."""
    with pytest.raises(SystemExit) as stop:
        main(["levels", *map(str, words)])
    printed = capsys.readouterr()
    assert stop.value.code == status, printed.err
    return printed.out + printed.err if status else printed.out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model with a level that is slower than the texts below are long."""
    cms = [{"period": 64, "hidden": 4}, {"hidden": 4}]
    config = HopeConfig(mixer="attention", cms=cms, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    HopeForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_preset_is_shown_without_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "levels.html"
    shown = run(capsys, "hope-tiny", "--optimizer", "m3", "--out", page)
    assert "HopeForCausalLM + M3" in shown and "1 / 10 batches" in shown and "M3.slow_direction" in page.read_text()


def test_a_stream_gives_the_health_of_the_levels(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(10 * "What it does not read it cannot learn. ")
    report = json.loads(
        run(capsys, folder, "--stream", text, "--length", 32, "--batches", 2, "--no-switch-off", "--json")
    )
    assert report["batches"] == 2 and report["tokens"] == 32
    assert ("longer than the stream", "model.layers.0.cms.networks.0 · memory") in [
        (finding["fault"], finding["label"]) for finding in report["findings"]
    ]


def test_a_text_too_short_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a")
    assert "--stream holds 1 tokens" in run(capsys, folder, "--stream", tmp_path / "text.txt", status=1)
