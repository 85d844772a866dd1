"""Write facts into maps of a stacked model, as low-rank changes that a level state holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.fields import unknown_name
from nestlearn.models.stacking import LevelState
from nestlearn.models.stacking.edits import Edit, MapEdit

from .facts import Fact, FactRows, Row
from .measure import EditedLayer, Measured, fact_means, layers_of, measure, target_nats
from .solve import Opening, null_space, right_factor, soft
from .targets import find_targets
from .tracing import contributions

EditMethod = Literal["intattn", "memit", "alphaedit", "rome"]
"""Closed forms: MLPs and attention; MLPs; MLPs, along directions that general text hardly uses; one MLP."""

WEIGHTS = {"intattn": 0.1, "memit": 0.1, "alphaedit": 0.01, "rome": 0.0}
"""Weight of general inputs beside the facts in each closed form (`right_factor`)."""

NULL = 0.02
"""Largest mean square of general inputs, relative to the mean direction, along which ``alphaedit`` writes."""

LAYERS = 5
"""Layers that are edited, by default."""

TRACED = 16
"""Facts of one edit whose contributions are measured, at most."""

Directions = Callable[[Sequence[str]], dict[str, Float[Tensor, "r in"]]]
"""Directions of the general inputs of maps, by path."""


@dataclass
class EditReport:
    """What `MemorySession.edit` has done.

    Args:
        method: by which the facts were written.
        alpha: share of the attention maps.
        layers: numbers of the edited layers.
        before, after: ``-ln p`` per token of each target after its prompt.
        seconds: wall time.
    """

    method: str
    alpha: float
    layers: tuple[int, ...]
    before: list[float]
    after: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        count, (first, *_), (*_, last) = len(self.before), self.layers, self.layers
        means = (sum(nats) / count for nats in (self.before, self.after))
        facts = "1 fact" if count == 1 else f"{count} facts"
        return (
            f"{facts} by {self.method} in layers {first} to {last} (share of attention {self.alpha:.2f}): targets "
            "{:.2f} -> {:.2f} nats per token".format(*means)
        )


@dataclass(frozen=True)
class Editor:
    """Edits one model.

    Args:
        model: a stacked model.
        rows: makes the rows of facts.
        directions: of the general inputs of maps.
        protect: ``c_0`` of the memory of general inputs, for all methods but ``alphaedit``; None writes without it.
        progress: called with a line about what is being done.
    """

    model: Any
    rows: FactRows
    directions: Directions
    protect: float | None
    progress: Callable[[str], None] = lambda _: None

    def edit(
        self,
        state: LevelState,
        facts: Sequence[Fact],
        *,
        method: EditMethod = "intattn",
        alpha: float | None = None,
        layers: Sequence[int] | None = None,
        seed: int = 0,
    ) -> tuple[LevelState, EditReport]:
        """The state with one more edit; see `nestlearn.MemorySession.edit`."""
        began, chosen = time.monotonic(), self._layers(layers, method)
        every = layers_of(self.model)
        edited = [every[number] for number in chosen]
        plain = [self.rows.plain(i, fact) for i, fact in enumerate(facts)]
        check_sums(self.model, state, plain[:1], edited)
        if alpha is None:
            alpha = 0.0
            if method == "intattn":
                self.progress("measuring contributions")
                alpha = contributions(self.model, state, plain[:TRACED], edited, seed).alpha
        before = target_nats(self.model, state, plain)
        # ROME writes one fact into one map, so its facts go in one after another.
        groups = [[fact] for fact in facts] if method == "rome" else [list(facts)]
        after, maps = state, {}
        for group in groups:
            found = self._write(after, group, edited, method, alpha)
            maps = joined_maps(maps, found)
            after = replace(state, edits=(*state.edits, _edit(facts, method, alpha, maps)))
        report = EditReport(method, alpha, tuple(chosen), before, target_nats(self.model, after, plain))
        report.seconds = time.monotonic() - began
        return after, report

    def _layers(self, layers: Sequence[int] | None, method: str) -> list[int]:
        count = len(layers_of(self.model))
        if layers is None:
            last = default_last_layer(count)
            return [last] if method == "rome" else list(range(max(last - LAYERS + 1, 0), last + 1))
        wrong = [number for number in layers if not 0 <= number < count]
        if wrong or not layers:
            raise ValueError(f"layers={list(layers)} must name some of the {count} layers, 0 to {count - 1}.")
        if method == "rome" and len(set(layers)) > 1:
            raise ValueError(f"layers={list(layers)}: rome edits one layer. Give one, or use another method.")
        return sorted(set(layers))

    def _write(
        self, state: LevelState, facts: Sequence[Fact], layers: Sequence[EditedLayer], method: str, alpha: float
    ) -> dict[str, MapEdit]:
        """The changes of the maps of all layers, first to last, each at the keys that the ones before it leave."""
        many = [row for i, fact in enumerate(facts) for row in self.rows.all(i, fact)]
        plain = [self.rows.plain(i, fact) for i, fact in enumerate(facts)]
        last = layers[-1]
        hidden = measure(self.model, state, plain, [last.layer]).outputs[last.layer]
        neutral = [self.rows.neutral(i, fact) for i, fact in enumerate(facts)]
        delta = find_targets(
            self.model, state, last.down, hidden, many, neutral, lambda step: self.progress(f"target, step {step + 1}")
        )
        wanted, maps = hidden + delta, {}
        shares = {path: share for path, share in (("attention", alpha), ("down", 1 - alpha)) if share > 0}
        self.progress("reading general text")
        directions = self.directions([getattr(layer, kind) for layer in layers for kind in shares])
        for number, layer in enumerate(layers):
            self.progress(f"writing layer {number + 1} of {len(layers)}")
            now = replace(state, edits=(*state.edits, _edit(facts, method, alpha, maps))) if maps else state
            residual = wanted - measure(self.model, now, plain, [last.layer]).outputs[last.layer]
            residual = residual / (len(layers) - number)
            paths = {getattr(layer, kind): share for kind, share in shares.items()}
            inputs = measure(self.model, now, many, list(paths)).inputs
            for path, share in paths.items():
                keys = fact_means(many, inputs[path])
                right = self._right(state, path, keys, directions[path], method)
                maps[path] = MapEdit(keys, right.to(keys), share * residual)
        return maps

    def _right(self, state: LevelState, path: str, keys: Tensor, directions: Tensor, method: str) -> Tensor:
        opening: Opening = lambda x: x  # noqa: E731
        earlier = None
        if method == "alphaedit":
            opening = null_space(directions, NULL)
            known = [edit.maps[path].keys for edit in state.edits if path in edit.maps]
            earlier = torch.cat(known) if known else None
        elif self.protect is not None:
            opening = soft(directions, self.protect)
        return right_factor(keys, opening, WEIGHTS[method], earlier)


def default_last_layer(count: int) -> int:
    """The last of the layers that are edited by default: tokens behind the subject must still attend to it."""
    return max(min(max(count * 3 // 10, 1), count - 2), 0)


def check_arguments(facts: Sequence[Fact], method: str, alpha: float | None) -> None:
    """Raise ValueError or TypeError for facts, a method or a share that cannot work."""
    if not facts:
        raise ValueError("there is no fact to edit; give at least one: [Fact(prompt=..., target=...)].")
    if wrong := next((fact for fact in facts if not isinstance(fact, Fact)), None):
        raise TypeError(f"a fact is a nestlearn.Fact(prompt=..., target=...), got {wrong!r}.")
    if method not in get_args(EditMethod):
        raise unknown_name("method", method, get_args(EditMethod))
    if alpha is not None and method != "intattn":
        raise ValueError(f"alpha={alpha} is the share of attention in method='intattn'; {method!r} edits MLPs only.")
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must be from 0 (MLPs only) to 1 (attention only).")


def check_sums(model: Any, state: LevelState, rows: Sequence[Row], layers: Sequence[EditedLayer]) -> None:
    """Raise ValueError unless each layer adds the outputs of its attention map and of its MLP to its input."""
    for layer in layers:
        found: Measured = measure(model, state, rows, [layer.layer, layer.attention, layer.mlp])
        inside = found.outputs[layer.attention] + found.outputs[layer.mlp]
        change = found.outputs[layer.layer] - found.inputs[layer.layer]
        size = found.outputs[layer.layer].abs().max() + found.inputs[layer.layer].abs().max()
        tolerance = 16 * torch.finfo(next(model.parameters()).dtype).eps
        if not bool((change - inside).abs().max() <= tolerance * size):
            raise ValueError(
                f"{layer.layer} does not add the outputs of {layer.attention} and {layer.mlp} to its input (it "
                "normalizes or scales them, as in Gemma 2 and 3), so that the closed forms do not hold. Use a model of "
                "the Llama, Qwen, Mistral, Gemma, GPT-2 or GPT-NeoX families."
            )


def _edit(facts: Sequence[Fact], method: str, alpha: float, maps: dict[str, MapEdit]) -> Edit:
    texts = tuple((fact.prompt, str(fact.subject), fact.target) for fact in facts)
    return Edit(texts, method, alpha, dict(maps))


def joined_maps(first: dict[str, MapEdit], second: dict[str, MapEdit]) -> dict[str, MapEdit]:
    """Both changes of every map as one."""
    if not first:
        return second
    return {path: MapEdit(*map(torch.cat, zip(first[path], second[path], strict=True))) for path in first}
