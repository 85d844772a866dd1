"""Named configurations: four families, each at five sizes, and the paper-literal Hope."""

from __future__ import annotations

import copy
from typing import Any

from nestlearn.models.config import unknown_name

_FROZEN = [{"period": None, "expansion": 4}]

# The byte vocabulary of `nestlearn.data.byte_tokenizer`: 256 bytes, <s>, </s>, <pad>.
_BYTES = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "reset_token_id": 256}
_BPE = {"vocab_size": 32000}

_VOCABULARY: dict[str, dict[str, Any]] = {
    "tiny": _BYTES | {"tie_word_embeddings": True},
    "small": _BPE | {"tie_word_embeddings": True},
    "340m": _BPE | {"tie_word_embeddings": True},
    "760m": _BPE | {"tie_word_embeddings": False},
    "1.3b": _BPE | {"tie_word_embeddings": False},
}


def _shape(hidden_size: int, layers: int, heads: int) -> dict[str, Any]:
    return {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": heads}


_FAMILIES: dict[str, dict[str, Any]] = {
    "hope": {"mixer": "self_modifying_titans", "cms": _FROZEN},
    "hope-attention": {"mixer": "attention", "conv_size": 0, "cms": _FROZEN},
    "titans": {"mixer": "titans", "cms": _FROZEN},
    "transformer": {"mixer": "attention", "conv_size": 0, "cms": _FROZEN},
}

_SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "hope": {
        "tiny": _shape(128, 3, 4),
        "small": _shape(512, 8, 8),
        "340m": _shape(1024, 18, 16),
        "760m": _shape(1536, 17, 16),
        "1.3b": _shape(2048, 17, 16),
    },
    "transformer": {
        # As many parameters as hope-tiny (whose mixer is larger), spread over depth and width.
        "tiny": _shape(160, 4, 5) | {"cms": [{"period": None, "expansion": 3.75}]},
        "small": _shape(512, 12, 8),
        "340m": _shape(1024, 24, 16),
        "760m": _shape(1536, 24, 16),
        "1.3b": _shape(2048, 24, 16),
    },
}
_SHAPES["hope-attention"] = _SHAPES["transformer"]
_SHAPES["titans"] = _SHAPES["hope"]

_PRESETS: dict[str, dict[str, Any]] = {
    f"{family}-{size}": base | _VOCABULARY[size] | _SHAPES[family][size]
    for family, base in _FAMILIES.items()
    for size in _VOCABULARY
}
_PRESETS["hope-paper"] = _PRESETS["hope-340m"] | {"memory_objective": "l2", "memory_momentum": True}


def presets() -> list[str]:
    """The names that `HopeConfig.from_preset` knows."""
    return list(_PRESETS)


def preset(name: str) -> dict[str, Any]:
    """The configuration fields of a preset.

    Raises:
        ValueError: unknown name; the message has the closest known ones.
    """
    if name not in _PRESETS:
        raise unknown_name("preset", name, _PRESETS)
    return copy.deepcopy(_PRESETS[name])
