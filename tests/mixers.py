"""Small mixers by name, for tests that run on all of them."""

from __future__ import annotations

from typing import Any

import pytest

from nestlearn.memory import catalog
from nestlearn.nn import mixer_types

_MEMORY: dict[str, Any] = {"expansion": 2, "chunk_size": 4}
_TITANS: dict[str, Any] = _MEMORY | {"persistent_tokens": 2}
SMALL: dict[str, dict[str, Any]] = {
    "self_modifying": {"type": "self_modifying", "projection_chunk_size": 8} | _MEMORY,
    "attention": {"type": "attention", "conv_size": 4},
    "sliding_attention": {"type": "attention", "conv_size": 4, "window": 4},
    "pmi": {"type": "pmi", "slots": 3, "topk": 2, "segments": 2, "chunk_size": 4},
    "titans_mac": {"type": "titans_mac", "segment_length": 4} | _TITANS,
    "titans_mag": {"type": "titans_mag", "window": 4} | _TITANS,
    "titans_mal": {"type": "titans_mal", "window": 4} | _TITANS,
    "tnt": {"type": "tnt", "expansion": 2, "chunk_size": 8, "local_windows": [4, 8], "local_chunk_sizes": [2, 4]},
    **{name: {"type": "memory", "memory": name} | _MEMORY for name in catalog},
}
# One of each kind; of the memories a matrix, deep ones, one with a learned threshold. Quick tests of models run these
# and `make test-all` every mixer; tests/contracts/test_layers.py runs the layers with every memory.
KINDS = {*SMALL} - {*catalog} | {"deltanet", "titans", "hope", "yaad"}
ATTENTION = ("attention", "sliding_attention")

assert {mixer["type"] for mixer in SMALL.values()} == set(mixer_types())


def slow_unless(quick: bool, *values: object) -> object:
    """A parameter of a test, slow if it is not quick."""
    return pytest.param(*values, marks=[] if quick else pytest.mark.slow)


MIXERS = [slow_unless(name in KINDS, name) for name in SMALL]
