"""Greedy answers of a model to prompts, and their scores by length of context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nestlearn.data.tokenizers import document_ids
from nestlearn.models.generation import generate_texts

_PREFILL = 2048  # tokens of a prompt per forward pass, so that memory does not grow with its length


def token_count(tokenizer: Any, text: str) -> int:
    """Number of tokens of a text, without special tokens."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def require_end_of_text(tokenizer: Any) -> None:
    """Raise ValueError unless the tokenizer has an end-of-text token, at which an answer ends."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token (eos_token is None), so the end of an answer is unknown. Set one "
            "of its tokens, for example tokenizer.eos_token = '</s>', and save it with the model."
        )


def answer_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 8
) -> list[str]:
    """The greedy continuation of each prompt.

    Each prompt starts a document with fresh state. Shorter prompts of a batch are padded on the left, and padding is
    never written into a memory, so an answer does not depend on the batch.

    Args:
        model: a causal language model; its training mode is restored afterwards.
        tokenizer: the tokenizer that it was trained with.
        prompts: the texts to continue.
        max_new_tokens: the most tokens of an answer; an end-of-text token ends it earlier.
        batch_size: prompts per forward pass.

    Raises:
        ValueError: the tokenizer has no end-of-text token.

    Example:
        >>> model = HopeForCausalLM(HopeConfig(mixer="attention", num_hidden_layers=1))
        >>> [type(answer) for answer in answer_prompts(model, byte_tokenizer(), ["a", "abc"], max_new_tokens=2)]
        [<class 'str'>, <class 'str'>]
    """
    require_end_of_text(tokenizer)
    rows = [document_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    answers = [""] * len(rows)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            numbers = order[first : first + batch_size]
            batch = [rows[number] for number in numbers]
            chunks: dict[str, Any] = {"prefill_chunk_size": _PREFILL} if len(batch[-1]) > _PREFILL else {}
            found = generate_texts(model, tokenizer, batch, max_new_tokens=max_new_tokens, **chunks)
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer
    finally:
        model.train(was_training)
    return answers


def mean_with_stderr(scores: Sequence[float]) -> dict[str, Any]:
    """The mean of scores, its standard error (None for a single score) and their number.

    Example:
        >>> mean_with_stderr([0.0, 1.0])
        {'value': 0.5, 'stderr': 0.5, 'n': 2}
    """
    n = len(scores)
    mean = sum(scores) / n
    error = None if n < 2 else (sum((score - mean) ** 2 for score in scores) / (n - 1) / n) ** 0.5
    return {"value": mean, "stderr": error, "n": n}


class LengthScores(NamedTuple):
    """Scores by length: mean over the lengths, its standard error, number of samples, an entry per length, and the
    first answer at the last length as an example."""

    value: float
    stderr: float | None
    n: int
    by_length: dict[str, dict[str, Any]]
    answer: str


def score_by_length(
    model: Any,
    tokenizer: Any,
    samples: Mapping[int, Sequence[Any]],
    score: Callable[[str, Any], float],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> LengthScores:
    """Answers the prompts of every length and scores them.

    Args:
        model, tokenizer: as in `answer_prompts`.
        samples: for every length its samples, each with a `prompt`.
        score: from an answer and its sample to a score.
        max_new_tokens, batch_size: as in `answer_prompts`.
    """
    by_length, answer = {}, ""
    for length, part in samples.items():
        prompts = [sample.prompt for sample in part]
        answers = answer_prompts(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
        by_length[str(length)] = mean_with_stderr([score(*pair) for pair in zip(answers, part, strict=True)])
        answer = answers[0]
    entries = list(by_length.values())
    errors = [entry["stderr"] for entry in entries]
    stderr = None if None in errors else sum(error**2 for error in errors) ** 0.5 / len(errors)
    value = sum(entry["value"] for entry in entries) / len(entries)
    return LengthScores(value, stderr, sum(entry["n"] for entry in entries), by_length, answer)
