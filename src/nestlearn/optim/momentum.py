"""Momentum as an associative memory of gradients, and the ways to make it more expressive (NL section 4.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from nestlearn.optim.deep_memory import DeepMemory
from nestlearn.optim.matrices import Matrices, Stack, stack_count, stack_shape, take_step, together, wide
from nestlearn.optim.matrix_optimizer import MatrixOptimizer, fractions, is_matrix, not_negative
from nestlearn.optim.outputs import NewtonSchulz, Sign
from nestlearn.optim.preconditioners import Diagonal, LeastSquares, Whitening


@dataclass(frozen=True)
class DeltaRule:
    """The momentum's objective is regression, not the dot product: before g is added, what lies along it is erased.

    ``m ← m (α I - ρ ĝᵀĝ)`` with ``ĝ = g / (‖g‖_F + ε)`` (NL Eq. 48-49). The eigenvalues of ``ĝᵀĝ`` are in [0, 1] and
    add up to 1, so the factor of m is in [α - ρ, α]: it never grows, whatever the gradient's size. (As printed, with g
    in place of ĝ, it diverges where ``‖g‖ > √(1 + α)``.) Cost: ``4 min(rows, columns)`` operations per element.

    ε decides whether the erasing fades with the gradient. Tiny, it does not: the rule is free of the gradient's scale.
    With ε of the size of the first gradients, m is erased while they are large and kept when they are small, as NL
    Eq. 49 has it (ε = 1: ĝ is g where that is small). On smooth functions that is far better: near an optimum plain
    momentum is what accelerates (docs/log.md, the toy function of NL Eq. 53).

    Args:
        rho: ρ.
        eps: ε, the norm at which a quarter of ρ acts.

    Raises:
        ValueError: rho outside (0, 1], or a negative eps.
    """

    rho: float = 1.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not 0.0 < self.rho <= 1.0:
            raise ValueError(
                f"rho is {self.rho}; it must be in (0, 1]: the part of the momentum along the gradient that is erased. "
                "For 0 leave the delta rule out (delta=None)."
            )
        not_negative("eps", self.eps, "added to the gradient's norm")


@dataclass(frozen=True)
class Polynomial:
    """Higher-order features of a gradient (NL Eq. 51): powers of each element, relative to the matrix's.

    ``φ(g) = r Σ_k c_k sign(z) |z|^k`` with ``z = g / r``, r the root mean square of the whole g, k = 1, 2, ...

    The momentum and the weights have g's shape, so φ must keep it: powers of elements, no products of two. Relative to
    r, φ scales as g does (``φ(c g) = c φ(g)``) and the coefficients mean the same for every layer. Even powers keep the
    sign: without it they would point uphill for half of the elements.

    Args:
        coefficients: c_1, c_2, ...: ``(1.0,)`` is the gradient itself, ``(1.0, 0.0, 0.1)`` adds cubes, which stress the
            largest elements.

    Raises:
        ValueError: no coefficient, or only zeros.
    """

    coefficients: tuple[float, ...] = (1.0, 0.0, 0.1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficients", tuple(float(c) for c in self.coefficients))
        if not any(self.coefficients):
            raise ValueError(
                f"coefficients is {self.coefficients}; give those of g, g|g|, g³, ... with at least one that is not 0."
            )

    def apply(self, matrices: Matrices, gradients: list[Stack]) -> list[Stack]:
        """``φ(g)`` of each."""
        rows, columns = matrices.shape
        sizes = matrices.norms(gradients)
        torch._foreach_mul_(sizes, (rows * columns) ** -0.5)
        # A zero matrix has zero features; below this a norm's own squares are rounded to 0.
        torch._foreach_clamp_min_(sizes, torch.finfo(sizes[0].dtype).tiny ** 0.5)
        relative = torch._foreach_div(gradients, sizes)
        magnitudes = torch._foreach_abs(relative)
        # Horner: r z (c_1 + |z| (c_2 + |z| (c_3 + ...))).
        *rest, last = self.coefficients
        factors = list(torch._foreach_mul(magnitudes, 0.0))
        torch._foreach_add_(factors, last)
        for c in reversed(rest):
            torch._foreach_mul_(factors, magnitudes)
            torch._foreach_add_(factors, c)
        return list(torch._foreach_mul(gradients, factors))


class AssociativeMomentum(MatrixOptimizer):
    """Momentum with any of the extensions of NL section 4.4, each an argument of its own.

    With the gradient g of a matrix W:

        k = φ(g)                                    features        (NL Eq. 51)
        m ← m (α I - ρ k̂ᵀk̂) + P k                   delta rule      (NL Eq. 48-49),  preconditioner  (NL Eq. 46-47)
        W ← W - lr σ(M(m))                          memory          (NL Eq. 50),  output  (NL Eq. 52)

    Without any of them it is `torch.optim.SGD` with momentum to the bit: a memory of gradients without values, equal to
    linear attention over layer inputs and errors (NL Eq. 33-34). With ``output=NewtonSchulz()`` it is Muon. A
    preconditioner that learns from layer inputs is `nestlearn.optim.InputProjection` around this.

    Steps are of the gradient's size, as with SGD, unless a preconditioner (`Diagonal`, `Whitening`) or an output
    (`NewtonSchulz`, `Sign`) normalizes them: learning rates are those of SGD (0.01 to 1) or of Adam accordingly. AdamW
    of what is no matrix uses the same rate unless its groups have their own
    (``nestlearn.optim.param_groups(model, adamw_lr=...)``).

    State: 4 bytes per parameter for m, and those of the preconditioner.

    Args:
        params: parameters, (name, parameter) pairs, or groups (`MatrixOptimizer`).
        lr: learning rate, also AdamW's of parameters that are no matrices.
        momentum: α, the part of m kept at a step; 0 for none.
        nesterov: step along ``P k + α m`` in place of m.
        delta: `DeltaRule`, or None.
        features: `Polynomial`, or None for g itself.
        preconditioner: `Diagonal`, `Whitening`, `LeastSquares`, or None.
        memory: `DeepMemory`, or None for ``M(m) = m``.
        output: `NewtonSchulz`, `Sign`, or None for m itself.
        weight_decay: decoupled: ``W ← (1 - lr · weight_decay) W`` before the step.
        adamw: settings of AdamW (`MatrixOptimizer`).

    Raises:
        ValueError: a setting out of range, or settings that exclude each other.

    Example:
        >>> layer = torch.nn.Linear(4, 4, bias=False)
        >>> optimizer = AssociativeMomentum(
        ...     layer.parameters(), lr=0.1, delta=DeltaRule(), preconditioner=Whitening()
        ... )
        >>> x = torch.eye(4)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss = (layer(x) - x.flip(0)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        >>> loss.item() < 1e-6
        True
    """

    optional_states = MappingProxyType({"momentum_buffer": "momentum"})

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        delta: DeltaRule | None = None,
        features: Polynomial | None = None,
        preconditioner: Diagonal | Whitening | LeastSquares | None = None,
        memory: DeepMemory | None = None,
        output: NewtonSchulz | Sign | None = None,
        weight_decay: float = 0.0,
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "delta": delta,
            "features": features,
            "preconditioner": preconditioner,
            "memory": memory,
            "output": output,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, adamw)

    def check_group(self, group: Mapping[str, Any]) -> None:
        fractions("momentum", (group["momentum"],), 1)
        for name, kinds in AXES.items():
            if group[name] is not None and not isinstance(group[name], kinds):
                names = ", ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{name} is {group[name]!r}; it must be None or an object of {names}.")
        if group["momentum"] == 0 and (group["nesterov"] or group["delta"] is not None):
            raise ValueError(
                "momentum is 0, where nesterov and the delta rule do nothing but flip signs: there is no past to keep. "
                "Give a momentum between 0 and 1, or leave them out."
            )

    def state_dict(self) -> dict[str, Any]:
        """States and settings, the extensions as dictionaries of plain values."""
        state = super().state_dict()
        groups = [{**group, **{name: as_plain(group[name]) for name in AXES}} for group in state["param_groups"]]
        return state | {"param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, with the extensions that it names.

        Raises:
            ValueError: the state is of another optimizer, of parameters in another order or of other shapes.
        """
        groups = [
            {key: from_plain(key, value) if key in AXES else value for key, value in group.items()}
            for group in state_dict["param_groups"]
        ]
        super().load_state_dict(state_dict | {"param_groups": groups})

    def new_state(self, group: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        preconditioner, memory, kernels = group["preconditioner"], group["memory"], group["kernels"]
        if preconditioner is not None:
            state |= preconditioner.new_state(like, kernels)
        if memory is not None and like is first_alike(group, like):
            state |= memory.new_state(like, stack_shape(like.shape, kernels)[2])
        return state

    def update(self, group: Mapping[str, Any], matrices: Matrices) -> None:
        self._take(group, matrices, momentum_of(group, matrices))

    def _update_all(self, group: Mapping[str, Any], given: Iterable[Matrices]) -> None:
        if group["memory"] is None:
            super()._update_all(group, given)
            return
        # One memory for each shape: it has to see the rows of all batches before it answers to any.
        alike: dict[Tensor, list[Matrices]] = {}
        for matrices in given:
            alike.setdefault(first_alike(group, matrices.parameters[0]), []).append(matrices)
        for first, members in alike.items():
            state = self.state[first]
            if "memory_in" not in state:  # it has had no gradient yet, others of its shape have
                self.state[first] = {"step": torch.tensor(0.0), **self.new_state(group, first), **state}
            stacks = [matrices.whole(momentum_of(group, matrices)) for matrices in members]
            rows = [stack.reshape(-1, stack.shape[-1]) for some in stacks for stack in some]
            answers = group["memory"].apply(self.state[first], torch.cat(rows))
            parts = iter(answers.split([len(x) for x in rows]))
            for matrices, some in zip(members, stacks, strict=True):
                updates = matrices.own_parts([next(parts).view(stack.shape) for stack in some])
                self._take(group, matrices, updates)
                matrices.write_back()

    def _take(self, group: Mapping[str, Any], matrices: Matrices, updates: list[Stack]) -> None:
        """The step along what the memory gave, through the output."""
        output = group["output"]
        factor = 1.0 if output is None else output.lr_factor(matrices.shape)
        updates = updates if output is None else output.apply(matrices, updates)
        take_step(matrices.weights, updates, group, factor)


AXES: dict[str, tuple[type, ...]] = {
    "delta": (DeltaRule,),
    "features": (Polynomial,),
    "preconditioner": (Diagonal, Whitening, LeastSquares),
    "memory": (DeepMemory,),
    "output": (NewtonSchulz, Sign),
}
"""What a group's settings that are no numbers can be."""


def as_plain(setting: Any) -> dict[str, Any] | None:
    """A setting as what every reader of checkpoints knows: `torch.load` with weights_only, FSDP2's complete states."""
    return None if setting is None else {"kind": type(setting).__name__, **asdict(setting)}


def from_plain(name: str, saved: Any) -> Any:
    """The setting that `as_plain` made this of.

    Raises:
        ValueError: no extension of this version has that name or these settings.
    """
    if not isinstance(saved, Mapping):
        return saved
    settings = {key: value for key, value in saved.items() if key != "kind"}
    for kind in AXES[name]:
        if kind.__name__ == saved["kind"] and settings.keys() == {field.name for field in fields(kind)}:
            return kind(**settings)
    raise ValueError(
        f"This state has {name} {dict(saved)}; known are {', '.join(kind.__name__ for kind in AXES[name])} with their "
        "settings. It is of another version."
    )


def first_alike(group: Mapping[str, Any], parameter: Tensor) -> Tensor:
    """The first parameter of a group that shares a memory with this one: of its shape, arithmetic and device."""
    kind = (parameter.shape, wide(parameter.dtype), parameter.device)
    return next(p for p in group["params"] if is_matrix(group, p) and (p.shape, wide(p.dtype), p.device) == kind)


def momentum_of(group: Mapping[str, Any], matrices: Matrices) -> list[Stack]:
    """m after this step, or what Nesterov's rule looks ahead to; not to be changed."""
    features, preconditioner, delta = group["features"], group["preconditioner"], group["delta"]
    keys = matrices.gradients if features is None else features.apply(matrices, matrices.gradients)
    values = keys if preconditioner is None else preconditioner.apply(matrices, keys)
    if group["momentum"] == 0:
        return values
    momenta = matrices.state("momentum_buffer")
    if delta is None:
        torch._foreach_mul_(momenta, group["momentum"])
    else:
        erase(matrices, momenta, keys, group["momentum"], delta)
    torch._foreach_add_(momenta, values)
    return list(torch._foreach_add(values, momenta, alpha=group["momentum"])) if group["nesterov"] else momenta


def erase(matrices: Matrices, momenta: list[Stack], keys: list[Stack], alpha: float, delta: DeltaRule) -> None:
    """``m ← m (α I - ρ k̂ᵀk̂)`` in place, through the smaller of ``m kᵀ`` and ``kᵀk``."""
    complete = momenta if matrices.undivided else matrices.whole(momenta)
    complete_keys = keys if matrices.undivided else matrices.whole(keys)
    count = stack_count(complete[0].numel(), complete[0].device)
    for first in range(0, len(complete), count):
        own = complete[first : first + count]
        m, counts = together(own)
        k, _ = together(complete_keys[first : first + count])
        norm = torch.linalg.vector_norm(k, 2, (-2, -1), keepdim=True).add_(delta.eps)
        scale = norm.clamp_(min=torch.finfo(norm.dtype).tiny ** 0.5).square_().reciprocal_()
        if m.shape[-2] <= m.shape[-1]:
            m.baddbmm_((m @ k.mT).mul_(scale), k, beta=alpha, alpha=-delta.rho)
        else:
            m.copy_(torch.baddbmm(m, m, (k.mT @ k).mul_(scale), beta=alpha, alpha=-delta.rho))
        if m is not own[0]:
            torch._foreach_copy_(own, m.split(counts))
    if not matrices.undivided:
        torch._foreach_copy_(momenta, matrices.own_parts(complete))


class DeltaMomentum(AssociativeMomentum):
    """Momentum that forgets where it is told something new: ``m ← m (α I - ρ ĝᵀĝ) + P g`` (NL Eq. 48-49).

    Plain momentum averages over the last ``1 / (1 - α)`` gradients, whatever they are. Here what m holds along the
    current gradient is replaced, so that m turns at once where the gradient does, and directions that the gradient does
    not have are kept (`DeltaRule`). Under a gradient that stays the same, the part of m along a singular direction that
    has the share p of ``‖g‖²`` is ``1 / (1 - α + ρ p)`` times the gradient's: for rank one about g itself, ten times
    less than plain momentum at α = 0.9. So learning rates are larger.

    Args:
        params: parameters, (name, parameter) pairs, or groups (`MatrixOptimizer`).
        lr: learning rate, also AdamW's of parameters that are no matrices.
        momentum: α.
        rho: ρ, the part of m along the gradient that is erased.
        eps: ε, the gradient's norm at which a quarter of ρ acts (`DeltaRule`).
        settings: others of `AssociativeMomentum`.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1, 2))
        >>> optimizer = DeltaMomentum([weight], lr=1.0)
        >>> for gradient in ([1.0, 1.0], [0.0, -1.0]):
        ...     weight.grad = torch.tensor([gradient])
        ...     optimizer.step()
        >>> optimizer.state[weight]["momentum_buffer"]  # the second gradient replaced nearly all of its direction
        tensor([[ 0.9000, -1.1000]])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        *,
        momentum: float = 0.9,
        rho: float = 1.0,
        eps: float = 1e-8,
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, momentum=momentum, delta=DeltaRule(rho, eps), **settings)


class HigherOrderMomentum(AssociativeMomentum):
    """Momentum of higher-order features of the gradient: ``m ← α m + P φ(g)`` (NL Eq. 51, `Polynomial`).

    Args:
        params: parameters, (name, parameter) pairs, or groups (`MatrixOptimizer`).
        lr: learning rate, also AdamW's of parameters that are no matrices.
        momentum: α.
        coefficients: of g, g|g|, g³, ... relative to the root mean square of g.
        settings: others of `AssociativeMomentum`.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1, 2))
        >>> optimizer = HigherOrderMomentum([weight], lr=1.0, coefficients=(0.0, 0.0, 1.0))
        >>> weight.grad = torch.tensor([[1.0, -7.0]])  # of root mean square 5
        >>> optimizer.step()
        >>> weight.detach()
        tensor([[-0.0400, 13.7200]])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        *,
        momentum: float = 0.9,
        coefficients: tuple[float, ...] = (1.0, 0.0, 0.1),
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, momentum=momentum, features=Polynomial(coefficients), **settings)


class DeepMomentum(AssociativeMomentum):
    """The momentum is a perceptron trained online on the rows of gradients, one for each shape.

    After NL Eq. 50; unlike the printed rule, rows are normalized and a step is in closed form.

    Update = ``r M(g / r)`` row by row, after one step of the memory on all rows of all parameters of the shape: see
    `DeepMemory` for the rule, its cost and what it can and cannot do. Parameters without a gradient at a step are left
    out of it; rows that are not finite spoil their own parameter only.

    Args:
        params: parameters, (name, parameter) pairs, or groups (`MatrixOptimizer`).
        lr: learning rate, also AdamW's of parameters that are no matrices.
        memory: shape, objective and step of the network.
        momentum: of a plain momentum whose rows the network then reads in place of the gradient's. 0: none, as in NL.
        settings: others of `AssociativeMomentum`.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> layers = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(3)))
        >>> optimizer = DeepMomentum(layers.parameters(), lr=0.1)
        >>> layers(torch.randn(4, 8)).sum().backward()
        >>> optimizer.step()
        >>> [sorted(optimizer.state[p]) for p in layers.parameters()]  # one memory for all three
        [['memory_in', 'memory_out', 'memory_start', 'step'], ['step'], ['step']]
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        *,
        memory: DeepMemory | None = None,
        momentum: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, momentum=momentum, memory=memory or DeepMemory(), **settings)
