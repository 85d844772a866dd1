"""A pretrained model small enough for a test."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(**fields: Any) -> LlamaForCausalLM:
    """A Llama of one small layer over bytes, always with the same weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(sizes | fields))).eval()
