"""The frozen feed-forward network."""

import pytest
import torch
from torch.nn import functional as F

from nestlearn.nn import FeedForward


def test_both_activations_follow_their_formula():
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    swiglu, gelu = FeedForward(12, 4).double(), FeedForward(12, 4, "gelu").double()
    gated = F.silu(x @ swiglu.gate.weight.T) * (x @ swiglu.up.weight.T)
    torch.testing.assert_close(swiglu(x)[0], gated @ swiglu.down.weight.T)
    torch.testing.assert_close(gelu(x)[0], F.gelu(x @ gelu.up.weight.T) @ gelu.down.weight.T)


def test_both_have_the_same_size():
    count = [sum(p.numel() for p in FeedForward(12, 4, a).parameters()) for a in ("swiglu", "gelu")]
    assert count == [8 * 12 * 12] * 2


def test_flops_are_two_per_weight():
    assert FeedForward(12, 4).flops_per_token(7) == 16 * 12 * 12


def test_bad_sizes():
    with pytest.raises(ValueError, match="relu"):
        FeedForward(12, 4, "relu")
    with pytest.raises(ValueError, match="at least 1"):
        FeedForward(12, 0)
