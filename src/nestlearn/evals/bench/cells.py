"""Cells, each one model trained on one task from one seed, and the cells of a run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from nestlearn.evals.bench.mixers import mixer_fields
from nestlearn.evals.bench.suites import Recipe, Suite, Training
from nestlearn.evals.tasks import Task
from nestlearn.models.config import HopeConfig
from nestlearn.models.flops import meta_model

_NARROWEST = 0.5


@dataclass(frozen=True)
class Cell:
    """One training run of a benchmark.

    Attributes:
        suite, mixer: names; the mixer as it was given, with its changes of fields.
        task: what to learn.
        model: all fields given to `HopeConfig`.
        training: how to train.
        seed: of the model's initial weights and of the order and content of its batches.
    """

    suite: str
    task: Task
    mixer: str
    model: dict[str, Any]
    training: Training
    seed: int

    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on except the seed, as JSON values."""
        return json.loads(json.dumps(self.recipe_settings() | {"mixer": self.mixer, "model": self.model}))

    def recipe_settings(self) -> dict[str, Any]:
        """The settings that all mixers of the recipe share."""
        return {
            "suite": self.suite,
            "task": {"name": self.task.name, "version": self.task.version} | self.task.config(),
            "training": asdict(self.training),
        }

    @property
    def recipe_key(self) -> str:
        """A digest of the settings that all mixers of the recipe share."""
        return _digest(self.recipe_settings())

    @property
    def key(self) -> str:
        """A digest of task, version, settings and seed; equal for equal cells."""
        return _digest(self.settings() | {"seed": self.seed})


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def plan(
    suite: Suite,
    mixers: list[str] | None = None,
    seeds: int = 1,
    tasks: list[str] | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    first_seed: int = 0,
    data: str | None = None,
) -> list[Cell]:
    """The cells of a run. Seed by seed, so that an interrupted run has still compared all mixers.

    Args:
        suite: the recipes.
        mixers: mixer tokens; None for those of the suite.
        seeds: how many.
        tasks: names of tasks; None for all.
        steps: updates of every model, instead of the recipes'.
        learning_rate: peak rate of every model, instead of the recipes'.
        first_seed: the first seed. A search for settings should use other seeds than the reported ones.
        data: folder of the files that the suite's tasks read; None for a suite that makes its own sequences.

    Raises:
        ValueError: an unknown mixer, field or task, a number below 1, a seed below 0, or a rate that is not positive.
    """
    if seeds < 1 or (steps is not None and steps < 1):
        raise ValueError(f"{seeds=} and {steps=} must be at least 1.")
    if first_seed < 0:
        raise ValueError(f"{first_seed=} must not be negative.")
    tokens = list(dict.fromkeys(mixers or suite.mixers))
    cells = []
    for recipe in suite.select(tasks):
        recipe = replace(recipe, task=recipe.task.with_data(data))
        training = recipe.training if steps is None else replace(recipe.training, steps=steps)
        if learning_rate is not None:
            training = replace(training, learning_rate=learning_rate, mixer_rates={})
        for mixer in tokens:
            model = sized_fields(recipe, mixer)
            cells.append(Cell(suite.name, recipe.task, mixer, model, training, 0))
    return [replace(cell, seed=seed) for seed in range(first_seed, first_seed + seeds) for cell in cells]


def sized_fields(recipe: Recipe, mixer: str) -> dict[str, Any]:
    """Fields of a mixer's model, with a feed-forward network so wide that the parameter count equals the reference's.

    A model that is too large even with a network of half its width stays larger; the tables show its count.

    Raises:
        ValueError: an unknown mixer, or fields that do not fit each other.
    """
    shared = recipe.model | {"vocab_size": recipe.task.vocab_size}
    fields = shared | mixer_fields(mixer, recipe.mixer)
    reference = shared | mixer_fields(recipe.reference, recipe.mixer)
    target = parameters(reference | _network(recipe.expansion))
    count = parameters(fields | _network(recipe.expansion))
    slope = parameters(fields | _network(recipe.expansion + 4)) - count
    wanted = recipe.expansion + 4 * (target - count) / slope
    return fields | _network(round(max(_NARROWEST, wanted), 3))


def _network(expansion: float) -> dict[str, Any]:
    return {"cms": [{"period": None, "expansion": expansion}]}


def parameters(fields: dict[str, Any]) -> int:
    """Weights of the model with these fields, counted without building it."""
    return _parameters(json.dumps(fields, sort_keys=True))


@cache
def _parameters(fields: str) -> int:
    return sum(p.numel() for p in meta_model(HopeConfig(**json.loads(fields))).parameters())
