"""Differentiable functions whose gradient is worth writing by hand. Each is differentiable again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["gelu", "silu"]
Gradients = tuple[Tensor | None, ...]


def gradient_again(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> Gradients:
    """The gradient of a function by autograd, for a caller that differentiates it once more."""
    # New nodes: an input may be a function of another, and each gradient is a partial one.
    own = [None if x is None else x.view_as(x) for x in inputs]
    leaves = [x for x in own if x is not None and x.requires_grad]
    outputs = function(*own)
    pairs = zip((outputs,) if isinstance(outputs, Tensor) else outputs, grads, strict=True)
    ends, given = zip(*(pair for pair in pairs if pair[1] is not None), strict=True)
    # A fresh memory has no entering weights, and so no use for their coefficient.
    found = iter(torch.autograd.grad(ends, leaves, given, create_graph=True, allow_unused=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in own)


def product(x: Float[Tensor, "*#b n k"], y: Float[Tensor, "*#b k m"]) -> Float[Tensor, "*_ n m"]:
    """``x @ y``; for plain batches of matrices without the reshapes that ``@`` records for autograd."""
    if x.dim() == 3 and y.dim() == 3 and x.shape[0] == y.shape[0]:
        return torch.bmm(x, y)
    return x @ y


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
        inverse = _inverse(strict)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


def _inverse(strict: Tensor) -> Tensor:
    eye = torch.eye(strict.shape[-1], dtype=strict.dtype, device=strict.device)
    return torch.linalg.solve_triangular(strict, eye.expand_as(strict), upper=False, unitriangular=True)


def unit_lower_inverse(strict: Float[Tensor, "*b c c"]) -> Float[Tensor, "*b c c"]:
    """``(I + strict)^-1``."""
    return UnitLowerInverse.apply(strict)  # type: ignore[return-value]


class SolvedErasure(torch.autograd.Function):
    """``-(I + L)^-1 diag(eta)``, ``L = diag(eta) [before * X X^T]``: the triangular system of the delta rule, solved.

    ``before`` is strictly lower-triangular. One gradient for the chain saves half of its passes over c x c matrices,
    and ``d X = (g + g^T) X`` one product of two.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Tensor, eta: Tensor) -> Tensor:
        gram = product(x, x.mT)
        strict = (before * gram).mul_(eta.unsqueeze(-1))
        inverse = _inverse(strict)
        ctx.save_for_backward(x, before, eta, gram, inverse)
        return inverse * -eta.unsqueeze(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, before, eta, gram, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # Both again, as functions of the inputs.
            gram = product(x, x.mT)
            inverse = unit_lower_inverse(before * gram * eta.unsqueeze(-1))
        # Above its diagonal ``before`` is 0 and takes no gradient; what stands there is cut off below.
        through = product(product(inverse.mT, grad * eta.unsqueeze(-2)), inverse.mT)  # minus and minus
        held = through * before
        grad_eta = torch.linalg.vecdot(held, gram) - (grad * inverse).sum(-2)
        if torch.is_grad_enabled():
            held = held * eta.unsqueeze(-1)
            grad_before = (through * gram * eta.unsqueeze(-1)).tril(-1)
        else:
            held.mul_(eta.unsqueeze(-1))
            grad_before = through.mul_(gram).mul_(eta.unsqueeze(-1)).tril_(-1)
        return product(held + held.mT, x), grad_before.sum_to_size(before.shape), grad_eta.sum_to_size(eta.shape)


def solved_erasure(
    x: Float[Tensor, "*b c d"], before: Float[Tensor, "*#b c c"], eta: Float[Tensor, "*#b c"]
) -> Float[Tensor, "*b c c"]:
    """``-(I + diag(eta) [before * X X^T])^-1 diag(eta)``; leading dimensions broadcast to those of x."""
    return SolvedErasure.apply(x, before, eta)  # type: ignore[return-value]


def activate(name: Activation, z: Tensor) -> Tensor:
    """The activation of a deep memory: exact GELU ``z Phi(z)`` or SiLU."""
    return F.gelu(z) if name == "gelu" else F.silu(z)


_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


class GeluAndError(torch.autograd.Function):
    """``h = gelu(z)`` and ``b = back * gelu'(z)``, an error carried back; ``gelu' = Phi + z phi``.

    With the slope kept, the gradient needs no error function: ``d back = g_b gelu'`` and
    ``d z = g_h gelu' + g_b back gelu''``, ``gelu'' = phi (2 - z^2)``. On a CPU the passes run over blocks that stay in
    a core's cache, where a temporary costs less than its arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, back: Tensor, need_h: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        z, back = z.contiguous(), back.contiguous()
        one = torch.ones((), dtype=z.dtype, device=z.device)
        h, error, slope = torch.empty_like(z), torch.empty_like(z), torch.empty_like(z)
        for z_i, back_i, h_i, error_i, slope_i in _blocks(z, back, h, error, slope):
            if need_h:
                torch.ops.aten.gelu(z_i, out=h_i)
            torch.ops.aten.gelu_backward(one.expand_as(z_i), z_i, grad_input=slope_i)
            torch.mul(back_i, slope_i, out=error_i)
        ctx.save_for_backward(z, back, slope)
        return h, error

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_error: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        z, back, slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            grad_z, grad_back = _gelu_and_error_gradient(z, back, grad, grad_error)
            return grad_z, grad_back, None
        if grad_error is None:
            return None if grad is None else grad * slope, None, None
        grad_error = grad_error.contiguous()
        grad = None if grad is None else grad.contiguous()
        grad_z, grad_back = torch.empty_like(z), torch.empty_like(z)
        tensors = (z, back, slope, grad_error, grad_z, grad_back)
        for i, (z_i, back_i, slope_i, error_i, grad_z_i, grad_back_i) in enumerate(_blocks(*tensors)):
            torch.mul(error_i, slope_i, out=grad_back_i)
            square = torch.mul(z_i, z_i, out=grad_z_i)
            density = torch.mul(square, -0.5).exp_().mul_(error_i).mul_(back_i)
            square.neg_().add_(2).mul_(density).mul_(_INV_SQRT_2PI)
            if grad is not None:
                grad_z_i.addcmul_(_block(grad, i), slope_i)
        return grad_z, grad_back, None


def _gelu_and_error_gradient(
    z: Tensor, back: Tensor, grad: Tensor | None, grad_error: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The same gradient in operations that can be differentiated again."""
    density = torch.exp(z * z * -0.5) * _INV_SQRT_2PI
    slope = 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * density
    through = None if grad is None else grad * slope
    if grad_error is None:
        return through, None
    curved = grad_error * back * density * (2 - z * z)
    return curved if through is None else through + curved, grad_error * slope


def activate_with_error(name: Activation, z: Tensor, back: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``act(z)`` and ``back * act'(z)``: the way forward and an error's way back. ``h``: act(z), if at hand."""
    if name == "gelu":
        joint, error = GeluAndError.apply(z, back, h is None)  # type: ignore[misc]
        return joint if h is None else h, error
    gate = torch.sigmoid(z)
    h = z * gate if h is None else h
    return h, back * (gate + h * (1 - gate))


BLOCK_ELEMENTS = 1 << 17
"""Elements worked on at once on a CPU: a few such blocks of float32 fit the second-level cache of a core."""


def _block(x: Tensor, i: int) -> Tensor:
    """The i-th block of a contiguous tensor, flat; all of it on an accelerator or while compiling."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x
    return x.view(-1)[i * BLOCK_ELEMENTS : (i + 1) * BLOCK_ELEMENTS]


def _blocks(*tensors: Tensor):
    """Corresponding blocks of contiguous tensors of one shape."""
    first = tensors[0]
    whole = first.device.type != "cpu" or torch.compiler.is_compiling()
    count = 1 if whole else -(-first.numel() // BLOCK_ELEMENTS)
    return (tuple(_block(x, i) for x in tensors) for i in range(count))


class UnitNorm(torch.autograd.Function):
    """``y = x / sqrt(||x||^2 + eps)`` over the last dimension; gradient ``(g - y <y, g>) / sqrt(||x||^2 + eps)``.

    The scale is an output too: the gradient of the gradient has to see that it depends on x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, any_size: bool) -> tuple[Tensor, Tensor]:
        if any_size:
            # The square of a large finite number is not finite: the scale is taken out first.
            largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).clamp_(min=1)
            small = x / largest
            scale = torch.rsqrt(torch.linalg.vecdot(small, small).unsqueeze(-1) + eps / largest.square())
            y, scale = small.mul_(scale), scale / largest
        else:
            scale = torch.rsqrt(torch.linalg.vecdot(x, x).unsqueeze(-1) + eps)
            y = x * scale
        ctx.save_for_backward(y, scale)
        ctx.set_materialize_grads(False)
        return y, scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_scale: Tensor | None) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        y, scale = ctx.saved_tensors
        total = None
        if grad is not None:
            along = (y * grad).sum(-1, keepdim=True)
            total = torch.addcmul(grad, y, along, value=-1)
            total = total * scale if torch.is_grad_enabled() else total.mul_(scale)
        if grad_scale is not None:
            part = -grad_scale * scale.square() * y
            total = part if total is None else total + part
        return total, None, None


def unit_norm(x: Float[Tensor, "... d"], eps: float = 1e-6, *, any_size: bool = False) -> Float[Tensor, "... d"]:
    """``x / sqrt(||x||^2 + eps)``: L2-normalized, smooth at 0. ``any_size``: also where squares overflow."""
    return UnitNorm.apply(x, eps, any_size)[0]  # type: ignore[index]


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
