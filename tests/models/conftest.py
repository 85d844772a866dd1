"""A small float64 model of any mixer."""

import pytest
import torch

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.models.config import mixer_names

VOCABULARY = 50


# Not a mixer's name: attention with a continuum memory of three levels.
LEVELS = [{"period": 3, "expansion": 1}, {"period": 5, "expansion": 0.5, "rule": "descent"}, {"expansion": 2}]


def small_config(mixer="attention", **fields):
    if mixer == "levels":
        mixer, fields = "attention", {"cms": LEVELS} | fields
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "memory_expansion": 2,
        "memory_chunk_size": 4,
        "projection_chunk_size": 8,
        "sliding_window": 4,
        "segment_length": 4,
        "persistent_tokens": 2,
        "local_windows": [4, 8],
        "local_chunk_sizes": [2, 4],
        "global_chunk_size": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        # Large initial weights: every mechanism then has a visible effect on the logits.
        "initializer_range": 0.3,
    }
    return HopeConfig(**(defaults | {"mixer": mixer} | fields))


@pytest.fixture
def build():
    """build(mixer, **config fields) -> float64 model in evaluation mode, always with the same weights."""

    def make(mixer="attention", **fields):
        torch.manual_seed(0)
        model = HopeForCausalLM(small_config(mixer, **fields)).double().eval()
        for name, parameter in model.named_parameters():
            if name.endswith(".value"):
                # The levels of a continuum memory learn nothing at first: this map starts at zero.
                torch.nn.init.normal_(parameter)
        return model

    return make


@pytest.fixture
def ids():
    """Three rows of eleven tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=[*mixer_names(), "levels"])
def mixer(request):
    return request.param
