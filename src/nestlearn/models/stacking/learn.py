"""Read a segment with a stacked model, and let every level learn from the loss of its next tokens (NL Eq. 71)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from nestlearn.memory import Factor
from nestlearn.models.segments import learn_segment, next_token_nats
from nestlearn.nn.cms.level import Level
from nestlearn.nn.cms.tape import Factors, Tape, gradients, usable
from nestlearn.nn.state import detach

from .model import StackedModel, stacked_model
from .network import LevelState, reading
from .rows import join_rows
from .write import PROTECT, Writing, write_levels

KeyValues = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of every attention layer, ``[b, heads, t, d_head]``."""


class SegmentRead(NamedTuple):
    """The result of reading a segment; ``nats`` is ``-ln p`` of all its tokens but the first."""

    logits: Float[Tensor, "b t v"]
    keys: KeyValues
    state: LevelState
    nats: Float[Tensor, "b t-1"]

    @property
    def loss(self) -> Float[Tensor, "b"]:
        """The sum of the next-token losses of every row, in nats."""
        return self.nats.sum(1)


class SegmentRow(NamedTuple):
    """A segment of one row, with a state and a context of its own; see `read_segment`."""

    ids: Int[Tensor, "1 t"]
    state: LevelState = LevelState()
    keys: KeyValues = ()


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
        ids: tokens of every row, all real, 1 to ``plan.segment`` of them; any number without writes.
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
    _check(stacked, ids, state, writes)
    learns = writes and ids.shape[1] > 1
    how = _writing(stacked, levels, protect, meta is not None)
    with gradients(), torch.set_grad_enabled(learns or meta is not None):
        ids, keys, networks = usable((ids, keys, dict(state.networks)))
        found = _read(model, stacked, ids, replace(state, networks=networks), keys, learns, how, meta)
    if meta is not None:
        return found
    logits, keys, nats = detach((found.logits, found.keys, found.nats))
    return SegmentRead(logits, keys, found.state.detach(), nats)


def read_segments(
    model: PreTrainedModel,
    rows: Sequence[SegmentRow],
    *,
    writes: bool = True,
    levels: Sequence[Level] | None = None,
    protect: float | None = PROTECT,
) -> list[SegmentRead]:
    """`read_segment` for rows of different states, contexts and lengths, in one forward and backward pass.

    Shorter rows are filled up at the end, where no token sees them, and shorter contexts at the start, where they are
    masked. Each row is written by itself, so it learns what it would learn alone.

    Args:
        model: a stacked model, as of `read_segment`, whose forward takes ``position_ids`` and ``attention_mask``.
        rows: one segment of each.
        writes, levels, protect: as of `read_segment`.

    Raises:
        ValueError: see `read_segment`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = stack_levels(LlamaForCausalLM(config), [Level(period=8)], mode="split").eval()
        >>> one, two = read_segments(model, [SegmentRow(torch.arange(8)[None]), SegmentRow(torch.arange(3)[None])])
        >>> one.nats.shape, two.nats.shape, two.state.rows
        (torch.Size([1, 7]), torch.Size([1, 2]), 1)
    """
    if len(rows) < 2:
        return [read_segment(model, *row, writes=writes, levels=levels, protect=protect) for row in rows]
    stacked = stacked_model(model)
    how = _writing(stacked, levels, protect)
    for row in rows:
        _check(stacked, row.ids, row.state, writes)
        if row.state.rows > 1:
            raise ValueError(f"the state of a row holds {row.state.rows} rows; use state.index_rows([i]).")
    with gradients(), torch.set_grad_enabled(writes):
        rows = [row._replace(ids=ids, state=replace(row.state, networks=networks), keys=keys)
                for row in rows
                for ids, networks, keys in [usable((row.ids, dict(row.state.networks), row.keys))]]  # fmt: skip
        found = _read_rows(model, stacked, rows, writes, how)
    made = []
    for read in found:
        logits, keys, nats = detach((read.logits, read.keys, read.nats))
        made.append(SegmentRead(logits, keys, read.state.detach(), nats))
    return made


def _read_rows(
    model: PreTrainedModel, stacked: StackedModel, rows: Sequence[SegmentRow], writes: bool, how: Writing
) -> list[SegmentRead]:
    lengths = [row.ids.shape[1] for row in rows]
    pasts = [row.keys[0][0].shape[2] if row.keys else 0 for row in rows]
    length, past = max(lengths), max(pasts)
    ids = torch.cat([F.pad(row.ids, (0, length - row.ids.shape[1]), value=-1) for row in rows])
    cache, options = DynamicCache(), {}
    if past:
        cache = DynamicCache(_join_keys([row.keys for row in rows], past))
    if min(pasts) < past:
        columns, known = torch.arange(past + length, device=ids.device), torch.tensor(pasts, device=ids.device)
        options["attention_mask"] = (columns >= past - known[:, None]).long()
        options["position_ids"] = known[:, None] + columns[:length]
    state = join_rows(stacked, [row.state for row in rows], how.protect)

    def run(tape: Tape | None) -> tuple[Tensor, list[LevelState]]:
        with reading(stacked.stack_plan, state, tape, how.protect):
            read = model(input_ids=ids.clamp(min=0), past_key_values=cache, use_cache=True, **options)
        return read.logits, [row.state for row in rows]

    def write(states: list[LevelState], factors: dict[Any, Factors]) -> list[LevelState]:
        return [
            old if t < 2 else write_levels(stacked, old, _row_of(factors, i, t), how)
            for i, (old, t) in enumerate(zip(states, lengths, strict=True))
        ]

    if writes and length > 1:
        logits, nats, after = learn_segment(run, lambda logits: logits, write, ids)
    else:
        logits, after = run(None)
        nats = next_token_nats(logits, ids)
    layers = [(layer.keys, layer.values) for layer in cast(Any, cache.layers)]
    return [
        SegmentRead(
            logits[i : i + 1, :t],
            tuple((k[i : i + 1, :, past - p : past + t], v[i : i + 1, :, past - p : past + t]) for k, v in layers),
            after[i],
            nats[i : i + 1, : t - 1],
        )
        for i, (t, p) in enumerate(zip(lengths, pasts, strict=True))
    ]


def _join_keys(rows: Sequence[KeyValues], length: int) -> KeyValues:
    """Keys and values of several rows, filled up at the start to one length."""
    like = next(keys for keys in rows if keys)
    empty = tuple((k[:, :, :0], v[:, :, :0]) for k, v in like)
    joined = []
    for parts in zip(*(keys or empty for keys in rows), strict=True):
        padded = [[F.pad(x, (0, 0, length - x.shape[2], 0)) for x in pair] for pair in parts]
        joined.append(tuple(torch.cat(column) for column in zip(*padded, strict=True)))
    return tuple(joined)


def _row_of(factors: dict[Any, Factors], row: int, tokens: int) -> dict[Any, Factors]:
    """The factors of one row, of its own tokens. Maps with the same inputs still share them."""
    made: dict[int, Tensor] = {}

    def own(x: Tensor) -> Tensor:
        return made.setdefault(id(x), x[row : row + 1, :tokens])

    return {key: {name: Factor(own(x), own(e)) for name, (x, e) in maps.items()} for key, maps in factors.items()}


def _writing(
    stacked: StackedModel, levels: Sequence[Level] | None, protect: float | None, keep_graph: bool = False
) -> Writing:
    return Writing(stacked.stack_plan.levels if levels is None else tuple(levels), protect, keep_graph)


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
        logits, nats, after = learn_segment(
            run,
            lambda logits: logits,
            lambda state, factors: write_levels(stacked, state, factors, how),
            ids,
            second_order=meta == "second",
            keep_graph=how.keep_graph,
        )
    else:
        logits, after = run(None)
        nats = next_token_nats(logits, ids)
    return SegmentRead(logits, tuple((layer.keys, layer.values) for layer in cast(Any, cache.layers)), after, nats)


def _check(model: StackedModel, ids: Tensor, state: LevelState, writes: bool) -> None:
    segment, rows = model.stack_plan.segment, state.rows
    if ids.dim() != 2 or not 1 <= ids.shape[1] <= (segment if writes else ids.shape[1]):
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
