"""Bounds of the gates: which step sizes keep a memory from expanding, whatever a layer's gates emit.

A memory is a recurrence whose matrix depends on its gates, and gates depend on data. A layer whose gates could make
that recurrence expand at one token will meet a sequence where it does so at every token. So layers emit only gates
for which no sequence of tokens expands. Below, ``sigma`` is a sigmoid of the input, ``C`` the chunk size, ``b`` the
largest momentum (0 without momentum), and keys have norm at most 1.

==============================  ==========================================================  ====================
memory as the layer runs it     emitted step size                                           largest ``max_step``
==============================  ==========================================================  ====================
proximal steps                  ``max_step sigma``                                          any
dot product, delta or Oja       ``max_step sigma``                                          2
dot product, decay, matrix      ``max_step sigma``                                          any
dot product, decay, MLP         ``max_step sigma (1 - retain) (1 - b)^2 / 2``               1
any other, matrix               ``max_step sigma (1 - b) / max(C, 4 / (1 - b)) / s``        1
any other, MLP                  ``max_step sigma (1 - b) / max(C, 4 / (1 - b)) / 2gs``      1
==============================  ==========================================================  ====================

- *Proximal steps* are what a layer gives to every memory of the package that feeds errors back (`with_safe_steps`): L2,
  Lp, Huber and their like, and every MLP, under `Decay` or a mirror map. Within a chunk errors follow the weights, so
  that no chunk corrects an error twice, whatever the step size (`nestlearn.memory.proximal`). The momentum is at most
  ``retain / 2``. For L2 on a matrix that is a proof: no sequence of keys and gates expands. For an MLP each map has it,
  and both together were tested (docs/decisions.md). An MLP also gets a limit on the outer gradient
  (``gradient_limit``), since initial weights that training has enlarged can make it chaotic.
- *Dot product with delta*: the eigenvalue along the input is ``retain - eta'``, in [-1, 1]; errors do not depend on
  the map they change, so writes add up at most linearly. With `Oja` the same holds along the value. Three forms on an
  MLP are refused: raw steps, since its hidden activations have no bounded norm; momentum, which pushes on after the
  target is reached, each map through the other (gradients overflow within 1,024 tokens of chunks of 8); and normalized
  steps with retention to zero, which divide by activations that vanish.
- *Values that the memory generates* (``values=`` an objective) depend on the anchor. A chunk that takes its answers all
  the way to ``v - M(k)`` turns them over, and chunks together can expand. So a layer accepts only `Huber` and
  `DotProduct` there, whose gradients are bounded: then writes add up at most linearly, as under the delta rule.
- *Dot product with decay on a matrix* has no feedback at all: a sum of bounded writes.

The last three rows hold for raw steps with feedback. They bind objects from outside the package, `Decay` per channel
and `OrthogonalizedMomentum`, which have no proximal steps in a layer. A write is then small: about ``1 / C``.

- *Dot product with decay on an MLP*: each map's error grows with the other map. With ``r`` the larger of the two
  norms, and ``|act'| <= 1.13``, a chunk gives ``r <- A r + 1.13 r sum_s A_s eta_s``, where A are products of retain.
  As ``sum_s A_s (1 - retain_s) = 1 - A``, a step below ``(1 - retain) / 1.13`` cannot make ``r`` grow.
- *Orthogonalized momentum* writes matrices of norm about 1 whatever the errors: only the sum of the steps counts.
- *Other objectives* feed back the error at the chunk's first weights: a chunk multiplies the error by
  ``I - sum_t eta_t k_t k_t^T``, whose eigenvalues lie in [0, 1] if C steps add up to 1. Momentum multiplies the effect
  of a step by ``1 / (1 - b)`` and, over chunks shorter than ``1 / (1 - b)``, needs the critical damping of a heavy
  ball, ``eta <= (1 - b)^2 / 4``. In an MLP the hidden activations and the second map multiply the curvature: the half
  was found by experiment for initial weights at their random start (docs/decisions.md), and ``g >= 1`` is how far
  training has let the initial weights outgrow that start (`outgrown`). Where an error or a mirror map is steeper than
  that of L2 and decay, the step is divided by how much (s, `curvature`). Each axis states its own ``steepness``, and s
  is their product; a layer refuses an object that does not state it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
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
    Huber,
    Lp,
    Lq,
    LqDual,
    Matrix,
    Momentum,
    Oja,
    ValueShiftRobust,
)
from nestlearn.memory.algorithms import GRADIENT_LIMIT, SteepAlgorithm
from nestlearn.memory.architectures import SteepArchitecture
from nestlearn.memory.objectives import SteepObjective
from nestlearn.memory.retention import SteepRetention, erases, is_linear, is_per_channel
from nestlearn.memory.spans import has_closed_form
from nestlearn.memory.types import Weights

MAX_MOMENTUM = 0.9
MAX_FOLLOWED_MOMENTUM = 0.5
"""Times retain, the largest momentum of proximal steps: momentum at most doubles a write."""
DEFAULT_PROXIMAL_STEP = 4.0
"""The largest step of proximal memories: one write moves the read of a unit key by up to 4/5 of the model's step."""
MAX_THRESHOLD = 2.0
"""Twice the norm of the values, which are normalized where an objective has a threshold."""


def is_deep(memory: AssociativeMemory) -> bool:
    """Whether the memory has more than one map (an MLP): then values are normalized, and bounds are tighter."""
    return not isinstance(memory.architecture, Matrix)


def bounds_values(memory: AssociativeMemory) -> bool:
    """Whether the layer normalizes values: for deep memories, and where their scale would change the rule itself."""
    linear = is_linear(memory.retention) and not isinstance(memory.retention, Oja)
    linear = linear and isinstance(memory.objective, DotProduct | L2) and isinstance(memory.values, str)
    return is_deep(memory) or not linear


def curvature(memory: AssociativeMemory, initial: Weights) -> float | Float[Tensor, "h 1"]:
    """How much more than with `L2`, `Decay` and `Descent` on a matrix an update can change what is read.

    Residuals have norms up to `MAX_THRESHOLD`. Every axis states its part (``steepness``). Momentum is not counted
    here: the bounds of the built-in algorithms hold it. ``initial: {map: [h, out, in]}`` are accumulators.
    """
    objective, retention, algorithm = memory.objective, memory.retention, memory.algorithm
    assert isinstance(objective, SteepObjective) and isinstance(retention, SteepRetention)
    assert isinstance(algorithm, SteepAlgorithm)
    width = next(iter(initial.values())).shape[-1]
    # A dot product feeds no error back; what an object from outside makes of its gradient may.
    steep = objective.steepness(width, MAX_THRESHOLD) or 1.0
    if not is_known(memory):
        steep *= algorithm.steepness(MAX_MOMENTUM)
    slopes = [retention.steepness(start) for start in initial.values()]
    slopes.append(_architecture_steepness(memory, initial))
    numbers = [slope for slope in slopes[:-1] if not isinstance(slope, Tensor)]
    tensors = [slope.flatten(-2) for slope in slopes[:-1] if isinstance(slope, Tensor)]
    steep = steep * max(numbers, default=1.0) * slopes[-1]
    return steep * torch.stack(tensors).amax(0) if tensors else steep


def _architecture_steepness(memory: AssociativeMemory, initial: Weights) -> float | Float[Tensor, "h 1"]:
    """1 for a matrix; for an MLP twice what its initial weights have outgrown their random start."""
    if isinstance(memory.architecture, Matrix):
        return 1.0
    weights = {name: memory.retention.anchored(a) for name, a in initial.items()}
    if isinstance(memory.architecture, MLP):
        return 2 * outgrown(weights).unsqueeze(-1)
    assert isinstance(memory.architecture, SteepArchitecture)
    return memory.architecture.steepness(weights)


def is_known(memory: AssociativeMemory) -> bool:
    """Whether algorithm, architecture and retention are the package's own, whose bounds are worked out above."""
    return isinstance(memory.architecture, Matrix | MLP) and has_closed_form(memory)


def _require_steepness(memory: AssociativeMemory) -> None:
    """Raise for an axis that does not say how steep it is: no step is known to be safe."""
    retention = "how many times faster than the accumulator the weights can change (Decay has 1)"
    axes: list[tuple[object, type, str]] = [
        (memory.objective, SteepObjective, "steepness(width, reach): the largest slope of its error for residuals up "
         "to the norm reach (L2 has 1)"),
        (memory.retention, SteepRetention, f"steepness(start): {retention}"),
        (memory.algorithm, SteepAlgorithm, "steepness(beta): how many times larger than under Descent the whole effect "
         "of one gradient can be (Momentum has 1 / (1 - beta))"),
    ]  # fmt: skip
    if not isinstance(memory.architecture, Matrix | MLP):
        text = "steepness(weights): how much more than a matrix an update can change what is read (a matrix has 1)"
        axes.append((memory.architecture, SteepArchitecture, text))
    for axis, protocol, method in axes:
        if not isinstance(axis, protocol):
            raise ValueError(
                f"{axis!r} does not state its steepness, so that no step size is known to be stable. Give it a method "
                f"{method}."
            )
    objective = memory.objective
    assert isinstance(objective, SteepObjective)
    steep = objective.steepness(1, MAX_THRESHOLD)
    if not 0 <= steep < math.inf or (steep == 0 and not isinstance(objective, DotProduct)):
        raise ValueError(f"{objective!r} states a steepness of {steep!r}; it must be positive and finite.")


def with_safe_steps(memory: AssociativeMemory) -> AssociativeMemory:
    """The memory as a layer runs it: with proximal steps where raw ones would feed errors back.

    Raw steps are kept where there is no feedback (a matrix with the dot-product objective), where the steps are those
    of a delta rule, and for what has no proximal step here: objects from outside the package, `Decay` per channel and
    `OrthogonalizedMomentum`.
    """
    known = (
        type(memory.architecture) in (Matrix, MLP)
        and type(memory.objective) in (DotProduct, L2, Lp, Huber, ValueShiftRobust)
        and (memory.retention == Decay() or type(memory.retention) in (Lq, LqDual, KL, ElasticNet, Bregman))
        and type(memory.algorithm) in (Descent, Momentum)
    )
    free = isinstance(memory.objective, DotProduct) and not is_deep(memory)
    if not known or free:
        return memory
    feeds_back = is_deep(memory) or not isinstance(memory.values, str)
    limit = GRADIENT_LIMIT if memory.gradient_limit is None and feeds_back else memory.gradient_limit
    return replace(memory, step_size="proximal", gradient_limit=limit)


def bounded_momentum(
    memory: AssociativeMemory,
    sigma: Float[Tensor, "b h t"],
    retain: Float[Tensor, "b h t"] | Float[Tensor, "b h t d"],
) -> Float[Tensor, "b h t"]:
    """The momentum that a layer emits for ``sigma`` in [0, 1]; see the module documentation."""
    return sigma * retain * MAX_FOLLOWED_MOMENTUM if memory.follows_weights else sigma * MAX_MOMENTUM


def largest_step(memory: AssociativeMemory) -> float:
    """The largest ``max_step`` that is stable for this memory; see the module documentation."""
    if memory.follows_weights:
        return math.inf
    if not (isinstance(memory.objective, DotProduct) and is_known(memory)):
        return 1.0
    if erases(memory.retention):
        kinds = {memory.step_size_of(name) for name in memory.architecture.shapes(1, 1)}
        return math.inf if kinds == {"proximal"} else 2.0
    return 1.0 if is_deep(memory) else math.inf


def check_step(memory: AssociativeMemory, max_step: float | None) -> float:
    """``max_step`` if it is stable for this memory; None means 4 for proximal steps and else 1, which always are.

    Raises:
        ValueError: the value is not stable for this memory, or none is.
    """
    _require_steepness(memory)
    if not isinstance(memory.values, str | Huber | DotProduct):
        raise ValueError(
            f"values={memory.values!r} has no bounded gradient, so that a layer's memory could answer with values that "
            'grow from chunk to chunk. Use Huber("norm", threshold=1.0), or values="given".'
        )
    largest = largest_step(memory)
    if is_deep(memory) and isinstance(memory.retention, Delta):
        _refuse_unstable(memory)
    if max_step is None:
        kinds = {memory.step_size_of(name) for name in memory.architecture.shapes(1, 1)}
        return DEFAULT_PROXIMAL_STEP if kinds == {"proximal"} else 1.0
    if not 0 < max_step <= largest:
        raise ValueError(
            f"max_step={max_step!r} must be above 0 and at most {largest:g} for this memory; a larger step lets some "
            "sequence of gates make the fast weights grow without bound."
        )
    return float(max_step)


def _refuse_unstable(memory: AssociativeMemory) -> None:
    """Raise for delta retention on an MLP in a form that no useful bound keeps stable."""
    kinds = {name: memory.step_size_of(name) for name in memory.architecture.shapes(1, 1)}
    if "raw" in kinds.values():
        raise ValueError(
            f"no bound keeps raw delta steps on an MLP stable (step_size {kinds}): its hidden activations have no "
            "bounded norm. Use step_size='proximal' or 'normalized'."
        )
    if not isinstance(memory.objective, DotProduct):
        return
    if memory.has_momentum:
        raise ValueError(
            "no useful bound keeps the dot-product objective, delta retention and momentum together stable on an MLP: "
            "momentum pushes on after the target is reached, each map through the other. "
            "Use Descent(), Decay() or L2()."
        )
    if "normalized" in kinds.values() and memory.retain_to == "zero":
        raise ValueError(
            f"normalized steps (step_size {kinds}) on an MLP that decays to zero divide by hidden activations that "
            "vanish. Use retain_to='initial', or step_size='proximal'."
        )


def outgrown(initial: Weights, gain: float = 1.0) -> Float[Tensor, "*b"]:
    """How far initial weights have outgrown a random start with entries of variance ``gain / in``; at least 1.

    The ratio of ``sum_maps s(W)^2`` to what it is at the start, where ``s(W)^8 = tr (W W^T)^4`` bounds the spectral
    norm from above, by no more than a factor ``rank^(1/8)``. At the start, by the fourth moment of the
    Marchenko-Pastur law, ``s^8 = gain^4 out (1 + 6 y + 6 y^2 + y^3)`` with ``y = out / in``.

    Args:
        initial: ``{map: [*b, out, in]}``.
        gain: variance of a random start times its fan-in.
    """
    now: Tensor | float = 0.0
    start = 0.0
    for weight in initial.values():
        out, width = weight.shape[-2:]
        gram = weight.mT @ weight if width < out else weight @ weight.mT
        # The small number keeps the gradient of the root finite for a map of zeros.
        now = now + ((gram @ gram).square().sum((-2, -1)) + 1e-24) ** 0.25
        y = out / width
        start += gain * (out * (1 + 6 * y + 6 * y**2 + y**3)) ** 0.25
    return torch.clamp(torch.as_tensor(now) / start, min=1)


def bounded_step(
    memory: AssociativeMemory,
    max_step: float,
    sigma: Float[Tensor, "b h t"],
    retain: Float[Tensor, "b h t"] | Float[Tensor, "b h t d"],
    initial: Weights,
) -> Float[Tensor, "b h t"]:
    """The step size a layer emits for ``sigma`` in [0, 1]; see the module documentation.

    ``initial: {map: [h, out, in]}`` are the weights that each head starts from.
    """
    if memory.follows_weights:
        return sigma * max_step
    damping = 1 - (MAX_MOMENTUM if memory.has_momentum else 0.0)
    if is_per_channel(memory.retention):
        retain = retain.amax(-1)
    if not (isinstance(memory.objective, DotProduct) and is_known(memory)):
        tokens = max(memory.chunk_size, 4 / damping if damping < 1 else 1)
        return sigma * (max_step * damping / tokens) / curvature(memory, initial)
    if isinstance(memory.retention, Delta) or not is_deep(memory):
        return sigma * max_step  # no feedback
    return sigma * (1 - retain) * (max_step * damping**2 / 2)


def check_self_modifying_step(memory: AssociativeMemory, max_step: float | None) -> float:
    """The bound of eta for memories that write their own targets (`SelfModifyingTitans`); None means the usual one.

    Raises:
        ValueError: for a bound with which the recurrence could expand.
    """
    kinds = {memory.step_size_of(name) for name in memory.architecture.shapes(1, 1)}
    delta = isinstance(memory.retention, Delta)
    if delta and "raw" in kinds and is_deep(memory):
        raise ValueError(
            "step_size='raw' overflows on the second map of a deep memory within 100 tokens; "
            "use 'proximal' or 'normalized'"
        )
    limit, why = float("inf"), ""
    if "normalized" in kinds:
        limit, why = 2.0, "normalized steps above 2 expand"
    if "raw" in kinds:
        limit, why = 1.0, "a raw step of 1 erases all of what a key holds"
    if not isinstance(memory.objective, DotProduct):
        limit, why = 1.0, "the L2 objective erases at the anchor as well as in place"
    if not delta:
        limit, why = 0.5, "without delta retention only decay bounds the memory"
    step = min(1.0, limit) if max_step is None else float(max_step)
    if not 0 < step <= limit:
        raise ValueError(f"max_step must be in (0, {limit}] here ({why or 'positive'}), got {max_step}")
    return step
