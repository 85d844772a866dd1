"""The configuration of self-modifying Titans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nestlearn.fields import Count, Positive, Size
from nestlearn.memory import L2, MLP, AssociativeMemory, Decay, Delta, Descent, DotProduct, Matrix, Momentum
from nestlearn.memory.algorithms import GRADIENT_LIMIT
from nestlearn.memory.associative import Read, RetainTo, StepSize
from nestlearn.memory.kernels.products import Activation
from nestlearn.nn.bounds import check_self_modifying_step
from nestlearn.nn.config import MixerConfig, register_mixer

if TYPE_CHECKING:
    from .layer import SelfModifyingTitans

STREAMS = ("q", "k", "v", "eta", "alpha")
"""What a token is projected to; all but q adapt by default."""


@register_mixer("self_modifying")
@dataclass(frozen=True)
class SelfModifyingConfig(MixerConfig):
    """Configuration of `SelfModifyingTitans`.

    Args:
        architecture: what a memory is: ``mlp``, two layers with a residual, or ``matrix``. Matrices that absorb the
            same keys share one fast matrix per head, so they cost a fraction; see `SelfModifyingMatrix`.
        expansion: hidden units of an MLP memory per head width; None is 4. Matrices have none.
        chunk_size: tokens between two anchors of the main memory.
        projection_chunk_size: the same for the projection memories, a multiple of chunk_size; None is 256, or one chunk
            where that is longer. Matrices share one chunk.
        adaptive: which of ``q k v eta alpha`` are memories; the others are static projections (NL Table 6).
        step_size: ``proximal`` or ``normalized``, for all maps or per map ``{"in": mode, "out": mode}``. A matrix can
            take ``raw`` steps too.
        max_step: upper bound of eta; None for the largest usual one.
        objective: ``dot`` or ``l2`` (paper-literal).
        momentum: add momentum to the inner rule (NL Table 6).
        delta: DGD's erasing term; False is plain gradient descent (NL Table 6).
        retention: learned alpha; False keeps alpha = 1 (NL Table 6).
        retain_to: what retention and erasing pull toward, the ``initial`` weights or ``zero`` (as printed).
        read: ``token`` reads the memory after the token's own write, ``chunk`` at the start of its chunk (NL Eq. 90).
        self_values: False gives every memory the value v_t as its target.
        conv_size: width of the convolution; 0 for none.
        activation: of an MLP memory; None is ``gelu``. Matrices have none.
        norm_eps: epsilon of the output norm.

    Raises:
        ValueError: for contradictory or impossible settings.
    """

    architecture: Literal["mlp", "matrix"] = "mlp"
    expansion: Size | None = None
    chunk_size: Size = 64
    projection_chunk_size: Size | None = None
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
    activation: Activation | None = None
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
        if self.architecture == "matrix":
            self._check_matrix()
        elif self.projection_chunk % self.chunk_size:
            raise ValueError(
                f"projection_chunk_size={self.projection_chunk} must be a multiple of chunk_size={self.chunk_size}."
            )
        check_self_modifying_step(self.memory, self.max_step)

    def _check_matrix(self) -> None:
        """Raise for settings that matrix memories do not have."""
        for name in ("expansion", "activation", "projection_chunk_size"):
            value = getattr(self, name)
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} belongs to MLP memories; architecture='matrix' has none: its memories share one "
                    f"fast matrix and one chunk. Leave it out, or use architecture='mlp'."
                )
        if not isinstance(self.step_size, str):
            raise ValueError(f"step_size={self.step_size!r} names the maps of an MLP; a matrix takes one mode.")
        if self.objective == "l2" and not self.retention:
            raise ValueError(
                "objective='l2' with retention=False leaves nothing that bounds a matrix memory: its step is bounded "
                "by 1 - alpha. Use objective='dot', or retention=True."
            )

    def check_sizes(self, d_model: int, num_heads: int) -> None:
        super().check_sizes(d_model, num_heads)
        if self.architecture == "matrix" and d_model == num_heads:
            raise ValueError(
                f"{d_model=} with {num_heads=} leaves one channel per head, and the streams of matrix memories are "
                "centered: of one channel nothing is left. Use fewer heads."
            )

    @property
    def projection_chunk(self) -> int:
        """Tokens between two anchors of the projections."""
        if self.architecture == "matrix":
            return self.chunk_size
        return self.projection_chunk_size or max(256, self.chunk_size)

    @property
    def memory(self) -> AssociativeMemory:
        """The rule of all memories of the layer."""
        step_size: Any = self.step_size if self.delta else "raw"
        return AssociativeMemory(
            Matrix() if self.architecture == "matrix" else MLP(self.expansion or 4, self.activation or "gelu"),
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
        from .deep import SelfModifyingMLP
        from .matrix import SelfModifyingMatrix

        layer = SelfModifyingMatrix if self.architecture == "matrix" else SelfModifyingMLP
        return layer(d_model, num_heads, self)

    @property
    def work_period(self) -> int:
        return self.projection_chunk
