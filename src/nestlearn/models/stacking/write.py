"""The write of stacked levels: the factors of a segment become a change of the weights of every level (NL Eq. 71)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory import Factor, Gates, State
from nestlearn.memory.types import Weights
from nestlearn.nn.cms.level import Level, loss_gates
from nestlearn.nn.cms.tape import Factors, squared_norm, write
from nestlearn.nn.common import wide_dtype
from nestlearn.nn.state import map_tensors

from .model import StackedModel
from .network import LevelFast, LevelState, StackedLevel, StackedMLP

STEP = 5e-4
"""Change of a level's weights by a typical segment, relative to the norm of its initial network, at ``Level.lr`` 1."""

KEPT = 0.97
"""What a level without ``retain`` keeps, over one period, of what it has written."""

PROTECT = 0.03
"""``c_0`` of the memory of general inputs, by default."""

ENERGY_DECAY = 0.95
"""Kept fraction, per segment, of the moving average of squared gradient norms, the size of a typical gradient."""


class Writing(NamedTuple):
    """How levels write: their settings, ``c_0`` of the memory of general inputs (None: without it), and whether outer
    gradients go through what is written."""

    levels: tuple[Level, ...]
    protect: float | None = None
    keep_graph: bool = False


def write_levels(model: StackedModel, state: LevelState, factors: dict[Any, Factors], how: Writing) -> LevelState:
    """The state after the factors of a segment are written into every level."""
    plan, networks = model.stack_plan, dict(state.networks)
    for path, module in model.stacked_mlps().items():
        held = list(networks.get(path, (None,) * len(plan.levels)))
        for index in plan.learning():
            held[index] = _write_level(module, index, held[index], factors[path, index], state.tokens, how)
        networks[path] = tuple(held)
    return replace(state, networks=networks, tokens=state.tokens + plan.segment)


def _write_level(
    module: StackedMLP, index: int, held: LevelFast | None, factors: Factors, clock: int, how: Writing
) -> LevelFast:
    level, own, segment = how.levels[index], module.level(index), module.stack_plan.segment
    error, period = next(iter(factors.values())).error, cast(int, level.period)
    rows, dtype = error.shape[0], wide_dtype(error)
    initial = {name: w.to(dtype) for name, w in own.initial(error, how.protect).items()}
    if not how.keep_graph:
        initial = {name: w.detach() for name, w in initial.items()}
    memory = own.memory_of(level)
    if held is None:
        state = memory.init_state((rows,), own.width, own.width, initial, dtype=dtype, device=error.device)
        state = state._replace(position=state.position + clock % period, aligned=False)
        held = LevelFast(state, error.new_zeros(rows, dtype=dtype), 0)
    # The layers of a model, and the state, may be on different devices.
    held = cast(LevelFast, map_tensors(lambda x: x.to(error.device), held))
    factors = _map_inputs(factors, lambda name, x: x.to(dtype), dtype)
    energy = ENERGY_DECAY * held.energy + (1 - ENERGY_DECAY) * squared_norm(factors).detach()
    typical = (energy / (1 - ENERGY_DECAY ** (held.writes + 1))).sqrt()
    step = _step(level, segment, factors, module.size(index, error.device).to(dtype), typical)
    factors = _map_inputs(factors, lambda name, x: own.open_part(name, x, how.protect), dtype)
    if level.rule == "descent":
        state = held.weights._replace(params=_descend(level, held.weights.params, factors, step, initial))
    else:
        gates = _gates(level, factors, step)
        factors, gates = _fill(level, segment, factors, gates)
        state = write(memory, held.weights, factors, gates, level.clip, initial)
        if level.rule == "orthogonalized" and how.protect is not None:
            state = state._replace(params=_open_writes(own, held.weights, state, gates, initial, how.protect))
    position = (clock + segment) % period
    state = state._replace(position=torch.full_like(state.position, position), aligned=position == 0)
    if position == 0:
        # The last segment of a document may be shorter than its period, which ends with it.
        state = state._replace(anchor=state.params)
    return LevelFast(state, energy, held.writes + 1)


def _map_inputs(factors: Factors, change: Any, dtype: torch.dtype) -> Factors:
    """Factors with changed inputs; maps with the same inputs (gate and up) share the change."""
    made: dict[tuple[int, bool], Tensor] = {}
    found: Factors = {}
    for name, (x, e) in factors.items():
        key = id(x), name.endswith("_B")
        if key not in made:
            made[key] = change(name, x)
        found[name] = Factor(made[key], e.to(dtype))
    return found


def _step(
    level: Level, segment: int, factors: Factors, size: Float[Tensor, ""], typical: Float[Tensor, "b"]
) -> Float[Tensor, "b"]:
    """The step that changes the weights of a level by ``size`` times `STEP` in a typical segment at ``lr`` 1."""
    if level.rule == "orthogonalized":
        # An orthogonalized [out, in] has the Frobenius norm sqrt(min(out, in)); `loss_gates` divides by the period.
        rank = sum(min(x.shape[-1], e.shape[-1]) for x, e in factors.values())
        return (STEP * size * cast(int, level.period) / (segment * rank**0.5)).expand(typical.shape)
    return torch.where(typical > 0, STEP * size / typical.clamp(min=torch.finfo(typical.dtype).tiny), 0)


def _kept(level: Level) -> float:
    """The fraction that a level keeps over one period."""
    return KEPT if level.retain is None else level.retain


def _descend(level: Level, params: Weights, factors: Factors, step: Float[Tensor, "b"], initial: Weights) -> Weights:
    """Gradient descent with retention, all tokens of a segment in one product per map.

        W_t = W_init + a (W_{t-1} - W_init) - eta lr e_t x_tᵀ,    a = retain^(1 / period)

    It equals `nestlearn.nn.cms.tape.write` for this rule.
    """
    count = next(iter(factors.values())).error.shape[1]
    a = _kept(level) ** (1 / cast(int, level.period))
    later = torch.arange(count - 1, -1, -1, device=step.device, dtype=step.dtype)
    weight = level.lr * step[:, None] * torch.pow(torch.full_like(later, a), later)
    if level.clip is not None:
        weight = weight * (level.clip * squared_norm(factors).clamp(min=level.clip**2).rsqrt())[:, None]
    found: Weights = {}
    for name, w in params.items():
        x, e = factors[name]
        found[name] = torch.baddbmm(w, (weight[..., None] * e).mT, x, beta=a**count, alpha=-1)
        if a < 1 and name.endswith("_A"):  # the others start at zero
            found[name] = found[name] + (1 - a**count) * initial[name]
    return found


def _gates(level: Level, factors: Factors, step: Float[Tensor, "b"]) -> Gates:
    tokens = next(iter(factors.values())).error.shape[1]
    return loss_gates(level, step.unsqueeze(1).expand(-1, tokens), step.new_tensor(_kept(level)))


def _open_writes(
    level: StackedLevel, before: State, after: State, gates: Gates, initial: Weights, protect: float
) -> Weights:
    """The weights, with P applied to what was written: an orthogonalized write loses the scale of its keys."""
    kept = gates.retain.prod(1)[:, None, None]
    found = dict(after.params)
    for name, w in after.params.items():
        base = initial[name] + kept * (before.params[name] - initial[name])
        found[name] = base + level.open_part(name, w - base, protect)
    return found


def _fill(level: Level, segment: int, factors: Factors, gates: Gates) -> tuple[Factors, Gates]:
    """Fill a short last segment, if the rule writes at the end of a period: its clock must reach it."""
    missing = segment - gates.lr.shape[1]
    if level.rule != "orthogonalized" or missing == 0:
        return factors, gates
    factors = {name: Factor(*(F.pad(x, (0, 0, 0, missing)) for x in factor)) for name, factor in factors.items()}
    kept = F.pad(gates.retain, (0, missing), value=1)
    momentum = None if gates.momentum is None else F.pad(gates.momentum, (0, missing), value=1)
    return factors, Gates(F.pad(gates.lr, (0, missing)), kept, momentum)
