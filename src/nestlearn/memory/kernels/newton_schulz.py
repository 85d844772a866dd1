"""Newton-Schulz orthogonalization, used by memories and by optimizers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Coefficients = tuple[float, float, float]

COEFFICIENTS: Coefficients = (3.4445, -4.7750, 2.0315)
"""The quintic of Muon: steep at 0, so that small singular values rise to about 1 within five steps."""

POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
"""One quintic per step, each the best of its degree for the interval that the steps before it leave, from singular
values of 1e-3 on (Polar Express, arXiv 2505.16932); the last one repeats."""

TINY = 1e-7
"""Matrices of a Frobenius norm below this go to zero instead of to an orthogonal matrix."""


BLOCK_ROWS, LEAST_ROWS = 128, 384
"""On a processor, products of so many rows per thread are made by blocks of at least 128: in bfloat16 and with one
thread 11 % less time for 446 x 446 and 40 % for 1024 x 4096 (benchmarks/newton_schulz.py)."""


def per_step(coefficients: Coefficients | Sequence[Coefficients]) -> Sequence[Coefficients]:
    """One triple per step, the last of which repeats; a single triple is that of every step."""
    return [coefficients] if isinstance(coefficients[0], (int, float)) else coefficients  # pyright: ignore[reportReturnType]


def self_product(x: Float[Tensor, "m n"]) -> Float[Tensor, "m m"]:
    """``x xᵀ`` by blocks: of a symmetric matrix, only those on and below the diagonal are multiplied. No gradients."""
    product = x.new_empty(x.shape[0], x.shape[0])
    _fill_self_product(x, product)
    return product


def _fill_self_product(x: Float[Tensor, "m n"], out: Float[Tensor, "m m"]) -> None:
    half = x.shape[0] // 2
    if half < BLOCK_ROWS:
        torch.mm(x, x.mT, out=out)
        return
    _fill_self_product(x[:half], out[:half, :half])
    _fill_self_product(x[half:], out[half:, half:])
    torch.mm(x[half:], x[:half].mT, out=out[half:, :half])
    out[:half, half:] = out[half:, :half].mT


def newton_schulz(
    x: Float[Tensor, "*b m n"],
    steps: int = 5,
    coefficients: Coefficients | Sequence[Coefficients] = COEFFICIENTS,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*b m n"]:
    """The matrix moved toward ``U V^T`` of its singular value decomposition ``U diag(s) V^T``: Muon's quintic.

        X_0 = X / ||X||_F,     X_{i+1} = a X_i + (b X_i X_i^T + c (X_i X_i^T)^2) X_i

    It is used where NL Eq. 42-44 ask for Newton-Schulz; the iteration that Eq. 44 prints is `printed_iteration`.

    Each step applies ``a s + b s^3 + c s^5`` to every singular value s. After five, those that were at least 1.43e-3 of
    the Frobenius norm lie in [0.65, 1.21]; with `POLAR_EXPRESS`, those of at least 9.6e-4 in [0.85, 1.13]. Smaller ones
    are still on their way up. So a matrix of condition number 100 is in that range whatever its spectrum if min(m, n)
    is at most 50 (110 with `POLAR_EXPRESS`), and with singular values evenly spread on a logarithmic scale up to 450
    (1000). A zero matrix stays zero, with finite gradients.

    Args:
        x: matrices; the smaller of m and n sets the cost.
        steps: iterations; 0 only normalizes.
        coefficients: (a, b, c), or one such triple per step, the last of which repeats.
        dtype: of the iterations and of the result, that of `x` by default. Half precision loses small singular values.

    Example:
        >>> import torch
        >>> x = torch.diag(torch.tensor([4.0, 1.0, 0.5]))
        >>> s = torch.linalg.svdvals(newton_schulz(x))
        >>> bool((s > 0.6).all() and (s < 1.3).all())
        True
        >>> s = torch.linalg.svdvals(newton_schulz(x, coefficients=POLAR_EXPRESS))
        >>> bool((s > 0.87).all() and (s < 1.13).all())
        True
    """
    triples = per_step(coefficients)
    # A large matrix first shrinks by its largest entry: its squares would not be finite.
    x = x / x.detach().abs().amax((-2, -1), keepdim=True).clamp(min=1)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x * (x.square().sum((-2, -1), keepdim=True) + TINY**2).rsqrt()
    stack = (x if dtype is None else x.to(dtype)).reshape(-1, *x.shape[-2:])
    # A product of batches of one is slower than one of matrices on a processor, by a third in bfloat16.
    single = stack.shape[0] == 1
    stack, add_product = (stack[0], torch.addmm) if single else (stack, torch.baddbmm)
    blocks = single and x.device.type == "cpu" and not torch.is_grad_enabled()
    blocks = blocks and x.shape[-2] >= LEAST_ROWS * torch.get_num_threads()  # small blocks leave threads idle
    for i in range(steps):
        a, b, c = triples[min(i, len(triples) - 1)]
        gram = self_product(stack) if blocks else stack @ stack.mT
        if blocks:
            polynomial = self_product(gram).mul_(c).add_(gram, alpha=b)
        else:
            polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        stack = add_product(stack, polynomial, stack, beta=a)
    x = stack.reshape(x.shape)
    return x.mT if tall else x


def printed_iteration(
    gradient: Float[Tensor, "*b m n"], steps: int = 100, step_size: float = 0.05
) -> Float[Tensor, "*b m n"]:
    """The iteration as NL Eq. 44 prints it. Its limit is not orthogonal, unless g is scaled.

        O_0 = g,     O_{i+1} = O_i - ζ (O_i - g + 2 O_i (O_iᵀ O_i - I))

    Each singular value s of g moves by itself to the root σ of ``2 σ³ - σ = s``: 1 stays 1, 14 goes to 2.
    `newton_schulz` sends all to about 1. Values below 1 end in [0.71, 1], so
    `nestlearn.optim.OrthogonalDescent` divides g by its norm.

    Args:
        gradient: g.
        steps: iterations.
        step_size: ζ. It must stay below ``2 / (6 s² - 1)`` for the largest singular value s above 1, where the
            iteration starts; otherwise it can diverge.

    Example:
        >>> import torch
        >>> printed_iteration(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).diagonal().tolist()[0]
        1.0
    """
    result = gradient
    for _ in range(steps):
        gram = result.mT @ result
        result = result - step_size * (result - gradient + 2 * (result @ gram - result))
    return result
