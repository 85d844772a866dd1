"""An optimizer around another one: the same parameter groups, one `state_dict` for both."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

_KEY = "wrappers"

_Function = TypeVar("_Function", bound=Callable[..., Any])


def not_compiled(function: _Function) -> _Function:
    """A function that `torch.compile` leaves alone, with all that it calls (`torch.compiler.disable`, typed)."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


class OptimizerWrapper(Optimizer):
    """Changes what another optimizer gets or does; wrappers can be wrapped.

    Parameter groups are those of the wrapped optimizer, so learning-rate schedulers and `zero_grad` work on either.
    A subclass defines `update`, which calls ``self.base.step()`` once, and its own state.

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
        # Schedulers that also change momentum read from the defaults which of its names the rule has.
        super().__init__(base.param_groups, base.defaults)
        self._share_groups()

    def _share_groups(self) -> None:
        """One list of groups and one state for both: what is added or changed in one is seen by the other."""
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer."""
        if any(param_group is group for group in self.base.param_groups):
            super().add_param_group(param_group)
        else:
            self.base.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Refused: a copy's parameters would be no model's, and what watches the model would not watch the copy's.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"A {type(self).__name__} cannot be copied or pickled: its copy would not train the copied model. Copy the "
            "model, make an optimizer for it as this one was made, and give that "
            "load_state_dict(copy.deepcopy(optimizer.state_dict()))."
        )

    # As in `MatrixOptimizer.step`: what a step does depends on where in a period it is.
    @not_compiled
    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], Any] | None = None
    ) -> Any:
        """One update.

        Args:
            closure: computes the loss and its gradients anew; called once, before the update.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._makes_state():
            self.base.step()
        else:
            self.update()
        return loss

    def _makes_state(self) -> bool:
        """Whether this step is how `torch.distributed.checkpoint` has a new optimizer make its state.

        All learning rates and all gradients are 0 then. It goes to all parameters at once, and is not counted.
        """
        if self.state or any(float(group.get("lr", 1.0)) != 0.0 for group in self.param_groups):
            return False
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        return bool(gradients) and not any(float(gradient.abs().sum()) for gradient in gradients)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets gradients, and what the wrapped optimizer collected with them."""
        self.base.zero_grad(set_to_none)

    def hold_back(self, parameters: Sequence[Tensor]) -> None:
        """Has the wrapped optimizer keep what it collected of these parameters for a later step."""
        hold_back(self.base, parameters)

    @abstractmethod
    def update(self) -> None:
        """What one step does, without gradients."""

    def settings(self) -> dict[str, Any]:
        """What this wrapper was made with and does not change, as plain values: for records of a run."""
        return {}

    @abstractmethod
    def own_state(self) -> dict[str, Any]:
        """What this wrapper alone must remember between steps: numbers, tensors, and lists and dictionaries of them.

        With the same entries at every step and strings as keys, a distributed checkpoint can be read into it.
        """

    @abstractmethod
    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes over what `own_state` returned."""

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, with this wrapper's own at the end of the first group's list ``wrappers``.

        (`torch.distributed.checkpoint` keeps groups and parameters' states of an optimizer, and nothing beside them.)
        """
        state = self.base.state_dict()
        own = {"kind": type(self).__name__, **self.own_state()}
        first = state["param_groups"][0]
        first[_KEY] = [*first.get(_KEY, ()), own]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, also in the middle of a period.

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
        """All parameters in the order of the groups: what indices in a state refer to."""
        return [parameter for group in self.param_groups for parameter in group["params"]]


def hold_back(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Tells an optimizer of parameters whose gradients of this step come with those of a later one.

    One that collects something beside gradients, as `DGD` does, keeps it until then in a method of this name.
    """
    keep: Callable[[Sequence[Tensor]], None] | None = getattr(optimizer, "hold_back", None)
    if keep is not None:
        keep(parameters)


def whole_number(name: str, value: object, meaning: str) -> int:
    """`value` if it is a positive integer.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1: {meaning}.")
    return value
