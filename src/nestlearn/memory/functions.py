"""Differentiable functions whose gradient is worth writing by hand. Each is differentiable again."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["gelu", "silu"]


class SegmentProducts(torch.autograd.Function):
    """``D[t, s] = a_{s+1} ... a_t`` for s <= t, else 0. Products, not exponentials of logs: ``a = 0`` is legal.

    Gradient: ``d a_u = sum_{s < u <= t} g[t, s] D[t, u] D[u-1, s]``, exact at zeros as well.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        c = a.shape[-1]
        strict = torch.ones(c, c, dtype=torch.bool, device=a.device).tril(-1)
        factors = torch.where(strict, a.unsqueeze(-1), 1)
        products = torch.cumprod(factors, -2).tril()
        ctx.save_for_backward(products)
        return products

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (products,) = ctx.saved_tensors
        through = products.mT @ grad.tril()
        inner = (through[..., 1:, :] * products[..., :-1, :]).tril().sum(-1)
        return F.pad(inner, (1, 0))


def segment_products(a: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c c"]:
    """Lower-triangular products ``D[t, s] = a_{s+1} ... a_t`` with ones on the diagonal."""
    return SegmentProducts.apply(a)  # type: ignore[return-value]


class UnitLowerInverse(torch.autograd.Function):
    """``(I + L)^-1`` for a strictly lower-triangular L; gradient ``-T^T g T^T``, strictly lower.

    One inverse serves all right-hand sides as matrix products, which run several times faster than triangular solves.
    """

    @staticmethod
    def forward(ctx: Any, strict: Tensor) -> Tensor:
        eye = torch.eye(strict.shape[-1], dtype=strict.dtype, device=strict.device)
        inverse = torch.linalg.solve_triangular(strict, eye.expand_as(strict), upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


def unit_lower_inverse(strict: Float[Tensor, "*b c c"]) -> Float[Tensor, "*b c c"]:
    """``(I + strict)^-1``."""
    return UnitLowerInverse.apply(strict)  # type: ignore[return-value]


def activate(name: Activation, z: Tensor) -> Tensor:
    """The activation of a deep memory: exact GELU ``z Phi(z)`` or SiLU."""
    return F.gelu(z) if name == "gelu" else F.silu(z)


_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


class GeluSlopeProduct(torch.autograd.Function):
    """``a gelu'(z)`` with ``gelu' = Phi + z phi``; its own derivative is ``gelu''(z) = phi (2 - z^2)``.

    torch's kernel for the first derivative is one fused pass; its second derivative is not, so that is written here.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(a, z)
        return torch.ops.aten.gelu_backward(a, z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, z = ctx.saved_tensors
        if torch.is_grad_enabled():
            square = z * z
            curvature = torch.exp(square * -0.5) * (2 - square) * _INV_SQRT_2PI
            return GeluSlopeProduct.apply(grad, z), grad * a * curvature  # type: ignore[return-value]
        # Without a second derivative to follow, the same in place: on a CPU each new temporary costs more than its sum.
        square = z * z
        curvature = torch.exp(square * -0.5).mul_(square.sub_(2)).mul_(a).mul_(grad).mul_(-_INV_SQRT_2PI)
        return torch.ops.aten.gelu_backward(grad, z), curvature


def slope_product(name: Activation, a: Tensor, z: Tensor) -> Tensor:
    """``a act'(z)``: an error carried back through the activation."""
    if name == "gelu":
        return GeluSlopeProduct.apply(a, z)  # type: ignore[return-value]
    gate = torch.sigmoid(z)
    return a * (gate + z * gate * (1 - gate))


class UnitNorm(torch.autograd.Function):
    """``y = x / sqrt(||x||^2 + eps)`` over the last dimension; gradient ``(g - y <y, g>) / sqrt(||x||^2 + eps)``.

    The scale is an output too: the gradient of the gradient has to see that it depends on x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(torch.linalg.vecdot(x, x).unsqueeze(-1) + eps)
        y = x * scale
        ctx.save_for_backward(y, scale)
        ctx.set_materialize_grads(False)
        return y, scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_scale: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        y, scale = ctx.saved_tensors
        total = None
        if grad is not None:
            along = (y * grad).sum(-1, keepdim=True)
            total = torch.addcmul(grad, y, along, value=-1) * scale
        if grad_scale is not None:
            part = -grad_scale * scale.square() * y
            total = part if total is None else total + part
        return total, None


def unit_norm(x: Float[Tensor, "... d"], eps: float = 1e-6) -> Float[Tensor, "... d"]:
    """``x / sqrt(||x||^2 + eps)``: L2-normalized, smooth at 0."""
    return UnitNorm.apply(x, eps)[0]  # type: ignore[index]


class LimitGradient(torch.autograd.Function):
    """The identity; its gradient is scaled down to norm ``limit`` per matrix if larger, and 0 if not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        norm = torch.linalg.matrix_norm(grad, keepdim=True)
        return torch.where(torch.isfinite(norm), grad * (ctx.limit / norm).clamp(max=1), 0), None


def limit_gradient(x: Float[Tensor, "*b out in"], limit: float) -> Float[Tensor, "*b out in"]:
    """``x`` itself, cut off from gradients beyond ``limit``.

    Where a recurrence is chaotic, gradients through it grow without bound and mean nothing; here they stay finite.
    """
    return LimitGradient.apply(x, limit)  # type: ignore[return-value]


class Potential(torch.autograd.Function):
    """``value`` with the given gradient ``slope`` with respect to r; the slope carries all further derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(r: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return grad.unsqueeze(-1) * slope, None, None


def potential(
    r: Float[Tensor, "*b d"], value: Float[Tensor, "*b"], slope: Float[Tensor, "*b d"]
) -> Float[Tensor, "*b"]:
    """A loss of value ``value`` whose gradient with respect to ``r`` is ``slope``, a differentiable function of r."""
    return Potential.apply(r, value, slope)  # type: ignore[return-value]
