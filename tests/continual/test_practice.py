"""MemorySession.practice: it learns by heart, repeats by its seed, loses nothing when stopped, and refuses clearly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.continual.test_session import llama
from tests.mixers import SMALL

from nestlearn import HopeConfig, HopeForCausalLM, Level, MemorySession, stack_levels
from nestlearn.continual.session.practice import Practice, PracticeReport, batches
from nestlearn.data import byte_tokenizer

TEXT = "A town\nThe town lies by Lake Ostrin. It was founded in 1683 by Ilsabet Krone, who sold salt."
OTHER = "Rain falls on the hills of Deldrum, where 40 goats live."
CHAT = "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'assistant: ' }}"


@pytest.fixture(scope="module")
def model():
    return stack_levels(llama(), [Level(16, lr=300, rank=4, rule="orthogonalized", retain=1.0)], mode="split")


def session(model, **fields) -> MemorySession:
    return MemorySession(model, byte_tokenizer(), compare="none", **fields)


def written(one: MemorySession) -> list[torch.Tensor]:
    levels = one._cursor.memory.levels
    return [w for held in levels.networks.values() for level in held for w in level.weights.params.values()]


def test_what_is_practised_is_known_and_repeats_by_its_seed(model) -> None:
    one, two, other = session(model), session(model), session(model)
    before = one.score(TEXT)
    report = one.practice(TEXT, OTHER, passes=15, seed=3)
    assert (report.steps, report.total, report.questions) == (15, 15, 5)
    assert report.text[-1] < report.text[0] and report.answers[-1] < report.answers[0]
    assert one.score(TEXT) < before - 0.3
    two.practice(TEXT, OTHER, passes=15, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(written(one), written(two), strict=True))
    for each, seed in ((two, 3), (other, 4)):
        each.forget()
        each.practice(TEXT, OTHER, passes=1, questions=2, seed=seed)
    assert not all(torch.equal(a, b) for a, b in zip(written(two), written(other), strict=True))


def test_files_are_documents_and_a_session_goes_on(model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(OTHER)
    one, two = session(model), session(model)
    one.practice(tmp_path, passes=2)
    two.practice(TEXT, OTHER, passes=2)
    assert all(torch.equal(a, b) for a, b in zip(written(one), written(two), strict=True))
    assert one.tokens == two.tokens == 0
    one.read(OTHER)
    known = one.describe()[0].tokens
    one.practice(OTHER, passes=1)
    assert one.describe()[0].tokens == known > 0
    one.save(tmp_path / "mine.session")
    again = MemorySession.load(tmp_path / "mine.session", model, byte_tokenizer())
    for each in (one, again):
        each.read(OTHER * 3)
        each.practice(OTHER, passes=1)
    assert all(torch.equal(a, b) for a, b in zip(written(one), written(again), strict=True))


def test_an_interrupt_keeps_the_steps_taken(model) -> None:
    def stop(report: PracticeReport) -> None:
        if report.steps == 2:
            raise KeyboardInterrupt

    one = session(model)
    with pytest.raises(KeyboardInterrupt):
        one.practice(TEXT, passes=9, progress=stop)
    assert any(w.abs().max() > 0 for w in written(one))
    assert session(model).practice(TEXT, passes=500, minutes=1e-9).steps == 1


def test_steps_fall_linearly(model, monkeypatch: pytest.MonkeyPatch) -> None:
    one, steps = session(model), []
    step = one._backend.practise

    def watch(memory, rows, lr):
        steps.append(lr)
        return step(memory, rows, lr)

    monkeypatch.setattr(one._backend, "practise", watch)
    one.practice(TEXT * 30, passes=2, lr=2.0, questions=0)  # eleven windows: the last step has three of four
    assert len(steps) == 6
    assert steps == pytest.approx(
        [x * y for x, y in zip([2.0, 1.7, 1.4, 1.1, 0.8, 0.5], 2 * [1, 1, 0.75], strict=True)]
    )


def test_the_answer_of_a_question_is_learned_and_nothing_else() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    made = Practice(tokenizer, [TEXT], (256,))
    ids, known = made.questions[1]
    asked = "user: Topic: A town. Fill in the blank: It was founded in ____ by Ilsabet Krone, who sold salt. Answer"
    assert ids[0] == 256 and bytes(ids[1:known]).decode().startswith(asked)
    assert bytes(ids[known:-1]) == b"1683" and ids[-1] == tokenizer.eos_token_id
    [rows] = batches([(ids, known)], 0.5)
    assert rows.learned[0].nonzero().flatten().tolist() == list(range(known, len(ids)))
    plain = Practice(byte_tokenizer(), [TEXT], (256,))
    assert bytes(plain.questions[1][0][1:-1]).decode().startswith("Topic: A town. Fill in")


def test_weights_of_batches_follow_their_learned_tokens() -> None:
    rows = [([1] * n, 1) for n in (3, 700, 800, 5)]
    made = batches(rows, 2.0)
    assert [len(batch.ids) for batch in made] == [2, 1, 1]
    assert sum(batch.weight for batch in made) == pytest.approx(2.0)
    assert made[0].weight / made[1].weight == pytest.approx(6 / 699)


@pytest.mark.parametrize(
    ("arguments", "fields", "message"),
    [
        ((TEXT,), {"passes": 0}, "passes >= 1"),
        ((TEXT,), {"lr": 0.0}, "lr=0.0 must be positive"),
        ((TEXT,), {"questions": -1}, "questions >= 0"),
        ((TEXT,), {"minutes": 0}, "must be positive"),
        ((TEXT,), {"prompt": "Say it."}, "sentence"),
        (("",), {}, "no text to practise"),
        ((), {}, "no text to practise"),
    ],
)
def test_what_cannot_be_practised_is_refused(model, arguments, fields, message) -> None:
    one = session(model)
    with pytest.raises(ValueError, match=message):
        one.practice(*arguments, **fields)
    assert one.nbytes == 0


def test_a_hope_model_is_told_to_read_again() -> None:
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mixer=SMALL["self_modifying"]
    )
    with pytest.raises(ValueError, match="cannot practise"):
        session(HopeForCausalLM(config).eval()).practice(TEXT)
