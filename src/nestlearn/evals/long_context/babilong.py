"""BABILong (Kuratov et al. 2024, arXiv 2406.10149): facts from bAbI files, scattered in a book."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nestlearn.evals.language import describe_model
from nestlearn.evals.long_context.answers import score_by_length, token_count
from nestlearn.evals.long_context.babi_files import Question, read_questions
from nestlearn.evals.long_context.words import read_sentences
from nestlearn.evals.result import EvalResult
from nestlearn.fields import unknown_name

_ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
LABELS: dict[str, tuple[str, ...]] = {
    "qa1": _ROOMS,
    "qa2": _ROOMS,
    "qa3": _ROOMS,
    "qa4": _ROOMS,
    "qa5": ("bill", "fred", "jeff", "mary", "apple", "football", "milk"),
}
"""All answers of each task, in lower case."""
_ANSWER_TOKENS = 16
_SHORTEST = 10  # tokens of the shortest sentence taken from a book


class BabilongSample(NamedTuple):
    """A prompt that ends where the answer begins; ``tokens`` counts the text with facts and question."""

    prompt: str
    question: Question
    tokens: int


def read_babi(path: str | Path, task: str, split: str = "test") -> list[Question]:
    """The questions of a bAbI task, each with the facts before it.

    Args:
        path: a folder with files such as ``qa1_test.txt`` or ``qa1_single-supporting-fact_test.txt``.
        task: ``"qa1"`` to ``"qa5"``.
        split: ``"train"``, ``"valid"`` or ``"test"``.

    Raises:
        ValueError: the task is unknown, the file does not exist, or it does not have bAbI's form.
    """
    if task not in LABELS:
        raise unknown_name("BABILong task", task, LABELS)
    return read_questions(path, task, split)


def exact_label(prediction: str, question: Question, labels: Sequence[str]) -> bool:
    """Whether the right label is the only one in the prediction's first sentence, labels of the question aside.

    Example:
        >>> asked = Question((), "Where is Mary?", "garden")
        >>> exact_label("In the Garden. Or the office.", asked, LABELS["qa1"])
        True
        >>> exact_label("garden or office", asked, LABELS["qa1"])
        False
    """
    first = re.split(r"[.\n]", prediction.lower().strip(), maxsplit=1)[0]
    asked = question.question.lower()
    named = {label for label in labels if label in first and label not in asked}
    return named == {question.answer.lower()}


def babilong_samples(
    task: str,
    tokenizer: Any,
    *,
    babi: str | Path,
    book: str | Path | Sequence[str],
    length: int,
    n: int,
    shots: int = 2,
    split: str = "test",
    seed: int = 0,
) -> list[BabilongSample]:
    """Questions with their facts in order at random places between the sentences of a book.

    Sentences of at least ten tokens are taken from a random one on, until the text has ``length`` tokens. Each fact
    goes to a gap, drawn with repetition; the gaps are sorted. Questions whose facts alone are longer are left out.

    Args:
        task: ``"qa1"`` to ``"qa5"``.
        tokenizer: the tokenizer that counts the tokens.
        babi: folder of bAbI files, see `read_babi`.
        book: a text file, a folder of text files, or sentences.
        length: tokens of facts, book and question together; 0 for the facts alone.
        n: number of samples; fewer if fewer questions fit.
        shots: answered questions of the train split, with their facts alone, before the text.
        split: split of the questions.
        seed: seed of all random choices.

    Raises:
        ValueError: a file cannot be read, or no question fits.
    """
    if n < 1 or length < 0 or shots < 0:
        raise ValueError(f"n={n}, length={length}, shots={shots}: n must be at least 1, the others at least 0.")
    questions = read_babi(babi, task, split)
    examples = _examples(read_babi(babi, task, "train"), shots, seed)
    found = read_sentences(book) if isinstance(book, (str, Path)) else list(book)
    noise = _Noise(found, tokenizer)
    sizes = [token_count(tokenizer, _text(question.facts, question)) for question in questions]
    fitting = [number for number, size in enumerate(sizes) if length == 0 or size <= length]
    if not fitting:
        raise ValueError(
            f"length={length} is too small: the facts and the question of the shortest of the {len(questions)} {task} "
            f"questions take {min(sizes)} tokens of this tokenizer."
        )
    random.Random(f"{seed} {task}").shuffle(fitting)
    samples = []
    for number in fitting[:n]:
        draw = random.Random(f"{seed} {task} {number}")
        question = questions[number]
        text, tokens = _scattered(question, sizes[number], noise, length, tokenizer, draw)
        samples.append(BabilongSample(f"{examples}{text}\nAnswer:", question, tokens))
    return samples


def _text(sentences: Sequence[str], question: Question) -> str:
    return " ".join(sentences) + f"\nQuestion: {question.question}"


def _examples(questions: Sequence[Question], shots: int, seed: int) -> str:
    chosen = random.Random(f"{seed} shots").sample(questions, min(shots, len(questions)))
    return "".join(f"{_text(question.facts, question)}\nAnswer: {question.answer}\n\n" for question in chosen)


class _Noise:
    """The sentences of a book that are long enough, with their numbers of tokens."""

    def __init__(self, sentences: Sequence[str], tokenizer: Any) -> None:
        # A sentence is preceded by a space, which a tokenizer may count.
        sized = [(sentence, token_count(tokenizer, f" {sentence}")) for sentence in sentences]
        self.sentences = [(sentence, size) for sentence, size in sized if size >= _SHORTEST]
        if not self.sentences:
            raise ValueError(f"the book has no sentence of at least {_SHORTEST} tokens; give a longer one.")

    def fill(self, room: int, draw: random.Random) -> list[str]:
        """Sentences in the order of the book from a random one on, as many as fit."""
        start, found, number = draw.randrange(len(self.sentences)), [], 0
        while True:
            sentence, size = self.sentences[(start + number) % len(self.sentences)]
            room, number = room - size, number + 1
            if room < 0:
                return found
            found.append(sentence)


def _scattered(
    question: Question, least: int, noise: _Noise, length: int, tokenizer: Any, draw: random.Random
) -> tuple[str, int]:
    """The text of facts between sentences of the book, and its number of tokens."""
    sentences = noise.fill(length - least, draw) if length else []
    while True:
        places = sorted(draw.randint(0, len(sentences)) for _ in question.facts)
        mixed = list(sentences)
        # From the last place to the first, so that a fact does not move the places of others.
        for place, fact in zip(reversed(places), reversed(question.facts), strict=True):
            mixed.insert(place, fact)
        text = _text(mixed, question)
        tokens = token_count(tokenizer, text)
        if tokens <= length or not sentences:
            return text, tokens
        # Joined sentences may take more tokens than the sum of their own.
        sentences.pop()


def evaluate_babilong(
    model: Any,
    tokenizer: Any,
    task: str,
    *,
    babi: str | Path,
    book: str | Path | Sequence[str],
    lengths: Sequence[int],
    n: int = 100,
    shots: int = 2,
    split: str = "test",
    seed: int = 0,
    batch_size: int = 8,
    command: str = "",
) -> EvalResult:
    """Accuracy of a model's greedy answers by `exact_label`, for each length of the text.

    Args:
        task: ``"qa1"`` to ``"qa5"``; the other arguments are those of `babilong_samples` and `answer_prompts`.

    Returns:
        A result whose value is the mean over the lengths, and whose ``details`` hold ``by_length`` and an example.

    Raises:
        ValueError: as in `babilong_samples`, or no length is given.
    """
    if not lengths:
        raise ValueError("No length was given. Give at least one, for example --lengths 0,1024,2048.")
    began = time.perf_counter()
    sentences = read_sentences(book) if isinstance(book, (str, Path)) else book
    options: dict[str, Any] = {"babi": babi, "book": sentences, "n": n, "shots": shots, "split": split, "seed": seed}
    made = {length: babilong_samples(task, tokenizer, length=length, **options) for length in lengths}
    scores = score_by_length(
        model,
        tokenizer,
        made,
        lambda answer, sample: float(exact_label(answer, sample.question, LABELS[task])),
        max_new_tokens=_ANSWER_TOKENS,
        batch_size=batch_size,
    )
    asked = made[lengths[-1]][0].question
    example = {"length": lengths[-1], "question": asked.question, "answer": scores.answer, "reference": asked.answer}
    settings = {"lengths": list(lengths), "babi": str(babi), "book": str(book)[:200], "shots": shots, "split": split}
    return EvalResult(
        task=f"local_babilong_{task}",
        version=1,
        metric="accuracy of the label in the answer's first sentence, mean over lengths",
        value=scores.value,
        stderr=scores.stderr,
        n=scores.n,
        seed=seed,
        seconds=time.perf_counter() - began,
        command=command,
        config={**settings, "answer_tokens": _ANSWER_TOKENS, "samples": n, "model": describe_model(model)},
        details={"by_length": scores.by_length, "example": example},
    )
