"""BABILong's texts: every fact is there, in order, and the rest is the book; answers are scored as published."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data import byte_tokenizer
from nestlearn.evals.long_context import (
    LABELS,
    Question,
    babilong_samples,
    evaluate_babilong,
    exact_label,
    read_babi,
)

TOKENIZER = byte_tokenizer()
BOOK = [f"The {number}th sentence of a long book goes on for a while." for number in range(50)]
STORIES = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary moved to the office.
5 Where is Mary? \toffice\t4
1 Sandra went to the garden.
2 Where is Sandra?\tgarden\t1
"""


@pytest.fixture
def babi(tmp_path: Path) -> Path:
    for name in ("qa1_test.txt", "qa1_single-supporting-fact_train.txt"):
        (tmp_path / name).write_text(STORIES)
    return tmp_path


def test_stories_are_cut_into_questions(babi: Path):
    first = ("Mary moved to the bathroom.", "John went to the hallway.")
    assert read_babi(babi, "qa1") == [
        Question(first, "Where is Mary?", "bathroom"),
        Question((*first, "Mary moved to the office."), "Where is Mary?", "office"),
        Question(("Sandra went to the garden.",), "Where is Sandra?", "garden"),
    ]
    assert read_babi(babi, "qa1", "train") == read_babi(babi, "qa1")


def parts_of(prompt: str) -> tuple[list[str], str]:
    """Sentences of the text and the question."""
    text, question = prompt.removesuffix("\nAnswer:").split("\nQuestion: ")
    return [f"{part.strip('. ')}." for part in text.split(". ") if part], question


@pytest.mark.parametrize("length", [200, 600, 2000])
def test_facts_stand_in_order_in_the_book(babi: Path, length: int):
    samples = babilong_samples("qa1", TOKENIZER, babi=babi, book=BOOK, length=length, n=3, shots=0)
    assert len(samples) == 3
    for sample in samples:
        text = sample.prompt.removesuffix("\nAnswer:")
        assert len(text.encode()) == sample.tokens <= length and sample.tokens > length - 60
        sentences, question = parts_of(sample.prompt)
        facts = [sentence for sentence in sentences if sentence not in BOOK]
        assert tuple(facts) == sample.question.facts and question == sample.question.question
        numbers = [BOOK.index(sentence) for sentence in sentences if sentence in BOOK]
        assert all((number + 1) % len(BOOK) == after for number, after in pairwise(numbers))


def test_facts_are_spread(babi: Path):
    first_places = set()
    for seed in range(12):
        (sample,) = babilong_samples("qa1", TOKENIZER, babi=babi, book=BOOK, length=1500, n=1, shots=0, seed=seed)
        sentences, _ = parts_of(sample.prompt)
        first_places.add(sentences.index(sample.question.facts[0]))
    assert len(first_places) > 5


def test_samples_depend_on_the_seed_only(babi: Path):
    def make(seed: int, n: int = 3) -> list[str]:
        made = babilong_samples("qa1", TOKENIZER, babi=babi, book=BOOK, length=600, n=n, seed=seed)
        return [sample.prompt for sample in made]

    assert make(0) == make(0) != make(1) and make(0, n=2) == make(0)[:2]


def test_without_a_book_the_facts_stand_alone_after_the_examples(babi: Path):
    (sample,) = babilong_samples("qa1", TOKENIZER, babi=babi, book=BOOK, length=0, n=1, shots=2)
    blocks = sample.prompt.split("\n\n")
    assert len(blocks) == 3 and all("\nAnswer: " in block for block in blocks[:2])
    assert parts_of(blocks[2])[0] == list(sample.question.facts)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        (" garden", True),
        ("The GARDEN. In the office.", True),
        ("garden\nQuestion: Where is the kitchen?", True),
        ("garden or kitchen", False),
        ("office", False),
        ("", False),
        # A label that the question names does not count, for or against.
        ("The garden is north of the hallway", True),
    ],
)
def test_the_first_sentence_must_name_the_label_alone(prediction: str, right: bool):
    asked = Question((), "What is north of the hallway?", "garden")
    assert exact_label(prediction, asked, LABELS["qa4"]) is right


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("qa9", {}, "unknown BABILong task 'qa9'"),
        ("qa2", {}, "has no bAbI file qa2_test.txt"),
        ("qa1", {"split": "valid"}, "has no bAbI file qa1_valid.txt"),
        ("qa1", {"length": 30}, r"length=30 is too small: .* take 53 tokens"),
        ("qa1", {"book": "/nonexistent"}, "does not exist"),
        ("qa1", {"book": ["Too."]}, "no sentence of at least 10 tokens"),
        ("qa1", {"n": 0}, "n must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(babi: Path, task: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        babilong_samples(task, TOKENIZER, **({"babi": babi, "book": BOOK, "length": 500, "n": 1} | options))


def test_foreign_files_are_refused(babi: Path):
    (babi / "qa1_test.txt").write_text("Once upon a time\n")
    with pytest.raises(ValueError, match=r"line 1: 'Once upon a time' is not '<number> <sentence>'"):
        read_babi(babi, "qa1")
    (babi / "qa1_test.txt").write_text("1 Mary moved.\n")
    with pytest.raises(ValueError, match="holds no question"):
        read_babi(babi, "qa1")


def test_models_are_scored_by_length(babi: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = HopeForCausalLM(
        HopeConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mixer="self_modifying",
                   bos_token_id=256, eos_token_id=257, pad_token_id=258)
    )  # fmt: skip
    options = {"babi": babi, "book": BOOK, "lengths": (0, 300), "n": 3}
    untrained = evaluate_babilong(model, TOKENIZER, "qa1", **options)
    assert untrained.value == 0 and untrained.n == 6

    def last_room(ids: torch.Tensor, **_options: object) -> torch.Tensor:
        """What a model says that remembers the last move, whoever it was."""
        rows = []
        for row in ids.tolist():
            text = bytes(token for token in row if token < 256).decode().rsplit("\nQuestion", 1)[0]
            room = max(LABELS["qa1"], key=text.rfind)
            rows.append([*row, *f" {room}.".ljust(12).encode()])
        return torch.tensor(rows)

    monkeypatch.setattr(model, "generate", last_room)
    result = evaluate_babilong(model, TOKENIZER, "qa1", **options)
    # Right for two of the three questions: John's move is the last before the first of them.
    assert [entry["value"] for entry in result.details["by_length"].values()] == pytest.approx([2 / 3, 2 / 3])
    assert result.task == "local_babilong_qa1"
    with pytest.raises(ValueError, match="No length"):
        evaluate_babilong(model, TOKENIZER, "qa1", babi=babi, book=BOOK, lengths=())


@pytest.mark.parametrize("task", LABELS)
def test_real_stories_and_a_real_book(shared_data: Path, task: str):
    book, babi = shared_data / "gutenberg_books" / "alice.txt", shared_data / "babi_en" / "en-valid"
    questions = read_babi(babi, task)
    assert len(questions) == 1000 and {question.answer.lower() for question in questions} <= set(LABELS[task])
    samples = babilong_samples(task, TOKENIZER, babi=babi, book=book, length=8192, n=3)
    for sample in samples:
        places = [sample.prompt.rindex(fact) for fact in sample.question.facts]
        assert sample.tokens <= 8192 and len(places) == len(sample.question.facts)
