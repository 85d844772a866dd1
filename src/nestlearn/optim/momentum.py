"""Momentum as an associative memory of gradients, and the ways to make it more expressive (NL section 4.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from nestlearn.optim.checks import fractions, not_negative, positive, share
from nestlearn.optim.deep_memory import DeepMemory
from nestlearn.optim.matrices import Matrices, Stack, stack_count, stack_shape, take_step, together, wide
from nestlearn.optim.matrix_optimizer import MatrixOptimizer, is_matrix
from nestlearn.optim.outputs import NewtonSchulz, OrthogonalDescent, Sign
from nestlearn.optim.preconditioners import Diagonal, LeastSquares, Whitening


@dataclass(frozen=True)
class DeltaRule:
    """Regression as the momentum's objective: what m holds along the gradient is erased before the gradient is added.

    ``m ← m (α I - ρ ĝᵀĝ)`` with ``ĝ = g / (‖g‖_F + ε)`` (after NL Eq. 48-49). The eigenvalues of ``ĝᵀĝ`` are in [0, 1]
    and add up to 1, so the factor of m is in [α - ρ, α]: m never grows, whatever the size of the gradient. (The printed
    rule has g in place of ĝ and diverges where ``‖g‖ > √(1 + α)``.) Cost: ``4 min(rows, columns)`` operations per
    element.

    ε decides whether erasing fades with the gradient. With a tiny ε it does not: the rule is free of the gradient's
    scale. With ε of the size of the first gradients, m is erased while gradients are large and kept when they are
    small, as in NL Eq. 49 (for ε = 1, ĝ is g where g is small). On smooth functions that is far better: plain momentum
    accelerates near an optimum (docs/log.md, the toy function of NL Eq. 53).

    Args:
        rho: ρ.
        eps: ε, the norm at which a quarter of ρ acts.

    Raises:
        ValueError: rho outside (0, 1], or a negative eps.
    """

    rho: float = 1.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        advice = "the part of the momentum along the gradient that is erased; for 0 leave the rule out (delta=None)"
        share("rho", self.rho, advice)
        not_negative("eps", self.eps, "added to the gradient's norm")


@dataclass(frozen=True)
class Polynomial:
    """Higher-order features of a gradient (NL Eq. 51): powers of each element, relative to the matrix's size.

    ``φ(g) = r Σ_k c_k sign(z) |z|^k`` with ``z = g / r``, r the root mean square of the whole g, k = 1, 2, ...

    φ keeps the shape of g, as the momentum and the weights need it: powers of elements, no products of two. φ scales as
    g does (``φ(c g) = c φ(g)``), so the coefficients mean the same for every layer. Even powers keep the sign:
    otherwise they would point uphill for half of the elements.

    Args:
        coefficients: c_1, c_2, ...: ``(1.0,)`` is the gradient itself. ``(1.0, 0.0, 0.1)`` adds cubes, which amplify
            the largest elements.

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
        # A zero matrix has zero features. Squares of smaller norms are rounded to 0.
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


@dataclass(frozen=True)
class GeneratedValues:
    """A momentum that generates the values it learns: generalized momentum (after NL Eq. 58-60).

    The momentum predicts the gradient by ``p = (1 - α) m``, which is right where gradients stay the same. It stores
    ``p + u`` in place of g. u is its surprise: minus the gradient by p of Huber's norm of ``p - g``, with a threshold
    that it generates too.

        u = (g - p) min(1, d ‖p‖ / ‖g - p‖)          m ← α m + p + u = m + u

    Without a threshold this is plain momentum. With one, no single gradient changes m by more than ``d (1 - α)`` of its
    norm: an outlier is cut, and gradients that stay large make m grow from step to step. The first gradient is taken
    whole. With a preconditioner, ``P g`` takes the place of g.

    Args:
        threshold: d. Under independent noise ``‖g - p‖`` is about ``√(2 / (1 - α))`` times ``‖p‖``, 4.5 at α = 0.9, so
            that a smaller d cuts most gradients.

    Raises:
        ValueError: a threshold that is not positive.
    """

    threshold: float = 8.0

    def __post_init__(self) -> None:
        positive("threshold", self.threshold, "the largest surprise, relative to the predicted gradient")

    def apply(self, matrices: Matrices, values: list[Stack], momenta: list[Stack], alpha: float) -> list[Stack]:
        """``p + u`` for each ``P g``."""
        answers = list(torch._foreach_mul(momenta, 1 - alpha))
        surprises = list(torch._foreach_sub(values, answers))
        sizes, limits = matrices.norms(surprises), matrices.norms(answers)
        factors = [
            torch.where(
                limit == 0, 1, (self.threshold * limit / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1)
            )
            for size, limit in zip(sizes, limits, strict=True)
        ]
        torch._foreach_mul_(surprises, factors)
        return list(torch._foreach_add(answers, surprises))


class AssociativeMomentum(MatrixOptimizer):
    """Momentum with any of the extensions of NL section 4.4, each an argument of its own.

    With the gradient g of a matrix W:

        k = φ(g)                          features (NL Eq. 51)
        m ← m (α I - ρ k̂ᵀk̂) + P k         delta rule (NL Eq. 48-49, with a normalized k̂), preconditioner (NL Eq. 46-47)
                                          or, in place of P k, values of its own (after NL Eq. 58-60)
        W ← W - lr σ(M(m))                memory (after NL Eq. 50), output (NL Eq. 52)

    Without extensions it equals `torch.optim.SGD` with momentum to the bit: a memory of gradients without values, which
    is linear attention over layer inputs and errors (NL Eq. 33-34). With ``output=NewtonSchulz()`` it is Muon, whose
    quintic is not the iteration of NL Eq. 44. For a preconditioner of layer inputs wrap it in
    `nestlearn.optim.InputProjection`.

    A step has the size of the gradient, as with SGD, unless a preconditioner (`Diagonal`, `Whitening`) or an output
    (`NewtonSchulz`, `Sign`) normalizes it. Learning rates are accordingly those of SGD (0.01 to 1) or of Adam. AdamW
    uses the same rate for all other parameters unless their groups have their own
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
        values: `GeneratedValues`, or None for ``P k``.
        memory: `DeepMemory`, or None for ``M(m) = m``.
        output: `NewtonSchulz`, `OrthogonalDescent`, `Sign`, or None for m itself.
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

    optional_prefix = "momentum_buffer"

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
        values: GeneratedValues | None = None,
        memory: DeepMemory | None = None,
        output: NewtonSchulz | OrthogonalDescent | Sign | None = None,
        weight_decay: float = 0.0,
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "delta": delta, "features": features,
            "preconditioner": preconditioner, "values": values, "memory": memory, "output": output,
            "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults, adamw)

    def check_group(self, group: Mapping[str, Any]) -> None:
        fractions("momentum", (group["momentum"],), 1)
        for name, kinds in AXES.items():
            if group[name] is not None and not isinstance(group[name], kinds):
                names = ", ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{name} is {group[name]!r}; it must be None or an object of {names}.")
        if group["momentum"] == 0 and (group["nesterov"] or group["delta"] or group["values"]):
            raise ValueError(
                "momentum is 0, where nesterov, the delta rule and generated values have no past to work on. "
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

    def needed_states(self, group: Mapping[str, Any]) -> Iterable[str]:
        return ("momentum_buffer",) if group["momentum"] > 0 else ()

    def update(self, group: Mapping[str, Any], matrices: Matrices) -> None:
        self._take(group, matrices, momentum_of(group, matrices))

    def _update_all(self, group: Mapping[str, Any], given: Iterable[Matrices]) -> None:
        if group["memory"] is None:
            super()._update_all(group, given)
            return
        # One memory per shape: it learns the rows of all batches before it answers to any.
        alike: dict[Tensor, list[Matrices]] = {}
        for matrices in given:
            alike.setdefault(first_alike(group, matrices.parameters[0]), []).append(matrices)
        for first, members in alike.items():
            state = self.state[first]
            if "memory_in" not in state:  # only others of its shape have had a gradient so far
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
        """The step along the memory's answers, through the output."""
        output = group["output"]
        factor = 1.0 if output is None else output.lr_factor(matrices.shape)
        updates = updates if output is None else output.apply(matrices, updates)
        take_step(matrices.weights, updates, group, factor)


AXES: dict[str, tuple[type, ...]] = {
    "delta": (DeltaRule,),
    "features": (Polynomial,),
    "preconditioner": (Diagonal, Whitening, LeastSquares),
    "values": (GeneratedValues,),
    "memory": (DeepMemory,),
    "output": (NewtonSchulz, OrthogonalDescent, Sign),
}
"""Allowed types of non-numeric settings."""


def as_plain(setting: Any) -> dict[str, Any] | None:
    """A setting as plain values, for `torch.load` with weights_only and FSDP2's complete states."""
    return None if setting is None else {"kind": type(setting).__name__, **asdict(setting)}


def from_plain(name: str, saved: Any) -> Any:
    """The setting that `as_plain` converted.

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
    """m after this step, or Nesterov's ``P k + α m``; do not change it."""
    features, preconditioner, delta = group["features"], group["preconditioner"], group["delta"]
    keys = matrices.gradients if features is None else features.apply(matrices, matrices.gradients)
    values = keys if preconditioner is None else preconditioner.apply(matrices, keys)
    if group["momentum"] == 0:
        return values
    momenta = matrices.state("momentum_buffer")
    if group["values"] is not None:
        values = group["values"].apply(matrices, values, momenta, group["momentum"])
    if delta is None:
        torch._foreach_mul_(momenta, group["momentum"])
    else:
        erase_keys(matrices, momenta, keys, group["momentum"], delta)
    torch._foreach_add_(momenta, values)
    return list(torch._foreach_add(values, momenta, alpha=group["momentum"])) if group["nesterov"] else momenta


def erase_keys(matrices: Matrices, momenta: list[Stack], keys: list[Stack], alpha: float, delta: DeltaRule) -> None:
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
    """Momentum with the delta rule: ``m ← m (α I - ρ ĝᵀĝ) + P g`` (after NL Eq. 48-49, with a normalized ĝ).

    Plain momentum averages over the last ``1 / (1 - α)`` gradients. Here the gradient replaces what m holds along it,
    and m keeps all other directions (`DeltaRule`): m turns at once where the gradient turns. Under a constant gradient,
    the part of m along a singular direction with the share p of ``‖g‖²`` is ``1 / (1 - α + ρ p)`` times the gradient's:
    for rank one about g itself, ten times less than plain momentum at α = 0.9. So learning rates are larger.

    Args:
        params: parameters, (name, parameter) pairs, or groups (`MatrixOptimizer`).
        lr: learning rate, also AdamW's of parameters that are no matrices.
        momentum: α.
        rho: ρ, the part of m along the gradient that is erased.
        eps: ε, the gradient's norm at which a quarter of ρ acts (`DeltaRule`).
        settings: other arguments of `AssociativeMomentum`.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1, 2))
        >>> optimizer = DeltaMomentum([weight], lr=1.0)
        >>> for gradient in ([1.0, 1.0], [0.0, -1.0]):
        ...     weight.grad = torch.tensor([gradient])
        ...     optimizer.step()
        >>> optimizer.state[weight]["momentum_buffer"]  # the second gradient replaced most of its direction
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
        settings: other arguments of `AssociativeMomentum`.

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
    """A perceptron in place of the momentum, trained online on the rows of gradients; one for each shape.

    After NL Eq. 50; unlike the printed rule, rows are normalized and a step is in closed form. The update is
    ``r M(g / r)`` row by row, after one step of the memory on all rows of all parameters of the shape. `DeepMemory` has
    the rule, its cost and its limits. A step leaves out parameters without a gradient; rows that are not finite spoil
    only their own parameter.

    Args:
        params: parameters, (name, parameter) pairs, or groups (`MatrixOptimizer`).
        lr: learning rate, also AdamW's of parameters that are no matrices.
        memory: shape, objective and step of the network.
        momentum: of a plain momentum whose rows the network reads in place of the gradient's. 0: none, as in NL.
        settings: other arguments of `AssociativeMomentum`.

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
