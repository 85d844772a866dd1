"""The lock of a model whose forward pass changes the model itself."""

from __future__ import annotations

import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

_TURNS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


def turn_of(model: Any) -> AbstractContextManager[Any]:
    """A context for one forward pass at a time, if the model needs that; nothing for others."""
    if not has_changing_table(model):
        return nullcontext()
    with _TURNS_LOCK:
        return _TURNS.setdefault(model, threading.RLock())


def has_changing_table(model: Any) -> bool:
    """Whether the table of the rotary embedding depends on the longest input so far.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> has_changing_table(LlamaForCausalLM(LlamaConfig(**sizes)))
        False
    """
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)
