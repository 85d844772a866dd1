"""A projection that remembers each layer's inputs, so that new learning leaves the answers to old inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from nestlearn.optim.checks import one_of, positive, whole_number
from nestlearn.optim.sharding import (
    check_input,
    distributed,
    gathered,
    inputs_are_divided,
    is_shared,
    local,
    own_rows,
    pooled,
)
from nestlearn.optim.sketch import add_rows, closing
from nestlearn.optim.wrapper import OptimizerWrapper

ApplyTo = Literal["update", "gradient"]
Unit = Literal["squares", "steps"]
Sums = dict[str, Tensor]


def ridge_projection(gram: Float[Tensor, "*b d d"], alpha: float | Float[Tensor, ""]) -> Float[Tensor, "*b d d"]:
    """``P = (I + XᵀX / α)⁻¹``, the result of recursive least squares from P = I after all rows X.

    Each batch of rows X changes ``P ← P - P Xᵀ (α I + X P Xᵀ)⁻¹ X P``. By Woodbury's identity only the sum of ``XᵀX``
    matters, not the order and size of the batches. P is close to 0 along directions of the inputs and 1 along all
    others: its eigenvalues are ``α / (α + λ)``, λ those of XᵀX. It is computed by one eigendecomposition in float64.

    Args:
        gram: ``XᵀX`` summed over all rows, finite.
        alpha: α, the sum of squares at which a direction is half closed.

    Example:
        >>> ridge_projection(torch.diag(torch.tensor([0.0, 1.0, 99.0])), alpha=1.0).diagonal()
        tensor([1.0000, 0.5000, 0.0100])
    """
    # In float32 the sum loses the identity where XᵀX / α is above 1e7, and rounding errors of either sign remain as
    # small eigenvalues. Clamped eigenvalues keep those of P in [0, 1].
    values, vectors = torch.linalg.eigh(gram.double())
    kept = alpha / (alpha + values.clamp(min=0.0))
    return ((vectors * kept.unsqueeze(-2)) @ vectors.mT).to(gram.dtype)


class _Memory:
    """The past inputs of one linear map: the sum of ``x xᵀ``, where x ends with a 1 if the bias is trained.

    Attributes:
        sums: what is stored, by name; "seen" is the sum.
        fresh: what this process has seen since the last `join`; only where several processes train the weight.
        applied: the copy in use, made from the sums at a `refresh`; None before the first one.
    """

    def __init__(self, name: str, module: nn.Module, dtype: torch.dtype, trained: set[Tensor], rank: int) -> None:
        self.name, self.rank = name or "the model itself", rank
        self.weight: Tensor = module.weight  # pyright: ignore[reportAttributeAccessIssue]
        bias: Tensor | None = getattr(module, "bias", None)
        self.bias = bias if bias is not None and bias in trained else None
        self.size = self.weight.shape[1] + (self.bias is not None)
        self.sums = self.empty(dtype, self.weight.device)
        self.fresh: Sums = {}
        self.applied: Tensor | None = None

    def empty(self, dtype: torch.dtype, device: torch.device) -> Sums:
        """The sums over no inputs."""
        return {"seen": torch.zeros(self.size, self.size, dtype=dtype, device=device)}

    def add(self, inputs: Tensor, shared: bool) -> None:
        """Stores the inputs of one forward pass; where processes share the memory, until they `join`."""
        if self.sums["seen"].device != inputs.device:  # the model moved after the optimizer was made
            self.sums = {name: x.to(inputs.device) for name, x in self.sums.items()}
        if shared:
            self.fresh = self.added(self.fresh or self._nothing(), inputs)
        else:
            self.sums = self.added(self.sums, inputs)

    def added(self, sums: Sums, inputs: Tensor) -> Sums:
        """Sums with these inputs; their memory may be the same."""
        rows = self.rows(inputs)
        return {"seen": sums["seen"].addmm_(rows.T, rows)}

    def join(self, process_group: dist.ProcessGroup | None) -> None:
        """Stores what all processes have seen since the last call: the same on each of them."""
        fresh, self.fresh = self.fresh or self._nothing(), {}
        self.sums = self.joined(fresh, process_group)

    def joined(self, fresh: Sums, process_group: dist.ProcessGroup | None) -> Sums:
        """Sums with what each process has seen."""
        return {name: x + pooled(fresh[name], self.weight, process_group)[0] for name, x in self.sums.items()}

    def _nothing(self) -> Sums:
        return {name: torch.zeros_like(x) for name, x in self.sums.items()}

    def rows(self, inputs: Tensor) -> Float[Tensor, "t d"]:
        """Inputs as rows, with the 1 of the bias."""
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self.sums["seen"].dtype)
        return rows if self.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], 1)

    def mean_square(self) -> Float[Tensor, ""]:
        """Sum of squares of what is stored, per direction."""
        return self.sums["seen"].diagonal().mean()

    def refresh(self, alpha: float | Float[Tensor, ""]) -> None:
        """Makes the copy in use from what is stored now."""
        self.applied = ridge_projection(self.sums["seen"], alpha)

    def check(self) -> None:
        """Raises ValueError if a stored input was not finite."""
        seen = self.sums["seen"]
        if not bool(seen.isfinite().all()):
            raise ValueError(
                f"The inputs of {self.name} ({tuple(self.weight.shape)}) are not finite, or the sum of their squares "
                f"is too large for {seen.dtype}. The layers before it diverged: lower the learning rate, or scale the "
                "inputs, and begin again from weights saved before; for large inputs give "
                "InputProjection(dtype=torch.float64)."
            )

    def project(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``D P`` of a change (or gradient) D of this process's rows; the bias is the last column of D."""
        assert self.applied is not None
        applied = self.applied.to(weight)
        if self.bias is None:
            return self.times(weight, applied), None
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
        both = self.times(torch.cat([weight, bias[:, None]], 1), applied)
        return both[:, :-1], both[:, -1]

    def times(self, change: Tensor, applied: Tensor) -> Tensor:
        """``D P``."""
        return change @ applied

    def state(self) -> dict[str, Any]:
        """What is stored and the copy in use, with the same entries before the first copy."""
        applied = torch.zeros_like(self.sums["seen"]) if self.applied is None else self.applied.clone()
        sums = {name: x.clone() for name, x in self.sums.items()}
        return {**sums, "applied": applied, "refreshed": self.applied is not None}

    def load(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.sums, self.fresh = {name: state[name].to(x, copy=True) for name, x in self.sums.items()}, {}
        self.applied = state["applied"].to(self.sums["seen"], copy=True) if state["refreshed"] else None


class _RowCounts(_Memory):
    """An embedding's memory: how often each row was read. Its inputs are one-hot, so P is diagonal."""

    def empty(self, dtype: torch.dtype, device: torch.device) -> Sums:
        return {"seen": torch.zeros(self.weight.shape[0], dtype=dtype, device=device)}

    def added(self, sums: Sums, inputs: Tensor) -> Sums:
        seen = sums["seen"]
        return {"seen": seen.add_(torch.bincount(inputs.reshape(-1), minlength=len(seen)).to(seen.dtype))}

    def mean_square(self) -> Float[Tensor, ""]:
        return self.sums["seen"].mean()

    def refresh(self, alpha: float | Float[Tensor, ""]) -> None:
        self.applied = alpha / (alpha + self.sums["seen"])

    def project(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert self.applied is not None
        return weight * own_rows(self.applied.to(weight), self.weight)[:, None], None


class _LeadingDirections(_Memory):
    """A linear map's memory in the r leading directions of its inputs: r x d numbers in place of d x d.

    The sums are these directions, and the squares of all inputs.
    """

    def empty(self, dtype: torch.dtype, device: torch.device) -> Sums:
        seen = torch.zeros(self.rank, self.size, dtype=dtype, device=device)
        return {"seen": seen, "squares": seen.new_zeros(())}

    def added(self, sums: Sums, inputs: Tensor) -> Sums:
        rows = self.rows(inputs)
        return {"seen": add_rows(sums["seen"], rows), "squares": sums["squares"] + rows.square().sum()}

    def joined(self, fresh: Sums, process_group: dist.ProcessGroup | None) -> Sums:
        # Each process sends its leading directions.
        directions = gathered(fresh["seen"], self.weight, process_group).flatten(0, 1)
        squares, _ = pooled(fresh["squares"], self.weight, process_group)
        return {"seen": add_rows(self.sums["seen"], directions), "squares": self.sums["squares"] + squares}

    def mean_square(self) -> Float[Tensor, ""]:
        return self.sums["squares"] / self.size  # of all inputs, also of directions that are not kept

    def refresh(self, alpha: float | Float[Tensor, ""]) -> None:
        self.applied = closing(self.sums["seen"], alpha)

    def times(self, change: Tensor, applied: Tensor) -> Tensor:
        return change - (change @ applied.T) @ applied  # D (I - AᵀA)


class InputProjection(OptimizerWrapper):
    """Projects each change of a linear map away from the past inputs of the map.

    A preconditioner as in NL Eq. 38-41, 47, but learned from inputs and not from gradients: orthogonal weights
    modification (Zeng et al. 2019, arXiv 1810.01256). Per `nn.Linear`, recursive least squares over its inputs x (with
    a 1 for the bias) gives ``P ← P - P Xᵀ (α I + X P Xᵀ)⁻¹ X P``, and each change D of the weight becomes ``D P``. For
    a stored x, ``D P x ≈ 0``: its answer stays. No input is kept, only a (d+1) x (d+1) matrix per map. The rows of an
    `nn.Embedding` follow the same rule with one-hot inputs, where P is diagonal: ``α / (α + count)``.

    Two timescales: inputs are stored at every forward pass in training mode, but the applied P is a copy, taken every
    `period` steps. The copy lags, so the newest inputs do not block their own update, and no task boundary is needed.

    Under activation checkpointing with ``use_reentrant=False`` the forward pass of a map runs twice with gradients. Its
    inputs then count twice, as with half the α.

    Several processes, which hold replicas of the model (DistributedDataParallel) or parts of it (FSDP2, weights divided
    along their first dimension as by default), share one memory of what all of them read. They join it at each step and
    in `refresh`, which all of them must call: (d+1)² numbers per map are summed, or r (d+1) of each process are
    collected with a rank. A state has what was joined.

    Args:
        base: any torch optimizer, this package's wrappers included.
        model: its linear maps and embeddings with parameters of `base` are projected; `base` alone trains its other
            parameters, such as norms. With FSDP2 after `fully_shard`.
        alpha: α, the sum of squares of a direction's inputs at which it is half closed.
        unit: of alpha. "squares": as in the formula, the same for all maps. "steps": α times the map's mean square per
            step and direction, so that α means the same for maps with inputs of other sizes, and for maps that read
            every token of a text or one vector of it.
        period: steps between two refreshes of the copy in use; None: only `refresh()` does it, e.g. at a task's end.
        rank: r, for maps with more inputs than that: only the r leading directions of the inputs are remembered, in
            r (d+1) numbers, ``P = I - V diag(λ / (α + λ)) Vᵀ`` (`nestlearn.optim.sketch`). Exact while the inputs have
            at most rank r; beyond, smaller directions stay open. None: the whole matrix.
        apply_to: "update" projects the change that `base` made, whatever its rule. "gradient" projects the gradients
            that `base` gets; its elementwise scaling (Adam) then points partly back into the closed directions.
        dtype: of the stored sums.
        process_group: the processes that train replicas of the model; the default group where torch.distributed is
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
        positive("alpha", alpha, "the sum of squares that half closes a direction")
        one_of("apply_to", apply_to, ApplyTo)
        one_of("unit", unit, Unit)
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
        if inputs_are_divided(module.weight):
            placements = getattr(module.weight, "placements", ())
            raise ValueError(
                f"The weight of {name or 'the model itself'} {tuple(module.weight.shape)} is divided as {placements}; "
                "InputProjection needs its first dimension divided, as fully_shard does by default (Shard(0))."
            )
        rank = self.rank or 0
        low = isinstance(module, nn.Linear) and 0 < rank < module.in_features
        kind = _RowCounts if isinstance(module, nn.Embedding) else _LeadingDirections if low else _Memory
        return kind(name, module, dtype, trained, rank)

    def _hook(self, memory: _Memory, own: nn.Module) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def store(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            # A deep copy of the model keeps its hooks; what the copy reads is not this model's past.
            if module is own and self.recording and module.training and torch.is_grad_enabled():
                check_input(memory.name, inputs[0], "InputProjection works with data parallelism (FSDP2, DDP)")
                with torch.no_grad():
                    memory.add(inputs[0].detach(), is_shared(memory.weight, self._process_group))

        return store

    def refresh(self) -> None:
        """Makes the copy in use from all inputs stored so far. With several processes all must call it.

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
                    # Without inputs the mean square is 0, and so is all that would be divided by it.
                    alpha = (memory.mean_square() * (self.alpha / max(self._recorded, 1))).clamp_min(1e-12)
                memory.refresh(alpha)

    @torch.no_grad()
    def _join(self) -> None:
        for memory in self._memories:
            # Checked each time: torch.distributed may be initialized after the optimizer was made.
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
        """Restores what `own_state` returned.

        Raises:
            ValueError: the state is of a model with other maps.
        """
        shapes = [tuple(item["seen"].shape) for item in state["maps"]]
        expected = [tuple(memory.sums["seen"].shape) for memory in self._memories]
        if shapes != expected:
            raise ValueError(f"This state is of maps with inputs {shapes}; the model's maps have {expected}.")
        self._steps, self._recorded, self.recording = state["steps"], state["recorded"], state["recording"]
        for memory, item in zip(self._memories, state["maps"], strict=True):
            memory.load(item)
