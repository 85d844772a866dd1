"""A model's answers to prompts, and accuracies by length of context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nestlearn.data.tokenizers import document_ids
from nestlearn.models.generation import generate_texts

_PREFILL = 2048  # tokens of a prompt read at once, so that memory does not grow with its length


def token_count(tokenizer: Any, text: str) -> int:
    """Tokens of a text, without special tokens."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 8
) -> list[str]:
    """What a model adds to each prompt, the most likely token each time.

    Each prompt starts a document with fresh state. Shorter prompts of a batch are padded on the left, and padding is
    never written: an answer is the one the prompt would get alone.

    Args:
        model: a causal language model; its training mode is restored afterwards.
        tokenizer: the tokenizer it was trained with.
        prompts: texts to go on with.
        max_new_tokens: the most tokens of an answer; it ends earlier at the end-of-text token.
        batch_size: prompts per forward pass.

    Raises:
        ValueError: the tokenizer has no end-of-text token.

    Example:
        >>> model = HopeForCausalLM(HopeConfig(mixer="attention", num_hidden_layers=1))
        >>> [type(answer) for answer in answer_prompts(model, byte_tokenizer(), ["a", "abc"], max_new_tokens=2)]
        [<class 'str'>, <class 'str'>]
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token (eos_token is None), so an answer could not be seen to end. "
            "Name one of its tokens, e.g. tokenizer.eos_token = '</s>', and save it beside the model."
        )
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


def mean_with_stderr(scores: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, its standard error (None for a single score) and the number of scores.

    Example:
        >>> mean_with_stderr([0.0, 1.0])
        {'value': 0.5, 'stderr': 0.5, 'n': 2}
    """
    n = len(scores)
    mean = sum(scores) / n
    error = None if n < 2 else (sum((score - mean) ** 2 for score in scores) / (n - 1) / n) ** 0.5
    return {"value": mean, "stderr": error, "n": n}


def mean_over_lengths(by_length: Mapping[str, Mapping[str, Any]]) -> tuple[float, float | None, int]:
    """Mean of the accuracies of all lengths, its standard error, and the number of samples."""
    entries = list(by_length.values())
    value = sum(entry["value"] for entry in entries) / len(entries)
    errors = [entry["stderr"] for entry in entries]
    stderr = None if None in errors else sum(error**2 for error in errors) ** 0.5 / len(errors)
    return value, stderr, sum(entry["n"] for entry in entries)
