"""What a stacked model computes at the maps that edits change: keys, outputs, and the directions of general inputs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from nestlearn.models.stacking import LevelState, reading, stacked_model
from nestlearn.models.stacking.general import leading_directions
from nestlearn.models.stacking.taps import Tap, tapping
from nestlearn.nn.common import wide_dtype

from .facts import Row, batched

ATTENTION_OUTPUTS = ("self_attn.o_proj", "attn.c_proj", "attention.dense")
"""Output maps of attention in the layers of the Llama, Qwen, Mistral and Gemma families, GPT-2, and GPT-NeoX."""

DIRECTIONS = 2_048
"""Directions of general inputs that are kept of each map: all of them in a small model."""

_GENERAL: weakref.WeakKeyDictionary[Any, dict[tuple[Any, str], Tensor]] = weakref.WeakKeyDictionary()
"""Directions of a model by the name of the text and the map. They are estimated once per process."""


class EditedLayer(NamedTuple):
    """Paths of a layer, its MLP, the output map of the MLP, and that of the attention."""

    layer: str
    mlp: str
    down: str
    attention: str


def layers_of(model: Any) -> list[EditedLayer]:
    """All layers of a stacked model, in order.

    Raises:
        ValueError: the layers have no such maps, or their attention has an unknown output map.
    """
    stacked = stacked_model(model)
    parts = stacked.stack_plan.paths[0].split(".")
    number = max((i for i, part in enumerate(parts) if part.isdigit()), default=None)
    if number is None:
        raise ValueError(f"the MLP {'.'.join(parts)} is in no numbered layer, so that facts cannot be edited.")
    prefix, rest = ".".join(parts[:number]), ".".join(parts[number + 1 :])
    found = []
    for name, layer in stacked.get_submodule(prefix).named_children():
        modules = dict(layer.named_modules())
        down = f"{rest}.{stacked.stack_plan.names.down}"
        attention = next((path for path in ATTENTION_OUTPUTS if path in modules), None)
        if attention is None or down not in modules:
            raise ValueError(
                f"{prefix}.{name} ({type(layer).__name__}) has no {down}, or none of {', '.join(ATTENTION_OUTPUTS)}. "
                "Facts can be edited in dense models of the Llama, Qwen, Mistral, Gemma, GPT-2 and GPT-NeoX families."
            )
        path = f"{prefix}.{name}"
        found.append(EditedLayer(path, f"{path}.{rest}", f"{path}.{down}", f"{path}.{attention}"))
    return found


def run(model: Any, state: LevelState, ids: Int[Tensor, "b t"], taps: Mapping[str, Tap]) -> Float[Tensor, "b t v"]:
    """Logits of rows, each in a fresh context, with taps."""
    stacked = stacked_model(model)
    with reading(stacked.stack_plan, state), tapping(stacked, stacked.stack_plan, taps):
        return model(input_ids=ids.to(model.device), use_cache=False).logits


class Measured(NamedTuple):
    """Inputs and outputs of modules at the last token of the subject, by path, ``[rows, width]``."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@torch.no_grad()
def measure(model: Any, state: LevelState, rows: Sequence[Row], paths: Sequence[str]) -> Measured:
    """Inputs and outputs of modules in all rows; the mean, where a module runs several times in a pass."""
    blank = [torch.empty(0)] * len(rows)
    found = {path: (list(blank), list(blank)) for path in paths}
    for numbers, chosen, ids in batched(rows):
        at = torch.tensor([row.subject[1] for row in chosen])
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in paths}
        run(model, state, ids, {path: _keeping(seen[path], at) for path in paths})
        for path, kept in seen.items():
            for held, values in zip(found[path], zip(*kept, strict=True), strict=True):
                for number, value in zip(numbers, torch.stack(values).mean(0), strict=True):
                    held[number] = value
    inputs, outputs = ({path: torch.stack(pair[i]) for path, pair in found.items()} for i in (0, 1))
    return Measured(inputs, outputs)


def _keeping(kept: list[tuple[Tensor, Tensor]], at: Int[Tensor, "b"]) -> Tap:
    """A tap that keeps input and output at one token of each row."""

    def part(x: Tensor) -> Tensor:
        return x[torch.arange(len(at)), at].to(wide_dtype(x))

    def keep(x: Tensor, y: Tensor) -> None:
        kept.append((part(x), part(y)))

    return keep


def fact_means(rows: Sequence[Row], values: Float[Tensor, "r d"]) -> Float[Tensor, "n d"]:
    """The mean over the rows of each fact."""
    owner = torch.tensor([row.fact for row in rows], device=values.device)
    sums = values.new_zeros(int(owner.max()) + 1, values.shape[1]).index_add_(0, owner, values)
    return sums / torch.bincount(owner)[:, None]


@torch.no_grad()
def target_nats(model: Any, state: LevelState, rows: Sequence[Row]) -> list[float]:
    """``-ln p`` per token of the target in every row."""
    found = [0.0] * len(rows)
    for numbers, chosen, ids in batched(rows):
        losses = row_losses(run(model, state, ids, {}), ids, chosen)
        for number, loss in zip(numbers, losses.tolist(), strict=True):
            found[number] = loss
    return found


def row_losses(logits: Float[Tensor, "b t v"], ids: Int[Tensor, "b t"], rows: Sequence[Row]) -> Float[Tensor, "b"]:
    """``-ln p`` per token of the target in every row."""
    losses = []
    for number, row in enumerate(rows):
        own = logits[number, row.prompt - 1 : len(row.ids) - 1]
        losses.append(F.cross_entropy(own.to(wide_dtype(own)), ids[number, row.prompt : len(row.ids)].to(own.device)))
    return torch.stack(losses)


@torch.no_grad()
def general_directions(
    model: Any,
    paths: Sequence[str],
    name: Any,
    text: Callable[[], Int[Tensor, "b t"]],
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Float[Tensor, "r in"]]:
    """The rows B of `nestlearn.models.stacking.general` for the inputs of maps, of the model without what was learned.

    Args:
        model: a stacked model.
        paths: of the maps.
        name: of the text. What is known of a text is not estimated again.
        text: gives the tokens, in rows that are read on their own.
        progress: called with a line before each row.
    """
    known = _GENERAL.setdefault(stacked_model(model), {})
    missing = [path for path in paths if (name, path) not in known]
    if missing:
        sums: dict[str, Tensor] = {}

        def tap(path: str) -> Tap:
            def add(x: Tensor, y: Tensor) -> None:
                del y
                rows = x.reshape(-1, x.shape[-1]).to(wide_dtype(x))
                sums[path] = rows.mT @ rows if path not in sums else sums[path].addmm_(rows.mT, rows)

            return add

        rows = text().split(1)
        for number, row in enumerate(rows):
            progress(f"reading general text, row {number + 1} of {len(rows)}")
            run(model, LevelState(), row, {path: tap(path) for path in missing})
        known.update({(name, path): leading_directions(sums[path], DIRECTIONS) for path in missing})
    return {path: known[name, path] for path in paths}
