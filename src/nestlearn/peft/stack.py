"""From a trained adapter to a stacked model, whose levels go on learning while it reads."""

from __future__ import annotations

from typing import Any

import torch

from nestlearn.models.stacking import stack_levels

from .config import ContinuumConfig
from .layer import ContinuumLayer


@torch.no_grad()
def stack_adapter(model: Any, adapter_name: str | None = None) -> Any:
    """The base model, stacked with the levels of an adapter (`nestlearn.stack_levels`); the peft model is used up.

    Its levels start from what the adapter was trained to, and write what they read into a `nestlearn.MemorySession`.
    Levels of mode ``add`` are moved to the stacked model. Those of mode ``split`` are merged into the weights first.
    Before the first write, the logits are those of the adapter.

    Args:
        model: a peft model with an adapter of levels.
        adapter_name: None: the active one. Other adapters of levels are dropped.

    Raises:
        ValueError: no such adapter; or a base that cannot be stacked or, in mode ``split``, merged.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> adapter = ContinuumConfig(levels=[{"period": 8, "hidden": 4}])
        >>> model = get_peft_model(LlamaForCausalLM(config), adapter).eval()
        >>> ids = torch.arange(12)[None]
        >>> before = model(ids).logits
        >>> stacked = stack_adapter(model)
        >>> type(stacked).__name__, torch.allclose(stacked(ids).logits, before, atol=1e-6)
        ('StackedLlamaForCausalLM', True)
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    config = model.peft_config.get(name) if isinstance(name, str) else None
    if not isinstance(config, ContinuumConfig):
        raise ValueError(
            f"{name!r} is not the name of one adapter of levels; the model has {sorted(model.peft_config)}. Name one "
            "that was made with a ContinuumConfig."
        )
    tuner = model.base_model
    found = {path: module for path, module in tuner.model.named_modules() if isinstance(module, ContinuumLayer)}
    trained = {path: module.levels(name) for path, module in found.items() if module.levels(name)}
    base = tuner.merge_and_unload(adapter_names=[name]) if config.mode == "split" else tuner.unload()
    stacked = stack_levels(
        base,
        config.plan().levels,
        mode=config.mode,
        split=config.split,
        mlp=lambda path, module: path in trained,
    )
    if config.mode == "add":
        for path, module in stacked.stacked_mlps().items():
            for index, level in enumerate(trained[path]):
                own = dict(level.named_parameters())
                for part, parameter in module.level(index).named_parameters():
                    parameter.copy_(own[part])
    return stacked
