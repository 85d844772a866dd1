"""The benchmark of edits, on a small random model: its measures against loops, and every kind of cell."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn.data import byte_tokenizer

Load = Callable[[str], ModuleType]
EDITED = [["France", "capital", "Paris", "Oslo"], ["Ghana", "continent", "Africa", "Europe"]]
TUNING = [["Peru", "language", "Spanish", "Dutch"]]
NEIGHBOURS = [["Norway", "capital", "Oslo", ""], ["Chad", "continent", "Africa", ""]]


def small(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """In place of a pretrained model; always in float32 and with the same weights."""
    del name, dtype
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), byte_tokenizer()


@pytest.fixture
def editing(load_benchmark: Load, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_benchmark("editing")
    monkeypatch.setattr(module, "pretrained", small)
    return module


@torch.no_grad()
def test_scores_are_those_of_single_rows(editing: ModuleType) -> None:
    asker = editing.Asker(*small(""))
    rows = [("The capital of France is", "Paris"), ("It", "was so long ago"), ("Ghana", "x")]
    for (prompt, answer), (nats, says) in zip(rows, asker.logs(rows), strict=True):
        ids, wanted = [*asker.start, *asker.ids(prompt)], asker.ids(f" {answer}")
        total, right = 0.0, True
        for token in wanted:
            logs = asker.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            total, right = total - float(logs[token]), right and int(logs.argmax()) == token
            ids.append(token)
        assert nats == pytest.approx(total / len(wanted), abs=1e-5) and says == right


@torch.no_grad()
def test_a_fact_is_known_by_its_first_token_among_those_of_the_kind(editing: ModuleType) -> None:
    asker = editing.Asker(*small(""))
    asker.first = lambda answer: asker.ids(answer)[0]  # bytes of a blank would all be the same
    answers = {"capital": ["Paris", "Oslo", "Quito", "Lima", "Bern"]}
    prompt = [*asker.start, *asker.ids("The capital of France is")]
    logits = asker.model(torch.tensor([prompt])).logits[0, -1]
    best = max(answers["capital"], key=lambda answer: float(logits[asker.ids(answer)[0]]))
    facts = [editing.Known("France", "capital", answer) for answer in answers["capital"]]
    # The others are longer, so that the row is filled up.
    assert asker.knows([*facts, editing.Known("the United Kingdom", "capital", "Bern")], answers)[:5] == [
        answer == best for answer in answers["capital"]
    ]


def test_entropy(editing: ModuleType) -> None:
    assert editing._entropy([1, 1, 1, 1], 2) == 0
    assert editing._entropy([1, 2, 3, 4, 5], 2) == pytest.approx(2)
    assert editing._entropy([1, 2, 1, 2], 2) == pytest.approx(-2 / 3 * math.log2(2 / 3) - 1 / 3 * math.log2(1 / 3))


def test_settings_are_told_apart_in_the_table(editing: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "editing.jsonl"
    settings = [
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"parts": 1},
        {"parts": 10},
        {"rate": 1.0, "tuning": True},
        {"rate": 1.0},
    ]
    lines = [{"arm": "a", "edits": 2, "efficacy": i / 8, **setting} for i, setting in enumerate(settings)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"arm": "a", "edits": 2, "refused": "no"}]))
    rows = editing.rows_of(editing.Records(path))
    assert [row[2] for row in rows] == ["alpha=0.0", "alpha=1.0", "", "parts=10", "rate=1.0, to choose", "rate=1.0"]
    assert [row[3] for row in rows] == ["0.000", "0.125", "0.250", "0.375", "0.500", "0.625"]


@pytest.mark.slow
def test_cells_write_their_facts_and_are_not_repeated(
    editing: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editing, "STEPS", 3)
    monkeypatch.setattr(editing, "RATES", {"finetune": (1e-5, 1e-2), "lora": (1e-2,)})
    for name in ("wikitext2/valid.txt", "tinyshakespeare/input.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("Words of a text that nobody edits. " * 18_000)
    drawn = {
        "edited": EDITED, "tuning": TUNING, "neighbours": NEIGHBOURS,
        "answers": {"capital": ["Paris", "Oslo"], "continent": ["Africa", "Europe"]},
    }  # fmt: skip
    out = tmp_path / "editing.jsonl"
    out.write_text(json.dumps({"arm": "facts", "seed": 0, "most": 2} | drawn) + "\n")
    words = ["--data", str(tmp_path), "--out", str(out), "--keep", str(tmp_path / "keep"), "--edits", "2"]
    arms = ["--arms", "memit", "alphaedit", "finetune", "lora"]
    editing.main([*words, *arms])
    base, memit, alphaedit, *trained = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert [r["arm"] for r in trained] == [*["finetune"] * 3, *["lora"] * 2]
    assert memit["after"] < memit["before"] and memit["damage"] != 0 and base["neighbours"] == 1
    # Inputs of so small a random model use all directions.
    assert "no change is allowed" in alphaedit["refused"]
    assert len(torch.load(tmp_path / "keep/targets-0.pt")) == 1, "both closed forms start from one search"
    monkeypatch.setattr(editing, "pretrained", lambda *_, **__: pytest.fail("a cell was repeated"))
    capsys.readouterr()
    editing.main([*words, *arms])
    assert capsys.readouterr().out.count("| memit |") == 1
