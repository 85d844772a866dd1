"""`nestlearn stack`, `learn` and `chat` as a person uses them, on a tiny pretrained model of another library."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.llama import tiny_llama
from transformers import AutoModelForCausalLM

from nestlearn import HopeConfig, HopeForCausalLM, MemorySession, cli, pretrained
from nestlearn.cli.stack import parse_levels
from nestlearn.data import byte_tokenizer
from nestlearn.nn import Level

from .test_cli import _plain_terminal, run

pytestmark = pytest.mark.usefixtures("_plain_terminal")
_ = _plain_terminal
STORY = "The lamp is red. The door is blue. The king has a parrot.\n" * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer, a stream of two texts, and a text known before."""
    path = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
    tiny_llama(**sizes).save_pretrained(path / "llama")
    byte_tokenizer().save_pretrained(path / "llama")
    (path / "texts").mkdir()
    (path / "texts" / "a.txt").write_text(STORY)
    (path / "texts" / "b.txt").write_text(STORY[::-1])
    (path / "known.txt").write_text("Long ago it was known that water is wet.\n" * 60)
    return path


@pytest.fixture(scope="module")
def stacked(folder: Path) -> Path:
    options = ["--levels", "16:rank=4,64:hidden=8", "--mode", "add", "--general", "none"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["stack", str(folder / "llama"), *options, "--out", str(folder / "stacked")])
    assert not stop.value.code
    return folder / "stacked"


class TestLevels:
    def test_periods_and_options(self) -> None:
        assert parse_levels("64, 512:rank=8:lr=0.5:rule=delta,frozen:hidden=3") == [
            Level(64),
            Level(512, rank=8, lr=0.5, rule="delta"),
            Level(None, hidden=3),
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("fast", "does not begin with a period"),
            ("64:speed=3", "unknown option 'speed' in '64:speed=3'"),
            ("64:lr=much", "lr='much' in '64:lr=much' cannot be read"),
            ("64:rank=2.5", "rank='2.5'"),
            ("0", "at least 1"),
        ],
    )
    def test_bad_levels(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse_levels(text)


class TestStack:
    def test_nothing_changes_before_the_first_write(self, folder: Path, stacked: Path) -> None:
        plain = AutoModelForCausalLM.from_pretrained(folder / "llama")
        model = AutoModelForCausalLM.from_pretrained(stacked)
        ids = torch.arange(40)[None]
        assert torch.equal(plain(ids).logits, model(ids).logits)
        assert [level.period for level in model.stack_plan.levels] == [16, 64]

    @pytest.mark.parametrize("general", ["known.txt", "own"])
    def test_a_memory_of_general_inputs(
        self, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, general: str
    ) -> None:
        text = folder / general if general != "own" else general
        out = tmp_path / "stacked"
        code, _, error = run(
            capsys, "stack", folder / "llama", "--levels", "16:rank=4", "--out", out, "--general", text
        )
        assert code == 0, error
        model = AutoModelForCausalLM.from_pretrained(out)
        kept = model.stacked_mlps()["model.layers.1.mlp"].level(0)
        assert kept.general_up.shape == (32, 32) and kept.general_down.square().sum() > 0
        missing = run(
            capsys, "stack", folder / "llama", "--levels", "16", "--out", tmp_path / "x", "--general", "no.txt"
        )
        assert missing[0] == 1 and "no.txt" in missing[2] and not (tmp_path / "x").exists()

    def test_the_default_is_one_protected_level_without_new_maps(
        self, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
    ) -> None:
        general = ("--general", folder / "known.txt")
        code, _, error = run(capsys, "stack", folder / "llama", "--out", tmp_path / "new", *general)
        assert code == 0, error
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
        assert model.stack_plan.levels == (Level(64, rank=16, rule="orthogonalized", lr=3, retain=1),)
        assert model.stack_plan.mode == "split"
        assert model.stacked_mlps()["model.layers.0.mlp"].level(0).general_up is not None

    def test_errors_name_the_fix(self, capsys: pytest.CaptureFixture[str], folder: Path, stacked: Path) -> None:
        code, _, error = run(capsys, "stack", folder / "llama", "--levels", "16", "--out", stacked)
        assert code == 1 and "is not empty" in error
        code, _, error = run(capsys, "stack", folder / "texts", "--levels", "16", "--out", folder / "x")
        assert code == 1 and "no config.json" in error and not (folder / "x").exists()
        code, _, error = run(capsys, "stack", folder / "llama", "--levels", "64,16", "--out", folder / "x")
        assert code == 1 and "increasing" in error and not (folder / "x").exists()


class TestLearn:
    def test_a_memory_learns_and_the_report_says_how_much(
        self, capsys: pytest.CaptureFixture[str], folder: Path, stacked: Path, tmp_path: Path
    ) -> None:
        words = ("learn", stacked, "--stream", folder / "texts" / "a.txt", folder / "texts" / "b.txt", "--known",
                 f"text:{folder / 'known.txt'}", "--known-bytes", 400, "--out", tmp_path)  # fmt: skip
        code, out, error = run(capsys, *words)
        assert code == 0, error
        assert "a.txt: " in out and "b.txt: " in out and "nestlearn chat" in out
        record = json.loads((tmp_path / "results.json").read_text())
        assert [document["name"] for document in record["documents"]] == ["a.txt", "b.txt"]
        for document in record["documents"]:
            assert document["after"] < document["before"]
            assert document["online"]["bits_per_byte"] < document["online"]["off"]
            assert document["online"]["by_level"] == {}  # each level would cost one more pass over the text
        page = (tmp_path / "report.html").read_text()
        assert "While it reads" in page and page.count("<svg") == 2
        # Going on from the file.
        again = tmp_path / "again"
        words = ("learn", stacked, "--stream", folder / "texts" / "a.txt", "--known", f"text:{folder / 'known.txt'}",
                 "--known-bytes", 400, "--session", tmp_path / "session.safetensors", "--out", again)  # fmt: skip
        assert run(capsys, *words)[0] == 0
        went_on = json.loads((again / "results.json").read_text())
        assert went_on["documents"][0]["before"] == pytest.approx(record["documents"][1]["first"], rel=1e-6)

    @pytest.mark.parametrize("method", ["finetune", "ewc", "replay", "lora"])
    def test_methods_that_train_weights(
        self, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, method: str
    ) -> None:
        words = ("learn", folder / "llama", "--stream", folder / "texts" / "a.txt", "--method", method, "--known",
                 f"text:{folder / 'known.txt'}", "--known-bytes", 400, "--learning-rate", "1e-2",
                 "--context-length", 64, "--out", tmp_path)  # fmt: skip
        code, out, error = run(capsys, *words)
        assert code == 0, error
        record = json.loads((tmp_path / "results.json").read_text())
        assert record["documents"][0]["after"] < record["documents"][0]["before"] - 0.1
        assert record["documents"][0]["online"] is None
        assert (tmp_path / "model").is_dir() and (tmp_path / "report.html").is_file()
        assert "nestlearn chat" not in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--stream", "nowhere.txt"), "nowhere.txt"),
            (("--stream", "STORY", "--method", "cmss"), "unknown method 'cmss'. Did you mean 'cms'"),
            (("--stream", "STORY", "--method", "finetune", "--session", "x"), "--session is for --method cms"),
            (("--stream", "STORY", "--known", "text:nowhere"), "nowhere"),
        ],
    )
    def test_errors_come_before_anything_is_written(
        self, capsys: pytest.CaptureFixture[str], folder: Path, stacked: Path, tmp_path: Path,
        arguments: tuple[str, ...], message: str,
    ) -> None:  # fmt: skip
        story = str(folder / "texts" / "a.txt")
        words = [story if word == "STORY" else word for word in arguments]
        code, _, error = run(capsys, "learn", stacked, *words, "--out", tmp_path / "out")
        assert code == 1 and message in error, error
        assert not (tmp_path / "out").exists()

    def test_a_model_without_levels_is_told_how_to_get_them(
        self, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
    ) -> None:
        code, _, error = run(capsys, "learn", folder / "llama", "--stream", folder / "texts", "--out", tmp_path / "out")
        assert code == 1 and "stack" in error


class TestResume:
    """A run that was killed inside a document goes on there, and ends as if nothing had happened."""

    def words(self, folder: Path, stacked: Path, out: Path, *more: object) -> list[str]:
        long, short = folder / "long.txt", folder / "short.txt"
        long.write_text("".join(f"The {n}th lamp is {'red' if n % 3 else 'blue'}. " for n in range(100)))
        short.write_text(STORY[:200])
        known = ("--known", f"text:{folder / 'known.txt'}", "--known-bytes", 200)
        words = ("learn", stacked, "--stream", short, long, *known, "--save-every", 0, "--out", out)
        return [str(word) for word in (*words, *more)]

    def record(self, out: Path) -> dict[str, Any]:
        return json.loads((out / "results.json").read_text())

    @pytest.mark.slow
    @pytest.mark.skipif(os.name != "posix", reason="kills a process")
    def test_a_killed_run_goes_on_inside_the_document(
        self, capsys: pytest.CaptureFixture[str], folder: Path, stacked: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        command = [sys.executable, "-m", "nestlearn", *self.words(folder, stacked, out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            counts = set()
            # The session is saved after the record: once a second record is there, the first session is too.
            while len(counts) < 2:
                found = self.record(out) if (out / "results.json").exists() else {}
                if found.get("documents"):
                    counts |= {len((found["reading"] or {}).get("segments", ()))} - {0}
                assert process.poll() is None, process.communicate()
                time.sleep(0.02)
            process.kill()
        unfinished = self.record(out)
        assert len(unfinished["documents"]) == 1 and not (out / "report.html").exists()
        session = MemorySession.load(out / "session.safetensors", *pretrained(stacked))
        assert session.unfinished is not None and 0 < session.unfinished[0] <= 100 * 24
        # The same command alone would overwrite what was learned.
        code, _, error = run(capsys, *self.words(folder, stacked, out))
        assert code == 1 and "Add --resume to go on with it" in error
        code, _, error = run(capsys, *self.words(folder, stacked, out, "--seed", 1, "--resume"))
        assert code == 1 and "was begun with another settings" in error
        code, text, error = run(capsys, *self.words(folder, stacked, out, "--resume"))
        assert code == 0 and "Going on after 1 of 2 documents" in text, error
        code, _, error = run(capsys, *self.words(folder, stacked, tmp_path / "whole"))
        assert code == 0, error
        resumed, whole = self.record(out)["documents"], self.record(tmp_path / "whole")["documents"]
        for mine, theirs in zip(resumed, whole, strict=True):
            for name in ("name", "before", "after", "known", "first"):
                assert mine[name] == theirs[name]
            assert mine["online"]["segments"] == theirs["online"]["segments"]
        # The comparison with writes ignored from the start of the document was lost with the process.
        assert whole[1]["online"]["off"] is not None and resumed[1]["online"]["off"] is None
        tensors = [load_file(place / "session.safetensors") for place in (out, tmp_path / "whole")]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
        code, _, error = run(capsys, *self.words(folder, stacked, out, "--resume"))
        assert code == 1 and "holds a finished run" in error

    def test_a_record_that_is_damaged_is_named(
        self, capsys: pytest.CaptureFixture[str], folder: Path, stacked: Path, tmp_path: Path
    ) -> None:
        code, _, error = run(capsys, *self.words(folder, stacked, tmp_path, "--resume"))
        assert code == 1 and "results.json is no record of `nestlearn learn`" in error
        (tmp_path / "results.json").write_text('{"documents": [1]}')
        code, _, error = run(capsys, *self.words(folder, stacked, tmp_path))
        assert code == 1 and "begin again in another folder" in error
        assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


class TestChat:
    def talk(self, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))

    def test_read_save_and_come_back(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, stacked: Path,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        file = tmp_path / "mine.safetensors"
        story = folder / "texts" / "a.txt"
        self.talk(monkeypatch, f"/read {story}", "Hello", "/levels", "/fork " + str(tmp_path / "copy"), "/forget 0")
        options = ("--max-new-tokens", 8, "--temperature", 0)
        code, out, error = run(capsys, "chat", stacked, "--session", file, *options)
        assert code == 0, error
        assert "a new memory" in out and "bits per byte" in out and "goes on with a copy" in out
        assert "Forgotten: level 0." in out and f"Saved {tmp_path / 'copy'}" in out
        assert not file.exists()
        shutil.copy(tmp_path / "copy", file)
        self.talk(monkeypatch, "/levels", "/quit")
        code, out, error = run(capsys, "chat", stacked, "--session", file)
        assert code == 0 and "a new memory" not in out and "Nothing new to save." in out, error

    def test_the_levels_of_a_hope_model_are_listed_and_forgotten(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        levels = [{"period": 16, "hidden": 8, "lr": 0.01}, {"period": 64, "rank": 2, "lr": 0.01}, {"period": None}]
        config = HopeConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, cms=levels, cms_signal="loss")
        HopeForCausalLM(config).save_pretrained(tmp_path / "hope")
        byte_tokenizer().save_pretrained(tmp_path / "hope")
        story = folder / "texts" / "a.txt"
        self.talk(monkeypatch, f"/read {story}", "/levels", "/forget 0", "/levels", "/forget 2", "/quit")
        code, out, error = run(capsys, "chat", tmp_path / "hope", "--session", tmp_path / "mine")
        assert code == 0, error
        assert "(writes off" in out and "Forgotten: level 0." in out
        assert "levels [2] cannot be forgotten" in out + error
        tables = [[line.split() for line in out.splitlines() if line.split()[:1] == [name]] for name in "01"]
        (learned, forgotten), slow = tables
        tokens = f"{len(STORY) // 16 * 16:,}"
        assert learned[1:4] == ["2", "16", tokens] and float(learned[4]) > 0
        assert forgotten[1:] == ["2", "16", "0", "0.0000", "0"]
        assert slow[0] == slow[1] and slow[0][1:4] == ["2", "64", tokens]

    def test_a_session_of_another_model_is_refused(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, stacked: Path,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        file = tmp_path / "mine"
        self.talk(monkeypatch, f"/read {folder / 'texts' / 'a.txt'}")
        run(capsys, "chat", stacked, "--session", file)
        run(capsys, "stack", folder / "llama", "--levels", "32", "--general", "none", "--out", tmp_path / "other")
        self.talk(monkeypatch, "/quit")
        code, _, error = run(capsys, "chat", tmp_path / "other", "--session", file)
        assert code == 1 and "another model" in error
        file.write_bytes(file.read_bytes()[:-10])
        code, _, error = run(capsys, "chat", stacked, "--session", file)
        assert code == 1 and str(file) in error


def test_practice_learns_files_by_heart_and_goes_on_from_its_file(folder: Path, stacked: Path, capsys) -> None:
    file, words = folder / "heart.safetensors", ["practice", str(stacked), "--stream", str(folder / "texts" / "a.txt")]
    status, out, _ = run(capsys, *words, "--session", str(file), "--passes", "3")
    assert status == 0 and "Practised 1 documents in 3 steps" in out and "nats per token" in out
    first = file.read_bytes()
    status, out, _ = run(capsys, *words, "--session", str(file), "--passes", "1", "--questions", "0")
    assert status == 0 and "answers" not in out and file.read_bytes() != first
    status, _, err = run(capsys, *words, "--session", str(file), "--minutes", "-1")
    assert status == 1 and "minutes=-1.0 must be positive" in err
    status, _, err = run(capsys, "practice", str(folder / "llama"), *words[2:], "--session", str(folder / "no"))
    assert status == 1 and "nestlearn stack" in err and not (folder / "no").exists()


def test_facts_are_edited_listed_and_taken_back(folder: Path, stacked: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("nestlearn.continual.editing.targets.STEPS", 2)
    file, general = folder / "edits.safetensors", ["--general", str(folder / "texts" / "a.txt")]
    words = ["edit", str(stacked), "--session", str(file)]
    status, out, _ = run(capsys, *words, "--fact", "The king of Peru is -> Bo", *general, "--method", "memit")
    assert status == 0 and "The king of Peru is -> Bo: " in out and "by memit in layers 0 to 0" in out and file.exists()
    facts = folder / "facts.jsonl"
    lamp = '{"prompt": "its lamp is", "target": "off", "subject": "lamp"}'
    facts.write_text(lamp + '\n\n{"prompt": "A Bo is", "target": 1}\n')
    status, _, err = run(capsys, *words, "--facts", str(facts), *general)
    assert status == 1 and "facts.jsonl, line 3: the target of a fact is a text, got int" in err
    facts.write_text(lamp)
    status, out, _ = run(capsys, *words, "--facts", str(facts), *general, "--alpha", "0.5", "--layers", "0")
    assert status == 0 and "in layers 0 to 0 (share of attention 0.50)" in out
    status, out, _ = run(capsys, *words)
    assert status == 0 and out == "The king of Peru is -> Bo (memit)\nits lamp is -> off (intattn)\n"
    status, out, _ = run(capsys, *words, "--undo", "2")
    assert status == 0 and out.startswith("Taken back: its lamp is -> off (intattn)\nTaken back: The king of Peru")
    assert run(capsys, *words)[1] == "There are no edits.\n"
    for more, message in (
        (["--undo", "1"], "no edit -1 to take back"),
        (["--fact", "no arrow"], "has no arrow"),
        (["--fact", "The king of Peru is -> Bo", "--undo", "1"], "either facts or --undo"),
        (["--fact", "its king is -> Bo", "--subject", "Peru"], "'Peru' is not in the prompt"),
        (["--facts", str(facts), "--subject", "Peru"], "--subject belongs to one --fact"),
        (["--fact", "The king of Peru is -> Bo", "--layers", "x"], "--layers 'x' must be numbers"),
        (["--fact", "The king of Peru is -> Bo", "--method", "x"], "unknown method 'x'"),
    ):
        status, _, err = run(capsys, *words, *more)
        assert status == 1 and message in err, (more, err)
