"""Nested transfer: fast weights start each period from slow weights, which then move toward them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nestlearn.optim.checks import share, whole_number
from nestlearn.optim.matrices import wide
from nestlearn.optim.wrapper import OptimizerWrapper


class NestedTransfer(OptimizerWrapper):
    """Every ``period`` steps ``θ₀ ← θ₀ + ρ (θ - θ₀)``, then ``θ ← θ₀``.

    The nested variant of the Continuum Memory System between an optimizer and a slower level that holds its initial
    state (NL Eq. 72, to first order). The fast weights θ learn for a period, starting from the slow weights θ₀, which
    then move by the part ρ toward them: θ₀ is an average over periods. (Reptile, and Lookahead for one task, are this
    rule.) θ₀ starts as the weights at the first step.

    Args:
        base: any torch optimizer, this package's wrappers included.
        rate: ρ, in (0, 1]; 1 changes nothing.
        period: in steps.

    Raises:
        ValueError: a rate outside (0, 1], or a period that is no positive integer.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = NestedTransfer(torch.optim.SGD([weight], lr=1.0), rate=0.5, period=2)
        >>> for _ in range(2):
        ...     weight.grad = torch.full((1,), -1.0)
        ...     optimizer.step()
        >>> weight.detach()  # two steps to 2, half of it kept
        tensor([1.])
    """

    def __init__(self, base: Optimizer, *, rate: float = 0.5, period: int) -> None:
        super().__init__(base)
        share("rate", rate, "the part of a period's change that is kept")
        self.rate = rate
        self.period = whole_number("period", period, "steps between two transfers")
        self._steps = 0
        self._slow: dict[Tensor, Tensor] = {}

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
                parameter.copy_(slow.lerp_(parameter.to(slow.dtype), self.rate))

    def settings(self) -> dict[str, Any]:
        """ρ and the period."""
        return {"rate": self.rate, "period": self.period}

    def own_state(self) -> dict[str, Any]:
        """Steps taken and the slow weights θ₀ by the parameter's index; before the first step the weights."""
        places = enumerate(self.parameters())
        slow = {str(place): self._slow.get(p, p).detach().to(wide(p.dtype), copy=True) for place, p in places}
        return {"steps": self._steps, "slow": slow}

    def load_own_state(self, state: dict[str, Any]) -> None:
        parameters = self.parameters()
        self._steps = state["steps"]
        slow = ((parameters[int(i)], value) for i, value in state["slow"].items() if self._steps > 0)
        self._slow = {p: value.to(p.device, wide(p.dtype), copy=True) for p, value in slow}
