"""Nested transfer: fast weights start each period from slow weights, which then move toward them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestlearn.optim.checks import kept, share, whole_number
from nestlearn.optim.matrices import wide
from nestlearn.optim.matrix_optimizer import zeros
from nestlearn.optim.wrapper import OptimizerWrapper


class NestedTransfer(OptimizerWrapper):
    """Every ``period`` steps ``θ₀ ← θ₀ + ρ (θ - θ₀)``, then ``θ ← θ₀``.

    The nested variant of the Continuum Memory System between an optimizer and a slower level that holds its initial
    state (NL Eq. 72, to first order). The fast weights θ learn for a period, starting from the slow weights θ₀, which
    then move by the part ρ toward them: θ₀ is an average over periods. (Reptile, and Lookahead for one task, are this
    rule.) θ₀ starts as the weights at the first step.

    With a momentum μ the slow weights take Nesterov's step along the changes of all periods, as the outer optimizer of
    DiLoCo does (arXiv 2311.08105). For one process, every ``period`` steps:

        v ← μ v + (θ - θ₀)        θ₀ ← θ₀ + ρ (θ - θ₀ + μ v)        θ ← θ₀

    State in bytes per parameter (float32): 4 for θ₀, and with μ > 0 4 for v.

    Args:
        base: any torch optimizer, this package's wrappers included.
        rate: ρ, in (0, 1]; without momentum 1 changes nothing.
        period: in steps.
        momentum: μ, in [0, 1).

    Raises:
        ValueError: a rate outside (0, 1], a momentum outside [0, 1), or a period that is no positive integer.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = NestedTransfer(torch.optim.SGD([weight], lr=1.0), rate=0.5, period=2)
        >>> for _ in range(2):
        ...     weight.grad = torch.full((1,), -1.0)
        ...     optimizer.step()
        >>> weight.detach()  # two steps to 2, half of it kept
        tensor([1.])
    """

    def __init__(self, base: Optimizer, *, rate: float = 0.5, period: int, momentum: float = 0.0) -> None:
        super().__init__(base)
        share("rate", rate, "the part of a period's change that is kept")
        kept("momentum", momentum, "the part of the changes of earlier periods that is added again")
        self.rate, self.momentum = rate, momentum
        self.period = whole_number("period", period, "steps between two transfers")
        self._steps = 0
        self._slow: dict[Tensor, Tensor] = {}
        self._velocity: dict[Tensor, Tensor] = {}

    def update(self) -> None:
        for parameter in self.parameters():
            # At the first step and not before, so that weights can be loaded in between. Later, for added groups.
            if parameter not in self._slow:
                self._slow[parameter] = parameter.detach().to(wide(parameter.dtype), copy=True)
        self.base.step()
        self._steps += 1
        if self._steps % self.period == 0:
            for parameter in self.parameters():
                slow = self._slow[parameter]
                parameter.copy_(slow.lerp_(self._target(parameter, slow), self.rate))

    def _target(self, parameter: Tensor, slow: Tensor) -> Tensor:
        """``θ + μ v``, toward which the slow weights move, after v has learned the period's change."""
        learned = parameter.to(slow.dtype)
        if self.momentum == 0:
            return learned
        if parameter not in self._velocity:
            self._velocity[parameter] = torch.zeros_like(slow)
        velocity = self._velocity[parameter]
        velocity.mul_(self.momentum).add_(learned - slow)
        return learned.add(velocity, alpha=self.momentum)

    def settings(self) -> dict[str, Any]:
        """ρ, the period and μ."""
        return {"rate": self.rate, "period": self.period, "momentum": self.momentum}

    def own_state(self) -> dict[str, Any]:
        """Steps taken; θ₀ (before the first step the weights) and with μ > 0 v, by the parameter's index."""
        places = [(str(place), parameter) for place, parameter in enumerate(self.parameters())]
        slow = {place: self._slow.get(p, p).detach().to(wide(p.dtype), copy=True) for place, p in places}
        velocity = {place: self._velocity[p].clone() if p in self._velocity else zeros(p) for place, p in places}
        # No empty entry: a distributed checkpoint would lose it.
        return {"steps": self._steps, "slow": slow, **({"velocity": velocity} if self.momentum > 0 else {})}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restores what `own_state` returned.

        Raises:
            ValueError: one of the two has a momentum, the other has none.
        """
        if ("velocity" in state) != (self.momentum > 0):
            has = "a momentum" if "velocity" in state else "no momentum"
            raise ValueError(
                f"This state was saved with {has}, and momentum is {self.momentum}; make the NestedTransfer with the "
                "momentum that it had."
            )
        self._steps = state["steps"]
        self._slow, self._velocity = self._read(state["slow"]), self._read(state.get("velocity", {}))

    def _read(self, saved: dict[str, Tensor]) -> dict[Tensor, Tensor]:
        """Tensors of a state by their parameters; none from before the first step."""
        parameters = self.parameters() if self._steps > 0 else []
        pairs = ((p, saved[str(place)]) for place, p in enumerate(parameters) if str(place) in saved)
        return {p: value.to(p.device, wide(p.dtype), copy=True) for p, value in pairs}
