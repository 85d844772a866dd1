"""The demonstration on a pretrained model: the page, the questions, the scores, and the whole on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.llama import tiny_llama

from nestlearn import cli
from nestlearn.data import byte_tokenizer
from nestlearn.data.invented_town import invent_town
from nestlearn.evals.probes import answer_scores, question_ids


@pytest.mark.parametrize("seed", range(20))
def test_a_page_answers_its_questions(seed: int) -> None:
    page, questions = invent_town(seed)
    assert len(questions) == 18 and (page, questions) == invent_town(seed)
    assert page != invent_town(seed + 1)[0]
    for question in questions:
        assert question.answer in page and len(question.wrong) == 3
        assert len({question.answer, *question.wrong, *question.near}) == 4 + len(question.near)
        assert all(near in page for near in question.near)
        assert not any(wrong in page for wrong in question.wrong if not wrong.isdigit())
        assert question.text not in page


def test_scores_are_mean_log_probabilities_of_each_answer_alone() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    asked = question_ids(tokenizer, "Who?", "Ann lives here.")
    assert bytes(asked[1:]) == b"Ann lives here.\n\nWho?\n"
    for answer, score in zip(["Ann", "Robert"], answer_scores(model, tokenizer, asked, ["Ann", "Robert"]), strict=True):
        ids = list(answer.encode())
        logs = model(torch.tensor([[*asked, *ids]])).logits[0].log_softmax(-1)
        wanted = sum(logs[len(asked) - 1 + i, token].item() for i, token in enumerate(ids)) / len(ids)
        assert score == pytest.approx(wanted, abs=1e-5)


def test_the_demonstration_compares_four_ways_to_know_a_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--pretrained", str(tmp_path / "model"), "--quick", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert not stop.value.code and "step 2 of 2" in said and "page in context" in said
    arms = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
    assert [len(arm["scores"]) for arm in arms] == [18] * 4 == [len(arm["answers"]) for arm in arms]
    base, context, practised, lora = arms
    assert base["scores"] != context["scores"] and base["scores"] != practised["scores"] != lora["scores"]
    assert base["nbytes"] == 0 < practised["nbytes"] and 0 < lora["nbytes"]
    report = (tmp_path / "out" / "report.html").read_text()
    assert "LoRA on the page" in report and "loss of practice" in report and "nestlearn demo --pretrained" in report
