"""An optimizer in which every level of an adapter steps at its own period."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nestlearn.optim import MultiTimescale, timescale_groups

from .config import ContinuumConfig
from .layer import ContinuumLayer


def continuum_optimizer(
    model: Any, factory: Callable[[Any], Optimizer], adapter_name: str | None = None
) -> MultiTimescale:
    """Any optimizer, in which level l steps once in ``n_l`` steps, with n_l its period over that of the fastest.

        theta_l <- theta_l - eta f(mean of the gradients of the last n_l steps)  if n_l divides the step   (NL Eq. 71)

    Between two steps a level collects its gradients and does not change. So a slow level follows the mean over much
    text, and a fast one the last batch. What else is trained (``modules_to_save``) steps every time. A plain optimizer
    works too: then all levels step every time.

    Args:
        model: a peft model with an adapter of levels.
        factory: from parameter groups to an optimizer, such as ``functools.partial(torch.optim.AdamW, lr=1e-3)``.
        adapter_name: None: the active adapter.

    Raises:
        ValueError: no such adapter, or one that is not trained now.

    Example:
        >>> from functools import partial
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = get_peft_model(LlamaForCausalLM(config), ContinuumConfig())
        >>> optimizer = continuum_optimizer(model, partial(torch.optim.AdamW, lr=1e-3))
        >>> [group["update_period"] for group in optimizer.param_groups]
        [1, 8]
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    config = model.peft_config.get(name) if isinstance(name, str) else None
    if not isinstance(config, ContinuumConfig):
        raise ValueError(
            f"{name!r} is not the name of one adapter of levels; the model has {sorted(model.peft_config)}. Name one "
            "that was made with a ContinuumConfig."
        )
    layers = [module.levels(name) for module in model.modules() if isinstance(module, ContinuumLayer)]
    levels: list[tuple[list[nn.Module], int]] = [
        ([here[i] for here in layers if here], steps) for i, steps in enumerate(config.steps)
    ]
    return MultiTimescale(factory(timescale_groups(model, levels)))
