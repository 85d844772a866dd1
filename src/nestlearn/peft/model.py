"""The tuner: peft's view of a model with adapters of levels."""

from __future__ import annotations

from typing import Any, cast

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from nestlearn.models.stacking import find_networks
from nestlearn.models.stacking.model import StackedModel

from .config import ContinuumConfig
from .layer import ContinuumLayer


class ContinuumModel(BaseTuner):
    """What ``get_peft_model(model, ContinuumConfig(...))`` puts around a pretrained model.

    Its feed-forward networks become `ContinuumLayer`. All else is peft's: several adapters, ``set_adapter``,
    ``disable_adapter``, ``save_pretrained``, ``merge_and_unload``, ``unload``.

    Raises:
        ValueError: a model without networks that can have levels, or with levels of its own.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = get_peft_model(LlamaForCausalLM(config), ContinuumConfig(levels=[{"period": 8, "hidden": 4}]))
        >>> model.get_nb_trainable_parameters()
        (192, 4848)
    """

    prefix = "continuum_"
    tuner_layer_cls = ContinuumLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """The modules come from the model itself, in `_prepare_model`, not from a table of its family."""
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if isinstance(model, StackedModel):
            raise ValueError(
                f"{type(model).__name__} has levels already, and no adapter of levels goes on it. Take them off with "
                "unstack_levels(model), or train them as they are: freeze_backbone(model)."
            )
        if peft_config.target_modules is None:
            present = {path for path, module in model.named_modules() if isinstance(module, ContinuumLayer)}
            peft_config.target_modules = sorted(present or find_networks(model))

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, ContinuumLayer):
            target.update_layer(adapter_name, cast(ContinuumConfig, peft_config))
            return
        (names,) = find_networks(self.model, lambda path, module: module is target).values()
        layer = ContinuumLayer(target, names, adapter_name)
        layer.update_layer(adapter_name, cast(ContinuumConfig, peft_config))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """peft's own also moves weights to the device of ``child.weight``; levels are made on the device of theirs."""
        setattr(parent, child_name, new_module)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Keys end in ``continuum_levels.ADAPTER.LEVEL.MAP``, where peft expects the adapter last or next to last."""
        return key.replace(f".continuum_levels.{adapter_name}.", ".continuum_levels.", 1)
