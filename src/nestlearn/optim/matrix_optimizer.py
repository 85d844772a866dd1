"""Optimizers with a rule for matrices, and AdamW for everything else in the same object."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from nestlearn.optim.checks import fractions, not_negative, one_of
from nestlearn.optim.matrices import Matrices, as_matrices, parameter_batches, weight_of, wide
from nestlearn.optim.sharding import local
from nestlearn.optim.wrapper import evaluate, not_compiled

Rule = Literal["auto", "matrix", "adamw"]

ADAMW = {"adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8}


class MatrixOptimizer(Optimizer):
    """Updates matrices by a rule of its own, and vectors, scalars, embeddings and heads by AdamW.

    Each parameter group has the entry ``rule``: ``"matrix"``, ``"adamw"``, or ``"auto"`` (the default), which is the
    matrix rule for all parameters of at least two dimensions. A tensor does not show whether it is an embedding:
    `nestlearn.optim.param_groups` makes the groups of a model. 3-D parameters are stacks of matrices; kernels of
    convolutions if their group has ``kernels=True``, as parameters of more dimensions always are.

    State and arithmetic are float32 for parameters of half precision. Gradients that a `torch.amp.GradScaler` scaled
    are unscaled here, and a step with non-finite ones is skipped. Without a scaler a non-finite gradient spoils its own
    parameter only, as in torch. With FSDP2, states are distributed as their parameters are.

    A subclass defines `new_state` and `update`. It may define `check_group`, which checks its settings, and
    `needed_states` with `optional_prefix`, for states that only some settings need.

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        defaults: settings of the groups: at least ``lr`` and ``weight_decay``, for AdamW too.
        adamw: ``adamw_betas`` and ``adamw_eps`` where they are to differ from (0.9, 0.95) and 1e-8.

    Raises:
        ValueError: a setting out of range, a complex parameter, one of fewer than two dimensions under ``"matrix"``.
    """

    # torch.amp.GradScaler then leaves unscaling to `step`, and sets `grad_scale` and `found_inf` for it.
    _step_supports_amp_scaling = True

    process_group: ProcessGroup | None = None
    """Processes that hold replicas of all parameters, as with DistributedDataParallel. They then share the work that
    needs whole matrices, such as Newton-Schulz; None: each does all of it. Divided parameters name their processes."""

    optional_prefix: ClassVar[str | None] = None
    """How the names of all states begin that a parameter may lack; None: it may lack none."""

    def __init__(self, params: Any, defaults: dict[str, Any], adamw: Mapping[str, Any] | None = None) -> None:
        unknown = set(adamw or {}) - set(ADAMW)
        if unknown:
            raise ValueError(f"adamw has {sorted(unknown)}; its settings are {sorted(ADAMW)}.")
        own = {"optimizer": type(self).__name__, "rule": "auto", "kernels": False, **ADAMW, **(adamw or {})}
        super().__init__(params, defaults | own)

    @abstractmethod
    def new_state(self, group: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step, without its step count.

        Args:
            group: the settings of its group.
            like: the parameter; `zeros` makes a state of its shape and distribution.
        """

    @abstractmethod
    def update(self, group: Mapping[str, Any], matrices: Matrices) -> None:
        """One step of the rule on parameters of one shape: changes ``matrices.weights`` and states in place.

        Args:
            group: the settings of their group.
            matrices: weights, gradients and states; `nestlearn.optim.matrices.take_step` applies the step.
        """

    def needed_states(self, group: Mapping[str, Any]) -> Iterable[str]:
        """Optional states that the group's settings need now, of a parameter's shape; they begin at zero."""
        return ()

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError for a setting of the rule that is out of range."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group.

        Raises:
            ValueError: a setting out of range, or a parameter that the group's rule cannot train.
        """
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def _check(self, group: Mapping[str, Any]) -> None:
        one_of("rule", group["rule"], Rule)
        not_negative("lr", group["lr"], "the learning rate")
        not_negative("weight_decay", group["weight_decay"], "the part of a weight that one step at lr = 1 takes away")
        fractions("adamw_betas", group["adamw_betas"], 2)
        not_negative("adamw_eps", group["adamw_eps"], "added to the root of the second moment")
        for parameter in group["params"]:
            if parameter.is_complex() or not parameter.is_floating_point():
                raise ValueError(
                    f"A parameter of shape {tuple(parameter.shape)} is {parameter.dtype}; {type(self).__name__} trains "
                    "real floating-point ones. Keep a complex weight as two real ones (torch.view_as_real)."
                )
            if group["rule"] == "matrix" and parameter.ndim < 2:
                raise ValueError(
                    f'A parameter of shape {tuple(parameter.shape)} is in a group with rule="matrix", which needs at '
                    'least two dimensions. Give vectors and scalars a group with rule="adamw", or use '
                    "nestlearn.optim.param_groups(model)."
                )
        self.check_group(group)

    # Not compiled: gradients are new tensors at each step and rules branch at the start of a period, so a traced step
    # would be compiled again and again.
    @not_compiled
    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], Any] | None = None
    ) -> Any:
        """One update.

        Args:
            closure: computes the loss and its gradients again; called once, before the update.

        Raises:
            ValueError: a sparse gradient.
        """
        loss = evaluate(closure)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return loss
        for group in self.param_groups:
            self._check_gradients(group)
        for group in self.param_groups:
            ready = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            self._step_matrices(group, [p for p in ready if is_matrix(group, p)])
            self._step_rest(group, [p for p in ready if not is_matrix(group, p)])
        return loss

    def _check_gradients(self, group: Mapping[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                raise ValueError(
                    f"A parameter of shape {tuple(parameter.shape)} has a gradient of layout {parameter.grad.layout}; "
                    f"{type(self).__name__} needs dense ones: make the embedding with sparse=False, or give its weight "
                    "to torch.optim.SparseAdam."
                )

    def _gradient(self, parameter: Tensor) -> Tensor:
        """The gradient in the type of the update, unscaled."""
        gradient = parameter.grad
        assert gradient is not None
        gradient = gradient.to(wide(parameter.dtype))
        scale: Tensor | None = getattr(self, "grad_scale", None)
        return gradient if scale is None else gradient / scale.to(gradient)

    def _step_matrices(self, group: Mapping[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state |= {"step": torch.tensor(0.0), **self.new_state(group, parameter)}
            for name in self.needed_states(group):
                if name not in state:
                    state[name] = zeros(parameter)
        steps = [int(self.state[parameter]["step"]) for parameter in parameters]
        batches = parameter_batches(parameters, steps, self.process_group)
        self._update_all(group, (self._matrices(group, members) for members in batches))

    def _matrices(self, group: Mapping[str, Any], members: list[Tensor]) -> Matrices:
        """Parameters as matrices, at their next step."""
        kernels = group["kernels"]
        states = [self.state[parameter] for parameter in members]
        for state in states:
            state["step"] += 1
        weights = [weight_of(parameter, kernels) for parameter in members]
        gradients = [as_matrices(local(self._gradient(parameter)), kernels) for parameter in members]
        return Matrices(members, weights, gradients, states, int(states[0]["step"]), kernels, self.process_group)

    def _update_all(self, group: Mapping[str, Any], given: Iterable[Matrices]) -> None:
        """One step of all matrices of a group, batch by batch; rules that share state between batches override it."""
        for matrices in given:
            self.update(group, matrices)
            matrices.write_back()

    def _step_rest(self, group: Mapping[str, Any], parameters: list[Tensor]) -> None:
        if not parameters:
            return
        for parameter in parameters:
            if "exp_avg" not in self.state[parameter]:
                self.state[parameter] = adamw_state(parameter)
        states = [self.state[parameter] for parameter in parameters]
        weights = [parameter.to(wide(parameter.dtype)) for parameter in parameters]
        adamw(
            weights,
            [self._gradient(parameter) for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["adamw_betas"][0],
            beta2=group["adamw_betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["adamw_eps"],
            maximize=False,
        )
        for parameter, weight in zip(parameters, weights, strict=True):
            if weight is not parameter:
                parameter.copy_(weight)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a `state_dict`, also one from the middle of a slow period.

        Raises:
            ValueError: the state is of another optimizer, of parameters in another order or of other shapes.
        """
        self._check_state(state_dict)
        super().load_state_dict(state_dict)
        # torch converts states to the type of the parameter, which would round those of half-precision parameters. It
        # also keeps the tensors of `state_dict` themselves, which both optimizers would then change.
        for parameter, saved in self._saved(state_dict):
            own = {name: value for name, value in saved.items() if name != "step"}
            for name, value in own.items():
                self.state[parameter][name] = value.detach().to(parameter.device, wide(parameter.dtype), copy=True)
            # On the CPU, where reading it does not wait for a device.
            self.state[parameter]["step"] = saved["step"].detach().to("cpu", copy=True)

    def _saved(self, state_dict: Mapping[str, Any]) -> Iterable[tuple[Tensor, dict[str, Any]]]:
        """Each parameter with its saved state, if there is one."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                if key in state_dict["state"]:
                    yield parameter, state_dict["state"][key]

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        groups = state_dict["param_groups"]
        kinds = sorted({str(group.get("optimizer", "another optimizer")) for group in groups})
        if kinds != [type(self).__name__]:
            raise ValueError(
                f"This state is of {', '.join(kinds)}, not of {type(self).__name__}; load it into an optimizer made as "
                "the one it was saved from."
            )
        sizes, saved_sizes = ([len(group["params"]) for group in gs] for gs in (self.param_groups, groups))
        if sizes != saved_sizes:
            raise ValueError(f"This state has groups of {saved_sizes} parameters, the optimizer of {sizes}.")
        for group, saved_group in zip(self.param_groups, groups, strict=True):
            names, saved_names = (g.get("param_names") for g in (group, saved_group))
            if names and saved_names and names != saved_names:
                first = next(pair for pair in zip(saved_names, names, strict=True) if pair[0] != pair[1])
                raise ValueError(f"This state is of parameters in another order: {first[0]} where {first[1]} is.")
            for parameter, key in zip(group["params"], saved_group["params"], strict=True):
                if key in state_dict["state"]:
                    settings = {**saved_group, "params": group["params"]}
                    self._check_shapes(settings, parameter, state_dict["state"][key])

    def _check_shapes(self, group: Mapping[str, Any], parameter: Tensor, saved: Mapping[str, Any]) -> None:
        expected = self.new_state(group, parameter) if is_matrix(group, parameter) else adamw_state(parameter)
        shapes = {name: tuple(value.shape) for name, value in expected.items() if name != "step"}
        received = {name: tuple(value.shape) for name, value in saved.items() if name != "step"}
        # Settings may have changed since the last step: new states begin at the next one, unused ones stay.
        optional = self._optional_shapes(parameter, received)
        allowed = shapes | optional
        required = {name: shape for name, shape in shapes.items() if name not in optional}
        if not required.items() <= received.items() <= allowed.items():
            raise ValueError(
                f"The saved state of a parameter of shape {tuple(parameter.shape)} has {received}; it must have "
                f"{allowed}. Give the optimizer the same parameters in the same order as when it was saved."
            )

    def _optional_shapes(self, parameter: Tensor, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """The shapes of those of these states that a parameter may lack."""
        prefix = self.optional_prefix
        optional = () if prefix is None else [name for name in names if name.startswith(prefix)]
        return dict.fromkeys(optional, tuple(parameter.shape))


def is_matrix(group: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether the matrix rule trains this parameter of a group."""
    return group["rule"] == "matrix" or (group["rule"] == "auto" and parameter.ndim >= 2)


def zeros(like: Tensor) -> Tensor:
    """A state of zeros for a parameter: of its shape and distribution, in the type of its update."""
    return torch.zeros_like(like, dtype=wide(like.dtype), memory_format=torch.contiguous_format)


def adamw_state(like: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter before its first step."""
    return {"step": torch.tensor(0.0), "exp_avg": zeros(like), "exp_avg_sq": zeros(like)}
