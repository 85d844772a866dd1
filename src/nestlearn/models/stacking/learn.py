"""Read a segment with a stacked model, and let every level learn from the loss of its next tokens (NL Eq. 71)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from nestlearn.memory import Factor, Gates, State
from nestlearn.memory.types import Weights
from nestlearn.models.segments import learn_segment, next_token_nats
from nestlearn.nn.cms.level import Level, loss_gates
from nestlearn.nn.cms.tape import Factors, Tape, gradients, squared_norm, usable, write
from nestlearn.nn.common import wide_dtype
from nestlearn.nn.state import detach, map_tensors

from .model import StackedModel, stacked_model
from .network import LevelFast, LevelState, StackedLevel, StackedMLP, reading

KeyValues = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of every attention layer, ``[b, heads, t, d_head]``."""

STEP = 5e-4
"""Change of a level's weights by a typical segment, relative to the norm of its initial network, at ``Level.lr`` 1."""

KEPT = 0.97
"""What a level without ``retain`` keeps, over one period, of what it has written."""

PROTECT = 0.03
"""``c_0`` of the memory of general inputs, by default."""

ENERGY_DECAY = 0.95
"""Kept fraction, per segment, of the moving average of squared gradient norms, the size of a typical gradient."""


class SegmentRead(NamedTuple):
    """The result of reading a segment; ``loss`` is the sum of its next-token losses in nats, per row."""

    logits: Float[Tensor, "b t v"]
    keys: KeyValues
    state: LevelState
    loss: Float[Tensor, "b"]


def read_segment(
    model: PreTrainedModel,
    ids: Int[Tensor, "b t"],
    state: LevelState | None = None,
    keys: KeyValues = (),
    *,
    writes: bool = True,
    meta: Literal["first", "second"] | None = None,
    protect: float | None = PROTECT,
) -> SegmentRead:
    """Read up to one segment (the smallest period) after the context in ``keys``, and learn from it.

        E = d/dz sum_{t<T} -ln p(x_{t+1} | x_{<=t}),    G = Eᵀ X,    D <- D - eta |W_0| / g  G        (per row, level)

    Targets are inside the segment only. D is the change of a map, W_0 its initial weight. g is the root mean square of
    ``|G|`` over past segments of this row and level, and eta = `STEP` ``Level.lr``, so that steps have the same meaning
    in every model. Over a period a level keeps the fraction ``Level.retain`` of D (`KEPT` by default, a memory of some
    33 periods). Errors are taken at the weights of the end of the last period, and a level reads other weights when its
    period ends. A shorter segment ends a document and counts as a whole one for the clock. The function works inside
    ``inference_mode`` and ``no_grad``.

    Args:
        model: a stacked model in evaluation mode, or an adapter around it.
        ids: tokens of every row, all real, 1 to ``plan.segment`` of them.
        state: what was learned before.
        keys: keys and values of the context; empty at its start.
        writes: False only reads.
        meta: None detaches everything. ``first`` keeps the graph from initial weights to outputs, with the written
            gradients as constants; ``second`` differentiates through them as well.
        protect: ``c_0`` of the memory of general inputs (`nestlearn.models.stacking.general`), if the model has one;
            None writes without it.

    Raises:
        ValueError: no stacked model, training mode (dropout would add noise to what is learned), a segment of wrong
            length.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = stack_levels(LlamaForCausalLM(config), [Level(period=8)], mode="split").eval()
        >>> read = read_segment(model, torch.arange(8)[None])
        >>> read.state.tokens, read.state.rows, read.loss.shape
        (8, 1, torch.Size([1]))
    """
    stacked, state = stacked_model(model), state or LevelState()
    _check(stacked, ids, state)
    learns = writes and ids.shape[1] > 1
    with gradients(), torch.set_grad_enabled(learns or meta is not None):
        ids, keys, networks = usable((ids, keys, dict(state.networks)))
        found = _read(model, stacked, ids, replace(state, networks=networks), keys, learns, meta, protect)
    if meta is not None:
        return found
    logits, keys, loss = detach((found.logits, found.keys, found.loss))
    return SegmentRead(logits, keys, found.state.detach(), loss)


def _read(
    model: PreTrainedModel,
    stacked: StackedModel,
    ids: Tensor,
    state: LevelState,
    keys: KeyValues,
    learns: bool,
    meta: str | None,
    protect: float | None,
) -> SegmentRead:
    cache = DynamicCache(keys) if keys else DynamicCache()

    def run(tape: Tape | None) -> tuple[Tensor, LevelState]:
        with reading(stacked.stack_plan, state, tape, protect):
            return model(input_ids=ids, past_key_values=cache, use_cache=True).logits, state

    if learns:
        logits, loss, after = learn_segment(
            run,
            lambda logits: logits,
            lambda state, factors: _write(stacked, state, factors, meta is not None, protect),
            ids,
            second_order=meta == "second",
            keep_graph=meta is not None,
        )
    else:
        logits, after = run(None)
        loss = next_token_nats(logits, ids)
    return SegmentRead(logits, tuple((layer.keys, layer.values) for layer in cast(Any, cache.layers)), after, loss)


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
        raise ValueError("the model is in training mode, where dropout adds noise. Call model.eval() first.")


def _write(
    model: StackedModel, state: LevelState, factors: dict[Any, Factors], keep_graph: bool, protect: float | None
) -> LevelState:
    """The state after the factors of a segment are written into every level."""
    plan, networks = model.stack_plan, dict(state.networks)
    for path, module in model.stacked_mlps().items():
        held = list(networks.get(path, (None,) * len(plan.levels)))
        for index in plan.learning():
            held[index] = _write_level(
                module, index, held[index], factors[path, index], state.tokens, keep_graph, protect
            )
        networks[path] = tuple(held)
    return replace(state, networks=networks, tokens=state.tokens + plan.segment)


def _write_level(
    module: StackedMLP,
    index: int,
    held: LevelFast | None,
    factors: Factors,
    clock: int,
    keep_graph: bool,
    protect: float | None,
) -> LevelFast:
    level, segment, memory = module.stack_plan.levels[index], module.stack_plan.segment, module.level(index).memory
    assert memory is not None
    error = next(iter(factors.values())).error
    rows, dtype = error.shape[0], wide_dtype(error)
    initial = {name: w.to(dtype) for name, w in module.level(index).initial(error, protect).items()}
    if not keep_graph:
        initial = {name: w.detach() for name, w in initial.items()}
    if held is None:
        width = module.level(index).width
        state = memory.init_state((rows,), width, width, initial, dtype=dtype, device=error.device)
        state = state._replace(position=state.position + clock % memory.chunk_size, aligned=False)
        held = LevelFast(state, error.new_zeros(rows, dtype=dtype), 0)
    # The layers of a model, and the state, may be on different devices.
    held = cast(LevelFast, map_tensors(lambda x: x.to(error.device), held))
    factors = {name: Factor(x.to(dtype), e.to(dtype)) for name, (x, e) in factors.items()}
    energy = ENERGY_DECAY * held.energy + (1 - ENERGY_DECAY) * squared_norm(factors).detach()
    typical = (energy / (1 - ENERGY_DECAY ** (held.writes + 1))).sqrt()
    gates = _gates(level, segment, factors, module.size(index, error.device).to(dtype), typical)
    opened = module.level(index).open_part
    factors = {name: Factor(opened(name, x, protect), e) for name, (x, e) in factors.items()}
    factors, gates = _fill(level, segment, factors, gates)
    state = write(memory, held.weights, factors, gates, level.clip, initial)
    if level.rule == "orthogonalized" and protect is not None:
        state = state._replace(params=_open_writes(module.level(index), held.weights, state, gates, initial, protect))
    position = (clock + segment) % memory.chunk_size
    state = state._replace(position=torch.full_like(state.position, position), aligned=position == 0)
    if position == 0:
        # The last segment of a document may be shorter than its period, which ends with it.
        state = state._replace(anchor=state.params)
    return LevelFast(state, energy, held.writes + 1)


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


def _gates(level: Level, segment: int, factors: Factors, size: Tensor, typical: Float[Tensor, "b"]) -> Gates:
    """Steps that change the weights of a level by ``lr`` times ``size`` in a typical segment."""
    tokens = next(iter(factors.values())).error.shape[1]
    if level.rule == "orthogonalized":
        # An orthogonalized [out, in] has the Frobenius norm sqrt(min(out, in)); `loss_gates` divides by the period.
        rank = sum(min(x.shape[-1], e.shape[-1]) for x, e in factors.values())
        step = (STEP * size * cast(int, level.period) / (segment * rank**0.5)).expand(typical.shape)
    else:
        step = torch.where(typical > 0, STEP * size / typical.clamp(min=torch.finfo(typical.dtype).tiny), 0)
    kept = step.new_tensor(KEPT if level.retain is None else level.retain)
    return loss_gates(level, step.unsqueeze(1).expand(-1, tokens), kept)


def _fill(level: Level, segment: int, factors: Factors, gates: Gates) -> tuple[Factors, Gates]:
    """Fill a short last segment, if the rule writes at the end of a period: its clock must reach it."""
    missing = segment - gates.lr.shape[1]
    if level.rule != "orthogonalized" or missing == 0:
        return factors, gates
    factors = {name: Factor(*(F.pad(x, (0, 0, 0, missing)) for x in factor)) for name, factor in factors.items()}
    kept = F.pad(gates.retain, (0, missing), value=1)
    momentum = None if gates.momentum is None else F.pad(gates.momentum, (0, missing), value=1)
    return factors, Gates(F.pad(gates.lr, (0, missing)), kept, momentum)
