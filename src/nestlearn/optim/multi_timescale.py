"""Parameter groups that step at their own period: the Continuum Memory System over any optimizer (NL Eq. 71)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from nestlearn.optim.checks import one_of, whole_number
from nestlearn.optim.matrices import wide
from nestlearn.optim.matrix_optimizer import zeros
from nestlearn.optim.wrapper import OptimizerWrapper, hold_back

Reduction = Literal["mean", "sum"]


class MultiTimescale(OptimizerWrapper):
    """Each parameter group accumulates gradients and steps at its own period.

    A group of period C does not change for C - 1 steps; at the C-th the wrapped optimizer steps on the gradient
    accumulated over the whole period, ``θ ← θ - Σ_{t in the last C steps} η f(θ; x_t)`` with f the wrapped rule
    (NL Eq. 71). A group of period 1 steps as without this wrapper. All periods count from the wrapper's first step.

    Args:
        base: any torch optimizer, with one group per level.
        periods: one per group, in steps; by default each group's own ``update_period`` (1 where there is none).
        reduction: ``"mean"`` gives the wrapped optimizer the mean of a parameter's gradients in the period, ``"sum"``
            their sum, which for plain descent is the printed formula. Adam and other rules that do not depend on the
            gradient's scale are equal under both.

    Raises:
        ValueError: a period that is no positive integer, or not one per group; or a mean over a period of
            `DGD(form="sample")`, whose samples' steps add up.

    Example:
        >>> fast, slow = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> groups = [{"params": fast.parameters()}, {"params": slow.parameters()}]
        >>> optimizer = MultiTimescale(torch.optim.Adam(groups, lr=0.1), periods=[1, 3])
        >>> before = slow.weight.detach().clone()
        >>> changed = []
        >>> for _ in range(3):
        ...     slow(fast(torch.ones(1, 2))).sum().backward()
        ...     optimizer.step()
        ...     changed.append(not torch.equal(slow.weight, before))
        >>> changed
        [False, False, True]
    """

    def __init__(self, base: Optimizer, periods: Sequence[int] | None = None, *, reduction: Reduction = "mean") -> None:
        self.reduction: Reduction = reduction
        super().__init__(base)
        self.defaults.setdefault("update_period", 1)  # also for groups that are added to the base directly
        one_of("reduction", reduction, Reduction)
        if periods is not None and len(periods) != len(self.param_groups):
            raise ValueError(
                f"{len(periods)} periods for {len(self.param_groups)} parameter groups; give one per group, for "
                "example by making a group of each level (nestlearn.optim.timescale_groups)."
            )
        for place, group in enumerate(self.param_groups):
            period = group.get("update_period", 1) if periods is None else periods[place]
            group["update_period"] = whole_number(f"the period of group {place}", period, "steps between two updates")
        self._check_reduction()
        self._steps = 0
        self._sums: dict[Tensor, Tensor] = {}
        self._counts: dict[Tensor, int] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, with ``update_period`` 1 by default.

        Periods count from this wrapper's first step, so the first period of a group added later can be shorter.

        Raises:
            ValueError: a period that is no positive integer.
        """
        period = param_group.setdefault("update_period", 1)
        whole_number("update_period of the added group", period, "steps between two updates")
        super().add_param_group(param_group)
        self._check_reduction()

    def _check_reduction(self) -> None:
        """Refuses the mean over a period for a rule that sums the steps of single samples."""
        slow = (group for group in self.param_groups if group["update_period"] > 1)
        sample = next((group for group in slow if group.get("form") == "sample"), None)
        if self.reduction == "mean" and sample is not None:
            raise ValueError(
                f'reduction is "mean" for a group of period {sample["update_period"]} with form="sample": the steps of '
                'single samples are collected in the backward pass and add up over a period. Use reduction="sum" with '
                'a learning rate that is smaller by the period, or form="batch".'
            )

    def is_due(self, group: Mapping[str, Any]) -> bool:
        """Whether the last step changed this group."""
        return self._steps % group["update_period"] == 0

    def update(self) -> None:
        self._check_reduction()  # a schedule may change the groups
        self._steps += 1
        slow = [group for group in self.param_groups if group["update_period"] > 1]
        waiting = [p for group in slow if not self.is_due(group) for p in group["params"] if p.grad is not None]
        hold_back(self.base, waiting)
        kept = [(parameter, parameter.grad) for group in slow for parameter in group["params"]]
        try:
            for group in slow:
                self._collect(group)
            self.base.step()
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient

    def _collect(self, group: dict[str, Any]) -> None:
        """Adds this step's gradients to the sums; the base gets them at the end of the period, and nothing before."""
        due = self.is_due(group)
        for parameter in group["params"]:
            if parameter.grad is not None:
                if parameter in self._sums:
                    self._sums[parameter].add_(parameter.grad)
                else:
                    # Not in half precision, in which a long sum stops growing.
                    self._sums[parameter] = parameter.grad.to(wide(parameter.grad.dtype), copy=True)
                self._counts[parameter] = self._counts.get(parameter, 0) + 1
            total = self._sums.pop(parameter, None) if due else None
            # torch optimizers skip a parameter without a gradient, its moments and weight decay included.
            parameter.grad = None
            if total is not None:
                # Fewer than the period's steps if the group was added in between, or a step had no gradient for it.
                count = self._counts.pop(parameter)
                parameter.grad = (total.div_(count) if self.reduction == "mean" else total).to(parameter.dtype)

    def settings(self) -> dict[str, Any]:
        """The reduction; periods are entries of the groups."""
        return {"reduction": self.reduction}

    def own_state(self) -> dict[str, Any]:
        """Steps taken; sums and numbers of gradients of unfinished periods, by the parameter's index."""
        waiting = {str(place): p for place, p in enumerate(self.parameters()) if p in self._slow_parameters()}
        sums = {place: self._sums[p].clone() if p in self._sums else zeros(p) for place, p in waiting.items()}
        return {"steps": self._steps, "sums": sums, "counts": {k: self._counts.get(p, 0) for k, p in waiting.items()}}

    def _slow_parameters(self) -> set[Tensor]:
        groups = [group for group in self.param_groups if group["update_period"] > 1]
        return {p for group in groups for p in group["params"] if p.requires_grad or p in self._sums}

    def load_own_state(self, state: dict[str, Any]) -> None:
        parameters = self.parameters()
        self._steps = state["steps"]
        self._counts = {parameters[int(i)]: count for i, count in state["counts"].items() if count > 0}
        sums = ((parameters[int(i)], total) for i, total in state["sums"].items())
        self._sums = {p: total.to(p.device, wide(p.dtype), copy=True) for p, total in sums if p in self._counts}


def timescale_groups(
    model: nn.Module, levels: Iterable[tuple[nn.Module | Iterable[nn.Module], int]], **settings: Any
) -> list[dict[str, Any]]:
    """Parameter groups by level, for the optimizer that `MultiTimescale` wraps.

    Args:
        model: its trainable parameters outside all levels form a last group of period 1.
        levels: (a module or several, period in steps), one pair per level.
        settings: entries of every group, such as ``lr``.

    Raises:
        ValueError: a parameter in two levels, a level without trainable parameters, or one that is not the model's.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> [(len(group["params"]), group["update_period"]) for group in timescale_groups(model, [(model[1], 16)])]
        [(2, 16), (4, 1)]
    """
    own = {parameter for parameter in model.parameters() if parameter.requires_grad}
    taken: set[nn.Parameter] = set()
    groups: list[dict[str, Any]] = []
    for place, (modules, period) in enumerate(levels):
        members = [modules] if isinstance(modules, nn.Module) else list(modules)
        parameters = list(dict.fromkeys(p for module in members for p in module.parameters() if p.requires_grad))
        if not parameters or not own.issuperset(parameters) or taken.intersection(parameters):
            raise ValueError(
                f"Level {place} of period {period} has {len(parameters)} trainable parameters, "
                f"{len(taken.intersection(parameters))} of them in an earlier level and {len(set(parameters) - own)} "
                "outside the model; give each level modules of the model that no other level has."
            )
        taken.update(parameters)
        groups.append({"params": parameters, "update_period": period, **settings})
    rest = [parameter for parameter in model.parameters() if parameter in own and parameter not in taken]
    return [*groups, {"params": rest, "update_period": 1, **settings}] if rest else groups
