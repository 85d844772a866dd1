"""HopeConfig: presets by name, close matches, refusals, JSON."""

from dataclasses import fields

import pytest
import torch

from nestlearn import HopeConfig, HopeForCausalLM, Level, presets

ODD = [None, "no", "", True, 0, -1, 2.5, 2, float("nan"), float("inf"), 10**30, 10**5000, [], {}, [None], ["no"], [2.5],
       {"no": 1}, object(), b"x"]  # fmt: skip
SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "memory_chunk_size": 2,
         "projection_chunk_size": 4, "segment_length": 4}  # fmt: skip


def refused_or_right(name, **settings):
    """A ValueError that names the field, or a model that computes numbers: never another error, never NaN."""
    try:
        model = HopeForCausalLM(HopeConfig(**(SMALL | settings)))
    except ValueError as error:
        assert name in str(error), error
        return
    with torch.no_grad():
        assert model(torch.arange(6)[None] % model.config.vocab_size).logits.isfinite().all()


@pytest.mark.parametrize("mixer", ["self_modifying_titans", "titans_mac", "tnt"])
@pytest.mark.parametrize("name", HopeConfig.field_names())
def test_any_value_of_any_field_is_refused_by_its_name_or_works(name, mixer):
    for value in ODD:
        refused_or_right(name, **({"mixer": mixer} | {name: value}))


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
        ({"mixer": "self_modifying_titan"}, "Did you mean 'self_modifying_titans'"),
        ({"mixer": ["attention"]}, "lists 1 layers"),
        ({"mixer": "zzz"}, "Known: .*attention"),
        ({"hidden_size": 130}, "not divisible"),
        ({"memory_chunk_size": 0}, "memory_chunk_size=0"),
        ({"segment_length": 0}, "segment_length=0"),
        ({"persistent_tokens": -1}, "persistent_tokens=-1"),
        ({"global_chunk_size": 0}, "global_chunk_size=0"),
        ({"local_windows": [10], "local_chunk_sizes": [4]}, "multiple of its chunk"),
        ({"local_windows": [8, 8]}, "one number each"),
        ({"local_windows": []}, "one number each"),
        ({"local_chunk_sizes": [0]}, "at least 1"),
        ({"memory": "titan"}, "memory 'titan'. Did you mean 'titans'"),
        ({"mixer": "titans_mak"}, "Did you mean 'titans_m"),
        ({"memory_read": "tokens"}, "Did you mean 'token'"),
        ({"memory_retain_to": "one"}, "'zero' or 'initial'"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"conv_size": -1}, "conv_size"),
        ({"reset_token_id": 259}, "reset_token_id=259"),
        ({"step_size": "proximate"}, "'proximal'"),
        ({"step_size": {"in": "normal"}}, "'normalized'"),
        ({"memory_objective": "l1"}, "'l2'"),
        ({"ffn_activation": "relu"}, "'gelu'"),
        ({"adaptive": ["key"]}, "adaptive=.*'key'.*'q' or 'k' or"),
        ({"memory_retention": "no"}, "memory_retention='no' must be True or False"),
        ({"tie_word_embeddings": "maybe"}, "tie_word_embeddings='maybe' must be True or False"),
        ({"memory_delta": 3}, "memory_delta=3 must be True or False"),
        ({"rope_theta": 0}, "rope_theta=0 must be a finite number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1"),
        ({"max_step": float("inf")}, "max_step=inf"),
        ({"pad_token_id": 500}, "pad_token_id=500 is not an id .*259"),
        ({"eos_token_id": [1, 500]}, "eos_token_id=.1, 500. is not an id"),
        ({"reset_token_id": 2.5}, "reset_token_id=2.5 must be an integer of at least 0"),
        ({"mixer": None}, "mixer=None must be a string or a list"),
        ({"local_windows": 5}, "local_windows=5 must be a list"),
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


def test_overrides_and_layers():
    config = HopeConfig.from_preset("hope-tiny", num_hidden_layers=2, mixer=["attention", "self_modifying_titans"])
    assert config.mixers == ["attention", "self_modifying_titans"]
    assert "hidden_size" in HopeConfig.field_names()
    assert "id2label" not in HopeConfig.field_names()
