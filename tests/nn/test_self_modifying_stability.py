"""No gate the layer can emit makes it expand: saturated gates, long texts, low precision; long training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nestlearn.nn import SelfModifyingConfig, SelfModifyingTitans

BOTH: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"momentum": True},
    "l2": {"objective": "l2"},
    "gradient-descent": {"delta": False},
    "gradient-descent-momentum": {"delta": False, "momentum": True},
    "no-retention-momentum": {"retention": False, "momentum": True},
    "normalized": {"step_size": "normalized", "max_step": 2.0},
    "normalized-momentum": {"step_size": "normalized", "max_step": 2.0, "momentum": True},
    "given-values": {"self_values": False},
    "to-zero": {"retain_to": "zero"},
    "as-printed": {"retain_to": "zero", "read": "chunk", "objective": "l2", "momentum": True},
}
ONE: dict[str, dict[str, dict[str, Any]]] = {
    "mlp": {
        "any-step": {"max_step": 50.0},
        "l2-momentum-normalized": {"objective": "l2", "momentum": True, "step_size": "normalized"},
        "per-map": {"step_size": {"in": "normalized", "out": "proximal"}, "max_step": 2.0},
    },
    "matrix": {
        "static": {"adaptive": ()},
        "raw": {"step_size": "raw"},
        "l2-momentum": {"objective": "l2", "momentum": True},
        "l2-to-zero": {"objective": "l2", "retain_to": "zero"},
    },
}
VARIANTS = [(form, name) for form in ONE for name in (*BOTH, *ONE[form])]
LENGTHS = [1024, pytest.param(32768, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]


def build(form: str, variant: str, **more: Any) -> SelfModifyingTitans:
    settings: dict[str, Any] = {"expansion": 2} if form == "mlp" else {}
    return SelfModifyingConfig(form, **settings, **{**BOTH, **ONE[form]}[variant], **more).build(8, 1)  # type: ignore[arg-type]


def saturated(form: str, variant: str, by: str) -> SelfModifyingTitans:
    """A layer whose gates are driven to their ends by its inputs, or stand fully open."""
    layer = build(form, variant)
    with torch.no_grad():
        layer.streams.weight.normal_(std=0.35)
        if by == "inputs":
            layer.eta_vector.normal_(std=3)
            layer.alpha_vector.normal_(std=3)
        else:
            layer.eta_bias.fill_(50)
            layer.alpha_bias.fill_(3 if variant.startswith("gradient") else 50)
        if layer.beta_gate is not None:
            layer.beta_gate.bias.fill_(20)
    return layer.bfloat16()


def streams(length: int) -> Tensor:
    """Three rows of large inputs: random, constant and alternating."""
    rows = (torch.randn(length, 8), torch.randn(1, 8).expand(length, 8), torch.randn(2, 8).repeat(length // 2, 1))
    return (100 * torch.stack(rows)).bfloat16()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("form", "variant"), VARIANTS)
def test_saturated_gates_stay_finite_forward_and_backward(form: str, variant: str, length: int) -> None:
    for by in ("inputs", "open gates"):
        layer, x = saturated(form, variant, by), streams(length).requires_grad_()
        y, state = layer(x)
        assert torch.isfinite(y).all() and state is not None
        for group in (state.memory, state.projections):
            assert group is None or all(w.abs().max() < 1e4 for w in group.params.values())
        gradients = torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()], allow_unused=True)
        assert all(torch.isfinite(g).all() for g in gradients if g is not None)


@pytest.mark.parametrize("alpha", [0.0, 2.0, 6.0])
def test_the_printed_rule_never_makes_a_matrix_longer(alpha: float) -> None:
    """L2, retention to zero: the operator norm of H stays at most 1 whatever the gates."""
    layer = build("matrix", "l2-to-zero", chunk_size=16).double()
    x = torch.randn(2, 400, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.streams.weight.normal_(std=0.35)
        layer.alpha_bias.fill_(alpha)
        layer.eta_bias.fill_(50.0)
        _, state = layer(x)
    assert torch.linalg.matrix_norm(state.memory.params["W"], 2).max() <= 1 + 1e-9


@pytest.mark.parametrize("variant", [*BOTH, *ONE["mlp"]])
def test_gradients_of_carried_weights_are_bounded(variant: str) -> None:
    """The first span gets gradients of later ones through the carried weights alone, however large theirs are."""
    layer = build("mlp", variant, projection_chunk_size=64)
    x = torch.randn(1, 192, 8, requires_grad=True)
    y, _ = layer(x)
    (gradient,) = torch.autograd.grad(1e12 * y[:, 128:].square().sum(), x)
    own, earlier = gradient[:, 128:].abs().max(), gradient[:, :64].abs().max()
    assert own > 1e10 and 0 < earlier < 1e9


def train(steps: int, length: int) -> tuple[float, float]:
    """First and last loss of one layer that learns to repeat what it read 16 tokens before."""
    layer = SelfModifyingConfig(expansion=2).build(32, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        x = torch.randn(1, length, 32)
        y = layer(x, return_state=False)[0]
        loss = (y[:, 16:] - x[:, :-16]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def test_a_little_training_lowers_the_loss() -> None:
    first, last = train(30, 128)
    assert last < first


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_steps_stay_finite() -> None:
    first, last = train(2000, 2048)
    assert last < first
