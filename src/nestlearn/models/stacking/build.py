"""Put levels on a pretrained model, take them off, and choose what an outer loop trains."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from nestlearn.models.config import HopeConfig
from nestlearn.nn.cms.level import Level

from .classes import StackedModel, stacked_config_class, stacked_model_class
from .families import FoundNetwork, MlpFilter, check_formula, check_not_shared, find_networks, maps_of
from .plan import Mode, StackPlan


def stack_levels(
    model: PreTrainedModel,
    levels: Sequence[Level],
    layers: str | Sequence[int] | None = None,
    mode: Mode = "add",
    split: Sequence[float] | None = None,
    mlp: MlpFilter = None,
) -> Any:
    """Turn MLPs of a pretrained language model into levels that learn while it reads (NL section 7.3), in place.

    The model stays what it was for everything else (generate, Trainer, PEFT, pipelines); until its levels write, its
    logits do not change: to the bit in mode ``add``, within rounding in ``split`` and ``copy``. What is read goes into
    a `LevelState` (see `nestlearn.MemorySession`), never into the model.

    Args:
        model: a model of the transformers library, neither quantized nor with MLP weights tied.
        levels: fastest first, periods in tokens; see `nestlearn.nn.Level`. ``hidden`` and ``rank`` bound the bytes of
            a row. In ``split``, ``hidden`` sets a level's share, and what no level takes stays frozen.
        layers: which layers: None or "all", "last:4", or a list of their numbers.
        mode: ``add``: zero-output networks beside the frozen MLP. ``split``: its hidden units divided over the levels,
            without new parameters. ``copy``: every level starts as the whole MLP, and their outputs are averaged.
        split: fractions of the hidden units, one for each level; even by default.
        mlp: which modules are the MLPs, for models whose maps have other names than those of the Llama, Qwen, Mistral,
            Gemma, GPT-2 and GPT-NeoX families; see `nestlearn.models.stacking.find_networks`.

    Returns:
        The model.

    Raises:
        ValueError: a model, levels or layers that cannot be stacked, with the fix.
        TypeError: not a model of the transformers library.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> model = stack_levels(LlamaForCausalLM(config), [Level(period=32), Level(period=256)], mode="split")
        >>> type(model).__name__, type(unstack_levels(model)).__name__
        ('StackedLlamaForCausalLM', 'LlamaForCausalLM')
    """
    _check_model(model)
    found = _chosen(find_networks(model, mlp), layers)
    _check_forward(model, found)
    check_not_shared(model, found)
    for network in found:
        check_formula(network)
    plan = StackPlan(
        tuple(levels),
        mode,
        tuple(network.path for network in found),
        found[0].names,
        None if split is None else tuple(float(part) for part in split),
    )
    if mode == "split":
        for network in found:
            plan.units(maps_of(network.module, network.names)["up"].weight.shape[0])
    _become_stacked(model, plan)
    return model


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"stack_levels needs a model of the transformers library, got {type(model).__name__}.")
    if isinstance(model.config, HopeConfig):
        raise ValueError(
            f"{type(model).__name__} has levels of its own, which nothing can be stacked on. Set them in its "
            'configuration before training, e.g. HopeConfig(cms=[{"period": 64}, {"period": None}]), with '
            "cms_signal='loss' for levels that the next-token loss teaches."
        )
    if isinstance(model, StackedModel):
        raise ValueError("the model has levels already; take them off with unstack_levels(model) first.")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "the model is quantized, and quantized weights cannot learn. Call model.dequantize() first, or load the "
            "model without quantization_config."
        )


def _check_forward(model: nn.Module, found: list[FoundNetwork]) -> None:
    """Raise ValueError where something has put a forward of its own on an object, which then hides its class's."""
    for path, module in [("", model), *((network.path, network.module) for network in found)]:
        if "forward" in vars(module):
            raise ValueError(
                f"{path or type(model).__name__} has a wrapped forward (device_map, offloading or a patch). Stack the "
                "model as loaded onto one device, save it, and load the stacked model with device_map."
            )


def _become_stacked(model: PreTrainedModel, plan: StackPlan) -> None:
    # Its own configuration: the caller's may serve other models, too. The model's parts share one.
    given, config = model.config, copy.deepcopy(model.config)
    for part in model.modules():
        if getattr(part, "config", None) is given:
            cast(Any, part).config = config
    base = type(config)
    config.__class__ = stacked_config_class(base)
    cast(Any, config).stacking = plan.to_dict()
    model.__class__ = stacked_model_class(type(model), base)
    stacked = cast(StackedModel, model)
    stacked.install_levels(plan)
    for module in stacked.stacked_mlps().values():
        module.start_levels()


def unstack_levels(model: PreTrainedModel) -> Any:
    """Take the levels off again, in place: class, configuration, modules and weights of the pretrained model.

    Parameters that levels had beside the pretrained ones are dropped; the pretrained ones are as they are now.

    Raises:
        ValueError: the model has no levels.

    Example: see `stack_levels`.
    """
    if not isinstance(model, StackedModel):
        raise ValueError(f"{type(model).__name__} has no levels to take off.")
    stacked_name, base, config = type(model).__name__, type(model).unstacked_class, cast(Any, model.config)
    for module in model.stacked_mlps().values():
        module.remove()
        cast(Any, module).__class__ = module.unstacked_class
    del config.stacking, model.stack_plan
    config.__class__ = config.unstacked_class
    cast(Any, model).__class__ = base
    if config.architectures == [stacked_name]:
        config.architectures = [base.__name__]
    return model


def _chosen(found: list[FoundNetwork], layers: str | Sequence[int] | None) -> list[FoundNetwork]:
    count = len(found)
    if layers is None or layers == "all":
        numbers = list(range(count))
    elif isinstance(layers, str):
        word, _, last = layers.partition(":")
        if word != "last" or not last.isdigit() or not 1 <= int(last) <= count:
            raise ValueError(
                f"layers={layers!r} must be 'all', 'last:N' with N from 1 to {count}, or a list of numbers."
            )
        numbers = list(range(count - int(last), count))
    else:
        wrong = [number for number in layers if not -count <= number < count]
        if wrong or not layers:
            raise ValueError(f"layers={list(layers)} must name some of the {count} layers, 0 to {count - 1}.")
        numbers = sorted({number % count for number in layers})
    return [found[number] for number in numbers]


def level_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters that are initial weights of levels, by name: what an outer loop trains to learn better.

    In ``add`` the levels' own, in ``split`` the MLPs' maps, in ``copy`` both.

    Raises:
        ValueError: the model has no levels.
    """
    plan = getattr(model, "stack_plan", None)
    if plan is None:
        raise ValueError(f"{type(model).__name__} has no levels; use stack_levels(model, levels) first.")
    base = model if isinstance(model, StackedModel) else next(m for m in model.modules() if isinstance(m, StackedModel))
    wanted: set[int] = set()
    for module in base.stacked_mlps().values():
        wanted |= {id(parameter) for parameter in module.levels.parameters()}
        if plan.mode != "add":
            wanted |= {id(getattr(module, name).weight) for name in plan.names.maps().values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}


def freeze_backbone(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Switch off gradients of everything but `level_parameters`, which are returned.

    Beside PEFT: call `level_parameters` instead and switch those on after ``get_peft_model``.
    """
    chosen = level_parameters(model)
    ids = {id(parameter) for parameter in chosen.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in ids)
    return chosen
