"""Depthwise causal convolution over the tokens of a document, with streaming state."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nestlearn.memory.layout import compaction


class ShortConv(nn.Module):
    """``y_t = sum_j w_j * x_{t-j}`` per channel over the last ``width`` tokens (Titans section 4.4: width 4).

    Only real tokens count: a masked token is skipped as if it were not there, and after a reset the tokens before it
    are not seen. The state is the tail, the last ``width - 1`` real tokens ``[B, width - 1, channels]``.

    Args:
        channels: number of channels.
        width: tokens seen, the current one included.

    Raises:
        ValueError: if ``width`` or ``channels`` is not positive.
    """

    def __init__(self, channels: int, width: int = 4):
        super().__init__()
        if width < 1 or channels < 1:
            raise ValueError(f"ShortConv needs positive channels and width, got channels={channels}, width={width}")
        self.channels, self.width = channels, width
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(width), as torch's Conv1d."""
        bound = self.width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(
        self,
        x: Float[Tensor, "b t ch"],
        tail: Float[Tensor, "b w ch"] | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
    ) -> tuple[Float[Tensor, "b t ch"], Float[Tensor, "b w ch"]]:
        """Outputs (0 at masked tokens) and the new tail."""
        past = self.width - 1
        if tail is None:
            tail = x.new_zeros(x.shape[0], past, self.channels)
        weight = self.weight.to(x.dtype)
        if mask is None and reset is None:
            padded = torch.cat([tail.to(x.dtype), x], 1)
            # A copy: as a view the tail would keep all tokens of this call alive.
            tail = padded[:, padded.shape[1] - past :].clone()
            return CausalTaps.apply(padded, weight), tail  # type: ignore[return-value]
        return self._placed(x, tail.to(x.dtype), weight, mask, reset)

    def _placed(
        self, x: Tensor, tail: Tensor, weight: Tensor, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows, tokens, _ = x.shape
        past = self.width - 1
        row = torch.arange(rows, device=x.device)[:, None]
        order = count = None
        if mask is not None:
            order, count = compaction(mask)
            x = x[row, order]
            # Slots after the last real token repeat token 0; they are never read back.
            reset = (
                None
                if reset is None
                else reset.gather(1, order) & (torch.arange(tokens, device=x.device) < count[:, None])
            )
        padded = torch.cat([tail, x], 1)
        document = None
        if reset is not None:
            document = torch.nn.functional.pad(reset.long().cumsum(1), (past, 0))
        y = torch.zeros_like(x)
        for j in range(self.width):
            tap = padded[:, past - j : past - j + tokens]
            if document is not None:
                same = document[:, past - j : past - j + tokens] == document[:, past:]
                tap = torch.where(same.unsqueeze(-1), tap, 0)
            y = torch.addcmul(y, tap, weight[past - j])
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
        return f"{self.channels}, width={self.width}"


class CausalTaps(torch.autograd.Function):
    """``y_t = sum_j w_j * padded_{t+j}`` with a gradient that keeps only its inputs.

    Channels last throughout: no transposes, which is where a grouped ``conv1d`` spends its time on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor) -> Tensor:
        width = weight.shape[0]
        tokens = padded.shape[1] - width + 1
        y = padded[:, :tokens] * weight[0]
        for j in range(1, width):
            y.addcmul_(padded[:, j : j + tokens], weight[j])
        ctx.save_for_backward(padded, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        padded, weight = ctx.saved_tensors
        width, tokens = weight.shape[0], grad.shape[1]
        wide = torch.nn.functional.pad(grad, (0, 0, width - 1, width - 1))
        grad_padded = wide[:, width - 1 : width - 1 + padded.shape[1]] * weight[0]
        for j in range(1, width):
            grad_padded = torch.addcmul(
                grad_padded, wide[:, width - 1 - j : width - 1 - j + padded.shape[1]], weight[j]
            )
        taps = [(grad * padded[:, j : j + tokens]).sum((0, 1)) for j in range(width)]
        return grad_padded, torch.stack(taps)
