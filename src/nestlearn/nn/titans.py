"""Titans with attention alongside the memory: memory as a gate and memory as a layer (Titans section 4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.fields import Count, Size
from nestlearn.nn.attention import AttentionConfig, AttentionState, CausalAttention, RotaryConfig
from nestlearn.nn.common import Mixer, RMSNorm, admit, check_tokens, largest_factor, poison
from nestlearn.nn.config import register_mixer
from nestlearn.nn.mixer import FastMemoryConfig, MemoryMixer, MixerState
from nestlearn.nn.state import record


@record("titans.hybrid")
class HybridState(NamedTuple):
    """Streaming state of a memory and of its attention, every tensor ``[B, ...]``."""

    memory: MixerState
    attention: AttentionState


@dataclass(frozen=True)
class TitansConfig(RotaryConfig, FastMemoryConfig):
    """Fields of the mixers that combine a memory (`FastMemoryConfig`) with attention (`RotaryConfig`)."""

    persistent_tokens: Count = field(default=4, kw_only=True)


@dataclass(frozen=True)
class WindowedTitansConfig(TitansConfig):
    """Fields of `MemoryAsGate` and `MemoryAsLayer`: those of `FastMemoryConfig`, and the following.

    Args:
        window: tokens that attention sees, the current one included.
        persistent_tokens: learned tokens that attention always sees.
        rope_theta: base of the rotary frequencies.
    """

    window: Size = 256

    @property
    def stored_tokens(self) -> int | None:
        return self.window


@register_mixer("titans_mag")
@dataclass(frozen=True)
class TitansMAGConfig(WindowedTitansConfig):
    """Configuration of `MemoryAsGate`."""

    def build(self, d_model: int, num_heads: int) -> MemoryAsGate:
        return MemoryAsGate(d_model, num_heads, self)


@register_mixer("titans_mal")
@dataclass(frozen=True)
class TitansMALConfig(WindowedTitansConfig):
    """Configuration of `MemoryAsLayer`."""

    def build(self, d_model: int, num_heads: int) -> MemoryAsLayer:
        return MemoryAsLayer(d_model, num_heads, self)


class _Hybrid(Mixer):
    """Common base of the gate and the layer: one memory, one windowed attention with persistent tokens."""

    def __init__(self, d_model: int, num_heads: int, config: WindowedTitansConfig) -> None:
        super().__init__()
        config.check_sizes(d_model, num_heads)
        # What the persistent tokens would write before the text is the same for every text: the learned start holds it.
        self.memory = MemoryMixer(d_model, num_heads, config.alone(learn_initial=True))
        attention = AttentionConfig(
            window=config.window, conv_size=config.conv_size, rope_theta=config.rope_theta,
            persistent_tokens=config.persistent_tokens,
        )  # fmt: skip
        self.attention = CausalAttention(d_model, num_heads, attention)
        self.d_model = d_model
        self.memory_norm = RMSNorm(d_model, eps=config.norm_eps)
        self._add_parts(d_model, config.norm_eps)

    def _add_parts(self, d_model: int, norm_eps: float) -> None:
        """Further modules of a subclass."""

    def _linears(self) -> int:
        """Entries of the linear maps around memory and attention."""
        return 0

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token at this context length (multiply-add = 2), writes included."""
        inside = self.memory.flops_per_token(context_length) + self.attention.flops_per_token(context_length)
        return inside + 2 * self._linears()


class MemoryAsGate(_Hybrid):
    r"""Titans MAG: attention as a precise short-term memory, gated by the long-term memory (Titans Eq. 26-28).

        y = SW-Attn*([p] || x),    o = W_o( norm(y) * silu(norm(M(x))) )

    ``SW-Attn*`` sees the last ``window`` tokens and the persistent tokens p; ``norm`` are RMS norms with one learned
    weight per channel. The memory M does not read p: what it would learn from them is part of its learned start.

    Args:
        d_model: width of input and output.
        num_heads: heads of the memory and of attention.
        config: the memory, the window and the persistent tokens; `WindowedTitansConfig`.

    Raises:
        ValueError: for sizes that do not fit, with the fix.

    Example:
        >>> import torch
        >>> from nestlearn.nn import TitansMAGConfig
        >>> layer = TitansMAGConfig(window=4, chunk_size=8).build(16, num_heads=2)
        >>> x = torch.randn(1, 20, 16)
        >>> y, state = layer(x[:, :13])
        >>> rest, state = layer(x[:, 13:], state)
        >>> torch.allclose(torch.cat([y, rest], 1), layer(x)[0], atol=1e-5)
        True
    """

    def _add_parts(self, d_model: int, norm_eps: float) -> None:
        self.attention_norm = RMSNorm(d_model, eps=norm_eps)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def _linears(self) -> int:
        return self.out.weight.numel()

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: HybridState | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        *,
        writes: bool = True,
        return_state: bool = True,
    ) -> tuple[Float[Tensor, "b t d"], HybridState | None]:
        """Read tokens, answer each, and learn from them; the protocol of `nestlearn.nn.Mixer`."""
        check_tokens(x, self.d_model)
        x, bad = admit(x, mask, largest_factor(x))
        past = (None, None) if state is None else state
        y, attended = self.attention(x, past[1], mask, reset, return_state=return_state)
        m, learned = self.memory(poison(x, bad), past[0], mask, reset, writes=writes, return_state=return_state)
        y = self.out(self.attention_norm(y) * F.silu(self.memory_norm(m)))
        y = y if mask is None else torch.where(mask.unsqueeze(-1), y, 0)
        return y, HybridState(learned, attended) if return_state else None


class MemoryAsLayer(_Hybrid):
    r"""Titans MAL: the long-term memory is a layer below attention (Titans Eq. 29-31).

        y = norm(M(x)),    o = SW-Attn*([p] || y)

    Persistent tokens p stand before the inputs of attention. Read through the memory, as printed, they would be vectors
    that depend on no text; so they are learned directly. Attention always sees them.
    The arguments are those of `MemoryAsGate`.

    Example:
        >>> import torch
        >>> from nestlearn.nn import TitansMALConfig
        >>> y, state = TitansMALConfig(window=4).build(16, num_heads=2)(torch.randn(1, 20, 16))
        >>> y.shape
        torch.Size([1, 20, 16])
    """

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: HybridState | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        *,
        writes: bool = True,
        return_state: bool = True,
    ) -> tuple[Float[Tensor, "b t d"], HybridState | None]:
        """Read tokens, answer each, and learn from them; the protocol of `nestlearn.nn.Mixer`."""
        check_tokens(x, self.d_model)
        x, bad = admit(x, mask, largest_factor(x))
        past = (None, None) if state is None else state
        m, learned = self.memory(poison(x, bad), past[0], mask, reset, writes=writes, return_state=return_state)
        m, bad = admit(self.memory_norm(m), mask, largest_factor(m))
        y, attended = self.attention(m, past[1], mask, reset, return_state=return_state)
        return poison(y, bad), HybridState(learned, attended) if return_state else None
