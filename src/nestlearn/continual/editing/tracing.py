"""Causal tracing: what the attention and the MLPs of some layers contribute to what a model says about a subject."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestlearn.models.stacking import LevelState, stacked_model
from nestlearn.models.stacking.taps import Tap
from nestlearn.nn.common import wide_dtype

from .facts import Row
from .measure import EditedLayer, measure, run

NOISE = 3.0
"""Standard deviation of the noise on the embeddings of a subject, relative to that of all embeddings."""

SAMPLES = 8
"""Draws of the noise for each fact."""


class Contribution(NamedTuple):
    """How far the probability of the model's own answer rises when one kind of module is restored, mean over facts."""

    attention: float
    mlp: float

    @property
    def alpha(self) -> float:
        """The attention's share; one half if neither helps."""
        attention, mlp = max(self.attention, 0.0), max(self.mlp, 0.0)
        return attention / (attention + mlp) if attention + mlp > 0 else 0.5


@torch.no_grad()
def contributions(
    model: Any, state: LevelState, rows: Sequence[Row], layers: Sequence[EditedLayer], seed: int = 0
) -> Contribution:
    """Causal tracing (ROME, arXiv 2202.05262, section 2) with one kind of module restored in all of some layers.

        contribution = mean_facts,noise  p(o | noise on the subject, clean outputs restored) - p(o | noise)

    o is the token that the model itself finds most likely after the prompt. Outputs are restored at the last token of
    the subject.

    Args:
        model: a stacked model.
        state: what it has learned.
        rows: of facts; the targets are ignored.
        layers: whose modules are restored.
        seed: of the noise.
    """
    table = model.get_input_embeddings().weight
    embedding = _path_of(stacked_model(model), model.get_input_embeddings())
    scale = NOISE * float(table.to(wide_dtype(table)).std())
    paths = {"attention": [layer.attention for layer in layers], "mlp": [layer.down for layer in layers]}
    rises = {"attention": 0.0, "mlp": 0.0}
    for row in rows:
        ids = torch.tensor([row.ids[: row.prompt]])
        own = int(run(model, state, ids, {})[0, -1].argmax())
        clean = measure(model, state, [row._replace(ids=row.ids[: row.prompt])], [*paths["attention"], *paths["mlp"]])
        first, last = row.subject
        noise = scale * torch.randn(
            SAMPLES, last + 1 - first, table.shape[1], generator=torch.Generator().manual_seed(seed)
        )

        def corrupted(x: Tensor, y: Tensor, noise: Tensor = noise, part: slice = slice(first, last + 1)) -> Tensor:
            del x
            changed = y.clone()
            changed[:, part] += noise.to(y)
            return changed

        taps: dict[str, Tap] = {embedding: corrupted}
        many = ids.expand(SAMPLES, -1)
        without = _probability(run(model, state, many, taps), own)
        for kind, maps in paths.items():
            restored = {path: _restore(clean.outputs[path], last) for path in maps}
            rises[kind] += (_probability(run(model, state, many, {**taps, **restored}), own) - without) / len(rows)
    return Contribution(**rises)


def _probability(logits: Tensor, token: int) -> float:
    last = logits[:, -1]
    return float(last.to(wide_dtype(last)).softmax(-1)[:, token].mean())


def _restore(clean: Tensor, at: int) -> Tap:
    def put(x: Tensor, y: Tensor) -> Tensor:
        del x
        changed = y.clone()
        changed[:, at] = clean.to(y)
        return changed

    return put


def _path_of(model: torch.nn.Module, wanted: torch.nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)
