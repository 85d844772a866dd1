"""Suites: named lists of recipes. A recipe is a task with a model size and training settings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from nestlearn.evals.tasks import (
    S3,
    S5,
    Babi,
    Compression,
    Counter2,
    Counter3,
    EvenA,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    ModularSum,
    Mqar,
    NeedleInNoise,
    NoisyRecall,
    Parity,
    RepeatedAbab,
    RewrittenMqar,
    SelectiveCopying,
    Shuffle2,
    SortOfClevr,
    Task,
    WhereIs,
)
from nestlearn.evals.tasks.base import require_at_least
from nestlearn.fields import unknown_name


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one model is trained: AdamW with warm-up and a cosine to ``final`` of the rate, gradients clipped to norm 1.

    Attributes:
        steps: updates.
        batch_size: sequences per update.
        learning_rate: peak rate.
        mixer_rates: peak rates of some mixers, by their token or by their name without changes of fields.
        weight_decay, beta2: of AdamW.
        warmup: updates of linear warm-up.
        final: rate at the end of the cosine, as a share of the peak; 1 for a constant rate.
        check_every: updates between two evaluations during training.
        check_examples: sequences per split of such an evaluation.
        stop: training ends when every split reaches this score, first in such an evaluation and then in full; None:
            never.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 4e-3
    mixer_rates: dict[str, float] = field(default_factory=dict)
    weight_decay: float = 0.1
    beta2: float = 0.98
    warmup: int = 50
    final: float = 0.05
    check_every: int = 50
    check_examples: int = 64
    stop: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "check_every", "check_examples"):
            require_at_least(name, getattr(self, name), 1)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate!r} must be positive.")

    def rate(self, mixer: str) -> float:
        """The peak learning rate of a mixer token."""
        own = self.mixer_rates.get(mixer.partition(":")[0], self.learning_rate)
        return self.mixer_rates.get(mixer, own)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A task, the size of every model on it, and their training.

    Attributes:
        task: the task.
        model: `HopeConfig` fields of every model; the fields of a mixer token override them.
        training: settings of the training.
        mixer: fields for every mixer that has them, such as chunk sizes.
        expansion: width of the frozen feed-forward network of the reference.
        reference: the mixer whose parameter count all models get, by the width of that network.
    """

    task: Task
    model: dict[str, Any]
    training: Training
    mixer: dict[str, Any] = field(default_factory=dict)
    expansion: float = 2.0
    reference: str = "hope"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Recipes that belong together.

    Attributes:
        name: on the command line.
        title: heading of its reports.
        recipes: one per task, with different task names.
        mixers: the mixers of a run that names none.

    Raises:
        ValueError: two recipes of one task name, or none at all.
    """

    name: str
    title: str
    recipes: tuple[Recipe, ...]
    mixers: tuple[str, ...]

    def __post_init__(self) -> None:
        names = [recipe.task.name for recipe in self.recipes]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"suite {self.name!r} needs recipes with different task names, got {names}.")

    def select(self, tasks: list[str] | None) -> tuple[Recipe, ...]:
        """The recipes of the named tasks; None for all.

        Raises:
            ValueError: a task that the suite does not have.
        """
        by_name = {recipe.task.name: recipe for recipe in self.recipes}
        for name in tasks or ():
            if name not in by_name:
                raise unknown_name(f"task of suite {self.name}", name, by_name)
        return tuple(by_name[name] for name in tasks or by_name)


def _model(hidden: int, heads: int = 1, layers: int = 2, **fields: Any) -> dict[str, Any]:
    """Sizes of the small models."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_activation": "gelu",
    } | fields


def _chunks(memory: int = 16, projections: int = 32) -> dict[str, Any]:
    """Short chunks and small memories, which write within short sequences."""
    return {"expansion": 2, "chunk_size": memory, "projection_chunk_size": projections}


# Small embeddings help to track a state, large ones to tell tokens apart (docs/log.md). State tracking has one chunk
# per sequence: with more boundaries than in training, answers are no longer exact (docs/decisions.md, 58).
_ONE_CHUNK = _chunks(128, 128)
_TRACK = _model(32, initializer_range=0.02)
_TELL_APART = _model(32, initializer_range=0.2)
# Counting needs several heads and large embeddings: linear attention then takes 250 steps, otherwise more than 500.
_COUNT = _model(32, heads=4, initializer_range=0.2)
# Chunks of half a recall sequence and of a whole one: 1.6 times as fast as 16 and 32.
_LONGER_CHUNKS = _chunks(32, 64)


def _formal() -> tuple[Recipe, ...]:
    # No weight decay: once the loss is 0, it alone moves the gates, away from the eigenvalue -1 (docs/log.md).
    tracking = Training(steps=800, weight_decay=0.0)
    repeating = Training(steps=400, batch_size=16, weight_decay=0.0)
    counting = Training(steps=2000, batch_size=16, learning_rate=1e-2, weight_decay=0.0)
    return (
        Recipe(task=Parity(eval_examples=500), model=_TRACK, mixer=_ONE_CHUNK, training=tracking),
        Recipe(task=EvenA(), model=_TRACK, mixer=_ONE_CHUNK, training=repeating),
        Recipe(task=RepeatedAbab(), model=_TRACK, mixer=_ONE_CHUNK, training=repeating),
        Recipe(task=Counter2(), model=_COUNT, mixer=_chunks(), training=counting),
        Recipe(task=Counter3(), model=_COUNT, mixer=_chunks(), training=counting),
        Recipe(task=Shuffle2(eval_examples=500), model=_TRACK, mixer=_ONE_CHUNK, training=Training(steps=1000)),
    )


def _mad() -> tuple[Recipe, ...]:
    training = Training(steps=800, batch_size=32, learning_rate=1e-2, stop=0.999)
    tasks = (
        Compression(train_examples=6400, eval_examples=500),
        InContextRecall(train_examples=6400, eval_examples=500, length=64),
        FuzzyRecall(train_examples=3200, eval_examples=500, length=64),
        NoisyRecall(train_examples=6400, eval_examples=500, length=64),
        SelectiveCopying(train_examples=6400, eval_examples=500, length=64, copied=8),
        Memorization(eval_examples=500),
    )
    # Two chunks per sequence, for every memory: the cheapest with which projections write before a sequence ends.
    return tuple(
        Recipe(task=task, model=_TELL_APART, mixer=_chunks(task.length // 2, task.length // 2), training=training)
        for task in tasks
    )


def _long_context_suites() -> list[Suite]:
    # Few evaluations on few sequences: on the long splits they take as long as many updates.
    training = Training(steps=1500, batch_size=16, learning_rate=2e-3, check_every=250, check_examples=8)
    model = _model(64, heads=2, initializer_range=0.1)
    # The number alone is asked for and noise holds no digits: half the width learns it, in a third of the steps. All
    # models take all steps, since to stop at the first that is good at every length would choose on the test.
    needle = replace(training, steps=400, learning_rate=4e-3, check_every=100, stop=None)
    mixers = ("hope", "titans", "gated_deltanet", "deltanet", "linear_attention", "attention")
    return [
        Suite(
            name="niah",
            title="S-NIAH-1 on bytes: a number told once in noise, trained at 256 tokens",
            recipes=(
                Recipe(
                    task=NeedleInNoise(), model=_model(32, initializer_range=0.1), mixer=_LONGER_CHUNKS, training=needle
                ),
            ),
            mixers=mixers,
        ),
        Suite(
            name="babilong",
            title="BABILong's qa1 on words: where is one of four people, trained at 256 tokens",
            recipes=(Recipe(task=WhereIs(), model=model, mixer=_LONGER_CHUNKS, training=training),),
            mixers=mixers,
        ),
    ]


def _recall() -> list[Suite]:
    few = Mqar(vocabulary=64, length=64, train_pairs=(4, 8, 16), eval_pairs=(4, 8, 16))
    twice = RewrittenMqar(vocabulary=64, length=64, train_pairs=(4, 8), eval_pairs=(4, 8))
    many = replace(few, length=96, train_pairs=(4, 8, 16, 24), eval_pairs=(4, 8, 16, 24))
    training = Training(steps=1200, learning_rate=1e-2, stop=0.999)
    model = _model(16, initializer_range=0.2)
    mixers = ("hope", "hope-static", "deltanet", "linear_attention", "attention")
    title = "Multi-query associative recall (Zoology's layout)"
    return [
        Suite(
            name="recall",
            title=title,
            recipes=(Recipe(task=few, model=model, mixer=_LONGER_CHUNKS, training=training),),
            mixers=mixers,
        ),
        Suite(
            name="recall-24",
            title=f"{title}, up to 24 pairs in 96 tokens",
            recipes=(Recipe(task=many, model=model, mixer=_LONGER_CHUNKS, training=training),),
            mixers=mixers,
        ),
        Suite(
            name="recall-rewritten",
            title="Associative recall where every key is told twice and the second value counts",
            recipes=(Recipe(task=twice, model=model, mixer=_LONGER_CHUNKS, training=training),),
            mixers=mixers,
        ),
    ]


def _reasoning() -> list[Suite]:
    # Attention below a memory: a slot takes in what a token knows of its object or sentence. Chunks hold an object.
    model = _model(64, heads=4, initializer_range=0.1)
    questions = Training(steps=1500, batch_size=64, learning_rate=3e-3, check_every=250, stop=0.999)
    stories = Training(steps=2000, batch_size=32, learning_rate=2e-3, check_every=500, check_examples=20, stop=None)
    mixers = ("pmi", "hope", "deltanet", "attention", "transformer")
    return [
        Suite(
            name="clevr",
            title="Questions about one, two and three of six objects (Sort-of-CLEVR in symbols)",
            recipes=(Recipe(task=SortOfClevr(), model=model, mixer=_chunks(5, 25), training=questions),),
            mixers=mixers,
        ),
        Suite(
            name="babi",
            title="bAbI's twenty tasks, learned jointly from the official files",
            recipes=(Recipe(task=Babi(), model=model, mixer=_chunks(8, 64), training=stories),),
            mixers=mixers,
        ),
    ]


def _suites() -> list[Suite]:
    return [
        Suite(
            name="formal",
            title="Formal languages, whole strings right (protocol of Irie et al. 2023)",
            recipes=_formal(),
            mixers=("hope-normalized", "hope-static-normalized", "deltanet-negative", "deltanet", "linear_attention",
                    "transformer"),
        ),
        *_recall(),
        Suite(
            name="mad",
            title="MAD's six tasks, reduced sizes",
            recipes=_mad(),
            mixers=("hope", "titans", "deltanet", "linear_attention", "attention"),
        ),
        Suite(
            name="tracking",
            title="State tracking: running products in a group, all prefixes right",
            recipes=(
                Recipe(task=ModularSum(), model=_TRACK, mixer=_ONE_CHUNK, training=Training(steps=1000)),
                Recipe(task=S3(), model=_TRACK, mixer=_ONE_CHUNK, training=Training(steps=1000)),
                Recipe(
                    task=S5(),
                    model=_model(64, initializer_range=0.1),
                    mixer=_ONE_CHUNK,
                    training=Training(steps=1000),
                ),
            ),
            mixers=("hope-normalized", "deltanet-negative", "deltanet", "linear_attention", "transformer"),
        ),
        *_long_context_suites(),
        *_reasoning(),
        Suite(
            name="quick",
            title="A few steps on two tasks, to see that everything works",
            recipes=(
                Recipe(
                    task=Parity(bins=((2, 8), (9, 16)), train_examples=200, eval_examples=32),
                    model=_model(8),
                    mixer=_chunks(),
                    training=Training(steps=4, batch_size=8, check_every=2, check_examples=8),
                ),
                Recipe(
                    task=Mqar(vocabulary=16, length=16, pairs=4, eval_pairs=(2, 4), eval_examples=32),
                    model=_model(8),
                    mixer=_chunks(),
                    training=Training(steps=4, batch_size=8, check_every=2, check_examples=8),
                ),
            ),
            mixers=("hope", "attention"),
        ),
    ]  # fmt: skip


_REGISTERED: dict[str, Suite] = {suite.name: suite for suite in _suites()}


def register_suite(suite: Suite) -> Suite:
    """Register a suite by its name; a suite of the same name is replaced.

    Example:
        >>> from nestlearn.evals.tasks import Mqar
        >>> model = {"hidden_size": 16, "num_attention_heads": 1}
        >>> recipe = Recipe(task=Mqar(), model=model, training=Training(steps=9))
        >>> register_suite(Suite(name="mine", title="My tasks", recipes=(recipe,), mixers=("hope",))).name
        'mine'
    """
    _REGISTERED[suite.name] = suite
    return suite


def suite_names() -> list[str]:
    """The suites that `find_suite` knows."""
    return list(_REGISTERED)


def find_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        ValueError: unknown name; the message has the closest known ones.
    """
    if name not in _REGISTERED:
        raise unknown_name("suite", name, _REGISTERED)
    return _REGISTERED[name]
