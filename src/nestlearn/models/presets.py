"""Named configurations: families at five sizes each, and the paper-literal Hope."""

from __future__ import annotations

import copy
from typing import Any

from nestlearn.fields import unknown_name

_BYTES = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "reset_token_id": 256}
"""The byte vocabulary of `nestlearn.data.byte_tokenizer`: 256 bytes, <s>, </s>, <pad>."""

_SIZES: dict[str, dict[str, Any]] = {
    # 0.02 suits widths above 500; a width of 128 learns twice as fast from 0.04 (docs/log.md).
    "tiny": _BYTES | {"tie_word_embeddings": True, "initializer_range": 0.04},
    "small": {"vocab_size": 32000, "tie_word_embeddings": True},
    "340m": {"vocab_size": 32000, "tie_word_embeddings": True},
    "760m": {"vocab_size": 32000, "tie_word_embeddings": False},
    "1.3b": {"vocab_size": 32000, "tie_word_embeddings": False},
}


def _frozen(expansion: float = 4) -> dict[str, Any]:
    return {"period": None, "expansion": expansion}


def _fast(period: int, expansion: float) -> dict[str, Any]:
    return {"period": period, "expansion": expansion}


# Every batch row has its own copy of a fast level, so fast levels are narrow: a level of expansion e holds 4 e d^2
# numbers per row and layer. Periods stay below the usual training lengths, 256 for tiny and 2,048 for the others.
_LEVELS = [_fast(256, 0.125), _fast(1024, 0.125), _frozen(4)]


def _shape(hidden_size: int, layers: int, heads: int, cms: list[dict[str, Any]]) -> dict[str, Any]:
    return {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": heads, "cms": cms}


# Tiny segments and windows are shorter than the usual training length of 256: the memory is needed, and so learned.
# The tiny presets have equal numbers of parameters: layers with a larger mixer are fewer.
_FAMILIES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "hope": (
        # No writing level: at equal FLOPs none brought anything (docs/results/language_ablations.md). Given values: own
        # ones are worse on both texts of docs/results/hope_ablations.md.
        {"mixer": {"type": "self_modifying", "architecture": "matrix", "self_values": False}},
        {
            # Heads are few and wide: a matrix holds about as many associations as it has rows.
            "tiny": _shape(160, 4, 2, [_frozen(3)]),
            "small": _shape(512, 12, 4, [_frozen(3.5)]),
            "340m": _shape(1024, 24, 8, [_frozen(3.75)]),
            "760m": _shape(1536, 23, 12, [_frozen(4)]),
            "1.3b": _shape(2048, 23, 16, [_frozen(4)]),
        },
    ),
    "hope-attention": (
        {"mixer": {"type": "attention"}},
        {
            "tiny": _shape(160, 4, 5, [_fast(64, 0.25), _frozen(3)]),
            "small": _shape(512, 10, 8, _LEVELS),
            "340m": _shape(1024, 20, 16, _LEVELS),
            "760m": _shape(1536, 19, 16, _LEVELS),
            "1.3b": _shape(2048, 20, 16, _LEVELS),
        },
    ),
    "titans": (
        {"mixer": {"type": "memory", "memory": "titans"}},
        {
            "tiny": _shape(128, 5, 4, [_frozen()]),
            "small": _shape(512, 11, 8, [_frozen()]),
            "340m": _shape(1024, 24, 16, [_frozen()]),
            "760m": _shape(1536, 22, 16, [_frozen()]),
            "1.3b": _shape(2048, 22, 16, [_frozen()]),
        },
    ),
    "titans-mac": (
        {"mixer": {"type": "titans_mac"}},
        {
            "tiny": _shape(128, 4, 4, [_frozen(3)]) | {"mixer": {"type": "titans_mac", "segment_length": 64}},
            "small": _shape(512, 8, 8, [_frozen()]),
            "340m": _shape(1024, 16, 16, [_frozen()]),
            "760m": _shape(1536, 15, 16, [_frozen()]),
            "1.3b": _shape(2048, 15, 16, [_frozen()]),
        },
    ),
    "titans-mag": (
        {"mixer": {"type": "titans_mag"}},
        {
            "tiny": _shape(128, 4, 4, [_frozen(3.5)]) | {"mixer": {"type": "titans_mag", "window": 64}},
            "small": _shape(512, 8, 8, [_frozen()]),
            "340m": _shape(1024, 17, 16, [_frozen()]),
            "760m": _shape(1536, 16, 16, [_frozen()]),
            "1.3b": _shape(2048, 16, 16, [_frozen()]),
        },
    ),
    "titans-mal": (
        {"mixer": {"type": "titans_mal"}},
        {
            "tiny": _shape(128, 4, 4, [_frozen()]) | {"mixer": {"type": "titans_mal", "window": 64}},
            "small": _shape(512, 8, 8, [_frozen()]),
            "340m": _shape(1024, 18, 16, [_frozen()]),
            "760m": _shape(1536, 17, 16, [_frozen()]),
            "1.3b": _shape(2048, 17, 16, [_frozen()]),
        },
    ),
    "transformer": (
        {"mixer": {"type": "attention"}},
        {
            "tiny": _shape(160, 4, 5, [_frozen(3.75)]),
            "small": _shape(512, 12, 8, [_frozen()]),
            "340m": _shape(1024, 24, 16, [_frozen()]),
            "760m": _shape(1536, 24, 16, [_frozen()]),
            "1.3b": _shape(2048, 24, 16, [_frozen()]),
        },
    ),
}

_PRESETS: dict[str, dict[str, Any]] = {
    f"{family}-{size}": base | _SIZES[size] | shape
    for family, (base, shapes) in _FAMILIES.items()
    for size, shape in shapes.items()
}
# What the paper prints: networks as memories, the L2 objective, reads at the start of a chunk, retention toward zero,
# momentum, an adaptive query, four levels at the long-context periods and GELU networks. Bounded steps and normalized
# targets are ours (docs/presets.md). Full levels for every sequence: the state of one row is as large as the weights.
_PRESETS["hope-paper"] = _PRESETS["hope-340m"] | {
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "mixer": {
        "type": "self_modifying",
        "objective": "l2",
        "read": "chunk",
        "retain_to": "zero",
        "momentum": True,
        "adaptive": ["q", "k", "v", "eta", "alpha"],
    },
    "ffn_activation": "gelu",
    "cms": [_fast(512, 1), _fast(2048, 1), _fast(8192, 1), _fast(32768, 1)],
}


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
