"""A preconditioner that is a memory of each layer's inputs: new learning leaves the answers to old inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from nestlearn.optim.sharding import distributed, gathered, is_shared, local, own_rows, pooled
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
    """What one weight's inputs were: the sum of ``x xᵀ`` of a linear map, the count of each row of an embedding.

    Attributes:
        seen: what is stored.
        fresh: what this process has seen since the last `join`; only where several processes train the weight.
        applied: the copy in use, made of what was stored at a `refresh`; None before the first one.
    """

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
        self.fresh: list[Tensor] = []
        self.applied: Tensor | None = None

    def sums(self) -> list[Tensor]:
        """What is stored of the inputs."""
        return [self.seen]

    def set_sums(self, sums: list[Tensor]) -> None:
        """Stores other sums."""
        (self.seen,) = sums

    def add(self, inputs: Tensor, shared: bool) -> None:
        """Stores the inputs of one forward pass; where processes share the memory, until they `join`."""
        if self.seen.device != inputs.device:  # the model moved after the optimizer was made
            self.set_sums([x.to(inputs.device) for x in self.sums()])
        if not shared:
            self.set_sums(self.added(self.sums(), inputs))
            return
        self.fresh = self.added(self.fresh or [torch.zeros_like(x) for x in self.sums()], inputs)

    def added(self, sums: list[Tensor], inputs: Tensor) -> list[Tensor]:
        """Sums with these inputs; their memory may be the same."""
        (seen,) = sums
        if self.is_embedding:
            return [seen.add_(torch.bincount(inputs.reshape(-1), minlength=len(seen)).to(seen.dtype))]
        rows = self.rows(inputs)
        return [seen.addmm_(rows.T, rows)]

    def join(self, process_group: dist.ProcessGroup | None) -> None:
        """Stores what all processes have seen since they did so last: the same on each of them."""
        fresh = self.fresh or [torch.zeros_like(x) for x in self.sums()]
        self.fresh = []
        self.set_sums(self.joined(fresh, process_group))

    def joined(self, fresh: list[Tensor], process_group: dist.ProcessGroup | None) -> list[Tensor]:
        """Sums with what each process has seen."""
        return [self.seen + pooled(fresh[0], self.weight, process_group)[0]]

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
        """``D P`` of a change (or gradient) D of the weight, its bias as the last column: of this process's rows."""
        assert self.applied is not None
        applied = self.applied.to(weight)
        if self.is_embedding:
            return weight * own_rows(applied, self.weight)[:, None], None
        if self.bias is None:
            return self.times(weight, applied), None
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
        both = self.times(torch.cat([weight, bias[:, None]], 1), applied)
        return both[:, :-1], both[:, -1]

    def times(self, change: Tensor, applied: Tensor) -> Tensor:
        """``D P`` of a linear map."""
        return change @ applied

    def state(self) -> dict[str, Any]:
        """What is stored and the copy in use, with the same entries before the first copy."""
        applied = torch.zeros_like(self.seen) if self.applied is None else self.applied.clone()
        return {"seen": self.seen.clone(), "applied": applied, "refreshed": self.applied is not None}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned."""
        self.applied = state["applied"].to(self.seen, copy=True) if state["refreshed"] else None
        self.seen, self.fresh = state["seen"].to(self.seen, copy=True), []


class _LeadingDirections(_Memory):
    """A linear map's memory in the r leading directions of its inputs: r x d numbers in place of d x d."""

    def __init__(self, name: str, module: nn.Linear, dtype: torch.dtype, trained: set[Tensor], rank: int) -> None:
        super().__init__(name, module, dtype, trained, rank)
        self.squares = self.seen.new_zeros(())

    def sums(self) -> list[Tensor]:
        """What is stored of the inputs: directions, and the squares of all."""
        return [self.seen, self.squares]

    def set_sums(self, sums: list[Tensor]) -> None:
        """Stores other sums."""
        self.seen, self.squares = sums

    def added(self, sums: list[Tensor], inputs: Tensor) -> list[Tensor]:
        """Sums with these inputs."""
        rows = self.rows(inputs)
        return [add_rows(sums[0], rows), sums[1] + rows.square().sum()]

    def joined(self, fresh: list[Tensor], process_group: dist.ProcessGroup | None) -> list[Tensor]:
        """Sums with what each process has seen, of which it sends its leading directions."""
        directions = gathered(fresh[0], self.weight, process_group).flatten(0, 1)
        squares, _ = pooled(fresh[1], self.weight, process_group)
        return [add_rows(self.seen, directions), self.squares + squares]

    def mean_square(self) -> Float[Tensor, ""]:
        """Sum of squares of all inputs, per direction, of those that are not kept too."""
        return self.squares / self.seen.shape[1]

    def refresh(self, alpha: float | Float[Tensor, ""]) -> None:
        """Applies from now on what is stored now."""
        self.applied = closing(self.seen, alpha)

    def times(self, change: Tensor, applied: Tensor) -> Tensor:
        """``D (I - AᵀA)``."""
        return change - (change @ applied.T) @ applied

    def state(self) -> dict[str, Any]:
        """What is stored and the copy in use."""
        return super().state() | {"squares": self.squares.clone()}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned."""
        super().load(state)
        self.squares = state["squares"].to(self.seen, copy=True)


class InputProjection(OptimizerWrapper):
    """Projects what an optimizer does to each linear map away from the inputs that the map has already had.

    A preconditioner as in NL Eq. 38-41, 47, but learned from inputs: per `nn.Linear`, recursive least squares over its
    inputs x (with a 1 for the bias), ``P ← P - P Xᵀ (α I + X P Xᵀ)⁻¹ X P``, and each change D of the weight becomes
    ``D P``. For x that were stored ``D P x ≈ 0``: the answers to them stay. (Known as orthogonal weights modification,
    Zeng et al. 2019, arXiv 1810.01256.) No input is kept, only a (d+1) x (d+1) matrix per map. The rows of an
    `nn.Embedding` are the same rule on one-hot inputs, where P is diagonal: ``α / (α + count)``.

    Two timescales: inputs are stored at every forward pass in training mode, but the P in use is a lagged copy, taken
    every `period` steps. So the newest inputs do not yet stand in their own way, and no task boundary is needed.

    Under activation checkpointing without reentry (`torch.utils.checkpoint` with ``use_reentrant=False``) the forward
    pass of a map runs twice with gradients, and its inputs count twice, as if its α were half as large.

    Several processes, replicas of the model (DistributedDataParallel) or parts of it (FSDP2, divided along the first
    dimension of weights, as they are by default), have one memory of what all of them read. They join what they have
    seen at each step and in `refresh`, which all of them must call: (d+1)² numbers per map are summed, of low-rank ones
    the r (d+1) of each process are collected. A state has what was joined.

    Args:
        base: any torch optimizer, this package's wrappers included.
        model: whose linear maps and embeddings with parameters of `base` are projected; its other parameters, such as
            norms, are left to `base`. With FSDP2 after `fully_shard`.
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
        process_group: the processes that train replicas of the model: the default group where torch.distributed is
            initialized. Processes that train models of their own must each give a group of one.

    Attributes:
        recording: whether forward passes in training mode store their inputs.

    Raises:
        ValueError: alpha not positive, an unknown `apply_to`, nothing in the model to project, or a weight that is
            divided along its inputs. In the forward pass: inputs that are divided (tensor parallelism).

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
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(base)
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
        self._process_group = process_group
        self._steps = self._recorded = 0
        # One memory per weight and kind: maps that share a weight share its memory, and a tied head has two.
        memories: dict[tuple[Tensor, bool], _Memory] = {}
        self._hooks = []
        trained = set(self.parameters())
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight in trained:
                check_rows_are_whole(name, module.weight)
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
                if isinstance(inputs[0], DTensor):
                    raise ValueError(
                        f"{memory.name} gets an input that is distributed ({inputs[0].placements}), as in tensor "
                        "parallelism; InputProjection works with data parallelism (FSDP2, DistributedDataParallel)."
                    )
                with torch.no_grad():
                    memory.add(inputs[0].detach(), is_shared(memory.weight, self._process_group))

        return store

    def refresh(self) -> None:
        """Takes the copy in use from all inputs stored so far; of several processes all must call it.

        Raises:
            ValueError: inputs of a map were not finite; the copies in use stay as they were.
        """
        self._join()
        self._refresh()

    def _refresh(self) -> None:
        for memory in self._memories:
            memory.check()
        with torch.no_grad():
            for memory in self._memories:
                alpha: float | Tensor = self.alpha
                if self.unit == "steps":
                    # Without any input the mean square is 0, and so is all that is divided by it.
                    alpha = (memory.mean_square() * (self.alpha / max(self._recorded, 1))).clamp_min(1e-12)
                memory.refresh(alpha)

    @torch.no_grad()
    def _join(self) -> None:
        for memory in self._memories:
            # Asked each time: torch.distributed may be initialized after the optimizer was made.
            if is_shared(memory.weight, self._process_group):
                memory.join(self._process_group)

    def close(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _active(self) -> Iterator[_Memory]:
        return (memory for memory in self._memories if memory.applied is not None)

    def update(self) -> None:
        if self.apply_to == "update":
            self._step_and_project()
        else:
            self._project_and_step()
        self._join()
        self._steps += 1
        self._recorded += self.recording
        if self.period is not None and self._steps % self.period == 0:
            self._refresh()

    def _step_and_project(self) -> None:
        before = [
            [None if p is None else local(p).detach().clone() for p in (memory.weight, memory.bias)]
            for memory in self._active()
        ]
        self.base.step()
        for memory, (weight, bias) in zip(self._active(), before, strict=True):
            assert weight is not None
            own, own_bias = local(memory.weight), None if memory.bias is None else local(memory.bias)
            shift = None if own_bias is None or bias is None else own_bias - bias
            changed, shifted = memory.project(own - weight, shift)
            own.copy_(weight + changed)
            if own_bias is not None and bias is not None and shifted is not None:
                own_bias.copy_(bias + shifted)

    def _project_and_step(self) -> None:
        kept = [(parameter, parameter.grad) for parameter in self.parameters()]
        for memory in self._active():
            weight, bias = memory.weight, memory.bias
            if weight.grad is not None:
                slope = None if bias is None or bias.grad is None else local(bias.grad)
                projected, shifted = memory.project(local(weight.grad), slope)
                weight.grad = distributed(projected, weight)
                if bias is not None and shifted is not None:
                    bias.grad = distributed(shifted, bias)
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


def check_rows_are_whole(name: str, weight: Tensor) -> None:
    """Raises ValueError if a weight is divided over processes along its inputs."""
    placements = weight.placements if isinstance(weight, DTensor) else ()
    if any(isinstance(given, Shard) and given.dim > 0 for given in placements):
        raise ValueError(
            f"The weight of {name or 'the model itself'} ({tuple(weight.shape)}) is divided as {placements}; "
            "InputProjection needs its first dimension divided, as fully_shard does by default (Shard(0))."
        )
