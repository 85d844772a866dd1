"""What a rule for linear maps needs beside gradients: second moments of their inputs, summed while backward runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from nestlearn.optim.matrices import wide

Form = Literal["batch", "sample"]


class LinearLayer:
    """A linear map with a weight of its own, and sums over the rows that went through it.

    With a bias that is trained too, the map is ``[W b] [x; 1]``: d is then one more than the width of x.

    Attributes:
        transposed: the weight is [in, out], as in the Conv1D of transformers.
        own_bias: if the optimizer has it.
        group: the place of the weight's group in the optimizer; None: not trained by the rule.
        bias_group: that of the bias's.
        rows: how many were summed since `forget`; None where nothing went through.
        moment: ``Σ x xᵀ``, or with steps for each row ``Σ η' x xᵀ``.
        writes: ``Σ η' e xᵀ``, e the gradient of the output; only with steps for each row.
        used: a step was taken on the sums; the next rows are the first of new ones.
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
        """The bias if it is updated with the weight: not where it is frozen and no gradient is left from before."""
        bias = self.own_bias
        return bias if bias is not None and (bias.requires_grad or bias.grad is not None) else None

    def forget(self) -> None:
        """Begins the sums anew."""
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
            x: its input.
            gradient: that of its output.
            lr: η, if each row is to have a step of its own, ``η' = η / (1 + η‖x‖²)``.
            skip_rows_without_gradient: leave rows out whose gradient is exactly 0: padding.
        """
        if self.used:
            self.forget()
        dtype = wide(self.weight.dtype)
        rows = counted_rows if skip_rows_without_gradient else all_rows
        inputs, errors, count = rows(x.to(dtype), gradient.to(dtype), self.bias is not None)
        if self.rows is None or self.moment is None:
            self.rows, self.moment = torch.zeros_like(count), inputs.new_zeros(inputs.shape[1], inputs.shape[1])
            self.writes = None if lr is None else inputs.new_zeros(errors.shape[1], inputs.shape[1])
        self.rows.add_(count)
        scaled = inputs if lr is None else inputs * (lr / (1 + lr * inputs.square().sum(1, keepdim=True)))
        self.moment.addmm_(inputs.T, scaled)
        if self.writes is not None:
            self.writes.addmm_(errors.T, scaled)

    def sums(self, form: Form) -> list[Tensor]:
        """Rows and moment, in the sample form writes too; zeros where nothing went through.

        Raises:
            ValueError: what was summed is for the other form, or for another bias.
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
        """Those of the sums."""
        out, width = self.weight.shape[::-1] if self.transposed else self.weight.shape
        size = width + (self.bias is not None)
        return [torch.Size(shape) for shape in ((), (size, size), (out, size))[: 2 + (form == "sample")]]

    def no_sums(self, form: Form) -> list[Tensor]:
        """The sums over no rows."""
        dtype, device = wide(self.weight.dtype), self.weight.device
        return [torch.zeros(shape, dtype=dtype, device=device) for shape in self.shapes(form)]


def all_rows(
    x: Float[Tensor, "*rows in"], gradient: Float[Tensor, "*rows out"], with_bias: bool
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n out"], Float[Tensor, ""]]:
    """Inputs (with a 1 for the bias), gradients of outputs, and the number of rows."""
    inputs, errors = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    if with_bias:
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
    return inputs, errors, inputs.new_tensor(float(len(inputs)))


def counted_rows(
    x: Float[Tensor, "*rows in"], gradient: Float[Tensor, "*rows out"], with_bias: bool
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n out"], Float[Tensor, ""]]:
    """The same without the rows whose gradient is exactly 0: their inputs are set to 0 and they are not counted.

    Whatever such a row holds does not reach the sums.
    """
    inputs, errors, _ = all_rows(x, gradient, with_bias)
    counted = errors.abs().amax(1, keepdim=True) != 0  # NaN counts: it is to be seen
    return torch.where(counted, inputs, 0), errors, counted.sum().to(inputs.dtype)


class _Observed(torch.autograd.Function):
    """The identity on a map's output; its backward hands the gradient of the output and the input to `receive`.

    The input is saved as autograd saves what backward needs: under activation checkpointing it is dropped and computed
    anew, and the second forward pass, whose backward does not run, is not counted.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, receive: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receive = receive
        return output.detach()  # no view: the output may be changed in place, as nn.ReLU(inplace=True) does

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            ctx.receive(ctx.saved_tensors[0], gradients[0].detach())
        return gradients[0], None, None


def observe(module: nn.Module, receive: Callable[[Tensor, Tensor], None]) -> Any:
    """Calls `receive(input, gradient of the output)` at every backward pass through a module.

    Returns:
        The handle that ends it.

    Raises:
        ValueError: in the forward pass, an input that is distributed over processes.
    """

    def hook(own: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        # A deep copy of the model keeps its hooks; what goes through the copy is not this model's.
        if own is not module or not torch.is_grad_enabled():
            return None
        # A frozen weight needs no sums. A subclass may return more than its output: `step` then names it.
        if not own.weight.requires_grad or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        x = next(iter((*args, *kwargs.values())))
        if isinstance(x, DTensor):
            raise ValueError(
                f"A {type(module).__name__} gets an input that is distributed ({x.placements}), as in tensor "
                'parallelism; give its weight a group with rule="adamw", or use data parallelism (FSDP2, DDP).'
            )
        return _Observed.apply(output, x.detach(), receive)

    # A compiled model calls the hook as it is: what backward collects is no part of its graph.
    eager: Any = torch.compiler.disable(hook)
    return module.register_forward_hook(eager, with_kwargs=True)


def linear_layers(model: nn.Module) -> tuple[dict[Tensor, LinearLayer], dict[Tensor, str]]:
    """The linear maps of a model by their weights, and the parameters of those that no rule for them can train.

    Returns:
        Layers, and for each weight that is none though it looks like one the reason with its fix.
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
        elif not _rows_are_local(own["weight"], transposed):
            refused[own["weight"]] = f"the inputs of {name} are divided over processes, its outputs may be (Shard(0))"
        else:
            layers[own["weight"]] = LinearLayer(name, module, transposed)
    return layers, refused


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers (GPT-2), a linear map with a weight [in, out]."""
    # A model can have one only where that module has been imported: it takes seconds, and torch alone is needed here.
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def _rows_are_local(weight: Tensor, transposed: bool) -> bool:
    """Whether each output's weights are complete on a process."""
    placements = weight.placements if isinstance(weight, DTensor) else ()
    return all(not isinstance(p, Shard) or p.dim == int(transposed) for p in placements)
