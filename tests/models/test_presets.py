"""The sizes of the presets: exact parameter counts on the meta device."""

import math
from pathlib import Path

import pytest
import torch

from nestlearn import HopeCache, HopeConfig, HopeForCausalLM, flops, presets
from nestlearn.models import row_bytes
from nestlearn.models.flops import meta_model
from nestlearn.nn.state import state_bytes

PARAMETERS = {
    "hope-tiny": 1_229_776,
    "hope-small": 53_397_600,
    "hope-340m": 332_009_856,
    "hope-760m": 763_605_928,
    "hope-1.3b": 1_307_924_064,
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
ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize("name", presets())
def test_documented_bytes_per_row(name):
    """Fast levels are small per sequence, and docs/presets.md has the figures.

    hope-paper has the paper's four full levels: their state is 69 % of its weights per sequence."""
    size, count = row_bytes(HopeConfig.from_preset(name)), PARAMETERS[name]
    share = size.levels / (4 * count)
    assert (share <= 0.1) == (name != "hope-paper")
    row = f"| {name} | {count:,} | {size.levels:,} | {100 * share:.1f} % | {size.mixers:,} | {size.per_token:,} |"
    assert row in (ROOT / "docs" / "presets.md").read_text().splitlines()


@pytest.mark.parametrize("mixer", ["attention", "memory", ["attention", "memory"]])
def test_bytes_per_row_are_those_of_a_cache(mixer):
    config = HopeConfig(mixer=mixer, num_hidden_layers=2, cms=[{"period": 8, "rank": 2, "rule": "momentum"}, {}])
    model, cache = HopeForCausalLM(config).eval(), HopeCache()
    ids = torch.zeros(1, 11, dtype=torch.long)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    size = row_bytes(config)
    held = [state_bytes([getattr(layer, part) for layer in cache.layers]) for part in ("cms", "mixer")]
    assert size.levels == held[0]
    # Three copies of 2 (in + out) numbers for the three maps of both layers, and a position.
    assert size.levels == 2 * (3 * 4 * 2 * 3 * (128 + 344) + 8)
    if "memory" not in mixer:
        assert size.mixers + 9 * size.per_token == held[1]


@pytest.mark.parametrize("name", presets())
def test_only_attention_costs_more_in_a_longer_context(name):
    config = HopeConfig.from_preset(name)
    short, long = flops(config, 4096), flops(config, 8192)
    assert (long > 1.05 * short) == (config.mixers[0].stored_tokens is None)
    # Every slow weight but the embedding is used once per token.
    assert short > 2 * (PARAMETERS[name] - config.vocab_size * config.hidden_size)


def test_flops_are_the_sum_over_the_layers():
    config = HopeConfig(mixer=["attention", "titans_mac", "attention"], num_hidden_layers=3, cms=[{"period": 8}, {}])
    layers = meta_model(config).model.layers
    output = 2 * config.hidden_size * config.vocab_size
    assert flops(config, 100) == output + sum(layer.flops_per_token(100) for layer in layers)


def test_flops_need_a_context():
    with pytest.raises(ValueError, match="context_length=0"):
        flops(HopeConfig(), 0)
