"""Self-modifying Titans: the projections of a memory are memories themselves (NL Eq. 83-91)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.memory import L2, Delta, Gates, State
from nestlearn.memory.clock import before_reset, choose, poisoned_from
from nestlearn.nn.bounds import MAX_MOMENTUM, check_self_modifying_step
from nestlearn.nn.common import HeadNorm, admit, check_tokens, full_precision, poison, wide_dtype
from nestlearn.nn.conv import ShortConv
from nestlearn.nn.state import record

from .config import STREAMS, SelfModifyingConfig


@record("self_modifying")
class SelfModifyingState(NamedTuple):
    """Fast state of the layer: its projection memories, its main memory, and the tail of the convolution.

    Rows of the projections are ``[B, heads, streams]`` (None without an adaptive one), those of the memory
    ``[B, heads]``.
    """

    projections: State | None
    memory: State
    conv: Float[Tensor, "b w ch"] | None

    @property
    def clock(self) -> State:
        """The group whose chunks are the longest."""
        return self.memory if self.projections is None else self.projections


class SelfModifyingTitans(nn.Module, ABC):
    r"""A sequence layer whose keys, values, step sizes and retention come from memories that learn in context.

    At the weights of the last chunk boundary (NL Eq. 83-91; docs/decisions.md for what the paper leaves open):

        k_t = M_k(x^k_t)   v_t = M_v(x^v_t)   eta_t = M_eta(x^eta_t)   alpha_t = M_alpha(x^alpha_t)
        v^_{m,t} = M_m(v_t)      every memory m generates its own target (v_t itself without self_values)
        W_m <- W_m (alpha_t I - eta'_t x x^T) - eta'_t e x^T  for every map of every memory (retention to initial)
        y_t = M_memory,t(q_t)    or, with chunk reads, the memory at the start of the chunk of t

    Each stream ``x^m`` is a linear map of the input, a causal convolution of width 4 and SiLU, split in heads.
    q, k, v and the targets are L2-normalized per head. All initial states are meta-learned parameters.

    **Bounds** (no gate the layer can emit makes the recurrence expand): alpha in (0, 1], momentum beta in (0, 0.9), and
    ``eta < max_step (1 - beta)``. Proximal steps contract at any max_step. ``normalized`` steps have max_step <= 2,
    eigenvalues in [-1, 1]. The L2 objective feeds back the error at the anchor, so eta is also divided by
    projection_chunk_size. Without delta retention ``eta < max_step (1 - alpha)`` with max_step <= 1/2: what is written
    stays smaller than the initial weights. A memory that writes its own targets is bounded but can be chaotic, with
    eigenvalues near -1 above all: gradients through it grow exponentially. The gradient of the weights that pass from
    one span to the next is therefore scaled down to norm 1e6 where it is larger; below it is exact.

    Args:
        d_model: width of input and output.
        num_heads: heads; d_model must be divisible by it.
        config: the memories and their rule; `SelfModifyingConfig`.

    Raises:
        ValueError: for sizes that do not fit.

    Example:
        >>> import torch
        >>> from nestlearn.nn import SelfModifyingConfig
        >>> layer = SelfModifyingConfig(chunk_size=8, projection_chunk_size=16).build(32, num_heads=2)
        >>> x = torch.randn(1, 20, 32)
        >>> y, state = layer(x[:, :13])
        >>> rest, state = layer(x[:, 13:], state)
        >>> torch.allclose(torch.cat([y, rest], 1), layer(x)[0], atol=1e-5)
        True
    """

    center: bool = False
    """Whether the mean over the channels of a head is taken from every stream."""

    def __init__(self, d_model: int, num_heads: int, config: SelfModifyingConfig) -> None:
        super().__init__()
        config.check_sizes(d_model, num_heads)
        self.memory = config.memory
        self.max_step = check_self_modifying_step(self.memory, config.max_step)
        self.d_model, self.num_heads, self.d_head = d_model, num_heads, d_model // num_heads
        self.projection_chunk_size = config.projection_chunk
        self.adaptive = tuple(name for name in STREAMS if name in config.adaptive)
        self.streams_order = self._order()
        self.retention, self.self_values = config.retention, config.self_values
        self.streams = nn.Linear(d_model, len(self.streams_order) * d_model, bias=False)
        self.conv = ShortConv(self.streams.out_features, config.conv_size, silu=True) if config.conv_size else None
        self._add_memories(config)
        self.eta_vector = nn.Parameter(torch.empty(num_heads, self.d_head))
        self.eta_bias = nn.Parameter(torch.empty(num_heads))
        self.alpha_vector = nn.Parameter(torch.empty(num_heads, self.d_head))
        self.alpha_bias = nn.Parameter(torch.empty(num_heads))
        self.beta_gate = nn.Linear(d_model, num_heads) if config.momentum else None
        self.norm, self.norm_eps = HeadNorm(self.d_head, eps=config.norm_eps), config.norm_eps
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def vector_parameters(self) -> list[nn.Parameter]:
        """Parameters whose rows are vectors and no linear map: no matrix rule of an optimizer suits them."""
        return [self.eta_vector, self.alpha_vector]

    def reset_parameters(self) -> None:
        """Initial values: random memories (both maps non-zero), gates that read a little and keep nearly everything."""
        self._reset_memories()
        # Small streams keep SiLU in its linear range: keys then have mean zero and do not erase each other
        # (docs/log.md: recall is learned in a third of the steps).
        nn.init.normal_(self.streams.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=self.d_model**-0.5)
        if self.conv is not None:
            self.conv.reset_parameters()
        for vector in (self.eta_vector, self.alpha_vector):
            nn.init.normal_(vector, std=0.02)
        nn.init.zeros_(self.eta_bias)
        # alpha = sigmoid(8) = 0.9997: with less the memories forget before they can be read (design trial).
        nn.init.constant_(self.alpha_bias, 8.0 if isinstance(self.memory.retention, Delta) else 4.0)
        if self.beta_gate is not None:
            nn.init.normal_(self.beta_gate.weight, std=0.02)
            nn.init.zeros_(self.beta_gate.bias)
        nn.init.ones_(self.norm.weight)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: SelfModifyingState | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        *,
        writes: bool = True,
        return_state: bool = True,
    ) -> tuple[Float[Tensor, "b t d"], SelfModifyingState | None]:
        """Read tokens, answer each, and learn from them.

        Args:
            x: inputs; masked tokens may hold anything.
            state: from an earlier call; None starts fresh.
            mask: False marks padding: it changes nothing and its output is 0.
            reset: True forgets everything of the row before that token.
            writes: False computes the same with step size 0.
            return_state: False skips the work only the next call would need.

        Returns:
            Outputs and the state after the last token (None if not asked for). A non-finite token makes the outputs of
            its row NaN from there to the next reset.
        """
        check_tokens(x, self.d_model)
        x, bad = admit(x, mask)
        streams, beta, tail = self._streams(x, None if state is None else state.conv, mask, reset)
        with full_precision(x):
            y, new, broken = self._read(streams, beta, state, mask, reset, writes, return_state)
        y = self._merge(y, x)
        poisoned = poisoned_from(bad, mask, reset)
        if broken is not None and reset is not None:
            poisoned = poisoned | (broken[:, None] & before_reset(mask, reset))
        y = poison(y, poisoned if mask is None else poisoned & mask)
        if mask is not None:
            y = torch.where(mask.unsqueeze(-1), y, 0)
        if not return_state:
            return y, None
        params = new.memory.params
        params = choose(poisoned[:, -1], {m: torch.full_like(w, torch.nan) for m, w in params.items()}, params)
        return y, SelfModifyingState(new.projections, new.memory._replace(params=params), tail)

    def _streams(
        self, x: Tensor, tail: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Streams ``[b, t, streams, heads, d]``, momentum gate ``[b, t, heads]`` (wide), and the new tail."""
        mixed, end = self.streams(x), None
        if self.conv is None:
            mixed = F.silu(mixed)
        else:
            mixed, end = self.conv(mixed, tail, mask, reset)
        split = mixed.unflatten(-1, (len(self.streams_order), self.num_heads, self.d_head))
        if self.center:
            split = split - split.mean(-1, keepdim=True)
        beta = None
        if self.beta_gate is not None:
            beta = MAX_MOMENTUM * torch.sigmoid(self.beta_gate(x).to(wide_dtype(x)))
        return split, beta, end

    def _merge(self, y: Tensor, x: Tensor) -> Tensor:
        """Heads back together, in the dtype of the inputs: ``[b, t, heads * d] -> [b, t, d_model]``."""
        return self.out(self.norm(y.unflatten(-1, (self.num_heads, -1))).flatten(2).to(x.dtype))

    def _order(self) -> tuple[str, ...]:
        """The names of the streams, the adaptive ones first."""
        return (*self.adaptive, *(name for name in STREAMS if name not in self.adaptive))

    @abstractmethod
    def _add_memories(self, config: SelfModifyingConfig) -> None:
        """The parameters of the memories."""

    @abstractmethod
    def _reset_memories(self) -> None:
        """Their initial values."""

    @abstractmethod
    def _read(
        self,
        streams: Float[Tensor, "b t n h d"],
        beta: Float[Tensor, "b t h"] | None,
        state: SelfModifyingState | None,
        mask: Tensor | None,
        reset: Tensor | None,
        writes: bool,
        return_state: bool,
    ) -> tuple[Tensor, SelfModifyingState, Tensor | None]:
        """Outputs ``[b, t, heads * d]``, the state after the last token (without the convolution's), and the rows
        ``[b]`` of which some head's state was not finite and is reset here (None: none)."""

    def _by_text(self, y: Float[Tensor, "r c d"], batch: int) -> Float[Tensor, "b c hd"]:
        """Rows ``batch * heads`` as texts."""
        return y.unflatten(0, (batch, self.num_heads)).transpose(1, 2).flatten(2)

    def _bounded(self, eta: Tensor, alpha: Tensor) -> Tensor:
        """The step size that keeps the L2 objective, which feeds the error at the anchor back, from expanding."""
        return eta / self.projection_chunk_size if isinstance(self.memory.objective, L2) else eta

    def _gates(self, eta_logit: Tensor, alpha_logit: Tensor, beta: Tensor | None, writes: bool) -> Gates:
        """Bounded gates (see the class docstring) from their logits ``[b, heads, c]``; returns rows ``[r, c]``."""
        alpha = torch.sigmoid(alpha_logit + self.alpha_bias.to(alpha_logit.dtype).unsqueeze(-1))
        eta = self.max_step * torch.sigmoid(eta_logit + self.eta_bias.to(eta_logit.dtype).unsqueeze(-1))
        alpha, eta = alpha.flatten(0, 1), eta.flatten(0, 1)
        if not isinstance(self.memory.retention, Delta):
            eta = eta * (1 - alpha)
        if beta is not None:
            eta = eta * (1 - beta)
        eta = self._bounded(eta, alpha)
        if not self.retention:
            alpha = torch.ones_like(alpha)
        if not writes:
            eta = torch.zeros_like(eta)
        return Gates(eta, alpha, beta)

    @abstractmethod
    def loop(
        self, x: Float[Tensor, "b t d"], state: SelfModifyingState | None = None
    ) -> tuple[Float[Tensor, "b t d"], SelfModifyingState]:
        """The definition: the same layer token by token with inner gradients by autograd. The oracle of `forward`."""

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token at this context length (multiply-add = 2), writes included."""
        linear = 2 * self.d_model * (len(self.streams_order) + 1) * self.d_model
        return linear + (0 if self.conv is None else self.conv.flops_per_token(context_length))

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, adaptive={self.adaptive}, "
            f"projection_chunk_size={self.projection_chunk_size}, max_step={self.max_step}, memory={self.memory}"
        )


def per_head(x: Tensor, heads: int) -> Tensor:
    """Flags of texts ``[b, ...]`` as those of rows ``[b * heads, ...]``."""
    return x.repeat_interleave(heads, 0)
