"""HopeConfig: presets by name, close matches, refusals, JSON."""

from dataclasses import fields

import pytest
import torch
from tests.mixers import SMALL

from nestlearn import HopeConfig, HopeForCausalLM, Level, presets
from nestlearn.memory import AssociativeMemory
from nestlearn.nn import AttentionConfig, MemoryMixerConfig, SelfModifyingConfig, mixer_types

ODD = [None, "no", "", True, 0, -1, 2.5, 2, float("nan"), float("inf"), 10**30, 10**5000, [], {}, [None], ["no"], [2.5],
       {"no": 1}, object(), b"x"]  # fmt: skip
SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


SHIPPED = {small["type"] for small in SMALL.values()}


def refused_or_right(name, **settings):
    """A ValueError that names the field, or a model that computes numbers: never another error, never NaN."""
    try:
        model = HopeForCausalLM(HopeConfig(**(SIZES | settings)))
    except ValueError as error:
        assert name in str(error), error
        return
    with torch.no_grad():
        assert model(torch.arange(6)[None] % model.config.vocab_size).logits.isfinite().all()


@pytest.mark.parametrize("name", HopeConfig.field_names())
def test_any_value_of_any_field_is_refused_by_its_name_or_works(name):
    for value in ODD:
        refused_or_right(name, **({"mixer": SMALL["self_modifying"]} | {name: value}))


@pytest.mark.parametrize(
    ("mixer", "name"), [(kind, f.name) for kind, cls in mixer_types().items() for f in fields(cls) if kind in SHIPPED]
)
def test_any_value_of_any_field_of_a_mixer_is_refused_by_its_name_or_works(mixer, name):
    small = next(small for small in SMALL.values() if small["type"] == mixer)
    for value in ODD:
        refused_or_right(name, mixer=small | {name: value})


@pytest.mark.parametrize("name", [f.name for f in fields(Level)])
def test_any_value_of_any_field_of_a_level_is_refused_by_its_name_or_works(name):
    for value in ODD:
        for signal in ("local", "loss"):
            refused_or_right(name, mixer="attention", cms=[{"period": 2} | {name: value}, {}], cms_signal=signal)


def test_what_the_libraries_pass_is_no_field_of_ours():
    config = HopeConfig(torch_dtype="float32", num_labels=3, output_attentions=False, attn_implementation="eager",
                        return_dict=True, id2label={"0": "a"})  # fmt: skip
    assert config.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_sise": 3}, "'hidden_sise'. Did you mean 'hidden_size'"),
        ({"mixer": "self_modifyin"}, "Did you mean 'self_modifying'"),
        ({"mixer": ["attention"]}, "lists 1 layers"),
        ({"mixer": []}, "lists 0 layers"),
        ({"mixer": "zzz"}, "mixer: unknown mixer type 'zzz'. Known: .*attention.*self_modifying"),
        ({"mixer": {}}, "must name its type"),
        ({"mixer": {"type": "attention", "windw": 3}}, "field of the mixer 'attention' 'windw'. Did you mean 'window'"),
        ({"mixer": ["attention", "tnt", {"type": "tnt", "chunk": 3}]}, r"mixer\[2\]: .*Did you mean 'chunk_size'"),
        ({"mixer": MemoryMixerConfig(AssociativeMemory())}, r"has no name .*catalog\[.mine.\] = memory"),
        ({"hidden_size": 130}, "not divisible"),
        ({"hidden_size": 12, "mixer": "attention"}, "hidden_size=12 .* 'attention': .* odd width 3"),
        ({"mixer": {"type": "self_modifying", "chunk_size": 0}}, "mixer: chunk_size=0"),
        (
            {"mixer": {"type": "self_modifying", "projection_chunk_size": 96}},
            "multiple of chunk_size=64",
        ),
        ({"mixer": {"type": "titans_mac", "segment_length": 0}}, "segment_length=0"),
        ({"mixer": {"type": "titans_mac", "persistent_tokens": -1}}, "persistent_tokens=-1"),
        ({"mixer": {"type": "tnt", "chunk_size": 0}}, "chunk_size=0"),
        ({"mixer": {"type": "tnt", "local_windows": [10], "local_chunk_sizes": [4]}}, "multiple of its chunk"),
        ({"mixer": {"type": "tnt", "local_windows": [8, 8]}}, "one number each"),
        ({"mixer": {"type": "tnt", "local_windows": []}}, "one number each"),
        ({"mixer": {"type": "tnt", "local_chunk_sizes": [0]}}, "at least 1"),
        ({"mixer": {"type": "memory", "memory": "titan"}}, "memory 'titan'. Did you mean 'titans'"),
        ({"mixer": {"type": "memory", "gates": {"lt": "one"}}}, "field of gates 'lt'. Did you mean 'lr'"),
        ({"mixer": "titans_mak"}, "Did you mean 'titans_m"),
        ({"mixer": {"type": "self_modifying", "read": "tokens"}}, "Did you mean 'token'"),
        ({"mixer": {"type": "self_modifying", "retain_to": "one"}}, "'zero' or 'initial'"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"mixer": {"type": "attention", "conv_size": -1}}, "conv_size"),
        ({"reset_token_id": 259}, "reset_token_id=259"),
        ({"mixer": {"type": "self_modifying", "step_size": "proximate"}}, "'proximal'"),
        ({"mixer": {"type": "self_modifying", "step_size": {"in": "normal"}}}, "'normalized'"),
        ({"mixer": {"type": "self_modifying", "objective": "l1"}}, "'l2'"),
        ({"ffn_activation": "relu"}, "'gelu'"),
        ({"mixer": {"type": "self_modifying", "adaptive": ["key"]}}, "adaptive=.*'key'.*'q' or 'k' or"),
        ({"mixer": {"type": "self_modifying", "retention": "no"}}, "retention='no' must be True or False"),
        ({"tie_word_embeddings": "maybe"}, "tie_word_embeddings='maybe' must be True or False"),
        ({"mixer": {"type": "self_modifying", "delta": 3}}, "delta=3 must be True or False"),
        ({"mixer": {"type": "attention", "rope_theta": 0}}, "rope_theta=0 must be a finite number above 0"),
        ({"mixer": {"type": "attention", "rope_theta": float("nan")}}, "rope_theta=nan"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1"),
        ({"mixer": {"type": "self_modifying", "max_step": float("inf")}}, "max_step=inf"),
        ({"pad_token_id": 500}, "pad_token_id=500 is not an id .*259"),
        ({"eos_token_id": [1, 500]}, "eos_token_id=.1, 500. is not an id"),
        ({"reset_token_id": 2.5}, "reset_token_id=2.5 must be an integer of at least 0"),
        ({"mixer": None}, "mixer=None must be the name of a mixer type, a mapping"),
        ({"mixer": {"type": "tnt", "local_windows": 5}}, "local_windows=5 must be a list"),
        ({"hidden_size": 10**30}, "hidden_size=10*.* must be an integer"),
        ({"hidden_size": 10**5000}, "hidden_size=a int of 16610 bits must be an integer"),
        ({"cms": [{"period": "no"}]}, "cms.0.: period='no' must be an integer .* or None"),
        ({"cms": []}, "at least one"),
        ({"cms": [4]}, "cms=.4. must be a list with each item a mapping"),
        ({"cms": [{"perod": 4}]}, "'perod'. Did you mean 'period'"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HopeConfig(**fields)


def test_unknown_preset():
    with pytest.raises(ValueError, match="Did you mean 'hope-tiny'"):
        HopeConfig.from_preset("hope-tini")
    with pytest.raises(ValueError, match="vocab_size"):
        HopeConfig.from_preset("hope-tiny", vocab_sizes=3)


@pytest.mark.parametrize("name", presets())
def test_every_preset_survives_a_file(name, tmp_path):
    config = HopeConfig.from_preset(name)
    config.save_pretrained(tmp_path)
    again = HopeConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.state_signature() == config.state_signature()


def test_presets_are_copies():
    before = HopeConfig.from_preset("hope-tiny").cms
    HopeConfig.from_preset("hope-tiny").cms[0]["expansion"] = 99
    assert HopeConfig.from_preset("hope-tiny").cms == before


def test_a_mixer_is_given_by_name_mapping_or_config():
    forms = ("attention", {"type": "attention"}, AttentionConfig())
    configs = [HopeConfig(mixer=form) for form in forms]
    assert configs[0].to_dict() == configs[1].to_dict() == configs[2].to_dict()
    assert configs[0].mixer == {
        "type": "attention", "window": None, "conv_size": 0, "rope_theta": 10000.0, "persistent_tokens": 0,
    }  # fmt: skip
    assert configs[0].mixers == [AttentionConfig()] * 3
    layers = HopeConfig(mixer=[{"type": "attention", "window": 8}, SelfModifyingConfig(), "attention"])
    assert layers.mixers == [AttentionConfig(window=8), SelfModifyingConfig(), AttentionConfig()]


@pytest.mark.parametrize("kind", sorted(SHIPPED))
def test_every_mixer_survives_a_file(kind, tmp_path):
    changed = {
        "self_modifying": {"adaptive": ["q"], "step_size": {"in": "normalized", "out": "proximal"}},
        "memory": {"gates": {"lr": "learned", "retain": "one"}, "memory": "deltanet"},
        "tnt": {"local_windows": [4, 8], "local_chunk_sizes": [2, 2]},
    }
    config = HopeConfig(mixer={"type": kind} | changed.get(kind, {}))
    config.save_pretrained(tmp_path)
    again = HopeConfig.from_pretrained(tmp_path)
    assert again.mixer == config.mixer and again.mixers == config.mixers
    assert again.state_signature() == config.state_signature()


def test_overrides_and_layers():
    config = HopeConfig.from_preset("hope-tiny", num_hidden_layers=2, mixer=["attention", "self_modifying"])
    assert [mixer.type for mixer in config.mixers] == ["attention", "self_modifying"]
    changed = HopeConfig.from_preset("hope-tiny", mixer={"chunk_size": 32}).mixers[0]
    assert changed == SelfModifyingConfig(architecture="matrix", chunk_size=32, self_values=False)
    other = HopeConfig.from_preset("hope-tiny", mixer={"type": "self_modifying", "chunk_size": 32}).mixers[0]
    assert other == SelfModifyingConfig(chunk_size=32)
    assert "hidden_size" in HopeConfig.field_names()
    assert "id2label" not in HopeConfig.field_names()


def test_layers_of_equal_mixers_have_one_signature():
    one, many = HopeConfig(mixer="attention"), HopeConfig(mixer=["attention"] * 3)
    assert one.state_signature() == many.state_signature()
    assert one.state_signature() != HopeConfig(mixer={"type": "attention", "window": 5}).state_signature()
