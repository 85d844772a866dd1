"""Questions with a right and wrong answers: how likely a model finds each, with or without a text in its context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from nestlearn.data.control_tokens import LiteralText


def question_ids(tokenizer: Any, question: str, context: str = "") -> list[int]:
    """Tokens of a question, up to the start of its answer: by the chat template, or as ``question`` and a line break.

    Args:
        tokenizer: of the model.
        question: the question.
        context: a text before it, in the same turn.
    """
    literal, asked = LiteralText(tokenizer), f"{context}\n\n{question}" if context else question
    if getattr(tokenizer, "chat_template", None):
        return literal.conversation([{"role": "user", "content": asked}])
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    return [*start, *literal.ids(f"{asked}\n")]


@torch.no_grad()
def answer_scores(model: Any, tokenizer: Any, asked: Sequence[int], answers: Sequence[str]) -> list[float]:
    """Mean log probability per token of each answer after a question, in nats.

    A right answer becomes likelier by familiarity alone. So compare it with wrong answers of the same kind.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        asked: tokens of the question, by `question_ids`.
        answers: texts.

    Example:
        >>> from nestlearn.data import byte_tokenizer
        >>> from nestlearn import HopeConfig, HopeForCausalLM
        >>> model, tokenizer = HopeForCausalLM(HopeConfig.from_preset("hope-tiny")).eval(), byte_tokenizer()
        >>> asked = question_ids(tokenizer, "Who?")
        >>> len(answer_scores(model, tokenizer, asked, ["Ann", "Robert"]))
        2
    """
    literal = LiteralText(tokenizer)
    ids = [literal.ids(answer) for answer in answers]
    width = max(map(len, ids))
    # Behind an answer comes what nothing before it sees.
    rows = torch.tensor([[*asked, *answer, *[0] * (width - len(answer))] for answer in ids], device=model.device)
    logits = model(rows, use_cache=False).logits[:, len(asked) - 1 : -1]
    logs = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    found = logs.gather(-1, rows[:, len(asked) :, None])[..., 0]
    return [found[i, : len(answer)].mean().item() for i, answer in enumerate(ids)]
