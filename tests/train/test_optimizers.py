"""Runs with each optimizer of the package: resumed to the bit, refused by name, made as asked."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nestlearn.models import HopeConfig, HopeForCausalLM
from nestlearn.optim import M3
from nestlearn.train import TrainConfig, build_config, optimizers, read_log, train
from nestlearn.train import engine as engine_module
from nestlearn.train.load import describe_settings, model_fields
from nestlearn.train.optimizers import (
    NamedOptimizer,
    build_optimizer,
    find_optimizer,
    optimizer_names,
    optimizer_options,
    register_optimizer,
)

NAMED = ["m3", "muon", "dgd", "dgd-inverse", "delta-momentum", "deep-momentum"]


@pytest.mark.parametrize("preset", ["transformer-tiny", "hope-tiny"])
@pytest.mark.parametrize("name", NAMED)
def test_a_run_resumes_to_the_bit(
    tiny: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, preset: str
):
    """Four steps and then four more are eight; M3 stops in the middle of a slow period."""
    build, made = engine_module.build_trainer, []
    monkeypatch.setattr(engine_module, "build_trainer", lambda *given: made.append(build(*given)) or made[-1])
    common = {"preset": preset, "optimizer": name, "schedule": "constant", "save_interval": 4,
              "optimizer_options": {"slow_period": 3} if name == "m3" else {}}  # fmt: skip
    train(tiny(**common, steps=8, out=str(tmp_path / "whole")))
    train(tiny(**common, steps=4, out=str(tmp_path / "parts")))
    torch.manual_seed(12345)
    train(tiny(**common, steps=8, out=str(tmp_path / "parts")), resume=True)
    left, right = (load_file(tmp_path / place / "model.safetensors") for place in ("whole", "parts"))
    assert all(torch.equal(left[key], right[key]) for key in left)
    for trainer in made:
        optimizer = trainer.optimizer.optimizer
        assert type(optimizer) is find_optimizer(name).make
        trained = {p for p in trainer.model.parameters() if p.requires_grad}
        assert {p for group in optimizer.param_groups for p in group["params"]} == trained
    losses = [line["loss"] for line in read_log(tmp_path / "whole") if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_adamw_is_the_engines_own(tiny: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch):
    build, made = engine_module.build_trainer, []
    monkeypatch.setattr(engine_module, "build_trainer", lambda *given: made.append(build(*given)) or made[-1])
    train(tiny(steps=2))
    assert type(made[0].optimizer.optimizer) is torch.optim.AdamW


def tiny_model() -> HopeForCausalLM:
    return HopeForCausalLM(HopeConfig.from_preset("transformer-tiny", hidden_size=20, num_hidden_layers=1))


def make(name: str, model: nn.Module, **options: object) -> torch.optim.Optimizer:
    return build_optimizer(
        name, model, lr=0.02, adamw_lr=0.003, weight_decay=0.1, betas=(0.8, 0.9), options=options
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_settings_of_the_run_reach_the_groups(name: str):
    optimizer = make(name, tiny_model())
    for group in optimizer.param_groups:
        assert group["lr"] == (0.02 if group["rule"] == "matrix" else 0.003)
        assert group["weight_decay"] == (0.0 if group["params"][0].ndim < 2 else 0.1)
        assert group["adamw_betas"] == (0.8, 0.9)
    assert make(name, tiny_model(), adamw_lr=0.5).param_groups[-1]["lr"] == 0.5


def test_what_dgd_leaves_to_adamw_has_adamws_rate():
    groups = make("dgd", nn.Sequential(nn.Conv1d(2, 3, 3), nn.Linear(4, 3))).param_groups
    assert [(group["rule"], group["lr"], group["params"][0].ndim) for group in groups] == [
        ("matrix", 0.02, 2),
        ("adamw", 0.003, 3),
        ("adamw", 0.003, 1),
    ]


def test_dgd_of_a_training_run_does_not_erase_unless_it_is_told_to():
    assert make("dgd", tiny_model()).defaults["erase"] == optimizer_options("dgd")["erase"] == 0.0
    assert make("dgd", tiny_model(), erase=1.0).defaults["erase"] == 1.0


def test_options_reach_the_rule_and_lists_are_tuples():
    optimizer = make("m3", tiny_model(), betas=[0.5, 0.6, 0.7], slow_period=4, adjust_lr=None)
    assert isinstance(optimizer, M3)
    assert (optimizer.defaults["betas"], optimizer.defaults["slow_period"]) == ((0.5, 0.6, 0.7), 4)
    assert optimizer.defaults["adjust_lr"] is None


def test_muon_is_m3_without_slow_memory_and_second_moment():
    optimizer = make("muon", tiny_model())
    assert (optimizer.defaults["alpha"], optimizer.defaults["second_moment"]) == (0.0, False)
    assert "slow_period" not in optimizer_options("muon")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "m4"}, "Unknown optimizer 'm4'. Choose one of: adamw, m3, muon"),
        ({"optimizer": "m3", "optimizer.period": "3"}, "m3 has no option 'period'. Its options: .*slow_period"),
        ({"optimizer": "muon", "optimizer.alpha": "1"}, "muon has no option 'alpha'"),
        ({"optimizer.eps": "1"}, "adamw has no option 'eps'.*--beta1"),
        ({"optimizer": "m3", "optimizer.lr": "1"}, "m3 has no option 'lr'"),
    ],
)
def test_unknown_names_are_refused_with_the_choices(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build_config(values, model_fields())


def test_a_value_out_of_range_ends_the_run_by_name(tiny: Callable[..., TrainConfig]):
    with pytest.raises(ValueError, match="slow_period is 0"):
        train(tiny(optimizer="m3", optimizer_options={"slow_period": 0}))


def test_the_optimizer_cannot_change_on_resume(tiny: Callable[..., TrainConfig]):
    train(tiny(optimizer="m3", schedule="constant", steps=2))
    for changes in ({"optimizer": "muon"}, {"optimizer": "m3", "optimizer_options": {"slow_period": 3}}):
        with pytest.raises(ValueError, match="cannot change"):
            train(tiny(**changes, schedule="constant", steps=4), resume=True)


def test_the_command_lines_values_are_typed_and_shown():
    values = {"optimizer": "m3", "optimizer.slow-period": "20", "optimizer.betas": "[0.9, 0.9, 0.8]"}
    config = build_config({**values, "optimizer.ns_coefficients": "polar_express"}, model_fields())
    options = {"slow_period": 20, "betas": [0.9, 0.9, 0.8], "ns_coefficients": "polar_express"}
    assert config.optimizer_options == options
    shown = describe_settings(config, HopeConfig.from_preset("hope-tiny"))["optimizer"]
    assert options.items() <= shown.items() and shown["alpha"] == optimizer_options("m3")["alpha"]


@pytest.mark.parametrize("name", NAMED)
def test_the_rate_is_that_of_adamw_or_the_optimizers_own(name: str):
    preset = TrainConfig(preset="hope-tiny").peak_learning_rate()
    config = TrainConfig(preset="hope-tiny", optimizer=name)
    own = make(name, tiny_model()).defaults
    assert (config.peak_learning_rate() == preset) is (not find_optimizer(name).own_rate), own
    assert TrainConfig(optimizer=name, learning_rate=0.5).peak_learning_rate() == 0.5


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that a test registers are forgotten after it."""
    monkeypatch.setattr(optimizers, "_REGISTERED", dict(optimizers._REGISTERED))


def test_every_name_of_the_package_is_known():
    assert set(NAMED) <= set(optimizer_names())


@pytest.mark.usefixtures("registry")
def test_an_optimizer_from_outside_trains_and_resumes_to_the_bit(tiny: Callable[..., TrainConfig], tmp_path: Path):
    register_optimizer("adamax", torch.optim.Adamax)
    common = {"optimizer": "adamax", "schedule": "constant", "optimizer_options": {"betas": [0.5, 0.9]}}
    train(tiny(**common, steps=6, out=str(tmp_path / "whole")))
    train(tiny(**common, steps=3, out=str(tmp_path / "parts")))
    train(tiny(**common, steps=6, out=str(tmp_path / "parts")), resume=True)
    left, right = (load_file(tmp_path / place / "model.safetensors") for place in ("whole", "parts"))
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.usefixtures("registry")
def test_an_optimizer_from_outside_gets_what_it_has_arguments_for():
    register_optimizer("sgd", NamedOptimizer(torch.optim.SGD, fixed={"momentum": 0.9}, defaults={"nesterov": True}))
    assert "adamw_lr" not in optimizer_options("sgd") and "momentum" not in optimizer_options("sgd")
    optimizer = make("sgd", tiny_model(), dampening=0.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.02}  # nothing is left to AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert all(group["momentum"] == 0.9 and group["nesterov"] for group in optimizer.param_groups)
    assert TrainConfig(optimizer="sgd").peak_learning_rate() == 1e-3
    given = []

    def with_model(params: object, model: nn.Module, lr: float = 0.5, weight_decay: float = 0.0) -> object:
        given.append(model)
        return torch.optim.SGD(params, lr=lr, weight_decay=weight_decay)  # pyright: ignore[reportArgumentType]

    register_optimizer("with-model", with_model)
    model = tiny_model()
    make("with-model", model)
    assert given == [model] and TrainConfig(optimizer="with-model").peak_learning_rate() == 0.5


@pytest.mark.usefixtures("registry")
def test_an_optimizer_that_a_run_cannot_make_is_refused_when_it_is_registered():
    with pytest.raises(ValueError, match="'bare' takes no weight_decay"):
        register_optimizer("bare", lambda params, lr=1.0: torch.optim.SGD(params, lr=lr))
    with pytest.raises(ValueError, match="'no-rate' has no default for lr"):
        register_optimizer("no-rate", lambda params, lr, weight_decay=0.0: torch.optim.SGD(params, lr=lr))
    with pytest.raises(ValueError, match="engine's own"):
        register_optimizer("adamw", torch.optim.AdamW)
    assert not {"bare", "no-rate"} & set(optimizer_names())
    with pytest.raises(ValueError, match="Unknown optimizer 'later'.*register_optimizer"):
        TrainConfig(optimizer="later")
