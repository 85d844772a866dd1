"""Parameters as stacks of matrices, the form in which a rule for matrices gets them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from nestlearn.optim.sharding import holders, local, own_part, total, undivided, whole

Stack = Float[Tensor, "b m n"]

CPU_ELEMENTS, ELEMENTS = 2**20, 2**27
"""Elements updated at once: on a CPU they fit its caches, elsewhere temporary tensors stay small."""

CPU_STACK = 2**16
"""Elements up to which matrices are stacked on a CPU; larger ones are faster one by one."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which a parameter of `dtype` is updated: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def as_matrices(tensor: Tensor, kernels: bool) -> Stack:
    """A parameter as matrices: 2-D is one, 3-D a stack; kernels of convolutions [out, in, ...] are [out, in · ...].

    Args:
        tensor: at least 2-D; from 4-D on always a kernel.
        kernels: whether 3-D tensors are kernels too.
    """
    if tensor.ndim == 3 and not kernels:
        return tensor
    return tensor.flatten(1)[None]


def stack_shape(shape: Sequence[int], kernels: bool) -> tuple[int, int, int]:
    """Matrices, rows and columns of a parameter as `as_matrices` gives them."""
    if len(shape) == 3 and not kernels:
        return shape[0], shape[1], shape[2]
    return 1, shape[0], math.prod(shape[1:])


def together(stacks: Sequence[Stack]) -> tuple[Stack, list[int]]:
    """Stacks of matrices of one shape joined to one, and their lengths: few large operations instead of many."""
    return stacks[0] if len(stacks) == 1 else torch.cat(list(stacks)), [len(stack) for stack in stacks]


def stack_count(elements: int, device: torch.device) -> int:
    """How many matrices of this many elements to update as one stack; on a CPU large ones are alone."""
    return max(1, (CPU_STACK if device.type == "cpu" else ELEMENTS) // max(elements, 1))


@dataclass(frozen=True)
class Matrices:
    """Parameters of one shape and type at the same step, each a stack of matrices.

    Attributes:
        parameters: as in the model, of any type, distributed or not.
        weights: the same in float32 or float64, this process's part; changed in place.
        gradients: of the weights, of the same types and shapes; not to be changed.
        states: of the optimizer, one dictionary for each parameter.
        step: the number of this step, from 1.
        kernels: how 3-D tensors are read (`as_matrices`).
        process_group: processes that hold replicas of the parameters and share the work on whole matrices.
    """

    parameters: list[Tensor]
    weights: list[Stack]
    gradients: list[Stack]
    states: list[dict[str, Tensor]]
    step: int
    kernels: bool
    process_group: ProcessGroup | None = None

    def state(self, name: str) -> list[Stack]:
        """One entry of all states, as matrices that share memory with it."""
        return [as_matrices(local(entry), self.kernels) for entry in self.entries(name)]

    def entries(self, name: str) -> list[Tensor]:
        """One entry of all states, as stored.

        Raises:
            ValueError: a state lacks it.
        """
        if any(name not in state for state in self.states):
            raise ValueError(
                f"Parameters of shape {tuple(self.parameters[0].shape)} have no state {name!r}: a setting of their "
                "group that needs it was changed after the first step. Give it when the optimizer is made, or clear "
                "their states: optimizer.state[parameter].clear()."
            )
        return [state[name] for state in self.states]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of each complete matrix."""
        return stack_shape(self.parameters[0].shape, self.kernels)[1:]

    @property
    def stacked(self) -> bool:
        """Whether a parameter is a stack of matrices along its first dimension."""
        return self.parameters[0].ndim == 3 and not self.kernels

    @property
    def undivided(self) -> bool:
        """Whether each matrix is whole on one process; so are the matrices of a stack that is divided between them."""
        return undivided(self.parameters[0], self.stacked)

    @property
    def workers(self) -> ProcessGroup | None:
        """The processes that have the same complete matrices; None: this one alone."""
        like = self.parameters[0]
        if isinstance(like, DTensor) and self.undivided:
            return None
        return holders(like, self.process_group)

    def whole(self, parts: Sequence[Stack]) -> list[Stack]:
        """Complete matrices on this process, from the parts of all processes."""
        return self._reread([whole(x, p) for x, p in zip(parts, self.parameters, strict=True)], parts)

    def own_parts(self, complete: Sequence[Stack]) -> list[Stack]:
        """This process's parts of complete matrices."""
        return self._reread([own_part(x, p) for x, p in zip(complete, self.parameters, strict=True)], complete)

    def _reread(self, tensors: Sequence[Tensor], given: Sequence[Stack]) -> list[Stack]:
        """Matrices of tensors in the shape of the parameters; without distribution these are the given stacks."""
        return [x if x is y else as_matrices(x, self.kernels) for x, y in zip(tensors, given, strict=True)]

    def total(self, parts: Sequence[Float[Tensor, "b *rest"]]) -> list[Float[Tensor, "b *rest"]]:
        """Sums over the processes that hold parts of the same matrices: one row for each matrix."""
        return [total(part, like, self.stacked) for part, like in zip(parts, self.parameters, strict=True)]

    def norms(self, parts: Sequence[Stack]) -> list[Float[Tensor, "b 1 1"]]:
        """The Frobenius norm of each complete matrix."""
        squares = [torch.linalg.vector_norm(part, 2, (-2, -1), keepdim=True).square_() for part in parts]
        return [x.sqrt() for x in self.total(squares)]

    def write_back(self) -> None:
        """Copies weights to parameters that do not share memory with them."""
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            own = local(parameter)
            if weight.data_ptr() != own.data_ptr():
                own.copy_(weight.view(own.shape))


def weight_of(parameter: Tensor, kernels: bool) -> Stack:
    """The matrices of a parameter in float32 or float64; they share its memory where type and layout allow."""
    own = local(parameter)
    return as_matrices(own.to(wide(own.dtype)).contiguous(), kernels)


def parameter_batches(
    parameters: Sequence[Tensor], steps: Sequence[int], process_group: ProcessGroup | None = None
) -> Iterator[list[Tensor]]:
    """Parameters that are updated together: of one shape, type, device, distribution and step, up to a limit.

    At least one for each process that shares the work (`Matrices.workers`), where there are as many.
    """
    alike: dict[tuple[object, ...], list[Tensor]] = {}
    for parameter, step in zip(parameters, steps, strict=True):
        placements = getattr(parameter, "placements", None), getattr(parameter, "device_mesh", None)
        alike.setdefault((parameter.shape, parameter.dtype, parameter.device, placements, step), []).append(parameter)
    for members in alike.values():
        limit = CPU_ELEMENTS if members[0].device.type == "cpu" else ELEMENTS
        workers = holders(members[0], process_group)
        count = max(1 if workers is None else workers.size(), limit // members[0].numel())
        for first in range(0, len(members), count):
            yield members[first : first + count]


def take_step(
    weights: list[Stack],
    updates: list[Stack],
    group: Mapping[str, Any],
    factor: float = 1.0,
    scales: list[Float[Tensor, "b 1 1"]] | None = None,
) -> None:
    """``W ← (1 - lr · weight_decay) W - lr · factor · scale · U``, in place on W; one scale for each matrix."""
    lr = group["lr"]
    if group["weight_decay"] > 0:
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
    if scales is not None:
        torch._foreach_addcmul_(weights, updates, torch._foreach_mul(scales, lr * factor), value=-1.0)
    elif isinstance(lr, Tensor):
        torch._foreach_add_(weights, torch._foreach_mul(updates, lr * -factor))
    else:
        torch._foreach_add_(weights, updates, alpha=-lr * factor)
