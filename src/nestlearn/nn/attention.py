"""Causal multi-head attention: rotary positions, sliding window, padding anywhere, documents, streaming state.

Shapes: b batch rows, h heads, t new tokens, s stored tokens, d head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.fields import Count, Positive, Size
from nestlearn.memory.clock import before_reset, known_empty, poisoned_from
from nestlearn.nn.common import admit, check_tokens, poison
from nestlearn.nn.config import MixerConfig, register_mixer
from nestlearn.nn.conv import ShortConv
from nestlearn.nn.state import record


@record("attention")
class AttentionState(NamedTuple):
    """The keys and values that later tokens can see.

    Attributes:
        keys: keys after their rotation.
        values: values.
        visible: False for padding and for tokens of earlier documents.
        place: position of each stored token in its document; padding does not count.
        position: position of the next token.
        poisoned: whether the current document holds a token that is not finite.
        conv: last inputs of the convolution; None without one.
    """

    keys: Float[Tensor, "b h s d"]
    values: Float[Tensor, "b h s d"]
    visible: Bool[Tensor, "b s"]
    place: Int[Tensor, "b s"]
    position: Int[Tensor, "b"]
    poisoned: Bool[Tensor, "b"]
    conv: Float[Tensor, "b w c"] | None = None


def rotate(x: Float[Tensor, "b h t d"], position: Int[Tensor, "b t"], theta: float) -> Float[Tensor, "b h t d"]:
    """Rotary positions (RoFormer): pair (i, i + d/2) of ``x`` is turned by the angle ``position theta^(-2i/d)``.

    Angles are computed in fp32, or in float64 for a float64 input.
    """
    half = x.shape[-1] // 2
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    power = torch.arange(half, device=x.device, dtype=dtype) / half
    angle = position.to(dtype)[:, None, :, None] * theta**-power
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def document_positions(
    start: Int[Tensor, "b"], mask: Bool[Tensor, "b t"], reset: Bool[Tensor, "b t"] | None
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Position of each token in its document, and the number of document starts up to it.

    Padding does not count: a padding token has the position of the last real token before it. ``start`` is the position
    of the first token, if that token continues the document of the state.
    """
    index = mask.long().cumsum(1) - 1
    if reset is None:
        return index + start[:, None], torch.zeros_like(index)
    # The index of document starts increases, so the running maximum is the start of the current document.
    origin = torch.where(reset, index, -start[:, None]).cummax(1).values
    return index - origin, reset.long().cumsum(1)


SHORTEST_BLOCK = 64
"""Smallest block of queries in windowed attention. Smaller blocks would mean many small matrix products."""


class _Queries(NamedTuple):
    """Queries before and after their rotation, with the position and the document of each token."""

    plain: Float[Tensor, "b h t d"]
    turned: Float[Tensor, "b h t d"]
    place: Int[Tensor, "b t"]
    document: Int[Tensor, "b t"]


def _cut(x: Tensor, before: int, block: int, overlap: int, dim: int) -> Tensor:
    """Overlapping blocks along ``dim``, as rows of the batch: ``[b, ..., s, ...]`` to ``[b n, ..., o + B, ...]``.

    The sequence begins ``before`` positions after the start of ``x``. Block i holds its positions
    ``[i B - o, (i + 1) B)``. Positions outside of ``x`` are zeros; positions further back than ``o`` are dropped.
    """
    length = x.shape[dim] - before
    after = -length % block
    behind = (0, 0) * (x.dim() - 1 - dim)
    x = F.pad(x, (*behind, overlap - before, after))
    return x.unfold(dim, overlap + block, block).movedim((dim, -1), (1, dim + 1)).flatten(0, 1)


class PersistentTokens(nn.Module):
    """``n`` learned tokens ``p`` that do not depend on the text (Titans Eq. 19), ``self.tokens: [n, d_model]``."""

    def __init__(self, count: int, d_model: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, d_model))
        self.reset_parameters()

    def vector_parameters(self) -> list[nn.Parameter]:
        """Parameters whose rows are vectors, not linear maps: an optimizer applies no matrix rule to them."""
        return [self.tokens]

    def reset_parameters(self) -> None:
        """Draw from the standard normal distribution, the scale of normalized inputs."""
        nn.init.normal_(self.tokens)

    def forward(self, dtype: torch.dtype) -> Float[Tensor, "n d"]:
        """The tokens in a dtype. Layers call this module, so that its hooks run (those of offloaded weights)."""
        return self.tokens.to(dtype)


def persistent_heads(
    persistent: PersistentTokens, qkv: nn.Module, heads: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "1 h n d"], Float[Tensor, "1 h n d"]]:
    """Keys and values of persistent tokens, by the projection ``qkv`` of an attention layer that runs in ``dtype``."""
    _, k, v = qkv(persistent(dtype)).unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
    return k.unsqueeze(0), v.unsqueeze(0)


@dataclass(frozen=True, kw_only=True)
class RotaryConfig(MixerConfig):
    """Fields of every mixer with attention over rotary positions.

    Args:
        rope_theta: base of the rotary frequencies.
        persistent_tokens: learned tokens that attention always sees; 0 for none.
    """

    rope_theta: Positive = 10000.0
    persistent_tokens: Count = 0

    def check_sizes(self, d_model: int, num_heads: int) -> None:
        super().check_sizes(d_model, num_heads)
        if d_model // num_heads % 2:
            raise ValueError(
                f"{d_model=} over {num_heads=} gives heads of odd width {d_model // num_heads}, but rotary positions "
                "turn pairs of channels; choose sizes whose quotient is even."
            )


@register_mixer("attention")
@dataclass(frozen=True, kw_only=True)
class AttentionConfig(RotaryConfig):
    """Configuration of `CausalAttention`.

    Args:
        window: number of last tokens (the current one included) that are visible; None sees all.
        rope_theta: base of the rotary frequencies.
        conv_size: width of a depthwise causal convolution on queries, keys and values; 0 for none.
        persistent_tokens: learned tokens before the text; 0 for none.
    """

    window: Size | None = None
    conv_size: Count = 0

    def build(self, d_model: int, num_heads: int) -> CausalAttention:
        return CausalAttention(d_model, num_heads, self)

    @property
    def stored_tokens(self) -> int | None:
        return self.window


class CausalAttention(nn.Module):
    """Softmax attention over the tokens of the same document up to the current one.

        o_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j,   y_i = W_o [o_i of all heads],
        j <= i, j real, document(j) = document(i), place(i) - place(j) < window

    In NL's terms attention is a memory without parameters and of infinite frequency: it keeps every token. Its answer
    is the Nadaraya-Watson minimizer ``argmin_m sum_j exp(q_i . k_j / sqrt(d)) ||v_j - m||^2`` (NL Eq. 62-63).

    Persistent tokens p (Titans Eq. 19) are learned inputs before the text. Every token of every document sees them,
    whatever the window. They have no position: their scores use the query before its rotation, so the scores do not
    depend on the length of the text.

    With a window, queries are cut into blocks of ``B = max(window, 64)`` tokens. A block reads only its own keys and
    the ``window - 1`` keys before it. So a call of T tokens needs memory of order ``T (B + window)``, not ``T^2``.

    A token that is not finite makes the outputs of its row NaN from there to the next reset.

    Args:
        d_model: width of the input and the output.
        num_heads: heads; must divide ``d_model`` and leave an even width for the rotation.
        config: window, convolution and positions; `AttentionConfig`.

    Raises:
        ValueError: sizes that do not fit each other.

    Example:
        >>> layer = AttentionConfig().build(16, num_heads=2)
        >>> y, state = layer(torch.randn(1, 5, 16))
        >>> step, state = layer(torch.randn(1, 1, 16), state)
        >>> tuple(state.keys.shape)
        (1, 2, 6, 8)
    """

    def __init__(self, d_model: int, num_heads: int, config: AttentionConfig) -> None:
        super().__init__()
        config.check_sizes(d_model, num_heads)
        self.d_model, self.num_heads = d_model, num_heads
        self.window = config.window
        self.rope_theta = config.rope_theta
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.conv = ShortConv(3 * d_model, config.conv_size) if config.conv_size else None
        self.persistent = PersistentTokens(config.persistent_tokens, d_model) if config.persistent_tokens else None

    def forward(
        self,
        x: Float[Tensor, "b t m"],
        state: AttentionState | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        *,
        writes: bool = True,
        return_state: bool = True,
    ) -> tuple[Float[Tensor, "b t m"], AttentionState | None]:
        """Attend from the new tokens to the stored and the new ones.

        ``mask`` False marks padding. No token attends to padding, it has no position, and its output is 0. ``reset``
        True starts a new document at that token. ``writes`` has no effect: there is nothing to learn.

        Raises:
            ValueError: the shape of ``x`` is not ``[batch, tokens >= 1, d_model]``.
            TypeError: ``x`` holds token ids, not embeddings.
        """
        del writes
        check_tokens(x, self.d_model)
        given = mask
        x, bad = admit(x, mask)
        poisoned = bad if known_empty(bad) else poisoned_from(bad, mask, reset)
        if state is not None:
            carried = state.poisoned[:, None]
            poisoned = poisoned | (carried if reset is None else carried & before_reset(mask, reset))
        order = None
        if mask is not None:
            if self._in_blocks(x.shape[1]):
                # A block is cut by columns. Real tokens come first, in order, so no window contains padding.
                order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
                x, mask = x.take_along_dim(order[..., None], 1), mask.gather(1, order)
                reset = reset if reset is None else reset.gather(1, order)
            reset = reset if reset is None else reset & mask
        y, stored = self._attend(x, state, mask, reset, poisoned[:, -1].clone())
        if order is not None:
            y = y.take_along_dim(order.argsort(1)[..., None], 1)
        y = poison(y, poisoned)
        if given is not None:
            y = torch.where(given[..., None], y, 0)
        return y, self._trim(stored, mask is not None) if return_state else None

    def _attend(
        self, x: Tensor, state: AttentionState | None, mask: Tensor | None, reset: Tensor | None, poisoned: Tensor
    ) -> tuple[Float[Tensor, "b t m"], AttentionState]:
        """Outputs at every column, and the state with all stored and new tokens."""
        q, k, v, conv = self._heads(x, None if state is None else state.conv, mask, reset)
        batch, time = x.shape[:2]
        real = torch.ones(batch, time, dtype=torch.bool, device=x.device) if mask is None else mask
        start = real.new_zeros(batch, dtype=torch.long) if state is None else state.position
        place, document = document_positions(start, real, reset)
        queries, k = _Queries(q, rotate(q, place, self.rope_theta), place, document), rotate(k, place, self.rope_theta)
        stored = AttentionState(k, v, real, place, place[:, -1] + 1, poisoned, conv)
        fresh = state is None and mask is None and reset is None and (self.window is None or time <= self.window)
        if fresh and self.persistent is None:
            read = F.scaled_dot_product_attention(queries.turned, k, v, is_causal=True)
        else:
            stored, stored_document = self._append(state, stored, document)
            read = (self._read_blocks if self._in_blocks(time) else self._read)(queries, stored, stored_document)
            stored = stored._replace(visible=stored.visible & (stored_document == document[:, -1:]))
        return self.out(read.transpose(1, 2).flatten(2)), stored

    def _heads(
        self, x: Tensor, tail: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values ``[b, h, t, d]`` and the convolution's new tail."""
        mixed = self.qkv(x)
        if self.conv is not None:
            mixed, tail = self.conv(mixed, tail, mask, reset)
        q, k, v = mixed.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v, tail

    def _in_blocks(self, time: int) -> bool:
        """Whether a call with this number of tokens runs block by block."""
        return self.window is not None and time > max(self.window, SHORTEST_BLOCK)

    def _read(
        self, queries: _Queries, stored: AttentionState, stored_document: Int[Tensor, "b s"]
    ) -> Float[Tensor, "b h t d"]:
        """Attention to the stored tokens and to the persistent ones, whose scores use the plain queries."""
        allowed = self._allowed(stored, queries.place, queries.document, stored_document)
        q, keys, values = queries.turned, stored.keys, stored.values
        if self.persistent is None:
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=allowed)
        first_keys, first_values = persistent_heads(self.persistent, self.qkv, self.num_heads, q.dtype)
        scores = queries.plain @ first_keys.mT / math.sqrt(q.shape[-1])
        hidden = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, -torch.inf)
        bias = torch.cat((scores, hidden.expand(*scores.shape[:3], -1)), -1)
        batch = (q.shape[0], -1, -1, -1)
        # The bias already holds the scores of persistent tokens, so their keys are zeros here.
        keys = torch.cat((torch.zeros_like(first_keys).expand(batch), keys), 2)
        values = torch.cat((first_values.expand(batch), values), 2)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)

    def _read_blocks(
        self, queries: _Queries, stored: AttentionState, stored_document: Int[Tensor, "b s"]
    ) -> Float[Tensor, "b h t d"]:
        """`_read`, block by block: each block with the keys that its windows reach. Needs real tokens first."""
        window = self.window or 1
        block, overlap, time = max(window, SHORTEST_BLOCK), window - 1, queries.place.shape[1]
        before = stored.place.shape[1] - time
        asked = _Queries(*(_cut(x, 0, block, 0, x.dim() // 2) for x in queries))
        near = stored._replace(
            keys=_cut(stored.keys, before, block, overlap, 2),
            values=_cut(stored.values, before, block, overlap, 2),
            visible=_cut(stored.visible, before, block, overlap, 1),
            place=_cut(stored.place, before, block, overlap, 1),
        )
        read = self._read(asked, near, _cut(stored_document, before, block, overlap, 1))
        batch, heads, _, width = queries.plain.shape
        return read.unflatten(0, (batch, -1)).movedim(1, 2).reshape(batch, heads, -1, width)[:, :, :time]

    def _append(
        self, state: AttentionState | None, new: AttentionState, document: Int[Tensor, "b t"]
    ) -> tuple[AttentionState, Int[Tensor, "b s"]]:
        """Stored tokens followed by new ones, and the document of each: the stored tokens belong to document 0."""
        if state is None:
            return new, document
        joined = new._replace(
            keys=torch.cat((state.keys, new.keys), dim=2),
            values=torch.cat((state.values, new.values), dim=2),
            visible=torch.cat((state.visible, new.visible), dim=1),
            place=torch.cat((state.place, new.place), dim=1),
        )
        return joined, torch.cat((torch.zeros_like(state.place), document), dim=1)

    def _allowed(
        self, stored: AttentionState, place: Tensor, document: Tensor, stored_document: Tensor
    ) -> Bool[Tensor, "b 1 t s"]:
        """Which stored tokens each new token may see."""
        time, total = place.shape[1], stored.place.shape[1]
        column = torch.arange(total, device=place.device)
        own = torch.arange(total - time, total, device=place.device)[:, None]
        allowed = (column <= own) & stored.visible[:, None, :]
        allowed = allowed & (document[:, :, None] == stored_document[:, None, :])
        if self.window is not None:
            allowed = allowed & (place[:, :, None] - stored.place[:, None, :] < self.window)
        # A query that sees nothing would give NaN, so padding sees itself; its key and value are 0.
        return (allowed | (column == own))[:, None]

    def _trim(self, stored: AttentionState, padded: bool) -> AttentionState:
        """Drop the tokens that no later token can see: all but the last ``window - 1`` visible ones of a row.

        The kept tokens are copied where they are a view, so that the memory of the others is freed.
        """
        if self.window is None:
            return stored._replace(values=stored.values.contiguous())
        keep = min(self.window - 1, stored.place.shape[1])
        if keep == 0:
            # A window of 1 sees only itself.
            pick = stored.place.new_zeros(stored.place.shape[0], 0)
        elif padded:
            # Rows hold different numbers of real tokens: move those of each row to the end, in order.
            pick = stored.visible.to(torch.uint8).argsort(dim=1, stable=True)[:, -keep:]
        else:
            first = stored.place.shape[1] - keep
            return stored._replace(
                keys=stored.keys[:, :, first:].clone(memory_format=torch.contiguous_format),
                values=stored.values[:, :, first:].clone(memory_format=torch.contiguous_format),
                visible=stored.visible[:, first:].clone(),
                place=stored.place[:, first:].clone(),
            )
        index = pick[:, None, :, None].expand(-1, self.num_heads, -1, stored.keys.shape[-1])
        return stored._replace(
            keys=stored.keys.gather(2, index),
            values=stored.values.gather(2, index),
            visible=stored.visible.gather(1, pick),
            place=stored.place.gather(1, pick),
        )

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token, averaged over a context of that many tokens; a multiply-add counts 2.

        Each weight costs 2. Scores and reads cost ``4 d_model`` per visible token, and a causal token sees
        ``(context + 1) / 2`` tokens on average. Without window and convolution:
        ``8 d_model^2 + 2 d_model (context + 1)``.
        """
        total, window = context_length, min(context_length, self.window or context_length)
        visible = window * (window + 1) // 2 + (total - window) * window
        weights = [w for layer in (self.qkv, self.out, self.conv) if layer is not None for w in layer.parameters()]
        constant = 0 if self.persistent is None else self.persistent.tokens.shape[0]
        read = 4 * self.out.in_features * visible // max(total, 1) + 4 * self.out.in_features * constant
        return 2 * sum(w.numel() for w in weights) + read

    def reset_parameters(self) -> None:
        """PyTorch's default initial values."""
        for layer in (self.qkv, self.conv, self.persistent, self.out):
            if layer is not None:
                layer.reset_parameters()
