"""Depthwise causal convolution over the tokens of a document, with a streaming state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.memory.clock import compaction


class ShortConv(nn.Module):
    """``y_t = sum_j w_j * x_{t-j}`` per channel over the last ``width`` tokens (Titans section 4.4: width 4).

    A masked token is left out, as if the text did not contain it. A token after a reset does not see the tokens before
    the reset. The state is the tail: the last ``width - 1`` real tokens ``[B, width - 1, channels]``.

    Args:
        channels: number of channels.
        width: number of tokens in the sum, the current one included.
        silu: apply SiLU to the outputs.

    Raises:
        ValueError: ``width`` or ``channels`` is not positive.

    Example:
        >>> conv = ShortConv(3, width=2)
        >>> y, tail = conv(torch.ones(1, 5, 3))
        >>> next_y, tail = conv(torch.ones(1, 1, 3), tail)
        >>> tuple(tail.shape), torch.equal(next_y, y[:, -1:])
        ((1, 1, 3), True)
    """

    def __init__(self, channels: int, width: int = 4, silu: bool = False):
        super().__init__()
        if width < 1 or channels < 1:
            raise ValueError(f"{channels=} and {width=} must be at least 1; leave the layer out for no convolution.")
        self.channels, self.width, self.silu = channels, width, silu
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.reset_parameters()

    def vector_parameters(self) -> list[nn.Parameter]:
        """Parameters whose rows are vectors, not linear maps: an optimizer applies no matrix rule to them."""
        return [self.weight]

    def reset_parameters(self) -> None:
        """Uniform in ``±1 / sqrt(width)``, as in torch's Conv1d."""
        bound = self.width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(
        self,
        x: Float[Tensor, "b t ch"],
        tail: Float[Tensor, "b w ch"] | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
    ) -> tuple[Float[Tensor, "b t ch"], Float[Tensor, "b w ch"]]:
        """Outputs, 0 at masked tokens, and the new tail."""
        past = self.width - 1
        if tail is None:
            tail = x.new_zeros(x.shape[0], past, self.channels)
        weight = self.weight.to(x.dtype)
        if mask is None and reset is None:
            tail = tail.to(x.dtype)
            y = CausalTaps.apply(x, tail, weight, self.silu)
            # A copy: a view would keep the memory of all tokens of this call.
            end = torch.cat([tail, x], 1)[:, x.shape[1] :] if x.shape[1] < past else x[:, x.shape[1] - past :]
            return y, end.clone()  # type: ignore[return-value]
        return self._placed(x, tail.to(x.dtype), weight, mask, reset)

    def step(
        self, x: Float[Tensor, "b 1 ch"], tail: Float[Tensor, "b w ch"] | None
    ) -> tuple[Float[Tensor, "b 1 ch"], Float[Tensor, "b w ch"]]:
        """`forward` of one token in fewer operations; for generation."""
        if tail is None:
            tail = x.new_zeros(x.shape[0], self.width - 1, self.channels)
        seen = torch.cat([tail.to(x.dtype), x], 1)
        y = (seen * self.weight.to(x.dtype)).sum(1, keepdim=True)
        return F.silu(y) if self.silu else y, seen[:, 1:]

    def _placed(
        self, x: Tensor, tail: Tensor, weight: Tensor, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same with a mask or resets: real tokens are moved to the front, and taps stay inside a document."""
        rows, tokens, _ = x.shape
        past = self.width - 1
        row = torch.arange(rows, device=x.device)[:, None]
        order = count = None
        if mask is not None:
            order, count = compaction(mask)
            x = x[row, order]
            # Slots after the last real token repeat token 0; nothing reads them.
            reset = (
                None
                if reset is None
                else reset.gather(1, order) & (torch.arange(tokens, device=x.device) < count[:, None])
            )
        padded = torch.cat([tail, x], 1)
        document = None
        if reset is not None:
            document = F.pad(reset.long().cumsum(1), (past, 0))
        y = torch.zeros_like(x)
        for j in range(self.width):
            tap = padded[:, past - j : past - j + tokens]
            if document is not None:
                same = document[:, past - j : past - j + tokens] == document[:, past:]
                tap = torch.where(same.unsqueeze(-1), tap, 0)
            y = torch.addcmul(y, tap, weight[past - j])
        y = F.silu(y) if self.silu else y
        end = torch.full((rows,), tokens, device=x.device) if count is None else count
        last = end[:, None] + torch.arange(past, device=x.device)
        new_tail = padded[row, last]
        if document is not None:
            current = document.gather(1, (end + past - 1)[:, None])
            new_tail = torch.where((document.gather(1, last) == current).unsqueeze(-1), new_tail, 0)
        if mask is not None:
            rank = (mask.cumsum(1) - 1).clamp(min=0)
            y = torch.where(mask.unsqueeze(-1), y[row, rank], 0)
        return y, new_tail

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token."""
        return 2 * self.width * self.channels

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}, silu={self.silu}"


STREAM_STD = 0.1
"""Standard deviation of aligned projections."""

TAP_NOISE = 0.1
"""What remains of the random taps of aligned convolutions."""


@torch.no_grad()
def align_streams(
    weight: Float[Tensor, "nd d"], conv: ShortConv | None, heads: int, order: Sequence[str] = ("q", "k", "v")
) -> None:
    """Set the projections and taps of streams so that a memory answers with what followed the last tokens earlier.

    A query sees the last n tokens and a key the n tokens before its own, both through the same projection; a value sees
    its own token. n goes from 1 to ``conv.width - 1`` over the heads. From random values, that a memory is of use is
    found late or never: ``python benchmarks/induction.py``.

    Args:
        weight: of the projection to all streams, each of width d, one after the other.
        conv: over all streams; None leaves projections alone aligned.
        heads: of every stream.
        order: the names of the streams.
    """
    place, width = {name: i for i, name in enumerate(order)}, weight.shape[1]
    streams = weight.view(len(place), width, width).normal_(0, STREAM_STD)
    streams[place["q"]] = streams[place["k"]]
    if conv is None or conv.width == 1:
        return
    last = conv.width - 1
    taps = conv.weight.view(conv.width, len(place), heads, width // heads).mul_(TAP_NOISE)
    for head in range(heads):
        n = 1 + head % last
        taps[last + 1 - n :, place["q"], head] += n**-0.5
        taps[last - n : last, place["k"], head] += n**-0.5
        taps[last, place["v"], head] += 1


BLOCK = 32
"""Tokens per block: a few hundred kilobytes fit in the cache of a core, a whole batch does not."""


class CausalTaps(torch.autograd.Function):
    """``y_t = sum_j w_j * p_{t+j}``, where ``p`` is the tail followed by x; then SiLU if ``silu``.

    Channels are the last dimension everywhere. A grouped ``conv1d`` needs transposes, which take most of its time on a
    CPU. Tokens are computed block by block, so that SiLU reads from the cache of a core.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tail: Tensor, weight: Tensor, silu: bool) -> Tensor:
        before = torch.empty_like(x)
        y = torch.empty_like(x) if silu else before
        for padded, before_here, y_here, _ in _regions(x, tail, before, y):
            for first in range(0, y_here.shape[1], _block(x)):
                cut = slice(first, first + _block(x))
                _taps(padded[:, first:], weight.unbind(0), before_here[:, cut])
                if silu:
                    _silu(before_here[:, cut], y_here[:, cut])
        ctx.save_for_backward(x, tail, weight, before if silu else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        x, tail, weight, before = ctx.saved_tensors
        past = tail.shape[1]
        if torch.is_grad_enabled():
            both, grad_weight = _differentiable_gradient(torch.cat([tail, x], 1), weight, grad, before is not None)
            return both[:, past:], both[:, :past], grad_weight, None
        grad_x, grad_weight, grad_head = torch.empty_like(x), torch.zeros_like(weight), None
        for padded, here, before_here, inside in _regions(x, tail, grad, grad if before is None else before):
            target = grad_x if inside else torch.empty_like(padded)
            _write_gradient(padded, weight, here, None if before is None else before_here, target, grad_weight)
            grad_head = grad_head if inside else target
        if grad_head is None:
            return grad_x, torch.zeros_like(tail), grad_weight, None
        if x.shape[1] > past:
            grad_x[:, :past] += grad_head[:, past:]
        else:
            grad_x = grad_head[:, past:]
        return grad_x, grad_head[:, :past], grad_weight, None


def _regions(x: Tensor, tail: Tensor, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor, Tensor, bool]]:
    """Inputs with the parts of a and b: first the tokens that see the tail, then those that see x only (True)."""
    past = tail.shape[1]
    if past == 0:
        return [(x, a, b, True)]
    first = (torch.cat([tail, x[:, :past]], 1), a[:, :past], b[:, :past], False)
    return [first, (x, a[:, past:], b[:, past:], True)] if x.shape[1] > past else [first]


def _write_gradient(
    padded: Tensor, weight: Tensor, grad: Tensor, before: Tensor | None, grad_padded: Tensor, grad_weight: Tensor
) -> None:
    """Write the gradient of one region to ``grad_padded`` (its old values do not matter); add to ``grad_weight``."""
    last, taps, sums = weight.shape[0] - 1, weight.unbind(0), grad_weight.unbind(0)
    grad_padded[:, :last] = 0
    for first in range(0, grad.shape[1], _block(padded)):
        here = grad[:, first : first + _block(padded)]
        if before is not None:
            here = torch.ops.aten.silu_backward(here, before[:, first : first + _block(padded)])
        # From the last tap to the first: the last one writes to new places, the others add.
        for j in range(last, -1, -1):
            cut = slice(first + j, first + j + here.shape[1])
            if j == last:
                _scale(here, taps[j], grad_padded[:, cut])
            else:
                grad_padded[:, cut].addcmul_(here, taps[j])
            sums[j].add_((here * padded[:, cut]).sum((0, 1)))


def _block(padded: Tensor) -> int:
    # On an accelerator one large kernel is faster than many small ones.
    return BLOCK if padded.device.type == "cpu" else padded.shape[1]


def _taps(padded: Tensor, taps: Sequence[Tensor], out: Tensor) -> None:
    """Write ``sum_j w_j * padded_{t+j}`` to ``out``, for as many tokens as it has."""
    tokens = out.shape[1]
    _scale(padded[:, :tokens], taps[0], out)
    for j in range(1, len(taps)):
        out.addcmul_(padded[:, j : j + tokens], taps[j])


def _silu(x: Tensor, out: Tensor) -> None:
    """``out = silu(x)``, in place."""
    if torch.compiler.is_compiling():  # a compiled graph cannot write to a view
        out.copy_(F.silu(x))
    else:
        torch.ops.aten.silu(x, out=out)


def _scale(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = x * weight``, in place."""
    if torch.compiler.is_compiling():  # a compiled graph cannot write to a view
        out.copy_(x * weight)
    else:
        torch.mul(x, weight, out=out)


def _differentiable_gradient(padded: Tensor, weight: Tensor, grad: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """The same gradient without writes in place, for a second derivative."""
    width, tokens = weight.shape[0], grad.shape[1]
    if silu:
        before = torch.stack([padded[:, j : j + tokens] * weight[j] for j in range(width)]).sum(0)
        gate = torch.sigmoid(before)
        grad = grad * (gate + before * gate * (1 - gate))
    wide = F.pad(grad, (0, 0, width - 1, width - 1))
    shifted = [wide[:, width - 1 - j : width - 1 - j + padded.shape[1]] * weight[j] for j in range(width)]
    taps = [(grad * padded[:, j : j + tokens]).sum((0, 1)) for j in range(width)]
    return torch.stack(shifted).sum(0), torch.stack(taps)
