"""Classes of stacked models: the pretrained class and configuration with levels, made when they are needed."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from nestlearn.models.files import refuse_non_finite_weights, refuse_pickled_weights

from .families import MapNames, add_names
from .network import StackedMLP, stacked_mlp_class
from .plan import StackPlan
from .state import LevelState, reading

PREFIX = "stacked_"

# Families that `AutoModelForCausalLM` knows right after `import nestlearn`: module of transformers, configuration.
_REGISTERED = {
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "mistral": "MistralConfig",
    "gemma": "GemmaConfig",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "gpt2": "GPT2Config",
    "gpt_neox": "GPTNeoXConfig",
}


class StackedModel(PreTrainedModel):
    """What `stack_levels` adds to the class of a pretrained model."""

    unstacked_class: ClassVar[type[PreTrainedModel]]
    stack_plan: StackPlan

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.install_levels(StackPlan.from_dict(getattr(config, "stacking", None)))
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
        """Levels start from their MLP, whose maps come before it."""
        super()._init_weights(module)
        if isinstance(module, StackedMLP):
            module.start_levels()


def _forward_of(base: type[PreTrainedModel]) -> Callable[..., Any]:
    """The base's forward, with the argument ``level_state``; callers that look at the signature see the base's."""

    @functools.wraps(base.forward)
    def forward(self: StackedModel, *args: Any, level_state: LevelState | None = None, **kwargs: Any) -> Any:
        if level_state is None:
            return base.forward(self, *args, **kwargs)
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError(
                "gradient checkpointing runs layers again after this call, when the level state is no longer there. "
                "Switch it off (model.gradient_checkpointing_disable()) to train with level_state."
            )
        with reading(self.stack_plan, level_state):
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
    return cast(type[PretrainedConfig], type(f"Stacked{base.__name__}", (base,), body))


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
    """Stands for a stacked class in the registry of auto classes until it is asked for.

    Making the class imports the pretrained model's code, which `import nestlearn` must not do for nine families.
    """

    config_class: ClassVar[type[PretrainedConfig]]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return _causal_class(cls.config_class).from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
        return cast(Any, _causal_class(cls.config_class))._from_config(*args, **kwargs)


def register(base: type[PretrainedConfig]) -> None:
    """Let `AutoConfig` and `AutoModelForCausalLM` know stacked models over configurations of class ``base``."""
    config = stacked_config_class(base)
    name = "Stacked" + base.__name__.removesuffix("Config").removesuffix("Text") + "ForCausalLM"
    later = type(name, (_Later,), {"config_class": config, "__module__": __name__})
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, cast(Any, later), exist_ok=True)


def register_family(names: MapNames, config: type[PretrainedConfig] | None = None) -> None:
    """Let `stack_levels` know a family of models, from outside the package as from inside.

    Args:
        names: how the MLPs of its layers name their maps.
        config: its configuration class. With it, `AutoModelForCausalLM` loads stacked models of the family;
            `load_stacked` does so in any case.

    Example:
        >>> from nestlearn.models.stacking import MapNames
        >>> register_family(MapNames(up="first_map", down="second_map", act="relu"))
    """
    add_names(names)
    if config is not None:
        register(config)


def register_families() -> None:
    """`register` the families of `stack_levels`; imports their configurations only."""
    for family, name in _REGISTERED.items():
        module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
        register(getattr(module, name))


def load_stacked(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A stacked causal language model from a folder, of whatever class (`AutoModelForCausalLM` knows the families).

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
        raise ValueError(f"{path} holds a model of type {kind!r}, not a stacked one; use AutoModelForCausalLM for it.")
    register(type(AutoConfig.for_model(kind.removeprefix(PREFIX))))
    refuse_pickled_weights(path)
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(path, **{**kwargs, "use_safetensors": True}))
    refuse_non_finite_weights(model, path)
    return model
