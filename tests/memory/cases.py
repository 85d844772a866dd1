"""Memory settings as points of a table of axes, their random inputs, and how results are compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from nestlearn.memory import (
    KL,
    L2,
    MLP,
    AssociativeMemory,
    Bregman,
    Decay,
    Delta,
    Descent,
    DotProduct,
    ElasticNet,
    Gates,
    Huber,
    Lp,
    Lq,
    LqDual,
    Matrix,
    Momentum,
    Objective,
    Oja,
    OrthogonalizedMomentum,
    Retention,
    State,
    ValueShiftRobust,
    scan,
)
from nestlearn.memory.objectives import needs_threshold

DEEP, HEBBIAN, DELTA = MLP(2), DotProduct(), Delta()
MIXED = {"in": "normalized", "out": "proximal"}

AXES: dict[str, tuple[Any, ...]] = {
    "architecture": (Matrix(), MLP(2), MLP(2, "silu")),
    "objective": (DotProduct(), L2()),
    "retention": (Decay(), Delta(), Delta(gated=True)),
    "step_size": ("raw", "proximal", "normalized", "mixed"),
    "momentum": (False, True),
    "retain_to": ("zero", "initial"),
    "chunk_size": (1, 4, 16, 64, 128, 192),
    "read": ("token", "chunk"),
    "flags": ("none", "mask", "reset", "both"),
    "tokens": (1, 17, 70),
    "batch": (1, 3),
}


# The further objectives, retentions and algorithms, in a table of their own: the product of both would not end.
MIRAS_AXES: dict[str, tuple[Any, ...]] = {
    "architecture": (Matrix(), MLP(2)),
    "objective": (
        DotProduct(),
        L2(),
        Lp(1),
        Lp(3),
        Huber("coordinate"),
        Huber("norm"),
        Huber("switch"),
        Huber("norm", threshold=0.4),
        ValueShiftRobust(),
    ),
    "retention": (
        Decay(),
        Decay(per_channel=True),
        Delta(),
        Lq(4),
        Lq(2.5, eps=1e-3),
        LqDual(4),
        KL(2.0),
        ElasticNet(0.05),
        ElasticNet(0.05, smooth=True),
        Bregman(),
        Oja(),
    ),
    "step_size": ("raw", "proximal"),
    "momentum": (False, True, "orthogonalized"),
    "retain_to": ("zero", "initial"),
    "chunk_size": (1, 4, 16, 37, 64, 192),
    "read": ("token", "chunk"),
    "flags": ("none", "mask", "reset", "both"),
    "tokens": (1, 17, 70),
    "batch": (1, 3),
}


@dataclass(frozen=True)
class Case:
    """One setting of every axis of `AXES` or `MIRAS_AXES`."""

    architecture: Matrix | MLP = DEEP
    objective: Objective = HEBBIAN
    retention: Retention = DELTA
    step_size: str = "proximal"
    momentum: bool | str = True
    retain_to: str = "zero"
    chunk_size: int = 4
    read: str = "token"
    flags: str = "none"
    tokens: int = 11
    batch: int = 2

    @property
    def memory(self) -> AssociativeMemory:
        return AssociativeMemory(
            self.architecture,
            self.objective,
            self.retention,
            {False: Descent(), True: Momentum(), "orthogonalized": OrthogonalizedMomentum()}[self.momentum],
            MIXED if self.step_size == "mixed" else self.step_size,  # type: ignore[arg-type]
            self.retain_to,  # type: ignore[arg-type]
            self.chunk_size,
            self.read,  # type: ignore[arg-type]
        )

    def __str__(self) -> str:
        arch = "matrix" if isinstance(self.architecture, Matrix) else f"mlp.{self.architecture.activation}"
        algorithm = {False: "descent", True: "momentum"}.get(self.momentum, self.momentum)  # type: ignore[arg-type]
        parts = [arch, label(self.objective), label(self.retention), self.step_size, str(algorithm)]
        parts += [f"to.{self.retain_to}", f"c{self.chunk_size}", self.read]
        return "-".join([*parts, f"flags.{self.flags}", f"t{self.tokens}", f"b{self.batch}"])


def label(part: Any) -> str:
    """``delta``, ``delta.gated``, ``lq.2.5``: the class and what was set of it."""
    default = type(part)()
    chosen = [
        (f.name, getattr(part, f.name)) for f in fields(part) if getattr(part, f.name) != getattr(default, f.name)
    ]
    return ".".join([type(part).__name__.lower(), *(n if v is True else str(v) for n, v in chosen)])


def legal(setting: dict[str, Any]) -> bool:
    """Whether a (possibly partial) setting can be part of a memory."""
    step, retention, arch = (setting.get(axis) for axis in ("step_size", "retention", "architecture"))
    if step in ("normalized", "mixed") and not isinstance(retention, Delta | None):
        return False
    if step == "proximal" and retention == Decay(per_channel=True):
        return False
    if setting.get("momentum") == "orthogonalized" and (retention not in (None, Decay()) or step == "proximal"):
        return False
    if isinstance(retention, Oja):
        others = zip(("architecture", "objective", "momentum"), (Matrix(), DotProduct(), False), strict=True)
        if any(setting.get(axis, needed) != needed for axis, needed in others):
            return False
    return not (step == "mixed" and isinstance(arch, Matrix))


def product(axes: dict[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every legal combination."""
    for values in itertools.product(*axes.values()):
        setting = dict(zip(axes, values, strict=True))
        if legal(setting):
            yield setting


def covering(axes: dict[str, Sequence[Any]], strength: int) -> list[dict[str, Any]]:
    """Settings such that all legal values of every ``strength`` axes meet in one of them (greedy, deterministic)."""
    groups, fits = list(itertools.combinations(axes, strength)), _fitting(axes)
    uncovered: dict[Combination, None] = {}
    for group in groups:
        for indices in itertools.product(*(range(len(axes[name])) for name in group)):
            if fits(dict(zip(group, indices, strict=True))):
                uncovered[tuple(zip(group, indices, strict=True))] = None
    settings = []
    while uncovered:
        chosen = _complete(dict(next(iter(uncovered))), axes, fits, uncovered, strength)
        for group in groups:
            uncovered.pop(tuple((name, chosen[name]) for name in group), None)
        settings.append({name: axes[name][chosen[name]] for name in axes})
    return settings


Combination = tuple[tuple[str, int], ...]


def _fitting(axes: dict[str, Sequence[Any]]) -> Callable[[dict[str, int]], bool]:
    """Whether a partial setting is part of a legal one: a partial setting can be legal and still fit in none."""
    bound = [name for name in axes if name in ("architecture", "objective", "retention", "step_size", "momentum")]
    fitting = set()
    for indices in itertools.product(*(range(len(axes[name])) for name in bound)):
        if legal({name: axes[name][i] for name, i in zip(bound, indices, strict=True)}):
            fitting |= set(itertools.product(*((i, None) for i in indices)))
    return lambda chosen: tuple(map(chosen.get, bound)) in fitting


def _complete(
    chosen: dict[str, int],
    axes: dict[str, Sequence[Any]],
    fits: Callable[[dict[str, int]], bool],
    uncovered: dict[Combination, None],
    strength: int,
) -> dict[str, int]:
    """Give every other axis the legal value that covers most."""
    order = {name: rank for rank, name in enumerate(axes)}
    for name in axes:
        if name in chosen:
            continue
        groups = [
            sorted((*group, name), key=order.__getitem__) for group in itertools.combinations(chosen, strength - 1)
        ]
        best, best_gain = 0, -1
        for i in range(len(axes[name])):
            # Starting elsewhere each time spreads ties over the values.
            i = (i + len(uncovered)) % len(axes[name])
            trial = {**chosen, name: i}
            if not fits(trial):
                continue
            gain = sum(tuple((n, trial[n]) for n in group) in uncovered for group in groups)
            if gain > best_gain:
                best, best_gain = i, gain
        chosen = {**chosen, name: best}
    return chosen


@dataclass
class Inputs:
    """Random inputs of one case; every tensor that can have an outer gradient is a leaf."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    initial: dict[str, Tensor]
    mask: Tensor | None
    reset: Tensor | None

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"q": self.q, "k": self.k, "v": self.v, "lr": self.gates.lr, "retain": self.gates.retain}
        if self.gates.momentum is not None:
            named["momentum"] = self.gates.momentum
        if self.gates.threshold is not None:
            named["threshold"] = self.gates.threshold
        return named | {f"initial {name}": w for name, w in self.initial.items()}

    def nudged(self, relative: float) -> Inputs:
        """The same case with every number changed by about that part of itself."""
        generator = torch.Generator().manual_seed(7)

        def nudge(x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            return (x * (1 + relative * noise)).detach().requires_grad_()

        initial = {name: nudge(w) for name, w in self.initial.items()}
        return replace(
            self, q=nudge(self.q), k=nudge(self.k), v=nudge(self.v), gates=self.gates.map(nudge), initial=initial
        )

    def cut(self, first: int, last: int) -> tuple[tuple[Tensor, Tensor, Tensor, Gates], dict[str, Tensor | None]]:
        """Arguments of `scan` for tokens ``first .. last - 1``."""

        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, first:last]

        gates = self.gates.map(lambda g: g[:, first:last])
        qkv = (self.q[:, first:last], self.k[:, first:last], self.v[:, first:last])
        return (*qkv, gates), {"mask": part(self.mask), "reset": part(self.reset)}


def make_inputs(case: Case, d: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    """Inputs in the range where every memory of the table stays finite; a tenth of the gates is 0, a tenth 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.tokens)

    def normal(*size: int, scale: float = 0.5) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    def gate(low: float, high: float, *channels: int) -> Tensor:
        size = (*shape, *channels)
        x = torch.rand(size, generator=generator, dtype=torch.float64) * (high - low) + low
        kind = torch.rand(size, generator=generator)
        return torch.where(kind < 0.1, 0.0, torch.where(kind < 0.2, 1.0, x)).to(dtype).requires_grad_()

    q, k, v = (normal(*shape, d) for _ in range(3))
    channels = (d,) if case.retention == Decay(per_channel=True) else ()
    gates = Gates(gate(0, 0.2), gate(0.5, 1, *channels), gate(0, 0.9) if case.momentum else None)
    # The curvature of Lp grows with the residual, the slope of this mirror map toward 0: larger steps would diverge.
    smaller = (0.05 if isinstance(case.objective, Lp) else 1) * (0.1 if isinstance(case.retention, LqDual) else 1)
    if smaller < 1:
        gates = gates._replace(lr=(smaller * gates.lr).detach().requires_grad_())
    if needs_threshold(case.objective):
        gates = gates._replace(threshold=gate(0.2, 1))
    shapes = case.architecture.shapes(d, d)
    initial = {name: normal(case.batch, *size, scale=0.3) for name, size in shapes.items()}
    mask = torch.rand(shape, generator=generator) > 0.3 if case.flags in ("mask", "both") else None
    reset = torch.rand(shape, generator=generator) < 0.1 if case.flags in ("reset", "both") else None
    return Inputs(q, k, v, gates, initial, mask, reset)


def start(case: Case, inputs: Inputs) -> State:
    """The fresh state of the case, with gradients to its initial weights."""
    d, batch, dtype = inputs.k.shape[-1], inputs.k.shape[0], inputs.k.dtype
    return case.memory.init_state((batch,), d, d, params=inputs.initial, dtype=dtype)


def run(
    case: Case, inputs: Inputs, engine: str = "auto", splits: Sequence[int] = (), **options: Any
) -> tuple[Tensor, State]:
    """Outputs and final state of `scan`, called once for each piece between ``splits``."""
    state, outputs = start(case, inputs), []
    for first, last in itertools.pairwise([0, *splits, case.tokens]):
        if last > first:
            args, flags = inputs.cut(first, last)
            y, state = scan(case.memory, state, *args, initial=inputs.initial, **flags, engine=engine, **options)  # type: ignore[arg-type]
            outputs.append(y)
    return torch.cat(outputs, 1), state


def state_tensors(state: State) -> dict[str, Tensor]:
    """Every weight in a state by name."""
    groups = {"params": state.params, "anchor": state.anchor, "momentum": state.momentum or {}}
    named = {f"{group} {name}": w for group, weights in groups.items() for name, w in weights.items()}
    return named if state.pending is None else named | {"pending": state.pending}


def results(inputs: Inputs, y: Tensor, state: State) -> dict[str, Tensor]:
    """Outputs, final state, position, and the gradients of a random function of all of them to every leaf."""
    outputs = {"y": y, **state_tensors(state)}
    generator = torch.Generator().manual_seed(99)
    loss = torch.zeros((), dtype=y.dtype)
    for x in outputs.values():
        loss = loss + (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()
    leaves = inputs.leaves
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        outputs[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    outputs["position"] = state.position
    return {name: x.detach() for name, x in outputs.items()}


def assert_same(
    got: dict[str, Tensor],
    expected: dict[str, Tensor],
    label: object,
    tolerance: float = 1e-9,
    noise: Mapping[str, float] | None = None,
) -> None:
    """Equal to ``tolerance`` relative to the norm of each expected tensor, or to more ``noise``, and finite."""
    assert got.keys() == expected.keys(), label
    for name, want in expected.items():
        have = got[name]
        assert have.shape == want.shape and have.dtype == want.dtype, (label, name)
        assert torch.isfinite(want.double()).all(), f"{label}: {name} is not finite: the case proves nothing"
        error = (have.double() - want.double()).norm().item()
        # A tensor that is zero but for rounding has no relative scale.
        bound = max(tolerance * max(want.double().norm().item(), 1e-3), (noise or {}).get(name, 0.0))
        assert error <= bound, f"{label}: {name} differs by {error:.3g}, allowed {bound:.3g}"
