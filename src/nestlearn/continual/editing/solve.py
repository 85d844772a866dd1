"""Closed forms of edits: the change of a linear map that gives wanted outputs at some keys, and little elsewhere.

Keys are rows, K [n, in], and R [n, out] are the changes of the output that are wanted at them. All methods write

    dW = Rᵀ G,    G = the first n rows of  (S P Sᵀ + mu I)⁻¹ S P,    S = [K; K_p]                                (1)

P [in, in] is symmetric and keeps changes away from general inputs, and K_p are keys of earlier edits, at which nothing
may change. By the push-through identity, (1) is the solution of

    min_D  |K Dᵀ - R|² + |K_p Dᵀ|² + mu tr(D P⁻¹ Dᵀ)        (for a projector P: over D = D P, with P⁻¹ = P)          (2)

- ``memit`` (arXiv 2210.07229, Eq. 14) is ``R Kᵀ (K Kᵀ + lambda C)⁻¹`` in columns. Here
  ``P = (I + C / (c_0 c))⁻¹`` with ``c = tr(C) / in``, the memory of general inputs of this package. That is MEMIT with
  ``C + c_0 c I`` in place of C and ``mu = lambda c_0 c``. So C need not have full rank.
- ``rome`` (arXiv 2202.05262, Eq. 2) is the same with one fact and mu = 0: the wanted output is reached exactly.
- ``alphaedit`` (arXiv 2410.02355): P projects onto the directions that general inputs hardly use, and K_p are
  the keys of all earlier edits.
- ``intattn`` (after arXiv 2510.27400) is ``memit`` on the output maps of MLP and attention; R has the share of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.models.stacking.network import times_open

Opening = Callable[[Float[Tensor, "n in"]], Float[Tensor, "n in"]]
"""``x ↦ x P``."""


def soft(directions: Float[Tensor, "r in"], protect: float) -> Opening:
    """P of the memory of general inputs with ``c_0 = protect``; ``directions`` are the rows B of
    `nestlearn.models.stacking.general`."""
    return lambda x: times_open(x, directions.to(x), protect)


def null_space(directions: Float[Tensor, "r in"], threshold: float) -> Opening:
    """The projector onto directions along which the mean square of general inputs is below ``threshold``, relative to
    its mean over all directions. Directions that B does not hold count as below.

    Example:
        >>> null_space(torch.tensor([[2.0, 0.0], [0.0, 0.1]]), 0.02)(torch.tensor([[3.0, 4.0]]))
        tensor([[0., 4.]])
    """
    squares = directions.square().sum(1)
    rest = (1 - squares.sum() / directions.shape[1]).clamp(min=0)
    used = directions[squares + rest >= threshold]
    axes = used / used.norm(dim=1, keepdim=True)
    return lambda x: x - (x @ axes.to(x).mT) @ axes.to(x)


def right_factor(
    keys: Float[Tensor, "n in"], opening: Opening, weight: float = 0.0, earlier: Float[Tensor, "m in"] | None = None
) -> Float[Tensor, "n in"]:
    """G of equation 1, in float64, with ``mu = weight`` times the mean of ``kᵀ P k`` over the rows of K.

    So with one fact the key gets ``1 / (1 + weight)`` of the wanted change, whatever the scale of inputs.

    Args:
        keys: K.
        opening: P.
        weight: of general inputs beside the facts.
        earlier: K_p.

    Raises:
        ValueError: general inputs use all directions of the keys, so that (1) allows no change.

    Example:
        >>> k = torch.tensor([[3.0, 4.0]])
        >>> k @ right_factor(k, lambda x: x).mT.float()
        tensor([[1.]])
    """
    count = len(keys)
    rows = (keys if earlier is None else torch.cat([keys, earlier.to(keys)])).double()
    opened = opening(rows)
    gram = opened @ rows.mT
    scale = gram.diagonal()[:count].mean()
    if not bool(scale > 1e-12 * rows[:count].square().sum(1).mean()):
        raise ValueError(
            "the keys of the facts lie among the general inputs entirely, so that no change is allowed. Use another "
            "method, other layers, or a larger protect."
        )
    gram = (gram + gram.mT) / 2 + weight * scale * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return torch.linalg.solve(gram, opened)[:count]
