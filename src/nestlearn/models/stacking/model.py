"""Stacked models: put levels on a pretrained model, take them off, save, load and register it."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from nestlearn.models.config import HopeConfig
from nestlearn.models.files import refuse_non_finite_weights, refuse_pickled_weights
from nestlearn.models.remote import NotCopied, auto_map, write_loader
from nestlearn.nn.cms.level import Level

from .families import FAMILIES, MapNames, MlpFilter, check_formula, find_networks, is_quantized, map_shape
from .network import LevelState, StackedMLP, reading, stacked_mlp_class
from .plan import Mode, StackPlan
from .taps import hook_edited_maps, unhook_modules

PREFIX = "stacked_"


class StackedModel(NotCopied, PreTrainedModel):
    """What `stack_levels` adds to the class of a pretrained model."""

    unstacked_class: ClassVar[type[PreTrainedModel]]
    stack_plan: StackPlan

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        stacking = getattr(config, "stacking", None)
        known = {**stacking} if isinstance(stacking, dict) else stacking
        directions = known.pop("general", None) if isinstance(known, dict) else None
        self.install_levels(StackPlan.from_dict(known))
        if directions is not None:
            for module in self.stacked_mlps().values():
                module.reserve_general(directions)
        self.post_init()

    def install_levels(self, plan: StackPlan) -> None:
        """Turn the planned MLPs into stacked ones, their own parameters uninitialized."""
        self.stack_plan = plan
        for path in plan.paths:
            module = self.get_submodule(path)
            if "levels" in dict(module.named_children()):
                raise ValueError(f"{path} has a submodule `levels` already, a name that stacking needs.")
            module.__class__ = stacked_mlp_class(type(module))
            cast(StackedMLP, module).install(plan, path)

    def stacked_mlps(self) -> dict[str, StackedMLP]:
        """The stacked MLPs by path, in order."""
        return {path: cast(StackedMLP, self.get_submodule(path)) for path in self.stack_plan.paths}

    def _init_weights(self, module: nn.Module) -> None:
        """Levels start from their MLP, whose maps are initialized before it."""
        super()._init_weights(module)
        if isinstance(module, StackedMLP):
            module.start_levels()


class StackedConfig(NotCopied, PretrainedConfig):
    """What stacking adds to the class of a pretrained configuration."""

    unstacked_class: ClassVar[type[PretrainedConfig]]

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the configuration, and the file by which a process that has not imported this package loads it."""
        names = {"AutoConfig": type(self).__name__, "AutoModelForCausalLM": "StackedForCausalLM"}
        vars(self)["auto_map"] = auto_map(names)
        if not Path(save_directory).is_file():  # the library's own error says what is wrong there
            family = self.unstacked_class.model_type
            made = f"{', '.join(names.values())} = stacked_classes({family!r})"
            write_loader(save_directory, f"from nestlearn.models.stacking import stacked_classes\n\n{made}\n")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _forward_of(base: type[PreTrainedModel]) -> Callable[..., Any]:
    """The base's forward, with the argument ``level_state``; callers that look at the signature see the base's."""

    @functools.wraps(base.forward)
    def forward(self: StackedModel, *args: Any, level_state: LevelState | None = None, **kwargs: Any) -> Any:
        if level_state is None:
            hook_edited_maps(self, self.stack_plan)
            return base.forward(self, *args, **kwargs)
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError(
                "gradient checkpointing runs layers again after this call, when the level state is no longer there. "
                "Switch it off (model.gradient_checkpointing_disable()) to train with level_state."
            )
        with reading(self.stack_plan, level_state):
            hook_edited_maps(self, self.stack_plan)
            return base.forward(self, *args, **kwargs)

    signature = inspect.signature(base.forward)
    parameters = list(signature.parameters.values())
    at = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters.insert(at, inspect.Parameter("level_state", inspect.Parameter.KEYWORD_ONLY, default=None))
    cast(Any, forward).__signature__ = signature.replace(parameters=parameters)
    return forward


@functools.cache
def stacked_config_class(base: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """The configuration class of stacked models over ``base``: the same fields, and ``stacking``."""
    body = {
        "model_type": PREFIX + base.model_type,
        "stacking": None,
        "unstacked_class": base,
        "__annotations__": {"stacking": "dict[str, Any] | None", "unstacked_class": "ClassVar[type]"},
        "__module__": __name__,
    }
    return cast(type[PretrainedConfig], type(f"Stacked{base.__name__}", (StackedConfig, base), body))


@functools.cache
def stacked_model_class(base: type[PreTrainedModel], config: type[PretrainedConfig]) -> type[StackedModel]:
    """The class of stacked models over ``base``, whose (unstacked) configurations are of class ``config``."""
    body = {
        "unstacked_class": base,
        "config_class": stacked_config_class(config),
        "forward": _forward_of(base),
        "__module__": __name__,
    }
    return cast(type[StackedModel], type(f"Stacked{base.__name__}", (StackedModel, base), body))


def _causal_class(config: type[PretrainedConfig]) -> type[StackedModel]:
    """The stacked class that `AutoModelForCausalLM` gives for a stacked configuration class."""
    base = cast(Any, config).unstacked_class
    try:
        found = cast(Any, AutoModelForCausalLM)._model_mapping[base]
    except KeyError as error:
        raise ValueError(f"transformers has no causal language model for {base.__name__}.") from error
    found = found[0] if isinstance(found, (list, tuple)) else found
    return stacked_model_class(found, base)


class _Later:
    """Stands for a stacked class in the registry of auto classes until the class is needed.

    Making the class imports the code of the pretrained model, too slow for `import nestlearn` with nine families.
    """

    config_class: ClassVar[type[PretrainedConfig]]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return _causal_class(cls.config_class).from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
        return cast(Any, _causal_class(cls.config_class))._from_config(*args, **kwargs)


def register(base: type[PretrainedConfig]) -> None:
    """Register stacked models over configurations of class ``base`` with `AutoConfig` and `AutoModelForCausalLM`."""
    config = stacked_config_class(base)
    name = "Stacked" + base.__name__.removesuffix("Config").removesuffix("Text") + "ForCausalLM"
    later = type(name, (_Later,), {"config_class": config, "__module__": __name__})
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, cast(Any, later), exist_ok=True)


def register_family(names: MapNames, config: type[PretrainedConfig] | None = None) -> None:
    """Register a family of models, so that `stack_levels` finds its MLPs.

    Args:
        names: of the maps in the MLPs of its layers.
        config: its configuration class. With it, `AutoModelForCausalLM` loads stacked models of the family. Without
            it, `load_stacked` does.

    Example:
        >>> register_family(MapNames(up="first_map", down="second_map", act="relu"))
    """
    FAMILIES.setdefault(names, {})
    if config is not None:
        register(config)


def register_families() -> None:
    """Register the known families. It imports their configurations only."""
    for members in FAMILIES.values():
        for family, name in members.items():
            module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
            register(getattr(module, name))


def stacked_classes(family: str) -> tuple[type[PretrainedConfig], type[StackedModel]]:
    """The classes of stacked models over a family of transformers, registered: the configuration and the model.

    Saved folders hold a file that calls it, for ``AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)``.

    Example:
        >>> [kind.__name__ for kind in stacked_classes("llama")]
        ['StackedLlamaConfig', 'StackedLlamaForCausalLM']
    """
    base = type(AutoConfig.for_model(family))
    register(base)
    config = stacked_config_class(base)
    return config, _causal_class(config)


def load_stacked(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A stacked causal language model of any class from a folder.

    Args:
        path: a folder written by ``save_pretrained`` of a stacked model.
        kwargs: as of ``from_pretrained``.

    Raises:
        ValueError: the folder does not hold a stacked model, or its weights are a pickle or are not finite.
    """
    file = Path(path) / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type", "")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); give the folder of a saved stacked model.") from error
    if not kind.startswith(PREFIX):
        raise ValueError(f"{path} holds a model of type {kind!r}, not a stacked one; use AutoModelForCausalLM.")
    stacked_classes(kind.removeprefix(PREFIX))
    refuse_pickled_weights(path)
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(path, **{**kwargs, "use_safetensors": True}))
    refuse_non_finite_weights(model, path)
    return model


def stack_levels(
    model: PreTrainedModel,
    levels: Sequence[Level],
    layers: str | Sequence[int] | None = None,
    mode: Mode = "split",
    split: Sequence[float] | None = None,
    mlp: MlpFilter = None,
) -> Any:
    """Turn MLPs of a pretrained language model into levels that learn while it reads (NL section 7.3), in place.

    Everything else works as before (generate, Trainer, PEFT, pipelines). Until the levels write, the logits do not
    change: to the bit in modes ``add`` and ``split``, within rounding in ``copy``. What is learned goes into a
    `LevelState` (see `nestlearn.MemorySession`), never into the model.

    Args:
        model: a model of the transformers library. Its MLPs may hold adapters (LoRA), or quantized maps that pass
            gradients to their input.
        levels: fastest first, periods in tokens; see `nestlearn.nn.Level`. ``hidden`` and ``rank`` bound the bytes of
            a row. In ``split``, ``hidden`` sets a level's share; hidden units of no level stay frozen.
        layers: None or "all", "last:4", or a list of the numbers of layers.
        mode: ``split``: the hidden units of the MLP are divided over the levels, without new parameters. ``add``:
            networks with output zero alongside the MLP. ``copy``: every level starts as the whole MLP, and the outputs
            of all levels are averaged.
        split: fractions of the hidden units, one for each level; even by default.
        mlp: the modules that are MLPs, for models whose maps have other names than those of the Llama, Qwen, Mistral,
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
    found = find_networks(model, mlp)
    chosen = _chosen(list(found), layers)
    _check_forward(model, chosen)
    widths = {}
    for path in chosen:
        module = model.get_submodule(path)
        widths[path] = map_shape(getattr(module, found[path].up), path)
        check_formula(module, path, found[path], widths[path][1])
    fractions = None if split is None else tuple(float(part) for part in split)
    plan = StackPlan(tuple(levels), mode, tuple(chosen), found[chosen[0]], fractions)
    if mode == "split":
        for hidden, _ in widths.values():
            plan.units(hidden)
    _become_stacked(model, plan)
    return model


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"stack_levels needs a model of the transformers library, got {type(model).__name__}.")
    if isinstance(model.config, HopeConfig):
        raise ValueError(
            f"{type(model).__name__} has levels of its own, and no others can be stacked on it. Set them in its "
            'configuration before training, e.g. HopeConfig(cms=[{"period": 64}, {"period": None}]), with '
            "cms_signal='loss' for levels that learn from the next-token loss."
        )
    if isinstance(model, StackedModel):
        raise ValueError("the model has levels already; take them off with unstack_levels(model) first.")
    quantizer = getattr(model, "hf_quantizer", None)
    if getattr(model, "is_quantized", False) and not getattr(quantizer, "is_trainable", False):
        raise ValueError(
            "the model is quantized by a method that passes no gradients (bitsandbytes does), so its levels cannot "
            "learn. Call model.dequantize() first, or load the model without quantization_config."
        )


def _check_forward(model: nn.Module, paths: list[str]) -> None:
    """Raise ValueError where an object has a forward of its own, which hides the forward of its class."""
    for path in ["", *paths]:
        if "forward" in vars(model.get_submodule(path)):
            raise ValueError(
                f"{path or type(model).__name__} has a wrapped forward (device_map, offloading or a patch). Stack the "
                "model as loaded onto one device, save it with save_pretrained, and load the stacked model with "
                "nestlearn.models.load_stacked(folder, device_map=...)."
            )


def _become_stacked(model: PreTrainedModel, plan: StackPlan) -> None:
    # A configuration of its own, because other models may use the given one. The parts of the model share it.
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
    """Take the levels off again, in place: class, configuration and modules are those of the pretrained model.

    The levels' own parameters are dropped. The pretrained parameters keep their present values.

    Raises:
        ValueError: the model has no levels.

    Example: see `stack_levels`.
    """
    if not isinstance(model, StackedModel):
        raise ValueError(f"{type(model).__name__} has no levels to take off.")
    stacked_name, base, config = type(model).__name__, type(model).unstacked_class, cast(Any, model.config)
    unhook_modules(model)
    for module in model.stacked_mlps().values():
        module.remove()
        cast(Any, module).__class__ = module.unstacked_class
    del config.stacking, model.stack_plan
    vars(config).pop("auto_map", None)
    config.__class__ = config.unstacked_class
    cast(Any, model).__class__ = base
    if config.architectures == [stacked_name]:
        config.architectures = [base.__name__]
    return model


def _chosen(found: list[str], layers: str | Sequence[int] | None) -> list[str]:
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


def stacked_model(model: Any) -> StackedModel:
    """The stacked model itself, also inside of an adapter.

    Raises:
        ValueError: the model has no levels.
    """
    found = [model] if isinstance(model, StackedModel) else []
    found += [module for module in getattr(model, "modules", list)() if isinstance(module, StackedModel)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no levels; use stack_levels(model, levels) first.")
    return found[0]


def level_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters that determine the initial weights of levels, by name. An outer loop trains them.

    In mode ``add`` these are the levels' own, in ``split`` the matrices of the MLPs (and of adapters on them), in
    ``copy`` both.

    Raises:
        ValueError: the model has no levels, or maps that they start from are quantized.
    """
    stacked, wanted = stacked_model(model), set[int]()
    for path, module in stacked.stacked_mlps().items():
        wanted |= {id(p) for p in module.levels.parameters() if p.dim() > 1}
        for name in stacked.stack_plan.names.maps().values() if stacked.stack_plan.mode != "add" else ():
            own = [p for p in getattr(module, name).parameters() if p.dim() > 1 and not is_quantized(p)]
            if not own:
                raise ValueError(
                    f"{path}.{name} is quantized, and no step can change its codes. The mode is "
                    f"{stacked.stack_plan.mode!r}, in which levels start from the weights of the MLP itself. Use "
                    "mode='add', whose levels have weights of their own, train an adapter (nestlearn.peft), or load "
                    "the model unquantized. Sessions need none of this: what a level learns while it reads goes into "
                    "the session."
                )
            wanted |= {id(p) for p in own}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}


def freeze_backbone(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Switch off gradients of all parameters except `level_parameters`, which are returned.

    With PEFT, call `level_parameters` instead, and switch those on after ``get_peft_model``.
    """
    chosen = level_parameters(model)
    ids = {id(parameter) for parameter in chosen.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in ids)
    return chosen
