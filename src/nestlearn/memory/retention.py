"""Retention (Miras section 3): how the weights of a memory are kept from one token to the next.

Decay and delta keep the weights themselves. The others are mirror maps: what evolves linearly inside a chunk is an
*accumulator* A, and the weights that the memory works with are a function of it,

    A_t = alpha_t A_{t-1} + S_t,     W_t = weights(A_t)

where S_t holds gradients with respect to W. So `nestlearn.memory.State` keeps A (for `KL` the logarithm of W), and
the initial weights given to ``init_state`` are initial accumulators. Errors are always taken at the weights of the
chunk's start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Retention(Protocol):
    """How weights are kept. Subclass it and define `weights`, or `keep` as well; the others have defaults.

    Each gets accumulators of one linear map, ``[*b, out, in]``, and must treat every matrix on its own. A retention
    with a `keep` of its own runs token by token; without one the recurrence has a closed form.
    """

    def keep(
        self,
        weights: Float[Tensor, "*b out in"],
        alpha: Float[Tensor, "*#b #out #in"],
        eta: Float[Tensor, "*b 1 1"],
        x: Float[Tensor, "*b in"],
    ) -> Float[Tensor, "*b out in"]:
        """What is left of the accumulator at one token, before its change is added.

        Args:
            weights: the accumulator's distance to what retention pulls toward.
            alpha: the retention gate.
            eta: the effective step size.
            x: the input of the map.
        """
        return alpha * weights

    def weights(
        self, accumulator: Float[Tensor, "*b out in"], anchor: Float[Tensor, "*#b out in"]
    ) -> Float[Tensor, "*b out in"]:
        """The weights a token reads, given the accumulator after it and that at the start of its chunk."""
        ...

    def anchored(self, accumulator: Float[Tensor, "*b out in"]) -> Float[Tensor, "*b out in"]:
        """The weights at the start of a chunk, where errors are taken and which chunk reads see."""
        return self.weights(accumulator, accumulator)

    def close(self, accumulator: Float[Tensor, "*b out in"]) -> Float[Tensor, "*b out in"]:
        """What the accumulator becomes when a chunk ends."""
        return accumulator

    def start(self, weights: Float[Tensor, "*b out in"]) -> Float[Tensor, "*b out in"]:
        """An accumulator that begins with these weights, or with weights of their scale."""
        return weights


@runtime_checkable
class SteepRetention(Retention, Protocol):
    """A retention that states its steepness, as the layers' bounds of the step size need it."""

    def steepness(self, start: Float[Tensor, "*b out in"]) -> float | Float[Tensor, "*b 1 1"]:
        """How many times faster than the accumulator the weights can change, from the accumulator ``start`` on."""
        ...


class _Identity(Retention):
    """The accumulator is the weights."""

    def steepness(self, start: Tensor) -> float:
        return 1.0

    def weights(self, accumulator: Tensor, anchor: Tensor) -> Tensor:
        return accumulator


@dataclass(frozen=True)
class Decay(_Identity):
    """``W_t = alpha_t W_{t-1} + S_t``: every direction decays alike (Titans Eq. 13). ``alpha = 1`` keeps everything.

    Args:
        per_channel: ``Gates.retain`` is ``[*b, t, d_key]``, one gate a channel: it scales the input channels of the
            map that sees the key, ``W Diag(alpha)``, and the output channels of every other map, ``Diag(alpha) W``
            (the second map of an MLP), so that both act in the width of keys and values (GLA, arXiv 2312.06635).
    """

    per_channel: bool = False


@dataclass(frozen=True)
class Delta(_Identity):
    """``W_t = W_{t-1} (alpha_t I - eta'_t x_t x_t^T) + S_t``: what the key holds is erased first (NL Eq. 57, 88).

    ``gated=True`` is Gated DeltaNet's form, alpha on both terms:
    ``W_t = alpha_t W_{t-1} (I - eta'_t x_t x_t^T) + S_t`` (arXiv 2412.06464).
    """

    gated: bool = False

    def keep(self, weights: Tensor, alpha: Tensor, eta: Tensor, x: Tensor) -> Tensor:
        erased = (weights @ x.unsqueeze(-1)) * x.unsqueeze(-2)
        return alpha * weights - (alpha if self.gated else 1) * eta * erased


@dataclass(frozen=True)
class Oja(_Identity):
    """``W_t = (alpha_t I - eta'_t v_t v_t^T) W_{t-1} + eta'_t v_t k_t^T``: Oja's rule (OjaNet; NL Eq. 66-67).

    The delta rule erases what the key holds, this one erases what the value holds. The objective is
    ``-<W k, v> + 1/2 ||W^T v||^2`` (the paper drops the 1/2). Its second term bounds the weights: along v they go
    toward k. For single neurons this is Oja's rule (1982). The step eta' is that of `AssociativeMemory` with v in place
    of the input; ``proximal`` is the exact minimizer. It needs `Matrix`, `DotProduct` (the first term) and `Descent`.

    Example:
        >>> from nestlearn.memory import AssociativeMemory, Gates, scan
        >>> k, v = torch.tensor([[3.0, 4.0]] * 99), torch.tensor([[0.0, 1.0]] * 99)
        >>> gates = Gates(lr=torch.full((99,), 0.5), retain=torch.ones(99))
        >>> _, state = scan(AssociativeMemory(retention=Oja()), None, k, k, v, gates)
        >>> state.params["W"].round(decimals=3).tolist()  # the row along v is the key
        [[0.0, 0.0], [3.0, 4.0]]
    """


@dataclass(frozen=True)
class Lq(Retention):
    """``W = A / ||A||_q^(q-2)``, elementwise norm per map and head: Moneta as printed (Miras section 5).

        ||A||_q = (sum_ij |A_ij|^q + eps)^(1/q)

    The norm is that of the accumulator at the start of the chunk, also for token reads inside it. For q above 3 the
    weights shrink when the accumulator grows; eps bounds them (q = 4: no entry exceeds ``eps^(-1/4) / sqrt(2)``).
    The minimizer that this form approximates is `LqDual`.

    Args:
        q: at least 2 (2 is plain decay).
        eps: added inside the norm.

    Raises:
        ValueError: q below 2, or eps that is not positive.

    Example:
        >>> a = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> torch.allclose(Lq(4).anchored(a), a / 82**0.5)
        True
    """

    q: float = 4.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not self.q >= 2:
            raise ValueError(f"Lq needs q of at least 2, got {self.q!r}; LqDual takes any q above 1")
        if not self.eps > 0:
            raise ValueError(f"Lq needs a positive eps, got {self.eps!r}: a zero accumulator has no norm")

    def scale(self, anchor: Float[Tensor, "*b out in"]) -> Float[Tensor, "*b 1 1"]:
        """``1 / ||A||_q^(q-2)``, the number that all weights of a map share within a chunk."""
        total = anchor.abs().pow(self.q).sum((-2, -1), keepdim=True) + self.eps
        return total.pow((2 - self.q) / self.q)

    def weights(self, accumulator: Tensor, anchor: Tensor) -> Tensor:
        return accumulator * self.scale(anchor)

    def steepness(self, start: Tensor) -> Tensor:
        """The scale of the initial weights over their accumulators, at least 1."""
        return self.scale(start).clamp(min=1)

    def start(self, weights: Tensor) -> Tensor:
        """The inverse where there is one: at q = 3 every accumulator gives weights of norm 1."""
        if self.q == 3:
            return weights
        norm = weights.abs().pow(self.q).sum((-2, -1), keepdim=True).pow(1 / self.q)
        return weights * norm.clamp(min=self.eps).pow((self.q - 2) / (3 - self.q))


@dataclass(frozen=True)
class LqDual(Retention):
    r"""``W = argmin_W -<W, A> + 1/2 ||W||_q^2``: the mirror map of the squared q-norm.

        W = sign(A) |A|^(p-1) / ||A||_p^(p-2),     p = q / (q - 1),     |A| = sqrt(A^2 + eps)

    Args:
        q: above 1 (2 is plain decay).
        eps: makes the root smooth at 0.

    Raises:
        ValueError: q not above 1, or eps that is not positive.

    Example:
        >>> a = torch.tensor([[8.0, -1.0]], dtype=torch.float64)
        >>> w = LqDual(4).anchored(a)
        >>> round((w[0, 0] / w[0, 1]).item(), 6)  # the cube root of the ratio of the accumulators
        -2.0
    """

    q: float = 4.0
    eps: float = 1e-12

    def __post_init__(self) -> None:
        if not self.q > 1:
            raise ValueError(f"LqDual needs q above 1, got {self.q!r}")
        if not self.eps > 0:
            raise ValueError(f"LqDual needs a positive eps, got {self.eps!r}: its root has no slope at 0")

    def weights(self, accumulator: Tensor, anchor: Tensor) -> Tensor:
        p = self.q / (self.q - 1)
        square = accumulator.square() + self.eps
        norm = square.pow(p / 2).sum((-2, -1), keepdim=True).pow((2 - p) / p)
        return accumulator * square.pow((p - 2) / 2) * norm

    def steepness(self, start: Tensor) -> float:
        """The slope at 0, which eps sets."""
        p = self.q / (self.q - 1)
        return max(p - 1, self.eps ** min((p - 2) / 2, 0))

    def start(self, weights: Tensor) -> Tensor:
        size = weights.abs()
        norm = size.pow(self.q).sum((-2, -1), keepdim=True).pow(1 / self.q).clamp(min=self.eps)
        return weights.sign() * size.pow(self.q - 1) * norm.pow(2 - self.q)


@dataclass(frozen=True)
class KL(Retention):
    """``W = c softmax(A)`` along the inputs of every output row: Memora (Miras section 5).

    The minimizer of ``eta <W, G> + alpha KL(W | W_prev) + (1 - alpha) sum W log W`` over rows of sum c is
    ``c softmax(alpha log W_prev - eta G)``; the accumulator is the logarithm of W but for a number per row.

    Args:
        c: sum of every row.

    Raises:
        ValueError: c that is not positive.

    Example:
        >>> KL(2.0).anchored(torch.zeros(1, 4)).tolist()
        [[0.5, 0.5, 0.5, 0.5]]
    """

    c: float = 1.0

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError(f"KL needs rows of a positive sum c, got {self.c!r}")

    def weights(self, accumulator: Tensor, anchor: Tensor) -> Tensor:
        return self.c * torch.softmax(accumulator, -1)

    def steepness(self, start: Tensor) -> float:
        return max(1.0, self.c / 2)

    def slope(self, accumulator: Float[Tensor, "*b out in"]) -> Float[Tensor, "*b 1 1"]:
        """The largest slope of the weights at this accumulator is below their largest entry."""
        return self.weights(accumulator, accumulator).amax((-2, -1), keepdim=True)


@dataclass(frozen=True)
class ElasticNet(Retention):
    """Soft threshold ``S_g(alpha W - eta G)`` when a chunk ends: sparse weights (Miras section 5).

        S_g(a) = sign(a) max(|a| - g, 0),        smooth: S_g(a) = a - g tanh(a / g)

    The minimizer of ``eta <W, G> + alpha/2 ||W - W_prev||^2 + (1 - alpha)/2 ||W||^2 + g ||W||_1``. Inside a chunk the
    accumulator moves on without it, and a token reads the soft threshold of the accumulator after it.

    Args:
        threshold: g, at least 0.
        smooth: the form without a kink, which keeps small weights learning.

    Raises:
        ValueError: a negative threshold.

    Example:
        >>> ElasticNet(0.5).close(torch.tensor([[2.0, -0.75, 0.25]])).tolist()
        [[1.5, -0.25, 0.0]]
    """

    threshold: float = 1e-3
    smooth: bool = False

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"ElasticNet needs a threshold of at least 0, got {self.threshold!r}")

    def close(self, accumulator: Tensor) -> Tensor:
        if self.threshold == 0:
            return accumulator
        if self.smooth:
            return accumulator - self.threshold * torch.tanh(accumulator / self.threshold)
        return accumulator.sign() * (accumulator.abs() - self.threshold).clamp(min=0)

    def weights(self, accumulator: Tensor, anchor: Tensor) -> Tensor:
        return self.close(accumulator)

    def anchored(self, accumulator: Tensor) -> Tensor:
        return accumulator

    def steepness(self, start: Tensor) -> float:
        return 1.0


@dataclass(frozen=True)
class Bregman(Retention):
    """``W = c tanh(A / 2)``: weights between -c and c, by the Bregman divergence of the binary entropy.

    With ``u = (W / c + 1) / 2`` in (0, 1) and ``F(u) = u log u + (1 - u) log(1 - u)``, summed over all entries, the
    minimizer of ``eta <W, G> + 2c D_F(u, u_prev)`` is ``logit(u) = logit(u_prev) - eta G``, that is
    ``u = sigmoid(A)`` with ``A = A_prev - eta G`` (Miras section 5 has u itself, which has no negative weights).

    Args:
        c: bound of every weight.

    Raises:
        ValueError: c that is not positive.

    Example:
        >>> Bregman(2.0).anchored(torch.tensor([[0.0, 50.0, -50.0]])).tolist()
        [[0.0, 2.0, -2.0]]
    """

    c: float = 1.0

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError(f"Bregman needs a positive bound c, got {self.c!r}")

    def weights(self, accumulator: Tensor, anchor: Tensor) -> Tensor:
        return self.c * torch.tanh(accumulator / 2)

    def steepness(self, start: Tensor) -> float:
        return max(1.0, self.c / 2)

    def start(self, weights: Tensor) -> Tensor:
        return 2 * torch.atanh((weights / self.c).clamp(-0.99, 0.99))


def is_linear(retention: Retention) -> bool:
    """Whether accumulators are the weights themselves, kept by decay, by the delta rule or by Oja's."""
    return type(retention) in (Decay, Delta, Oja)


def erases(retention: Retention) -> bool:
    """Whether a write first erases what the key (delta rule) or the value (Oja's rule) holds."""
    return isinstance(retention, Delta | Oja)


def is_mirror(retention: Retention) -> bool:
    """Whether accumulators only decay, and weights are a function of them."""
    return not is_linear(retention) and type(retention).keep is Retention.keep


def is_per_channel(retention: Retention) -> bool:
    """Whether ``Gates.retain`` holds one gate per channel of the keys."""
    return isinstance(retention, Decay) and retention.per_channel


def slope_at(retention: Retention, anchor: Float[Tensor, "*b out in"]) -> float | Tensor:
    """How many times faster than the accumulator the weights change near this one."""
    if isinstance(retention, KL):
        return retention.slope(anchor)
    assert isinstance(retention, SteepRetention)
    return retention.steepness(anchor)
