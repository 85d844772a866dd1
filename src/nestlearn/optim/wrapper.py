"""Optimizers that wrap another one, with its parameter groups and one `state_dict` for both."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestlearn.optim.checks import refuse_copy

_KEY = "wrappers"

_Function = TypeVar("_Function", bound=Callable[..., Any])


def not_compiled(function: _Function) -> _Function:
    """`torch.compiler.disable` with types: `torch.compile` does not trace the function."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The loss of a closure, which computes it and its gradients anew; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class OptimizerWrapper(Optimizer):
    """Changes the gradients or the steps of another optimizer; wrappers can be wrapped.

    It shares the parameter groups of the wrapped optimizer, so learning-rate schedulers and `zero_grad` work on either.
    A subclass defines `update`, which calls ``self.base.step()`` once, and `own_state` with `load_own_state`.

    Args:
        base: any torch optimizer.

    Raises:
        TypeError: `base` is no optimizer.
    """

    def __init__(self, base: Optimizer) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(
                f"base is a {type(base).__name__}; give the optimizer object to wrap, such as "
                "torch.optim.Adam(model.parameters(), lr=1e-3)."
            )
        self.base = base
        # Schedulers that also change momentum read its name from the defaults.
        super().__init__(base.param_groups, base.defaults)
        self._share_groups()

    def _share_groups(self) -> None:
        """One list of groups and one state for both, so that they always agree."""
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer."""
        if any(param_group is group for group in self.base.param_groups):
            super().add_param_group(param_group)
        else:
            self.base.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Refused: the parameters of a copy would belong to no model, and its hooks to the old model.

        Raises:
            TypeError: always.
        """
        refuse_copy(self)

    # Not compiled, as `MatrixOptimizer.step`: the work of a step depends on its place in a period.
    @not_compiled
    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], Any] | None = None
    ) -> Any:
        """One update.

        Args:
            closure: computes the loss and its gradients again; called once, before the update.
        """
        loss = evaluate(closure)
        if self._makes_state():
            self.base.step()
        else:
            self.update()
        return loss

    def _makes_state(self) -> bool:
        """Whether `torch.distributed.checkpoint` calls this step to create the state of a new optimizer.

        All learning rates and all gradients are then 0. The step goes to all parameters and is not counted.
        """
        if self.state or any(float(group.get("lr", 1.0)) != 0.0 for group in self.param_groups):
            return False
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        return bool(gradients) and not any(float(gradient.abs().sum()) for gradient in gradients)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients, and what the wrapped optimizer collected with them."""
        self.base.zero_grad(set_to_none)

    def hold_back(self, parameters: Sequence[Tensor]) -> None:
        """Lets the wrapped optimizer keep what it collected of these parameters for a later step."""
        hold_back(self.base, parameters)

    @abstractmethod
    def update(self) -> None:
        """One step, under `torch.no_grad`."""

    def settings(self) -> dict[str, Any]:
        """The fixed settings of this wrapper as plain values, for records of a run."""
        return {}

    @abstractmethod
    def own_state(self) -> dict[str, Any]:
        """The state of this wrapper alone: numbers, tensors, and lists and dictionaries of them.

        A distributed checkpoint can be loaded if it has the same entries at every step, and strings as keys.
        """

    @abstractmethod
    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restores what `own_state` returned."""

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, with this wrapper's own last in the list ``wrappers`` of the first group.

        (`torch.distributed.checkpoint` keeps nothing but the groups and the states of parameters.)
        """
        state = self.base.state_dict()
        own = {"kind": type(self).__name__, **self.own_state()}
        first = state["param_groups"][0]
        first[_KEY] = [*first.get(_KEY, ()), own]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a `state_dict`, also one from the middle of a period.

        Raises:
            ValueError: the state is of differently wrapped optimizers.
        """
        groups = state_dict["param_groups"]
        wrappers = list(groups[0].get(_KEY, ()))
        kind = wrappers[-1]["kind"] if wrappers else "no wrapper"
        if kind != type(self).__name__:
            raise ValueError(
                f"This state is of {kind} (wrappers from the inside out: {[w['kind'] for w in wrappers]}), not of "
                f"{type(self).__name__}. Wrap the optimizer as it was when the state was saved."
            )
        first = {key: value for key, value in groups[0].items() if key != _KEY}
        if wrappers[:-1]:
            first[_KEY] = wrappers[:-1]
        self.base.load_state_dict({**state_dict, "param_groups": [first, *groups[1:]]})
        self._share_groups()
        self.load_own_state(wrappers[-1])

    def parameters(self) -> list[Tensor]:
        """All parameters in the order of the groups, as indices in a state count them."""
        return [parameter for group in self.param_groups for parameter in group["params"]]


def hold_back(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Tells an optimizer that it gets the gradients of these parameters with those of a later step.

    An optimizer that collects more than gradients, as `DGD` does, keeps it until then by a method of this name.
    """
    keep: Callable[[Sequence[Tensor]], None] | None = getattr(optimizer, "hold_back", None)
    if keep is not None:
        keep(parameters)
