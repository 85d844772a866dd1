"""Read a segment with a stacked model, and let every level learn from the loss of its next tokens (NL Eq. 71)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from nestlearn.models.segments import learn_segment, next_token_nats
from nestlearn.nn.cms.level import Level
from nestlearn.nn.cms.tape import Tape, gradients, usable
from nestlearn.nn.state import detach

from .model import StackedModel, stacked_model
from .network import LevelState, reading
from .write import PROTECT, Writing, write_levels

KeyValues = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of every attention layer, ``[b, heads, t, d_head]``."""


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
    levels: Sequence[Level] | None = None,
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
        levels: the levels of the model with other settings (see `StackPlan.with_settings`); None takes the model's.
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
    how = Writing(stacked.stack_plan.levels if levels is None else tuple(levels), protect, meta is not None)
    with gradients(), torch.set_grad_enabled(learns or meta is not None):
        ids, keys, networks = usable((ids, keys, dict(state.networks)))
        found = _read(model, stacked, ids, replace(state, networks=networks), keys, learns, how, meta)
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
    how: Writing,
    meta: str | None,
) -> SegmentRead:
    cache = DynamicCache(keys) if keys else DynamicCache()

    def run(tape: Tape | None) -> tuple[Tensor, LevelState]:
        with reading(stacked.stack_plan, state, tape, how.protect):
            return model(input_ids=ids, past_key_values=cache, use_cache=True).logits, state

    if learns:
        logits, loss, after = learn_segment(
            run,
            lambda logits: logits,
            lambda state, factors: write_levels(stacked, state, factors, how),
            ids,
            second_order=meta == "second",
            keep_graph=how.keep_graph,
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
