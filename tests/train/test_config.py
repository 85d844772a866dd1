"""From loosely typed values to one checked TrainConfig."""

import json
from pathlib import Path

import pytest

from nestlearn.train import TrainConfig, build_config, read_config_file
from nestlearn.train.config import (
    PRESET_LEARNING_RATES,
    check_processes,
    check_resume,
    check_tokenizer_spec,
    parse_scalar,
)
from nestlearn.train.load import describe_settings, model_fields, prepare_model_config, prepare_tokenizer


def test_values_are_typed_and_routed():
    config = build_config(
        {
            "steps": "20",
            "learning-rate": "1e-3",
            "warmup": "None",
            "gradient-checkpointing": "true",
            "hidden_size": "64",
            "model.ffn_activation": "gelu",
            "mixer": "self_modifying",
            "mixer.conv-size": "0",
            "mixer.adaptive": '["k", "v"]',
            "trainer.report_to": "tensorboard",
        },
        model_fields(),
    )
    assert (config.steps, config.learning_rate, config.warmup, config.gradient_checkpointing) == (20, 1e-3, None, True)
    mixer = {"type": "self_modifying", "conv_size": 0, "adaptive": ["k", "v"]}
    assert config.model == {"hidden_size": 64, "ffn_activation": "gelu", "mixer": mixer}
    assert config.trainer == {"report_to": "tensorboard"}


def test_options_of_the_mixer_change_the_presets_own():
    config = build_config({"preset": "hope-tiny", "mixer.chunk_size": "32"}, model_fields())
    (mixer,) = {str(mixer) for mixer in prepare_model_config(config, prepare_tokenizer(config)).mixers}
    assert "chunk_size=32" in mixer and "architecture='matrix'" in mixer
    with pytest.raises(ValueError, match="write it into the list"):
        build_config({"mixer": '["attention"]', "mixer.window": "4"}, model_fields())


def test_later_values_win():
    base = build_config({"steps": 5, "model": {"hidden_size": 32}}, model_fields())
    config = build_config({"steps": 6, "num_hidden_layers": 2}, model_fields(), base)
    assert (config.steps, config.model) == (6, {"hidden_size": 32, "num_hidden_layers": 2})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": "1"}, "unknown field 'stepz'. Did you mean 'steps'"),
        ({"hiden_size": "1"}, "Did you mean 'hidden_size'"),
        ({"model": {"hiden_size": 1}}, "unknown model field 'hiden_size'. Did you mean 'hidden_size'"),
        ({"steps": "many"}, "steps='many' must be an integer of at least 1"),
        ({"steps": "1.5"}, r"steps=1\.5 must be an integer"),
        ({"steps": "0"}, "steps=0 must be an integer of at least 1"),
        ({"sequence_length": "0"}, "sequence_length=0 must be an integer of at least 2"),
        ({"learning_rate": "nan"}, "learning_rate='nan' must be"),
        ({"learning_rate": "-1"}, "learning_rate=-1.0 must be a finite number of at least 0 or None"),
        ({"schedule": "cosin"}, "schedule='cosin' must be .*Did you mean 'cosine'"),
        ({"dtype": "float16"}, "dtype='float16' must be 'float32' or 'bfloat16' or 'float64'"),
        ({"tokenizer": "bpe"}, "Unknown tokenizer 'bpe'"),
        ({"tokenizer": "bpe:100"}, "N > 259"),
    ],
)
def test_bad_values_are_refused_with_the_fix(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build_config(values, model_fields())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": True}, "steps=True must be an integer"),
        ({"steps": 1.5}, r"steps=1\.5 must be an integer"),
        ({"batch_size": "8"}, "batch_size='8' must be an integer"),
        ({"gradient_checkpointing": "no"}, "gradient_checkpointing='no' must be True or False"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm=inf must be a finite number"),
        ({"weight_decay": None}, "weight_decay=None must be a finite number"),
        ({"preset": None}, "preset=None must be a string"),
        ({"corpus": Path("docs")}, "corpus=.* must be a string"),
        ({"model": [1]}, r"model=\[1\] must be a mapping"),
        ({"trainer": {1: 2}}, "trainer=.* must be a mapping from a string"),
        ({"optimizer": 3}, "optimizer=3 must be a string"),
    ],
)
def test_fields_are_checked_by_their_declarations(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("preset", "model", "message"),
    [
        ("hope-tyny", {}, "(?i)unknown preset 'hope-tyny'.*hope-tiny"),
        ("hope-tiny", {"mixer": "selfmodifying"}, "(?i)unknown mixer"),
        ("hope-tiny", {"hidden_size": 31}, "not divisible"),
        ("hope-tiny", {"mixer": {"chunk_size": 0}}, "chunk_size=0"),
        ("hope-tiny", {"mixer": {"chunk_sise": 4}}, "Did you mean 'chunk_size'"),
    ],
)
def test_bad_models_are_refused(preset: str, model: dict, message: str):
    config = TrainConfig(preset=preset, model=model)
    with pytest.raises(ValueError, match=message):
        prepare_model_config(config, prepare_tokenizer(config))


def test_files_in_yaml_and_json(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("steps: 7\nlearning_rate: 1e-3\nhidden_size: 32\nmodel: {mixer: {conv_size: 0}}\n")
    (tmp_path / "a.json").write_text(json.dumps({"steps": 7, "learning_rate": 1e-3, "hidden_size": 32,
                                                 "model": {"mixer": {"conv_size": 0}}}))  # fmt: skip
    configs = [build_config(read_config_file(tmp_path / name), model_fields()) for name in ("a.yaml", "a.json")]
    assert configs[0] == configs[1]
    assert (configs[0].learning_rate, configs[0].model) == (1e-3, {"hidden_size": 32, "mixer": {"conv_size": 0}})
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "bad.json").write_text("{")
    for name, message in (("list.yaml", "expected a mapping"), ("bad.json", "neither valid"), ("none", "Cannot read")):
        with pytest.raises(ValueError, match=message):
            read_config_file(tmp_path / name)


def test_scalars():
    texts = ("1", "1.5", "true", "True", "none", "[1]", "word", "text:a")
    assert [parse_scalar(text) for text in texts] == [1, 1.5, True, True, None, [1], "word", "text:a"]


def test_tokenizer_specs():
    assert check_tokenizer_spec("byte") is None
    assert check_tokenizer_spec("bpe:512") == 512


def test_the_resolved_settings_are_complete_and_json():
    config = TrainConfig(preset="hope-tiny")
    content = describe_settings(config, prepare_model_config(config, prepare_tokenizer(config)))
    assert json.loads(json.dumps(content)) == content
    assert content["train"]["learning_rate"] == PRESET_LEARNING_RATES["hope-tiny"]
    assert content["train"]["warmup"] == 50
    assert content["model"]["vocab_size"] == 259
    assert set(content["model"]) == set(model_fields())


def test_resuming_keeps_what_determines_a_run():
    saved = TrainConfig()
    check_resume(saved, TrainConfig(steps=5, out="elsewhere", save_interval=9))
    with pytest.raises(ValueError, match="seed cannot change: saved 0, received 1"):
        check_resume(saved, TrainConfig(seed=1))


@pytest.mark.parametrize("name", ["1-gpu", "8-gpus", "64-gpus"])
def test_the_settings_for_gpus_can_be_used(name: str) -> None:
    folder = Path(__file__).parents[2] / "deploy" / "train"
    config = build_config(read_config_file(folder / f"{name}.yaml"), model_fields())
    processes = int(name.split("-")[0])
    check_processes(config, processes)
    assert {"1-gpu": "ddp", "8-gpus": "fsdp", "64-gpus": "hsdp"}[name] == config.strategy
    # About half a million tokens per update, and texts that the cache and levels of the preset fit.
    assert 4e5 < config.tokens_per_step * processes < 3e6
