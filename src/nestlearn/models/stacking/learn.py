"""Read a segment with a stacked model, and let every level learn from the loss of its next tokens (NL Eq. 71)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from nestlearn.memory import Factor, Gates
from nestlearn.models.segments import next_token_nats
from nestlearn.nn.cms.level import Level, loss_gates
from nestlearn.nn.cms.tape import Factors, Tape, gradients, segment_factors, squared_norm, usable, write

from .classes import StackedModel
from .network import StackedMLP
from .plan import StackPlan
from .state import LevelFast, LevelState, reading

KeyValues = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of every attention layer, ``[b, heads, t, d_head]``."""

STEP = 5e-4
"""Change of a level's weights by a typical segment, relative to the norm of its initial network, at ``Level.lr`` 1."""

KEPT = 0.97
"""What a level without ``retain`` keeps, over one period, of what it has written."""

ENERGY_DECAY = 0.95
"""Kept fraction, per segment, of the moving average of squared gradient norms that says what is typical."""


class Segment(NamedTuple):
    """What reading a segment gives; ``loss`` is the sum of its next-token losses in nats, per row."""

    logits: Float[Tensor, "b t v"]
    keys: KeyValues
    state: LevelState
    loss: Float[Tensor, "b"]


def stacked_model(model: Any) -> StackedModel:
    """The stacked model itself, also where an adapter wraps it.

    Raises:
        ValueError: there is none.
    """
    found = model if isinstance(model, StackedModel) else None
    if found is None and hasattr(model, "modules"):
        found = next((module for module in model.modules() if isinstance(module, StackedModel)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no levels; use stack_levels(model, levels) first.")
    return found


def read_segment(
    model: PreTrainedModel,
    ids: Int[Tensor, "b t"],
    state: LevelState | None = None,
    keys: KeyValues = (),
    *,
    writes: bool = True,
    meta: Literal["first", "second"] | None = None,
) -> Segment:
    """Read up to one segment (the smallest period) after the context in ``keys``, and learn from it.

        E = d/dz sum_{t<T} -ln p(x_{t+1} | x_{<=t}),    G = E^T X,    W <- W - eta |W_0| / g  G        (per row, level)

    with targets inside the segment only. g is the root mean square of ``|G|`` over past segments of this row and level
    and eta = `STEP` ``Level.lr``, so that steps have the same meaning in every model. Over a period a level keeps the
    fraction ``Level.retain`` of what it wrote (`KEPT` by default: it remembers some 33 periods). Errors are taken at
    the weights of the last period's end; what a level reads changes when its period ends. A shorter segment ends a
    document, and counts as a whole one for the clock. Works inside ``inference_mode`` and ``no_grad``.

    Args:
        model: a stacked model in evaluation mode (an adapter around it is fine).
        ids: tokens of every row, all real, 1 to ``plan.segment`` of them.
        state: what was learned before, if anything.
        keys: context of this block; empty at its start.
        writes: False only reads.
        meta: None detaches everything. ``first`` keeps the graph from initial weights to outputs, with the written
            gradients as constants; ``second`` differentiates through them as well.

    Raises:
        ValueError: no stacked model, a training mode that would drop units, a segment of wrong length.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = stack_levels(LlamaForCausalLM(config), [Level(period=8)], mode="split").eval()
        >>> read = read_segment(model, torch.arange(8)[None])
        >>> read.state.tokens, read.state.rows, read.loss.shape
        (8, 1, torch.Size([1]))
    """
    stacked = stacked_model(model)
    plan, state = stacked.stack_plan, state or LevelState()
    _check(stacked, ids, state)
    learns = writes and ids.shape[1] > 1
    with gradients(), torch.set_grad_enabled(learns or meta is not None):
        ids, keys, networks = usable((ids, keys, dict(state.networks)))
        state, tape = replace(state, networks=networks), Tape(meta == "second") if learns else None
        cache = DynamicCache(keys) if keys else DynamicCache()
        with reading(plan, state, tape):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        found: KeyValues = tuple((layer.keys, layer.values) for layer in cast(Any, cache.layers))
        loss = next_token_nats(logits, ids)
        if tape is not None:
            factors = segment_factors(loss.sum(), tape, keep_graph=meta is not None)
            state = _write(stacked, state, factors, ids.shape, keep_graph=meta is not None)
    if meta is None:
        logits, loss = logits.detach(), loss.detach()
        found = tuple((k.detach(), v.detach()) for k, v in found)
        state = state.detach()
    return Segment(logits, found, state, loss)


def _check(model: StackedModel, ids: Tensor, state: LevelState) -> None:
    segment, rows = model.stack_plan.segment, state.rows
    if ids.dim() != 2 or not 1 <= ids.shape[1] <= segment:
        raise ValueError(
            f"ids has shape {tuple(ids.shape)}; a segment is [rows, 1 to {segment}] (the smallest period)."
        )
    if rows not in (0, ids.shape[0]):
        raise ValueError(
            f"the level state holds {rows} rows, the segment {ids.shape[0]}: every row learns for itself. Repeat the "
            "state's rows (state.index_rows([0, 0, ...])), or read with a state of as many rows."
        )
    if model.training:
        raise ValueError("the model is in training mode, where dropout would teach noise. Call model.eval() first.")


def _write(
    model: StackedModel, state: LevelState, factors: dict[Any, Factors], shape: tuple[int, ...], keep_graph: bool
) -> LevelState:
    """The state after a segment of ``shape`` (rows, tokens)."""
    plan, networks = model.stack_plan, dict(state.networks)
    for path, module in model.stacked_mlps().items():
        held = list(networks.get(path, (None,) * len(plan.levels)))
        for index in plan.learning():
            held[index] = _write_level(module, index, held[index], factors[path, index], state.tokens, keep_graph)
        networks[path] = tuple(held)
    return replace(state, networks=networks, tokens=state.tokens + plan.segment)


def _write_level(
    module: StackedMLP, index: int, held: LevelFast | None, factors: Factors, clock: int, keep_graph: bool
) -> LevelFast:
    plan, level, memory = module.stack_plan, module.stack_plan.levels[index], module.memory(index)
    period = cast(int, level.period)
    first = next(iter(factors.values())).error
    rows, tokens = first.shape[:2]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    initial = {name: w.to(dtype) for name, w in module.initial(index).items()}
    if not keep_graph:
        initial = {name: w.detach() for name, w in initial.items()}
    if held is None:
        state = memory.init_state((rows,), 1, 1, initial, dtype=dtype, device=first.device)
        state = state._replace(position=state.position + clock % period, aligned=False)
        energy, writes = first.new_zeros(rows, dtype=dtype), 0
    else:
        state, energy, writes = held.weights, held.energy, held.writes
    factors = {name: Factor(x.to(dtype), e.to(dtype)) for name, (x, e) in factors.items()}
    energy = ENERGY_DECAY * energy + (1 - ENERGY_DECAY) * squared_norm(factors).detach()
    typical = (energy / (1 - ENERGY_DECAY ** (writes + 1))).sqrt()
    size = STEP * module.weight_norm(index).to(dtype)
    gates = _gates(level, plan, factors, size, typical, tokens)
    factors, gates = _fill(level, plan, factors, gates)
    state = write(memory, state, factors, gates, clip=level.clip, initial=initial)
    position = (clock + plan.segment) % period
    state = state._replace(position=torch.full_like(state.position, position), aligned=position == 0)
    if position == 0:
        # The last segment of a document may be shorter than its period, which ends with it.
        state = state._replace(anchor=state.params)
    return LevelFast(state, energy, writes + 1)


def _gates(
    level: Level, plan: StackPlan, factors: Factors, size: Tensor, typical: Float[Tensor, "b"], tokens: int
) -> Gates:
    """Steps that change the weights of a level by ``lr`` times ``size`` in a typical segment."""
    if level.rule == "orthogonalized":
        # An orthogonalized [out, in] has the Frobenius norm sqrt(min(out, in)); `loss_gates` divides by the period.
        rank = sum(min(x.shape[-1], e.shape[-1]) for x, e in factors.values())
        step = (size * cast(int, level.period) / (plan.segment * rank**0.5)).expand(typical.shape)
    else:
        step = torch.where(typical > 0, size / typical.clamp(min=torch.finfo(typical.dtype).tiny), 0)
    kept = step.new_tensor(KEPT if level.retain is None else level.retain)
    return loss_gates(level, step.unsqueeze(1).expand(-1, tokens), kept)


def _fill(level: Level, plan: StackPlan, factors: Factors, gates: Gates) -> tuple[Factors, Gates]:
    """Fill a short last segment where the rule writes at the end of a period: its clock must reach it."""
    missing = plan.segment - gates.lr.shape[1]
    if level.rule != "orthogonalized" or missing == 0:
        return factors, gates
    factors = {name: Factor(*(F.pad(x, (0, 0, 0, missing)) for x in factor)) for name, factor in factors.items()}
    ones = gates.lr.new_ones(gates.lr.shape[0], missing)
    kept = torch.cat([gates.retain, ones], 1)
    momentum = None if gates.momentum is None else torch.cat([gates.momentum, ones], 1)
    return factors, Gates(F.pad(gates.lr, (0, missing)), kept, momentum)
