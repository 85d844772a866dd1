"""General text for a stacked model's memory of general inputs: a file of the caller, or what the model writes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from nestlearn.data.control_tokens import LiteralText
from nestlearn.models.stacking import stacked_model
from nestlearn.models.stacking.general import DIRECTIONS, TOKENS, estimate_general, own_text


def protect(
    model: Any,
    tokenizer: Any,
    text: str | None = None,
    *,
    tokens: int = TOKENS,
    length: int = 256,
    rank: int | None = DIRECTIONS,
    seed: int = 0,
) -> Any:
    """Give a stacked model a memory of general inputs, so that what it reads leaves its answers to others alone.

    See `nestlearn.models.stacking.general` for what is kept.

    Args:
        model: a stacked model in evaluation mode.
        tokenizer: of the model.
        text: general text; None takes what the model itself writes from its start token.
        tokens: of the text that are used, in rows spread evenly over it.
        length: tokens of a row.
        rank: directions kept of the inputs of a map; None keeps all.
        seed: of the text that the model writes.

    Returns:
        The model.

    Raises:
        ValueError: a model without levels, an empty text, or one with which the inputs of a map are not finite.

    Example:
        >>> from nestlearn.data import byte_tokenizer
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = stack_levels(LlamaForCausalLM(config), [Level(period=16)], mode="split").eval()
        >>> model = protect(model, byte_tokenizer(), "Text of the kind that the model should answer as before. " * 9)
        >>> model.stacked_mlps()["model.layers.0.mlp"].level(0).general_up.shape
        torch.Size([16, 16])
    """
    stacked_model(model)
    ids = own_text(model, tokenizer, tokens, length, seed) if text is None else rows(tokenizer, text, tokens, length)
    estimate_general(model, ids, rank=rank)
    return model


def rows(tokenizer: Any, text: str, tokens: int = TOKENS, length: int = 256) -> Int[Tensor, "b t"]:
    """Rows of ``length`` tokens of a text, spread evenly over it, each with the tokenizer's start token before it."""
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    ids, room = LiteralText(tokenizer).ids(text), length - len(start)
    if not ids:
        raise ValueError("the general text holds no tokens; give a text of some thousand tokens, or None.")
    found = [ids[at : at + room] for at in range(0, len(ids) - room + 1, room)] or [ids]
    wanted = max(1, tokens // length)
    chosen = [found[i * len(found) // wanted] for i in range(wanted)] if wanted < len(found) else found
    return torch.tensor([start + row for row in chosen])
