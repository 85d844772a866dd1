"""A small float64 model of any mixer."""

from dataclasses import fields as fields_of

import pytest
import torch
from tests.mixers import MIXERS, SMALL

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.nn import mixer_types

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
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        # Large initial weights: every mechanism then has a visible effect on the logits.
        "initializer_range": 0.3,
    }
    return HopeConfig(**(defaults | {"mixer": chosen(mixer, fields)} | fields))


def chosen(mixer, fields):
    """The small mixer of a name, with its own fields taken out of ``fields``; a list of names gives a list."""
    if isinstance(mixer, list):
        return [chosen(name, dict(fields)) for name in mixer]
    own = {f.name for f in fields_of(mixer_types()[SMALL[mixer]["type"]])}
    return SMALL[mixer] | {name: fields.pop(name) for name in own & fields.keys()}


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


@pytest.fixture(params=[*MIXERS, "levels"])
def mixer(request):
    return request.param
