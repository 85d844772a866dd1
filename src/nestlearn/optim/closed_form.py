"""Adam and AdaGrad as the best memories of past gradients, in closed form (NL Appendix B).

A memory m of gradients g_i with the value P minimizes a ridge regression, element by element or with matrices:

    Σ_i w_i (m g_i - P)² + λ m²        m* = P M / (H + λ),      M = Σ w_i g_i, H = Σ w_i g_i²      (NL Eq. 101-103)
    Σ_i w_i ‖g_iᵀ m - I‖² + λ ‖m‖²     P m* = P (H + λ I)⁻¹ M,  M = Σ w_i g_i, H = Σ w_i g_i g_iᵀ  (NL Eq. 106-110)

The second is NL's with g transposed and the value P outside: as printed, ``m g`` and the [out, out] matrix P have no
common shape unless the layer is square.

The functions are these optima; `AdamMemory` and `AdaGradMemory` step along them. What of it is an optimizer of torch:
see `adam_memory` and `adagrad_memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.optim.matrices import Matrices, take_step
from nestlearn.optim.matrix_optimizer import MatrixOptimizer, fractions, not_negative, zeros
from nestlearn.optim.preconditioners import learn, multiply, square_states, where_finite
from nestlearn.optim.wrapper import whole_number

Value = Literal["root", "square"]


def adam_memory(
    first: Float[Tensor, "*s"], second: Float[Tensor, "*s"], value: Float[Tensor, "*s"], ridge: float | Tensor = 0.0
) -> Float[Tensor, "*s"]:
    """``m* = P M / (H + λ)``: the memory that maps each element's gradients best to P (NL Eq. 101-103).

    With averages M and H of weights ``(1 - β) β^(t-i) / (1 - β^t)``:

    - ``P = √H`` and ``λ = ε √H`` is the update of `torch.optim.Adam` with β1 = β2 = β: ``M / (√H + ε)``.
    - ``P = √H`` and a constant λ is Adam's where H is much larger than λ (NL Eq. 105, whose ε it is).
    - ``P = H`` and ``λ = 0`` is M: plain momentum (NL Eq. 104).

    Betas that differ give M and H weights of their own (NL Eq. 102): the same expression is then Adam's with these
    betas, but the minimizer of no one regression. With g itself for M and the sum of g² for H it is
    `torch.optim.Adagrad`. Where H + λ is 0 there was no gradient, and the memory is 0.

    Args:
        first: M.
        second: H.
        value: P.
        ridge: λ, a number or one per element.

    Example:
        >>> gradients = torch.tensor([[1.0, 2.0], [3.0, -2.0]])  # two steps of two elements
        >>> first, second = gradients.mean(0), gradients.square().mean(0)
        >>> adam_memory(first, second, second.sqrt())
        tensor([0.8944, 0.0000])
    """
    return value * first / (second + ridge).clamp(min=torch.finfo(second.dtype).tiny)


def adagrad_memory(
    first: Float[Tensor, "out in"],
    second: Float[Tensor, "out out"],
    value: Float[Tensor, "out out"],
    ridge: float = 0.0,
) -> Float[Tensor, "out in"]:
    """``P (H + λ I)⁻¹ M``: the same with matrices, as an update of the weights (NL Eq. 106-111).

    With H the sum of ``g gᵀ`` and ``P = H^(1/2)`` it is ``H^(-1/2) M``: AdaGrad with a full matrix and momentum, and
    for weights of one element `torch.optim.Adagrad`. `AssociativeMomentum` with ``Whitening("rows", beta=None)`` is
    this for ``M = g``; with momentum it divides each gradient before it is added, not their sum.

    Args:
        first: M.
        second: H.
        value: P.
        ridge: λ.

    Example:
        >>> second = torch.diag(torch.tensor([4.0, 9.0]))
        >>> adagrad_memory(torch.ones(2, 1), second, second.sqrt())
        tensor([[0.5000],
                [0.3333]])
    """
    damped = second + ridge * torch.eye(len(second), dtype=second.dtype, device=second.device)
    return value @ torch.linalg.solve(damped, first)


class AdamMemory(MatrixOptimizer):
    """Steps along the best element-wise memory of past gradients: ``W ← W - lr P M / (H + λ)`` (NL Eq. 101-105).

    M and H are moving averages of g and g², corrected for their start at zero. With the defaults it is
    `torch.optim.AdamW` (which is faster); other values and ridges are what the general form adds.

    Args:
        params: parameters, (name, parameter) pairs, or groups (`MatrixOptimizer`).
        lr: learning rate, also AdamW's of parameters that are no matrices.
        betas: of M and of H.
        value: P: ``"root"`` for √H, ``"square"`` for H, plain momentum but for the ridge.
        ridge: λ; None: ``ε √H``, in which Adam's ε is exactly that.
        eps: ε.
        weight_decay: decoupled.
        adamw: settings of AdamW (`MatrixOptimizer`).

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1, 2))
        >>> optimizer = AdamMemory([weight], lr=0.1)
        >>> weight.grad = torch.tensor([[5.0, -0.01]])
        >>> optimizer.step()
        >>> weight.detach()
        tensor([[-0.1000,  0.1000]])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        value: Value = "root",
        ridge: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        own = {"betas": betas, "value": value, "ridge": ridge, "eps": eps}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **own}, adamw)

    def check_group(self, group: Mapping[str, Any]) -> None:
        fractions("betas", group["betas"], 2)
        not_negative("eps", group["eps"], "the ridge relative to √H")
        if group["value"] not in get_args(Value):
            raise ValueError(f"value is {group['value']!r}; it must be one of {', '.join(get_args(Value))}.")
        if group["ridge"] is not None:
            not_negative("ridge", group["ridge"], "added to H")

    def new_state(self, group: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
        return {"first_moment": zeros(like), "second_moment": zeros(like)}

    def update(self, group: Mapping[str, Any], matrices: Matrices) -> None:
        beta1, beta2 = group["betas"]
        firsts, seconds = matrices.state("first_moment"), matrices.state("second_moment")
        torch._foreach_lerp_(firsts, matrices.gradients, 1 - beta1)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, matrices.gradients, matrices.gradients, value=1 - beta2)
        updates = []
        for first, second in zip(firsts, seconds, strict=True):
            square = second / (1 - beta2**matrices.step)
            root = square.sqrt()
            ridge = group["eps"] * root if group["ridge"] is None else group["ridge"]
            value = root if group["value"] == "root" else square
            updates.append(adam_memory(first / (1 - beta1**matrices.step), square, value, ridge))
        take_step(matrices.weights, updates, group)


class AdaGradMemory(MatrixOptimizer):
    """Steps along the best memory with matrices: ``W ← W - lr H^(1/2) (H + λ I)⁻¹ M`` (NL Eq. 106-111).

    ``H = Σ g gᵀ`` over all steps, ``M ← α M + g``: AdaGrad with a full matrix and momentum. λ is `ridge` times the mean
    eigenvalue of H: a direction that H hardly has, by rounding or because it came within a period, is divided by
    ``2 √λ`` at least. Cost: 4 m operations per
    element at every step and one eigendecomposition in float64 (about 10 m³) every `period` steps, m the number of
    rows; state: 2 m² numbers per matrix and one per element.

    Args:
        params: parameters, (name, parameter) pairs, or groups (`MatrixOptimizer`).
        lr: learning rate, also AdamW's of parameters that are no matrices.
        momentum: α.
        ridge: λ relative to the mean eigenvalue of H.
        period: steps between two decompositions; the first is at the first step.
        weight_decay: decoupled.
        adamw: settings of AdamW (`MatrixOptimizer`).

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1, 2))
        >>> optimizer = AdaGradMemory([weight], lr=1.0)
        >>> weight.grad = torch.tensor([[3.0, 4.0]])  # of norm 5
        >>> optimizer.step()
        >>> weight.detach()
        tensor([[-0.5994, -0.7992]])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        *,
        momentum: float = 0.0,
        ridge: float = 1e-3,
        period: int = 1,
        weight_decay: float = 0.0,
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        own = {"momentum": momentum, "ridge": ridge, "period": period}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **own}, adamw)

    def check_group(self, group: Mapping[str, Any]) -> None:
        fractions("momentum", (group["momentum"],), 1)
        whole_number("period", group["period"], "steps between two decompositions")
        if not group["ridge"] > 0:
            raise ValueError(f"ridge is {group['ridge']}; it must be positive: empty directions are divided by it.")

    def new_state(self, group: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": zeros(like), **square_states(like, group["kernels"], "rows")}

    def update(self, group: Mapping[str, Any], matrices: Matrices) -> None:
        def solution(gram: Tensor) -> Tensor:
            values, vectors = torch.linalg.eigh(gram.double())
            values = values.clamp(min=0.0)
            damped = values + group["ridge"] * values.mean(-1, keepdim=True)
            factors = values.sqrt() / damped.clamp(min=torch.finfo(damped.dtype).tiny)
            return ((vectors * factors.unsqueeze(-2)) @ vectors.mT).to(gram.dtype)

        complete = matrices.whole(matrices.gradients)
        learn(matrices, complete, "rows", (1.0, 1.0), group["period"], lambda gram: where_finite(gram, solution))
        momenta = matrices.state("momentum_buffer")
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, matrices.gradients)
        take_step(matrices.weights, matrices.own_parts(multiply(matrices, matrices.whole(momenta), "rows")), group)
