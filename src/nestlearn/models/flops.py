"""The cost of a model, from its configuration alone."""

from __future__ import annotations

import torch

from nestlearn.models.config import HopeConfig
from nestlearn.models.modeling import HopeForCausalLM


def meta_model(config: HopeConfig) -> HopeForCausalLM:
    """The model without memory for its weights (on the meta device): for counting."""
    with torch.device("meta"):
        return HopeForCausalLM(config)


def flops(config: HopeConfig, context_length: int = 2048) -> int:
    """Forward FLOPs per token at a context of that many tokens; training costs about three times as much.

    Sums what each layer's mixer and continuum memory count for themselves, and the output layer; a multiply-add is 2.
    Norms, activations and the embedding look-up are left out.

    Raises:
        ValueError: a context below one token.

    Example:
        >>> flops(HopeConfig(mixer="attention", num_hidden_layers=1, conv_size=0), context_length=1)
        462080
    """
    if context_length < 1:
        raise ValueError(f"{context_length=} must be at least 1 token.")
    model = meta_model(config)
    blocks = sum(block.flops_per_token(context_length) for block in model.model.layers)  # pyright: ignore[reportCallIssue]
    return blocks + 2 * config.hidden_size * config.vocab_size
