"""The sizes of the presets: exact parameter counts on the meta device."""

import math

import pytest
import torch

from nestlearn import HopeCache, HopeConfig, HopeForCausalLM, flops, presets
from nestlearn.models.flops import meta_model
from nestlearn.nn.state import state_bytes

PARAMETERS = {
    "hope-tiny": 1_223_806,
    "hope-small": 55_977_548,
    "hope-340m": 352_143_936,
    "hope-760m": 771_375_036,
    "hope-1.3b": 1_327_098_268,
    "hope-attention-tiny": 1_223_048,
    "hope-attention-small": 54_482_472,
    "hope-attention-340m": 337_163_344,
    "hope-attention-760m": 748_495_948,
    "hope-attention-1.3b": 1_347_381_328,
    "titans-tiny": 1_202_140,
    "titans-small": 54_131_144,
    "titans-340m": 348_671_616,
    "titans-760m": 749_210_208,
    "titans-1.3b": 1_287_665_440,
    "titans-mac-tiny": 1_232_048,
    "titans-mac-small": 56_464_576,
    "titans-mac-340m": 344_214_272,
    "titans-mac-760m": 754_694_256,
    "titans-mac-1.3b": 1_297_484_368,
    "titans-mag-tiny": 1_231_536,
    "titans-mag-small": 54_396_096,
    "titans-mag-340m": 345_975_664,
    "titans-mag-760m": 760_876_800,
    "titans-mag-1.3b": 1_308_365_568,
    "titans-mal-tiny": 1_239_216,
    "titans-mal-small": 52_294_848,
    "titans-mal-340m": 345_506_784,
    "titans-mal-760m": 762_153_360,
    "titans-mal-1.3b": 1_310_608_304,
    "transformer-tiny": 1_220_480,
    "transformer-small": 54_194_688,
    "transformer-340m": 334_611_456,
    "transformer-760m": 777_856_512,
    "transformer-1.3b": 1_339_525_120,
    "hope-paper": 341_740_176,
}
FAMILIES = ("hope", "hope-attention", "titans", "titans-mac", "titans-mag", "titans-mal", "transformer")
NOMINAL = {"340m": 340e6, "760m": 760e6, "1.3b": 1.3e9}


def test_every_preset_is_counted():
    assert set(PARAMETERS) == set(presets())


@pytest.mark.parametrize("name", presets())
def test_parameter_count(name):
    count = meta_model(HopeConfig.from_preset(name)).num_parameters()
    assert count == PARAMETERS[name]
    size = name.rpartition("-")[2]
    if size in NOMINAL:
        assert abs(count / NOMINAL[size] - 1) < 0.05
    if name == "hope-paper":
        assert abs(count / NOMINAL["340m"] - 1) < 0.05


def test_tiny_presets_are_comparable():
    counts = [PARAMETERS[f"{family}-tiny"] for family in FAMILIES]
    assert max(counts) < 1.05 * min(counts)


@pytest.mark.parametrize("name", [name for name in presets() if name.endswith("tiny")])
def test_initial_loss_of_tiny_presets(name):
    torch.manual_seed(0)
    model = HopeForCausalLM(HopeConfig.from_preset(name))
    ids = torch.randint(0, 256, (2, 64))
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert abs(loss - math.log(259)) < 0.05 * math.log(259)


def test_flops_of_a_transformer():
    """24 d^2 + 2 (T + 1) d per layer with an FFN of expansion 4, and the output layer."""
    config = HopeConfig.from_preset("transformer-small")
    d, ffn, context = config.hidden_size, 1368, 1024
    layer = 8 * d * d + 2 * d * (context + 1) + 6 * d * ffn
    assert flops(config, context) == config.num_hidden_layers * layer + 2 * d * config.vocab_size


@pytest.mark.parametrize("name", sorted(set(presets()) - {"hope-paper"}))
def test_fast_levels_are_small_per_sequence(name):
    """hope-paper has the paper's four full levels: their state is 69 % of its weights per sequence."""
    model, cache = meta_model(HopeConfig.from_preset(name)).eval(), HopeCache()
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long, device="meta"), past_key_values=cache)
    assert state_bytes([layer.cms for layer in cache.layers]) <= 0.1 * 4 * PARAMETERS[name]


@pytest.mark.parametrize("name", presets())
def test_only_attention_costs_more_in_a_longer_context(name):
    config = HopeConfig.from_preset(name)
    short, long = flops(config, 4096), flops(config, 8192)
    assert (long > 1.05 * short) == ("attention" in config.mixers)
    # Every slow weight but the embedding is used once per token.
    assert short > 2 * (PARAMETERS[name] - config.vocab_size * config.hidden_size)


def test_flops_need_a_context():
    with pytest.raises(ValueError, match="context_length=0"):
        flops(HopeConfig(), 0)
