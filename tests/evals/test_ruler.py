"""RULER's prompts, checked by reading them as a person would; answers do not depend on the batch."""

import re
from pathlib import Path

import pytest
import torch
from tests.mixers import SMALL

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data import byte_tokenizer
from nestlearn.evals.long_context import VARIANTS, Needles, answer_prompts, containment, evaluate_ruler, ruler_samples
from nestlearn.evals.long_context.words import key_words, read_sentences, sentences
from nestlearn.evals.tasks.published import PUBLISHED

TOKENIZER = byte_tokenizer()
BOOK = [f"Sentence number {number} of the book." for number in range(40)]
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
SHAPES = {"numbers": r"\d{7}", "uuids": UUID, "words": r"[a-z]+-[a-z]+"}


def make_model(mixer: str) -> HopeForCausalLM:
    torch.manual_seed(0)
    config = HopeConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mixer=SMALL[mixer],
        reset_token_id=256, bos_token_id=256, eos_token_id=257, pad_token_id=258,
        initializer_range=0.3,
    )  # fmt: skip
    return HopeForCausalLM(config).double().eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_hides_what_it_asks(name: str):
    task = VARIANTS[name]
    for length in (1500, 3000):
        for sample in ruler_samples(name, TOKENIZER, length=length, n=4, book=BOOK):
            assert sample.tokens == len(sample.prompt.encode()) <= length - 128
            # No more than one unit of haystack is left out.
            assert sample.tokens > length - 128 - 130
            hidden: dict[str, list[str]] = {}
            for kind, key, value in NEEDLE.findall(sample.prompt):
                assert kind == task.value and re.fullmatch(SHAPES[task.value], value)
                assert re.fullmatch(SHAPES[task.key], key)
                hidden.setdefault(key, []).append(value)
            asked = re.search(r"What .* for (.*) mentioned in the provided text\?", sample.prompt)
            assert asked is not None
            keys = re.split(r", and |, ", asked.group(1))
            assert len(keys) == task.queries and len(sample.answers) == task.queries * task.values
            assert {value for key in keys for value in hidden[key]} == set(sample.answers)
            assert all(len(hidden[key]) == task.values for key in keys)
            if task.haystack == "needles":
                assert len(hidden) > 5
            else:
                assert len(hidden) == task.keys
            verb = "is" if len(sample.answers) == 1 else "are"
            assert sample.prompt.endswith(f" for {asked.group(1)} mentioned in the provided text {verb}")


def test_prompts_depend_on_the_seed_and_the_number_only():
    def make(n: int, seed: int = 0) -> list[str]:
        samples = ruler_samples("niah_multikey_2", TOKENIZER, length=1500, n=n, seed=seed)
        return [sample.prompt for sample in samples]

    assert make(5)[:3] == make(3) and make(3) != make(3, seed=1) and len(set(make(5))) == 5


def test_the_first_needle_goes_where_it_is_told():
    for depth in (0.0, 0.5, 1.0):
        (sample,) = ruler_samples("niah_single_1", TOKENIZER, length=4096, n=1, depth=depth)
        context = sample.prompt.split("\n")[1:-1]
        (place,) = [number for number, line in enumerate(context) if NEEDLE.match(line)]
        assert abs(place - depth * (len(context) - 1)) <= 0.5
    places = set()
    for sample in ruler_samples("niah_single_1", TOKENIZER, length=4096, n=12):
        places.add(sample.prompt[: sample.prompt.index("One of")].count("\n"))
    assert len(places) > 6


def test_a_short_book_is_read_again():
    (sample,) = ruler_samples("niah_single_2", TOKENIZER, length=3000, n=1, book=BOOK[:3])
    assert sample.prompt.count(BOOK[0]) > 5 and sample.tokens > 2700


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("niah_single_4", {}, "unknown RULER task 'niah_single_4'. Did you mean"),
        ("niah_single_1", {"length": 300}, r"length=300 is too small: the prompt without haystack takes \d+ tokens"),
        ("niah_single_2", {}, "hides its needles in a book, and none was given"),
        ("niah_single_2", {"book": "/nonexistent/book.txt"}, "does not exist"),
        ("niah_single_2", {"book": []}, "no sentences"),
        ("niah_single_1", {"depth": 1.5}, r"depth=1.5 must be between 0"),
        ("niah_single_1", {"n": 0}, "n=0 samples"),
    ],
)
def test_impossible_settings_are_refused(name: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ruler_samples(name, TOKENIZER, **({"length": 1024, "n": 1} | options))


def test_needles_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="queries at most keys"):
        Needles(haystack="noise", keys=1, queries=2)
    with pytest.raises(ValueError, match="at least 1"):
        Needles(haystack="noise", values=0)


def test_containment_counts_references_whatever_their_case():
    assert containment(" 123 and aBc.", ["123", "ABC", "x"]) == pytest.approx(2 / 3)
    assert containment("", ["1"]) == 0


def test_a_books_sentences(tmp_path: Path):
    text = 'He said: "Go!" Then Mrs. Hill\nleft at 5. p.m.? Yes (so it was.) Why?'
    assert sentences(text) == [
        'He said: "Go!"', "Then Mrs. Hill left at 5. p.m.?", "Yes (so it was.)", "Why?"
    ]  # fmt: skip
    (tmp_path / "a.txt").write_text("One. Two.")
    (tmp_path / "b.txt").write_text("Three.")
    assert read_sentences(tmp_path) == ["One.", "Two.", "Three."]
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="no sentences"):
        read_sentences(tmp_path / "empty.txt")


def test_real_books(shared_data: Path):
    found = read_sentences(shared_data / "gutenberg_books" / "alice.txt")
    assert 800 < len(found) < 2500 and all("\n" not in sentence for sentence in found)
    (sample,) = ruler_samples("niah_multiquery", TOKENIZER, length=8192, n=1, book=found)
    assert "White Rabbit" in sample.prompt and sample.tokens > 7000


@pytest.mark.parametrize("mixer", ["self_modifying", "attention"])
def test_answers_in_a_batch_are_those_of_each_prompt_alone(mixer: str, monkeypatch: pytest.MonkeyPatch):
    model = make_model(mixer)
    prompts = ["the cat sat", "a", "so it was, at last, over and out", "we read"]
    together = answer_prompts(model, TOKENIZER, prompts, max_new_tokens=10, batch_size=4)
    alone = [answer_prompts(model, TOKENIZER, [prompt], max_new_tokens=10)[0] for prompt in prompts]
    assert together == alone and any(together)
    # Prompts longer than this are read in pieces.
    monkeypatch.setattr("nestlearn.evals.long_context.answers._PREFILL", 5)
    assert answer_prompts(model.train(), TOKENIZER, prompts, max_new_tokens=10, batch_size=4) == alone
    assert model.training


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        answer_prompts(make_model("attention"), tokenizer, ["a"], max_new_tokens=1)


def test_a_model_that_recalls_everything_scores_one(monkeypatch: pytest.MonkeyPatch):
    model = make_model("attention")
    monkeypatch.setattr(model, "generate", recalling_generate)
    options = {"lengths": (1024, 1500), "n": 3, "book": BOOK}
    result = evaluate_ruler(model, TOKENIZER, "niah_single_1", **options)
    assert result.value == 1 and result.n == 6 and list(result.details["by_length"]) == ["1024", "1500"]
    # Two of four values are said: half of them count.
    halves = evaluate_ruler(model, TOKENIZER, "niah_multivalue", **options)
    assert halves.value == 0.5 and halves.task == "local_niah_multivalue"
    with pytest.raises(ValueError, match="No length"):
        evaluate_ruler(model, TOKENIZER, "niah_single_1", lengths=())


def recalling_generate(ids: torch.Tensor, **_options: object) -> torch.Tensor:
    """Answers with at most two of the values that stand in the prompt."""
    rows = []
    for row in ids.tolist():
        text = bytes(token for token in row if token < 256).decode()
        rows.append([*row, *" and ".join(value for _, _, value in NEEDLE.findall(text)[:2]).encode()])
    longest = max(map(len, rows))
    return torch.tensor([row + [258] * (longest - len(row)) for row in rows])


def test_an_untrained_model_is_measured():
    result = evaluate_ruler(make_model("self_modifying"), TOKENIZER, "niah_single_1", lengths=(600,), n=2,
                            answer_tokens=8)  # fmt: skip
    assert result.value == 0 and result.stderr == 0 and len(result.details["example"]["references"]) == 1


def test_published_numbers_have_their_source():
    needles = {task: rows for task, rows in PUBLISHED.items() if task.startswith("niah_")}
    assert set(needles) <= set(VARIANTS) and all(len(rows) == 21 for rows in needles.values())
    hope = {
        (task, entry.split): entry.value for task, rows in needles.items() for entry in rows if entry.model == "Hope"
    }
    assert (hope["niah_single_3", "16384"], hope["niah_multiquery", "4096"]) == (24.8, 31.7)
    assert all("NL" in entry.source for rows in PUBLISHED.values() for entry in rows)
    assert [entry.value for entry in PUBLISHED["lambada_openai/acc"]] == [42.6, 49.1, 51.0]
    assert len(key_words()) == len(set(key_words()))
