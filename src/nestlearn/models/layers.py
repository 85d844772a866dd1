"""The blocks of a Hope model, built from its configuration."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_layers import GradientCheckpointingLayer

from nestlearn.models.cache import LayerState
from nestlearn.models.config import HopeConfig
from nestlearn.nn.cms import ContinuumMemory, WriteLevels
from nestlearn.nn.cms.level import Level
from nestlearn.nn.cms.tape import Tape

LOSS_STEP = 0.01
"""Default step of a level that learns from the loss. It multiplies the gradient of a sum of losses in nats."""


def _level_defaults(config: HopeConfig) -> dict[str, Any]:
    return {"lr": LOSS_STEP} if config.cms_signal == "loss" else {}


def build_cms(config: HopeConfig) -> ContinuumMemory:
    """The continuum memory of a layer: its levels, with the configured connection and signal.

    Raises:
        ValueError: levels out of order, or a level that cannot work.
    """
    return ContinuumMemory(
        config.hidden_size,
        [Level(**(_level_defaults(config) | level)) for level in config.cms],
        config.ffn_activation,
        config.cms_variant,
        config.cms_signal,
        config.cms_meta,
        config.cms_transfer,
        config.num_attention_heads if config.cms_variant == "independent" else 1,
        config.rms_norm_eps,
        config.cms_transfer_by,
    )


class HopeBlock(GradientCheckpointingLayer):
    """``x = x + mixer(norm(x)); x = x + cms(norm(x))`` with the state of both."""

    def __init__(self, config: HopeConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = config.mixers[layer].build(config.hidden_size, config.num_attention_heads)
        self.cms_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.cms = build_cms(config)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: LayerState | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        writes: WriteLevels = True,
        return_state: bool = True,
        tape: Tape | None = None,
        key: int = 0,
    ) -> tuple[Float[Tensor, "b t d"], LayerState | None]:
        """The protocol of `nestlearn.nn`; ``tape`` and ``key`` are for levels that learn from the loss."""
        # Of the attention kernels only this one can be differentiated twice.
        twice = tape is not None and tape.second_order
        with sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
            return self._forward(
                x, LayerState() if state is None else state, mask, reset, writes, return_state, tape, key
            )

    def _forward(
        self,
        x: Tensor,
        before: LayerState,
        mask: Tensor | None,
        reset: Tensor | None,
        writes: WriteLevels,
        return_state: bool,
        tape: Tape | None,
        key: int,
    ) -> tuple[Tensor, LayerState | None]:
        y, mixer_state = self.mixer(
            self.mixer_norm(x), before.mixer, mask, reset, writes=writes is not False, return_state=return_state
        )
        x = x + y
        y, cms_state = self.cms(
            self.cms_norm(x), before.cms, mask, reset, writes=writes, return_state=return_state, tape=tape, key=key
        )
        return x + y, LayerState(mixer_state, cms_state) if return_state else None

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token of the mixer and the continuum memory (norms are not counted)."""
        mixer: Any = self.mixer
        cms: Any = self.cms
        return mixer.flops_per_token(context_length) + cms.flops_per_token(context_length)


def check_checkpointing(model: nn.Module, carries: bool, learns: bool) -> None:
    """Raise ValueError where reentrant gradient checkpointing would lose gradients.

    It keeps the graph of tensors that a block takes or returns directly, but not of tensors inside a state.

    Args:
        model: with ``gradient_checkpointing``, as the library sets it.
        carries: whether a call returns a state.
        learns: whether levels learn from the loss inside the call, which takes gradients of recorded maps.
    """
    if not (model.training and getattr(model, "gradient_checkpointing", False) and torch.is_grad_enabled()):
        return
    function = cast(Any, model)._gradient_checkpointing_func
    if getattr(function, "keywords", {}).get("use_reentrant") is False or not (carries or learns):
        return
    reason = (
        "loses the gradients through a carried cache"
        if carries
        else "records no inputs and errors for levels to learn from"
    )
    raise ValueError(
        f"reentrant gradient checkpointing {reason}. Use the other form, "
        "model.activation_checkpointing_enable({'use_reentrant': False}), the library's default"
        + (", or pass use_cache=False and no cache." if carries and not learns else ".")
    )
