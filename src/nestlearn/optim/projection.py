"""A preconditioner that is a memory of each layer's inputs: new learning leaves the answers to old inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from nestlearn.optim.sketch import add_rows, closing
from nestlearn.optim.wrapper import OptimizerWrapper, whole_number

ApplyTo = Literal["update", "gradient"]


Unit = Literal["squares", "steps"]


def ridge_projection(gram: Float[Tensor, "*b d d"], alpha: float | Float[Tensor, ""]) -> Float[Tensor, "*b d d"]:
    """``P = (I + XᵀX / α)⁻¹``, what recursive least squares arrives at from P = I after all rows X.

    Each batch of rows X changes ``P ← P - P Xᵀ (α I + X P Xᵀ)⁻¹ X P``; by Woodbury's identity the order and the size of
    the batches do not matter, only the sum of ``XᵀX`` does. P is the map to the errors of ridge regression: close to 0
    along directions that inputs had, 1 along those that none had. Its eigenvalues are ``α / (α + λ)``, λ those of XᵀX:
    one eigendecomposition in float64, whatever the type of `gram`.

    Args:
        gram: ``XᵀX`` summed over all rows, finite.
        alpha: α, the sum of squares at which a direction is half closed.

    Example:
        >>> ridge_projection(torch.diag(torch.tensor([0.0, 1.0, 99.0])), alpha=1.0).diagonal()
        tensor([1.0000, 0.5000, 0.0100])
    """
    # By eigenvalues, in float64: where XᵀX / α is above 1e7, float32 loses the identity in the sum, and what is left
    # has the rounding errors of XᵀX as its small eigenvalues, of either sign. Clamped, those of P are in [0, 1] always.
    values, vectors = torch.linalg.eigh(gram.double())
    kept = alpha / (alpha + values.clamp(min=0.0))
    return ((vectors * kept.unsqueeze(-2)) @ vectors.mT).to(gram.dtype)


class _Memory:
    """What one weight's inputs were: the sum of ``x xᵀ`` of a linear map, the count of each row of an embedding."""

    def __init__(
        self,
        name: str,
        module: nn.Linear | nn.Embedding,
        dtype: torch.dtype,
        trained: set[Tensor],
        rank: int | None = None,
    ) -> None:
        self.name = name
        self.weight = module.weight
        bias = module.bias if isinstance(module, nn.Linear) else None
        self.bias = bias if bias is not None and bias in trained else None
        self.is_embedding = isinstance(module, nn.Embedding)
        size = module.weight.shape[0] if self.is_embedding else module.weight.shape[1] + (self.bias is not None)
        shape = (size,) if self.is_embedding else (rank or size, size)
        self.seen = torch.zeros(shape, dtype=dtype, device=module.weight.device)
        self.applied: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Stores the inputs of one forward pass."""
        if self.seen.device != inputs.device:  # the model moved after the optimizer was made
            self.seen = self.seen.to(inputs.device)
        if self.is_embedding:
            self.seen.add_(torch.bincount(inputs.reshape(-1), minlength=len(self.seen)).to(self.seen.dtype))
            return
        rows = self.rows(inputs)
        self.seen.addmm_(rows.T, rows)

    def rows(self, inputs: Tensor) -> Float[Tensor, "t d"]:
        """Inputs of a linear map, with the 1 of its bias."""
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self.seen.dtype)
        return rows if self.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], 1)

    def mean_square(self) -> Float[Tensor, ""]:
        """Sum of squares of what is stored, per direction."""
        return self.seen.mean() if self.is_embedding else self.seen.diagonal().mean()

    def refresh(self, alpha: float | Float[Tensor, ""]) -> None:
        """Applies from now on what is stored now."""
        self.applied = alpha / (alpha + self.seen) if self.is_embedding else ridge_projection(self.seen, alpha)

    def check(self) -> None:
        """Raises ValueError if an input stored was not finite."""
        if not bool(self.seen.isfinite().all()):
            raise ValueError(
                f"The inputs of {self.name or 'the model itself'} ({tuple(self.weight.shape)}) are not finite, or the "
                f"sum of their squares is too large for {self.seen.dtype}. The layers before it diverged: lower the "
                "learning rate, or scale the inputs, and begin again from weights saved before; for large inputs give "
                "InputProjection(dtype=torch.float64)."
            )

    def project(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``D P`` of a change (or gradient) D of the weight, its bias as the last column."""
        assert self.applied is not None
        applied = self.applied.to(weight)
        if self.is_embedding:
            return weight * applied[:, None], None
        if self.bias is None:
            return self.times(weight, applied), None
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
        both = self.times(torch.cat([weight, bias[:, None]], 1), applied)
        return both[:, :-1], both[:, -1]

    def times(self, change: Tensor, applied: Tensor) -> Tensor:
        """``D P`` of a linear map."""
        return change @ applied

    def state(self) -> dict[str, Tensor | None]:
        """What is stored and the copy in use."""
        return {"seen": self.seen.clone(), "applied": None if self.applied is None else self.applied.clone()}

    def load(self, state: dict[str, Tensor | None]) -> None:
        """Takes over what `state` returned."""
        seen, applied = state["seen"], state["applied"]
        assert seen is not None
        self.applied = None if applied is None else applied.to(self.seen).clone()
        self.seen = seen.to(self.seen).clone()


class _LeadingDirections(_Memory):
    """A linear map's memory in the r leading directions of its inputs: r x d numbers in place of d x d."""

    def __init__(self, name: str, module: nn.Linear, dtype: torch.dtype, trained: set[Tensor], rank: int) -> None:
        super().__init__(name, module, dtype, trained, rank)
        self.squares = self.seen.new_zeros(())

    def add(self, inputs: Tensor) -> None:
        """Stores the inputs of one forward pass."""
        if self.seen.device != inputs.device:
            self.seen, self.squares = self.seen.to(inputs.device), self.squares.to(inputs.device)
        rows = self.rows(inputs)
        self.seen = add_rows(self.seen, rows)
        self.squares += rows.square().sum()

    def mean_square(self) -> Float[Tensor, ""]:
        """Sum of squares of all inputs, per direction, of those that are not kept too."""
        return self.squares / self.seen.shape[1]

    def refresh(self, alpha: float | Float[Tensor, ""]) -> None:
        """Applies from now on what is stored now."""
        self.applied = closing(self.seen, alpha)

    def times(self, change: Tensor, applied: Tensor) -> Tensor:
        """``D (I - AᵀA)``."""
        return change - (change @ applied.T) @ applied

    def state(self) -> dict[str, Tensor | None]:
        """What is stored and the copy in use."""
        return super().state() | {"squares": self.squares.clone()}

    def load(self, state: dict[str, Tensor | None]) -> None:
        """Takes over what `state` returned."""
        super().load(state)
        squares = state["squares"]
        assert squares is not None
        self.squares = squares.to(self.seen).clone()


class InputProjection(OptimizerWrapper):
    """Projects what an optimizer does to each linear map away from the inputs that the map has already had.

    The preconditioner of NL Eq. 38-41, 47 as an associative memory: per `nn.Linear`, recursive least squares over its
    inputs x (with a 1 for the bias), ``P ← P - P Xᵀ (α I + X P Xᵀ)⁻¹ X P``, and each change D of the weight becomes
    ``D P``. For x that were stored ``D P x ≈ 0``: the answers to them stay. (Known as orthogonal weights modification,
    Zeng et al. 2019, arXiv 1810.01256.) No input is kept, only a (d+1) x (d+1) matrix per map. The rows of an
    `nn.Embedding` are the same rule on one-hot inputs, where P is diagonal: ``α / (α + count)``.

    Two timescales: inputs are stored at every forward pass in training mode, but the P in use is a lagged copy, taken
    every `period` steps. So the newest inputs do not yet stand in their own way, and no task boundary is needed.

    Under activation checkpointing without reentry (`torch.utils.checkpoint` with ``use_reentrant=False``) the forward
    pass of a map runs twice with gradients, and its inputs count twice, as if its α were half as large.

    Args:
        base: any torch optimizer, this package's wrappers included.
        model: whose linear maps and embeddings with parameters of `base` are projected; its other parameters, such as
            norms, are left to `base`.
        alpha: α, the sum of squares of a direction's inputs at which it is half closed.
        unit: of alpha: "squares" as the formula has it, the same for all maps; "steps" for steps whose inputs are
            average for the map: α times its mean square per step and direction. Then α means the same for maps with
            inputs of other sizes, and for maps that see every token of a text as for those that see one vector of it.
        period: steps between two refreshes of the copy in use; None: only `refresh()` does, say at a task's end.
        rank: r, for maps with more inputs than that: their memory is of the r leading directions of the inputs, in
            r (d+1) numbers, ``P = I - V diag(λ / (α + λ)) Vᵀ`` (`nestlearn.optim.sketch`). Exact while inputs have rank
            r at most; beyond, smaller directions stay open: protected is what came first and is large. None: all.
        apply_to: ``"update"`` projects the change that `base` made, whatever its rule; ``"gradient"`` what `base`
            gets, whose elementwise scaling (Adam) then points partly back into the closed directions.
        dtype: of the stored sums.

    Attributes:
        recording: whether forward passes in training mode store their inputs.

    Raises:
        ValueError: alpha not positive, an unknown `apply_to`, nothing in the model to project, or a model that several
            processes train.

    Example:
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> optimizer = InputProjection(torch.optim.SGD(layer.parameters(), lr=1.0), layer, alpha=1e-6, period=1)
        >>> old, new = torch.tensor([[1.0, 0, 0]]), torch.tensor([[1.0, 1, 0]])
        >>> layer(old).sum().backward()
        >>> optimizer.step()  # the copy is refreshed after the change: `old` is remembered from now on
        >>> remembered = layer(old).detach()
        >>> optimizer.zero_grad()
        >>> layer(new).sum().backward()
        >>> optimizer.step()
        >>> torch.allclose(layer(old), remembered, atol=1e-5)
        True
        >>> optimizer.close()
    """

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module,
        *,
        alpha: float = 100.0,
        period: int | None = None,
        rank: int | None = None,
        unit: Unit = "squares",
        apply_to: ApplyTo = "update",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base)
        divided = any(isinstance(parameter, DTensor) for parameter in self.parameters())
        if divided or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            raise ValueError(
                "InputProjection learns from the inputs of its own process only: replicas of a model "
                "(DistributedDataParallel) would drift apart, and weights in parts (FSDP2) cannot be projected. Train "
                "with it on one process; processes that each train a model of their own make it before "
                "torch.distributed.init_process_group."
            )
        if not alpha > 0.0:
            raise ValueError(f"alpha is {alpha}; it must be positive: the sum of squares that half closes a direction.")
        if apply_to not in get_args(ApplyTo):
            raise ValueError(f"apply_to is {apply_to!r}; it must be one of {', '.join(get_args(ApplyTo))}.")
        if unit not in get_args(Unit):
            raise ValueError(f"unit is {unit!r}; it must be one of {', '.join(get_args(Unit))}.")
        self.alpha, self.unit, self.apply_to = alpha, unit, apply_to
        self.period = None if period is None else whole_number("period", period, "steps between two refreshes")
        self.rank = None if rank is None else whole_number("rank", rank, "directions kept of a map's inputs")
        self.recording = True
        self._steps = self._recorded = 0
        # One memory per weight and kind: maps that share a weight share its memory, and a tied head has two.
        memories: dict[tuple[Tensor, bool], _Memory] = {}
        self._hooks = []
        trained = set(self.parameters())
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight in trained:
                key = (module.weight, isinstance(module, nn.Embedding))
                memory = memories.setdefault(key, self._memory(name, module, dtype, trained))
                self._hooks.append(module.register_forward_pre_hook(self._hook(memory, module)))
        if not memories:
            kinds = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
            raise ValueError(
                f"The model has no nn.Linear or nn.Embedding whose weight is the optimizer's (modules: {kinds}). Give "
                "the model that the optimizer trains, or leave the projection out."
            )
        self._memories = list(memories.values())

    def _memory(self, name: str, module: nn.Linear | nn.Embedding, dtype: torch.dtype, trained: set[Tensor]) -> _Memory:
        if self.rank is not None and isinstance(module, nn.Linear) and module.in_features > self.rank:
            return _LeadingDirections(name, module, dtype, trained, self.rank)
        return _Memory(name, module, dtype, trained)

    def _hook(self, memory: _Memory, own: nn.Module) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def store(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            # A deep copy of the model keeps its hooks; what the copy reads is not this model's past.
            if module is own and self.recording and module.training and torch.is_grad_enabled():
                with torch.no_grad():
                    memory.add(inputs[0].detach())

        return store

    def refresh(self) -> None:
        """Takes the copy in use from all inputs stored so far.

        Raises:
            ValueError: inputs of a map were not finite; the copies in use stay as they were.
        """
        for memory in self._memories:
            memory.check()
        with torch.no_grad():
            for memory in self._memories:
                alpha: float | Tensor = self.alpha
                if self.unit == "steps":
                    # Without any input the mean square is 0, and so is all that is divided by it.
                    alpha = (memory.mean_square() * (self.alpha / max(self._recorded, 1))).clamp_min(1e-12)
                memory.refresh(alpha)

    def close(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _active(self) -> Iterator[_Memory]:
        return (memory for memory in self._memories if memory.applied is not None)

    def _update(self) -> None:
        if self.apply_to == "update":
            self._step_and_project()
        else:
            self._project_and_step()
        self._steps += 1
        self._recorded += self.recording
        if self.period is not None and self._steps % self.period == 0:
            self.refresh()

    def _step_and_project(self) -> None:
        before = {
            parameter: parameter.detach().clone()
            for memory in self._active()
            for parameter in (memory.weight, memory.bias)
            if parameter is not None
        }
        self.base.step()
        for memory in self._active():
            weight, bias = memory.weight, memory.bias
            changes = (weight - before[weight], None if bias is None else bias - before[bias])
            changed, shifted = memory.project(*changes)
            weight.copy_(before[weight] + changed)
            if bias is not None and shifted is not None:
                bias.copy_(before[bias] + shifted)

    def _project_and_step(self) -> None:
        kept = [(parameter, parameter.grad) for parameter in self.parameters()]
        for memory in self._active():
            weight, bias = memory.weight, memory.bias
            if weight.grad is not None:
                projected, shifted = memory.project(weight.grad, None if bias is None else bias.grad)
                weight.grad = projected
                if bias is not None:
                    bias.grad = shifted
        self.base.step()
        for parameter, gradient in kept:
            parameter.grad = gradient

    def settings(self) -> dict[str, Any]:
        """α and its unit, the period, what is projected, and the rank if it is limited."""
        rank = {} if self.rank is None else {"rank": self.rank}
        return {"alpha": self.alpha, "unit": self.unit, "period": self.period, "apply_to": self.apply_to, **rank}

    def own_state(self) -> dict[str, Any]:
        """Steps taken, and of each map what is stored and the copy in use."""
        maps = [memory.state() for memory in self._memories]
        return {"steps": self._steps, "recorded": self._recorded, "recording": self.recording, "maps": maps}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes over what `own_state` returned.

        Raises:
            ValueError: the state is of a model with other maps.
        """
        shapes = [tuple(item["seen"].shape) for item in state["maps"]]
        expected = [tuple(memory.seen.shape) for memory in self._memories]
        if shapes != expected:
            raise ValueError(f"This state is of maps with inputs {shapes}; the model's maps have {expected}.")
        self._steps, self._recorded, self.recording = state["steps"], state["recorded"], state["recording"]
        for memory, item in zip(self._memories, state["maps"], strict=True):
            memory.load(item)
