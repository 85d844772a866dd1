"""The short convolution against torch's, in parts, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.nn import ShortConv
from nestlearn.nn.conv import BLOCK, CausalTaps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def expected(conv: ShortConv, x: Tensor) -> Tensor:
    padded = F.pad(x.mT, (conv.width - 1, 0))
    y = F.conv1d(padded, conv.weight.mT.unsqueeze(1), groups=conv.channels).mT
    return F.silu(y) if conv.silu else y


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 2 * BLOCK + 5])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_it_is_a_causal_depthwise_convolution(width: int, tokens: int, silu: bool) -> None:
    conv, x = ShortConv(6, width, silu).double(), normal(2, tokens, 6).requires_grad_()
    y, tail = conv(x)
    wanted = expected(conv, x)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    before = F.pad(x, (0, 0, width - 1, 0))
    assert torch.equal(tail, before[:, tokens:])
    weights = [x, conv.weight]
    coefficients = normal(2, tokens, 6, seed=1)
    for mine, theirs in zip(
        torch.autograd.grad((y * coefficients).sum(), weights),
        torch.autograd.grad((wanted * coefficients).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 2, 3, 9])
def test_parts_equal_the_whole(cut: int) -> None:
    conv, x = ShortConv(6, 4, silu=True).double(), normal(2, 12, 6)
    first, tail = conv(x[:, :cut])
    second, end = conv(x[:, cut:], tail)
    whole, last = conv(x)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(end, last)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("tokens", [2, 5])
def test_first_and_second_derivatives(tokens: int, silu: bool) -> None:
    arguments = tuple(x.requires_grad_() for x in (normal(2, tokens, 3), normal(2, 3, 3, seed=1), normal(4, 3, seed=2)))

    def function(x: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
        return CausalTaps.apply(x, tail, weight, silu)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("silu", [True, False])
def test_a_step_is_the_forward_pass_of_one_token(width: int, silu: bool) -> None:
    conv, x = ShortConv(3, width, silu).double(), torch.randn(2, 7, 3, dtype=torch.float64)
    whole, end = conv(x)
    outputs, tail = [], None
    for token in x.split(1, 1):
        y, tail = conv.step(token, tail)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(tail, end)
