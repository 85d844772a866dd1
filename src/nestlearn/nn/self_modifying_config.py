"""The configuration of self-modifying Titans: which of its projections learn, by which rule, at which chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nestlearn.fields import Count, Positive, Size
from nestlearn.memory import L2, MLP, AssociativeMemory, Decay, Delta, Descent, DotProduct, Momentum
from nestlearn.memory.associative import Read, RetainTo, StepSize
from nestlearn.memory.kernels.products import Activation

from .bounds import check_self_modifying_step
from .config import MixerConfig, register_mixer
from .self_modifying import SelfModifyingTitans
from .self_modifying_state import STREAMS

GRADIENT_LIMIT = 1e6
"""Norm beyond which the gradient of weights that pass from span to span is scaled down."""


@register_mixer("self_modifying")
@dataclass(frozen=True)
class SelfModifyingConfig(MixerConfig):
    """Configuration of `SelfModifyingTitans`.

    Args:
        expansion: hidden units of a memory per head width.
        chunk_size: tokens between two anchors of the main memory.
        projection_chunk_size: the same for the projection memories; a multiple of chunk_size.
        adaptive: which of ``q k v eta alpha`` are memories; the others are static projections (NL Table 6).
        step_size: ``proximal`` or ``normalized``, for all maps or per map ``{"in": mode, "out": mode}``.
        max_step: upper bound of eta; None for the largest usual one.
        objective: ``dot`` or ``l2`` (paper-literal).
        momentum: add momentum to the inner rule (NL Table 6).
        delta: DGD's erasing term; False is plain gradient descent (NL Table 6).
        retention: learned alpha; False keeps alpha = 1 (NL Table 6).
        retain_to: what retention and erasing pull toward, the ``initial`` weights or ``zero`` (as printed).
        read: ``token`` reads the memory after the token's own write, ``chunk`` at the start of its chunk (NL Eq. 90).
        self_values: False gives every memory the value v_t as its target.
        conv_size: width of the convolution; 0 for none.
        activation: of the memories.
        norm_eps: epsilon of the output norm.

    Raises:
        ValueError: for contradictory or impossible settings.
    """

    expansion: Size = 4
    chunk_size: Size = 64
    projection_chunk_size: Size = 256
    adaptive: tuple[Literal["q", "k", "v", "eta", "alpha"], ...] = ("k", "v", "eta", "alpha")
    step_size: StepSize | dict[Literal["in", "out"], StepSize] = "proximal"
    max_step: Positive | None = None
    objective: Literal["dot", "l2"] = "dot"
    momentum: bool = False
    delta: bool = True
    retention: bool = True
    retain_to: RetainTo = "initial"
    read: Read = "token"
    self_values: bool = True
    conv_size: Count = 4
    activation: Activation = "gelu"
    norm_eps: Positive = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.adaptive)) != len(self.adaptive):
            raise ValueError(f"adaptive={self.adaptive!r} names a stream twice; out of {', '.join(STREAMS)} each once.")
        if not self.retention and not self.delta:
            raise ValueError(
                "delta=False with retention=False leaves nothing that bounds the memory. "
                "Ablate one at a time: delta=False needs the retention gate."
            )
        if self.projection_chunk_size % self.chunk_size:
            raise ValueError(
                f"projection_chunk_size={self.projection_chunk_size} must be a multiple of "
                f"chunk_size={self.chunk_size}."
            )
        check_self_modifying_step(self.memory, self.max_step)

    @property
    def memory(self) -> AssociativeMemory:
        """The rule of all memories of the layer."""
        step_size: Any = self.step_size if self.delta else "raw"
        return AssociativeMemory(
            MLP(self.expansion, self.activation),
            objective=DotProduct() if self.objective == "dot" else L2(),
            retention=Delta() if self.delta else Decay(),
            algorithm=Momentum() if self.momentum else Descent(),
            step_size=step_size,
            retain_to=self.retain_to,
            chunk_size=self.chunk_size,
            read=self.read,
            values="own" if self.self_values else "given",
            gradient_limit=GRADIENT_LIMIT,
        )

    def build(self, d_model: int, num_heads: int) -> SelfModifyingTitans:
        return SelfModifyingTitans(d_model, num_heads, self)

    @property
    def work_period(self) -> int:
        return self.projection_chunk_size
