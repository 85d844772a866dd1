"""Write the loss of chosen tokens in many rows into one memory: what a session practises, beside what it reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from nestlearn.memory.types import Weights
from nestlearn.nn.cms.level import Level
from nestlearn.nn.cms.tape import Tape, gradients, segment_factors, usable
from nestlearn.nn.common import wide_dtype

from .model import StackedModel, stacked_model
from .network import LevelFast, LevelState, StackedMLP, reading
from .write import KEPT, PROTECT, STEP

WeightGradients = dict[tuple[str, int], Weights]
"""``{(path of the MLP, level): {map: [out, in]}}``."""


class PracticeRows(NamedTuple):
    """Rows of tokens that are learned together.

    Args:
        ids: tokens, filled up at the right with any token.
        learned: which tokens the loss counts; the first of a row is predicted by nothing.
        weight: of the rows' mean loss per learned token in the sum over all batches.
    """

    ids: Int[Tensor, "b t"]
    learned: Bool[Tensor, "b t"]
    weight: float = 1.0


def practise(
    model: PreTrainedModel,
    batches: Iterable[PracticeRows],
    state: LevelState | None = None,
    *,
    lr: float = 1.0,
    levels: Sequence[Level] | None = None,
    protect: float | None = PROTECT,
) -> tuple[LevelState, list[float]]:
    """One step of every level on the loss of all batches together, which share one memory.

        L = sum_b weight_b / n_b  sum_{learned t} -ln p(x_t | x_{<t}),    G = (dL / dD) P          (per level and map)

    The step has the size of a typical segment in `read_segment`: `STEP` ``lr Level.lr |W_0|``, whatever the size of the
    loss. It counts as one period of every level: retention and momentum act once, and what was written is read from
    the next call on. The clock of the levels does not move.

    Args:
        model: a stacked model in evaluation mode.
        batches: rows, each batch read in one forward and backward pass.
        state: of one row, at the end of a document.
        lr: factor of every level's step.
        levels: the levels of the model with other settings, as in `read_segment`.
        protect: ``c_0`` of the memory of general inputs, as in `read_segment`.

    Returns:
        The state, and the mean loss of every batch in nats per learned token.

    Raises:
        ValueError: no learned token, a state of several rows, a model in training mode, or a level of rule "delta",
            which erases token by token.

    Example:
        >>> from nestlearn import Level, stack_levels
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = stack_levels(LlamaForCausalLM(config), [Level(period=8, rank=2)], mode="split").eval()
        >>> rows = PracticeRows(torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.bool))
        >>> state, first = practise(model, [rows], lr=30)
        >>> practise(model, [rows], state)[1] < first
        True
    """
    stacked, state = stacked_model(model), state or LevelState()
    plan = stacked.stack_plan
    chosen = plan.levels if levels is None else tuple(levels)
    _check(stacked, state, chosen)
    mlps, total, losses = stacked.stacked_mlps(), {}, []
    with gradients():
        held = replace(state, networks=usable(dict(state.networks)))
        for rows in batches:
            losses.append(_add_gradients(model, plan, held, rows, protect, total))
    networks = dict(state.networks)
    with torch.no_grad():
        for path, module in mlps.items():
            now = list(networks.get(path, (None,) * len(plan.levels)))
            for index in plan.learning():
                now[index] = _step(module, index, chosen[index], now[index], total[path, index], lr, protect)
            networks[path] = tuple(now)
    return replace(state, networks=networks), losses


def end_practice(state: LevelState, levels: Sequence[Level]) -> LevelState:
    """The state after the last step of `practise`: without momentum, which a segment of `read_segment` counts by token.

    Under rule "momentum" the rest of its effect is written at once, ``D <- D + beta / (1 - beta) S``. A level inside a
    period of its reading keeps its momentum too: practice ends the period.

    Args:
        levels: with the settings by which they practised.
    """
    return state.map_levels(lambda index, held: _without_momentum(held, levels[index]))


def _without_momentum(held: LevelFast, level: Level) -> LevelFast:
    weights, momentum = held.weights, held.weights.momentum
    if not momentum:
        return held
    if level.rule == "momentum":
        rest = level.momentum / (1 - level.momentum)
        params = {name: w + rest * momentum[name] for name, w in weights.params.items()}
        weights = weights._replace(params=params, anchor=params)
    empty = {name: s.new_zeros(()).expand(s.shape) for name, s in momentum.items()}
    return held._replace(weights=weights._replace(momentum=empty))


def _check(model: StackedModel, state: LevelState, levels: Sequence[Level]) -> None:
    if state.rows > 1:
        raise ValueError(f"the level state holds {state.rows} rows; practice writes into one. Use index_rows([i]).")
    if model.training:
        raise ValueError("the model is in training mode, where dropout adds noise. Call model.eval() first.")
    if any(level.rule == "delta" for level in levels):
        raise ValueError('a level of rule="delta" cannot practise: it erases token by token. Use another rule.')


def _add_gradients(
    model: PreTrainedModel,
    plan: Any,
    state: LevelState,
    rows: PracticeRows,
    protect: float | None,
    total: WeightGradients,
) -> float:
    """Add the gradients of a batch to ``total``; returns the mean loss."""
    if not bool(rows.learned[:, 1:].any()):
        raise ValueError("the rows have no learned token behind their first one; nothing can be practised.")
    ids, learned, tape = rows.ids.to(model.device), rows.learned[:, 1:].to(model.device), Tape()
    with reading(plan, state, tape, protect):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1][learned]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide, ids[:, 1:][learned].long())
    for key, factors in segment_factors(rows.weight * loss, tape).items():
        sums = total.setdefault(cast(Any, key), {})
        for name, (x, e) in factors.items():
            dtype = wide_dtype(e)
            gradient = e.flatten(0, 1).to(dtype).mT @ x.flatten(0, 1).to(dtype)
            sums[name] = sums[name] + gradient if name in sums else gradient
    return loss.item()


def _step(
    module: StackedMLP,
    index: int,
    level: Level,
    held: LevelFast | None,
    total: Weights,
    lr: float,
    protect: float | None,
) -> LevelFast:
    """A level after one step along the gradients of its maps."""
    part = module.level(index)
    memory = part.memory_of(level)
    like = next(iter(total.values()))
    initial = {name: w.to(like) for name, w in part.initial(like, protect).items()}
    if held is None:
        state = memory.init_state((1,), part.width, part.width, initial, dtype=like.dtype, device=like.device)
        held = LevelFast(state, like.new_zeros(1), 0)
    state, algorithm = held.weights, memory.algorithm
    sums = {name: part.open_part(name, g, protect) for name, g in total.items()}
    size = lr * level.lr * STEP * module.size(index, like.device).to(like.dtype)
    kept = KEPT if level.retain is None else level.retain
    beta = like.new_tensor(level.momentum) if level.has_momentum else None
    if algorithm.writes_at_close:
        eta = size / sum(min(g.shape) for g in sums.values()) ** 0.5
    else:
        norm = torch.stack([g.square().sum() for g in sums.values()]).sum().sqrt()
        eta = torch.where(norm > 0, size / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0)
        eta = eta if beta is None else eta * (1 - beta)
    params, momentum = {}, {}
    for name, gradient in sums.items():
        names = memory.carried_names(name)
        carried = tuple(state.momentum[n].to(like.device) for n in names) if state.momentum else ()
        change, carried = algorithm.step(carried, gradient[None], eta, beta)
        if algorithm.writes_at_close:
            # Orthogonalized, a momentum loses the scale of its inputs, and so it is opened again.
            change = change + part.open_part(name, algorithm.close(carried, eta), protect)
        before = state.params[name].to(like.device)
        params[name] = initial[name] + kept * (before - initial[name]) + change
        momentum.update(zip(names, carried, strict=True))
    params = {name: params[name] for name in state.params}
    state = state._replace(params=params, anchor=params, momentum=momentum or None)
    return held._replace(weights=state, writes=held.writes + 1)
