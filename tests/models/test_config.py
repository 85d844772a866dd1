"""HopeConfig: presets by name, close matches, refusals, JSON."""

import pytest

from nestlearn import HopeConfig, presets


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
        ({"local_chunk_sizes": [0]}, "one number each"),
        ({"memory": "titan"}, "memory 'titan'. Did you mean 'titans'"),
        ({"mixer": "titans_mak"}, "Did you mean 'titans_m"),
        ({"memory_read": "tokens"}, "Did you mean 'token'"),
        ({"memory_retain_to": "one"}, "Known: initial, zero"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"conv_size": -1}, "conv_size"),
        ({"reset_token_id": 259}, "reset_token_id=259"),
        ({"step_size": "proximate"}, "'proximal'"),
        ({"step_size": {"in": "normal"}}, "'normalized'"),
        ({"memory_objective": "l1"}, "'l2'"),
        ({"ffn_activation": "relu"}, "'gelu'"),
        ({"adaptive": ["key"]}, "adaptive stream 'key'"),
        ({"cms": []}, "at least one"),
        ({"cms": [4]}, "mapping"),
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
