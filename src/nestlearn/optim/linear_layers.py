"""Second moments of the inputs of linear maps, summed while backward runs: what `DGD` needs besides gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nestlearn.optim.matrices import wide
from nestlearn.optim.sharding import check_input, inputs_are_divided

Form = Literal["batch", "sample"]


class LinearLayer:
    """A linear map whose weight no other module shares, and sums over its input rows.

    With a trained bias the map is ``[W b] [x; 1]``, and d is one more than the width of x.

    Attributes:
        transposed: the weight is [in, out], as in the Conv1D of transformers.
        own_bias: the bias, if the optimizer has it.
        group: index of the weight's group in the optimizer; None: not trained by the rule.
        bias_group: index of the bias's group.
        rows: how many were summed since `forget`; None for none.
        moment: ``Σ x xᵀ``, or with a step for each row ``Σ η' x xᵀ``.
        writes: ``Σ η' e xᵀ``, e the gradient of the output; only with a step for each row.
        used: a step has used the sums; the next row starts new ones.
    """

    def __init__(self, name: str, module: nn.Module, transposed: bool) -> None:
        self.name, self.module, self.transposed = name or "the model itself", module, transposed
        self.weight: Tensor = module.weight  # pyright: ignore[reportAttributeAccessIssue]
        self.own_bias: Tensor | None = None
        self.group: int | None = None
        self.bias_group: int | None = None
        self.forget()

    @property
    def bias(self) -> Tensor | None:
        """The bias if it is updated with the weight: unless it is frozen and has no gradient."""
        bias = self.own_bias
        return bias if bias is not None and (bias.requires_grad or bias.grad is not None) else None

    def forget(self) -> None:
        """Starts new sums."""
        self.used = False
        self.rows: Float[Tensor, ""] | None = None
        self.moment: Float[Tensor, "d d"] | None = None
        self.writes: Float[Tensor, "out d"] | None = None

    def add(
        self,
        x: Float[Tensor, "*rows in"],
        gradient: Float[Tensor, "*rows out"],
        lr: float | Tensor | None,
        skip_rows_without_gradient: bool = False,
    ) -> None:
        """Adds the rows of one call of the map.

        Args:
            x: the input.
            gradient: of the output.
            lr: η, if each row has a step of its own, ``η' = η / (1 + η‖x‖²)``.
            skip_rows_without_gradient: leave out rows whose gradient is exactly 0, such as padding.
        """
        if self.used:
            self.forget()
        inputs, errors, count = self._rows(x, gradient, skip_rows_without_gradient)
        if self.rows is None or self.moment is None:
            self.rows, self.moment = torch.zeros_like(count), inputs.new_zeros(inputs.shape[1], inputs.shape[1])
            self.writes = None if lr is None else inputs.new_zeros(errors.shape[1], inputs.shape[1])
        self.rows.add_(count)
        scaled = inputs if lr is None else inputs * (lr / (1 + lr * inputs.square().sum(1, keepdim=True)))
        self.moment.addmm_(inputs.T, scaled)
        if self.writes is not None:
            self.writes.addmm_(errors.T, scaled)

    def _rows(
        self, x: Float[Tensor, "*rows in"], gradient: Float[Tensor, "*rows out"], skip: bool
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n out"], Float[Tensor, ""]]:
        """Inputs (with a 1 for the bias), gradients of outputs, and the number of rows that count."""
        dtype = wide(self.weight.dtype)
        inputs, errors = (rows.reshape(-1, rows.shape[-1]).to(dtype) for rows in (x, gradient))
        if self.bias is not None:
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
        if not skip:
            return inputs, errors, inputs.new_tensor(float(len(inputs)))
        counted = errors.abs().amax(1, keepdim=True) != 0  # NaN counts, so that it is seen
        return torch.where(counted, inputs, 0), errors, counted.sum().to(dtype)

    def sums(self, form: Form) -> list[Tensor]:
        """Rows and moment, in the sample form writes too; zeros if there were no rows.

        Raises:
            ValueError: the sums are of the other form, or of another bias.
        """
        if self.rows is None or self.moment is None:
            return self.no_sums(form)
        sums = [self.rows, self.moment] + ([] if self.writes is None else [self.writes])
        if [x.shape for x in sums] != self.shapes(form):
            raise self.other_form(form)
        return sums

    def other_form(self, form: Form) -> ValueError:
        """The error for sums that are not those of this form and bias."""
        return ValueError(
            f"form is {form!r}, but {self.name} was observed for another one, or its bias was frozen or thawed since; "
            "change these after zero_grad(), before the backward pass, and where a period begins."
        )

    def shapes(self, form: Form) -> list[torch.Size]:
        """The shapes of the sums."""
        out, width = self.weight.shape[::-1] if self.transposed else self.weight.shape
        size = width + (self.bias is not None)
        return [torch.Size(shape) for shape in ((), (size, size), (out, size))[: 2 + (form == "sample")]]

    def no_sums(self, form: Form) -> list[Tensor]:
        """The sums over no rows."""
        dtype, device = wide(self.weight.dtype), self.weight.device
        return [torch.zeros(shape, dtype=dtype, device=device) for shape in self.shapes(form)]


class _Observed(torch.autograd.Function):
    """The identity on a map's output. Its backward passes the input and the gradient of the output to `receive`.

    Autograd saves the input: under activation checkpointing it is dropped and computed again, and a forward pass
    without a backward pass is not counted.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, receive: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receive = receive
        return output.detach()  # no view: nn.ReLU(inplace=True) changes the output in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            ctx.receive(ctx.saved_tensors[0], gradients[0].detach())
        return gradients[0], None, None


def observe(module: nn.Module, receive: Callable[[Tensor, Tensor], None]) -> Any:
    """Calls `receive(input, gradient of the output)` at every backward pass through a module.

    Returns:
        The handle that removes the hook.

    Raises:
        ValueError: in the forward pass, an input that is distributed over processes.
    """

    def hook(own: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        # A deep copy of the model keeps its hooks; inputs of the copy are not this model's.
        if own is not module or not torch.is_grad_enabled():
            return None
        # A frozen weight needs no sums. A subclass may return more than its output; `step` then names it.
        if not own.weight.requires_grad or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        x = next(iter((*args, *kwargs.values())))
        fix = 'give its weight a group with rule="adamw", or use data parallelism (FSDP2, DDP)'
        check_input(f"A {type(module).__name__}", x, fix)
        return _Observed.apply(output, x.detach(), receive)

    # A compiled model calls the hook uncompiled: the sums are no part of its graph.
    eager: Any = torch.compiler.disable(hook)
    return module.register_forward_hook(eager, with_kwargs=True)


def linear_layers(model: nn.Module) -> tuple[dict[Tensor, LinearLayer], dict[Tensor, str]]:
    """The linear maps of a model that a rule for linear maps can train.

    Returns:
        Layers by their weights, and for the parameters of all other linear maps the reason why they cannot be trained.
    """
    owners: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name or "the model itself")
    layers: dict[Tensor, LinearLayer] = {}
    refused: dict[Tensor, str] = {}
    for name, module in model.named_modules():
        transposed = is_conv1d(module)
        if not (isinstance(module, nn.Linear) or transposed):
            continue
        own = dict(module.named_parameters(recurse=False))
        if "weight" not in own:
            reason = f"{name} computes its weight from other parameters (a parametrization, such as weight_norm)"
            refused |= dict.fromkeys(module.parameters(), reason)
            continue
        shared = [parameter for parameter in own.values() if len(owners[parameter]) > 1]
        if shared:
            refused[own["weight"]] = f"{' and '.join(owners[shared[0]])} share a parameter (weight tying)"
        elif inputs_are_divided(own["weight"], outputs=int(transposed)):
            refused[own["weight"]] = f"the inputs of {name} are divided over processes, its outputs may be (Shard(0))"
        else:
            layers[own["weight"]] = LinearLayer(name, module, transposed)
    return layers, refused


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers (GPT-2), a linear map with a weight [in, out]."""
    # Not imported here: that takes seconds, and a model can have one only where the module has been imported.
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)
