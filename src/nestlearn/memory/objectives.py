"""Objectives (attentional bias, Miras section 3): what a memory minimizes over its context.

Each objective has the written loss (`loss`, differentiated by the reference engine) and its hand-derived gradient
with respect to the memory's output (`error`, used by the chunked engine). Tests compare the two. Below,
``r = M(k) - v``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .kernels.products import potential

SMOOTH = 1e-6
"""Added to squares under a root: ``|r|`` is ``sqrt(r^2 + 1e-6)``."""


@runtime_checkable
class Objective(Protocol):
    """A per-token loss between the memory's output M(k) and the value v."""

    def loss(self, prediction: Float[Tensor, "*b d"], v: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
        """The written objective."""
        ...

    def error(self, predict: Callable[[], Tensor], v: Tensor) -> Tensor:
        """Its gradient with respect to M(k). ``predict()`` computes M(k); it is called only where it is needed."""
        ...


@runtime_checkable
class ThresholdObjective(Objective, Protocol):
    """An objective with a threshold: a constant, or (None) one of every token, from ``Gates.threshold``."""

    @property
    def threshold(self) -> float | Tensor | None:
        """The constant, the thresholds ``[*b]`` of the tokens at hand, or None: still to be given with `at`."""
        ...

    def at(self, threshold: Float[Tensor, "*b"]) -> Objective:
        """The objective of tokens with these thresholds."""
        ...


@runtime_checkable
class SteepObjective(Objective, Protocol):
    """An objective that states its steepness, as the layers' bounds of the step size need it."""

    def steepness(self, width: int, reach: float) -> float:
        """How many times faster than that of `L2` the error can change with the residual r.

        Args:
            width: of values.
            reach: largest norm of a residual. A part of the error of bounded length, such as a sign, counts as 1.
        """
        ...


def needs_threshold(objective: Objective) -> bool:
    """Whether the objective takes its thresholds from the gates."""
    return isinstance(objective, ThresholdObjective) and objective.threshold is None


def with_threshold(objective: Objective, threshold: Tensor | None) -> Objective:
    """The objective of tokens whose gates hold ``threshold``."""
    if threshold is None or not isinstance(objective, ThresholdObjective):
        return objective
    return objective.at(threshold)


@dataclass(frozen=True)
class DotProduct:
    """``-<M(k), v>``, error ``-v``: Hebbian writing (linear attention; with delta retention, the delta rule)."""

    def loss(self, prediction: Tensor, v: Tensor) -> Tensor:
        return -(prediction * v).sum(-1)

    def error(self, predict: Callable[[], Tensor], v: Tensor) -> Tensor:
        return -v

    def steepness(self, width: int, reach: float) -> float:
        return 0.0


@dataclass(frozen=True)
class L2:
    """``1/2 ||M(k) - v||^2``, error ``M(k) - v`` (Titans, TTT; the papers drop the 1/2)."""

    def loss(self, prediction: Tensor, v: Tensor) -> Tensor:
        return 0.5 * (prediction - v).square().sum(-1)

    def error(self, predict: Callable[[], Tensor], v: Tensor) -> Tensor:
        return predict() - v

    def steepness(self, width: int, reach: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Lp:
    r"""``||r||_p^p`` in smooth form, the objective of Moneta (Miras section 5).

        e = p tanh(a r) (r^2 + 1e-6)^((p-1)/2)

    which is ``p sign(r) |r|^(p-1)`` but near 0, where that has a kink (p = 1) or no curvature (p < 2). The error is
    the definition; ``loss`` is its integral from 0 to r, coordinate by coordinate, by Gauss-Legendre quadrature, and
    autograd of it gives the error exactly.

    Args:
        p: exponent, at least 1.
        sharpness: a, how fast the sign turns; Miras takes 10.

    Raises:
        ValueError: p below 1, or a sharpness that is not positive and finite.

    Example:
        >>> r = torch.tensor([[0.5, -2.0, 0.0]], dtype=torch.float64)
        >>> Lp(3).error(lambda: r, torch.zeros_like(r)).round(decimals=3).tolist()
        [[0.75, -12.0, 0.0]]
    """

    p: float = 3.0
    sharpness: float = 10.0

    def __post_init__(self) -> None:
        if not self.p >= 1:
            raise ValueError(f"Lp needs an exponent p of at least 1 (the loss is not convex below), got {self.p!r}")
        if not 0 < self.sharpness < float("inf"):
            raise ValueError(f"Lp needs a positive finite sharpness of the smooth sign, got {self.sharpness!r}")

    def _slope(self, r: Tensor) -> Tensor:
        return self.p * torch.tanh(self.sharpness * r) * (r.square() + SMOOTH).pow((self.p - 1) / 2)

    def loss(self, prediction: Tensor, v: Tensor) -> Tensor:
        r = prediction - v
        with torch.no_grad():
            # The integrand turns within 1/a of 0: panels that double in length from there follow it.
            ends = torch.minimum(r.abs().unsqueeze(-1), r.new_tensor(_PANELS) / self.sharpness)
            ends = torch.cat([ends, r.abs().unsqueeze(-1)], -1)
            starts, lengths = ends[..., :-1], ends.diff(dim=-1)
            points = starts.unsqueeze(-1) + lengths.unsqueeze(-1) * r.new_tensor(_NODES)
            value = (self._slope(points) * r.new_tensor(_WEIGHTS)).sum(-1).mul(lengths).sum((-2, -1))
        return potential(r, value, self._slope(r))

    def error(self, predict: Callable[[], Tensor], v: Tensor) -> Tensor:
        return self._slope(predict() - v)

    def steepness(self, width: int, reach: float) -> float:
        """``p (p - 1) reach^(p-2)``; for p below 2 the slope at 0, which the sharpness of the smooth sign sets."""
        return self.p * (self.sharpness if self.p < 2 else max(self.p - 1, 1.0) * reach ** (self.p - 2))


# Gauss-Legendre with five points on [0, 1], and where the panels of `Lp.loss` end, in units of 1 / sharpness.
_NODES = (0.04691007703066802, 0.23076534494715845, 0.5, 0.7692346550528415, 0.953089922969332)
_WEIGHTS = (0.11846344252809454, 0.23931433524968324, 0.28444444444444444, 0.23931433524968324, 0.11846344252809454)
_PANELS = (0.0, *(2.0**n for n in range(-6, 12)))

HuberForm = Literal["coordinate", "norm", "switch"]


def _norm(r: Tensor) -> Tensor:
    """``||r||`` with gradient 0 at r = 0, kept as a last dimension of one."""
    square = r.square().sum(-1, keepdim=True)
    zero = square == 0
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt())


def _column(threshold: float | Tensor | None, like: Tensor) -> Tensor:
    """The thresholds of the tokens of ``like: [*b, d]`` as ``[*b, 1]``."""
    if threshold is None:
        raise ValueError(
            "this objective has no constant threshold and none was given for its tokens. Pass Gates(threshold=...), "
            "or make the objective with a constant, such as threshold=1.0."
        )
    if isinstance(threshold, Tensor):
        return threshold.unsqueeze(-1)
    return like.new_full((), threshold)


def _check_constant(objective: object, threshold: float | Tensor | None) -> None:
    if threshold is not None and not isinstance(threshold, Tensor) and not threshold >= 0:
        raise ValueError(f"{type(objective).__name__} needs a threshold of at least 0, or None; got {threshold!r}")


@dataclass(frozen=True)
class Huber:
    """Quadratic for small residuals, linear for large ones: the objective of Yaad (Miras section 5).

    With the threshold d:

    - ``coordinate``: ``e_i = r_i`` where ``|r_i| <= d``, else ``d sign(r_i)``.
    - ``norm``: ``e = r`` where ``||r|| <= d``, else ``d r / ||r||``.
    - ``switch``: ``e = r`` where ``||r|| <= d``, else ``d sign(r)``, the gradient of the L2 or of d times the L1 loss
      (Yaad). This field has no potential: the loss is ``1/2 ||r||^2`` on one side and ``d ||r||_1`` on the other, so
      that autograd gives the error on both, and jumps where ``||r|| = d``.

    Args:
        form: one of the three.
        threshold: a constant d, or None: every token brings its own in ``Gates.threshold``.

    Raises:
        ValueError: an unknown form or a negative constant.

    Example:
        >>> r = torch.tensor([[3.0, -4.0]])
        >>> Huber("norm", threshold=2.5).error(lambda: r, torch.zeros_like(r)).tolist()
        [[1.5, -2.0]]
    """

    form: HuberForm = "switch"
    threshold: float | Tensor | None = None

    def __post_init__(self) -> None:
        if self.form not in get_args(HuberForm):
            raise ValueError(f"unknown form {self.form!r} of Huber: use 'coordinate', 'norm' or 'switch'")
        _check_constant(self, self.threshold)

    def at(self, threshold: Tensor) -> Huber:
        return replace(self, threshold=threshold)

    def loss(self, prediction: Tensor, v: Tensor) -> Tensor:
        r = prediction - v
        d = _column(self.threshold, r)
        if self.form == "coordinate":
            return torch.where(r.abs() <= d, 0.5 * r.square(), d * (r.abs() - 0.5 * d)).sum(-1)
        norm = _norm(r)
        far = d * r.abs().sum(-1, keepdim=True) if self.form == "switch" else d * (norm - 0.5 * d)
        return torch.where(norm <= d, 0.5 * r.square().sum(-1, keepdim=True), far).squeeze(-1)

    def error(self, predict: Callable[[], Tensor], v: Tensor) -> Tensor:
        r = predict() - v
        d = _column(self.threshold, r)
        if self.form == "coordinate":
            return torch.where(r.abs() <= d, r, d * r.sign())
        norm = _norm(r)
        if self.form == "switch":
            return torch.where(norm <= d, r, d * r.sign())
        near = norm <= d
        return torch.where(near, r, d * r / torch.where(near, 1, norm))

    def steepness(self, width: int, reach: float) -> float:
        """1, but for ``switch`` the root of the width: the sign of a residual is longer than it by up to that."""
        return math.sqrt(width) if self.form == "switch" else 1.0


@dataclass(frozen=True)
class ValueShiftRobust:
    """``max over ||u|| <= d of 1/2 ||r - u||^2``: L2 against values shifted by up to d (Miras section 5).

        loss = 1/2 ||r||^2 + d ||r||  (+ d^2 / 2, a constant),      e = r + d r / ||r||

    with ``||r|| = sqrt(r^T r + 1e-6)``, smooth at 0.

    Args:
        threshold: a constant d, or None: every token brings its own in ``Gates.threshold``.

    Raises:
        ValueError: a negative constant.

    Example:
        >>> r = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
        >>> ValueShiftRobust(5.0).error(lambda: r, torch.zeros_like(r)).round(decimals=4).tolist()
        [[6.0, -8.0]]
    """

    threshold: float | Tensor | None = None

    def __post_init__(self) -> None:
        _check_constant(self, self.threshold)

    def at(self, threshold: Tensor) -> ValueShiftRobust:
        return replace(self, threshold=threshold)

    def loss(self, prediction: Tensor, v: Tensor) -> Tensor:
        r = prediction - v
        square = r.square().sum(-1, keepdim=True)
        return (0.5 * square + _column(self.threshold, r) * (square + SMOOTH).sqrt()).squeeze(-1)

    def error(self, predict: Callable[[], Tensor], v: Tensor) -> Tensor:
        r = predict() - v
        return r * (1 + _column(self.threshold, r) * torch.rsqrt(r.square().sum(-1, keepdim=True) + SMOOTH))

    def steepness(self, width: int, reach: float) -> float:
        """1: what it adds to the error of L2 has the length d at most."""
        return 1.0
