"""The base class of synthetic tasks: training batches, evaluation splits, scores."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nestlearn.data.synthetic import IGNORE, Batch
from nestlearn.fields import unknown_name

Metric = Literal["token accuracy", "sequence accuracy"]
_BUCKET = 8  # batches per window in which strings are sorted by length


@dataclass(frozen=True)
class Split:
    """A named set of evaluation sequences.

    Attributes:
        name: for example ``"51-100"``.
        axis: the quantity that differs between splits, for plots: ``"length"``, ``"pairs"``, ...; empty for one split.
        value: the split's value on that axis.
    """

    name: str
    axis: str = ""
    value: float = 0.0


@dataclass(frozen=True)
class Published:
    """A number from the literature, shown next to measured ones and never averaged with them.

    Attributes:
        model: the name in the source.
        split: the task's split that it belongs to, or the nearest one.
        value: accuracy in percent.
        source: paper, table, and differences of the protocol.
    """

    model: str
    split: str
    value: float
    source: str


class Score(NamedTuple):
    """Accuracy in [0, 1], its standard error over sequences, and the number of sequences."""

    value: float
    stderr: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A synthetic task. Subclasses are frozen dataclasses; their fields are the task's settings.

    Inputs and answers share one vocabulary: answer classes are token ids. A target is the answer at its own position
    (not shifted), or -100 (`IGNORE`) at a position without one.

    All random numbers come from a `torch.Generator` of the given seed, never from the global generator.

    Attributes:
        train_examples: size of a fixed training set, drawn from the run's seed; None draws new sequences without end.
        eval_examples: sequences per split, or fewer if the task has fewer distinct ones.
        eval_seed: seed of the evaluation splits, which are the same for every model and training seed.

    Example:
        >>> from nestlearn.evals.tasks import Mqar
        >>> task = Mqar(vocabulary=32, length=32, pairs=4)
        >>> batch = next(task.batches(batch_size=2, seed=0))
        >>> len(batch.inputs), int((batch.targets != -100).sum())
        (2, 8)
    """

    name: ClassVar[str]
    version: ClassVar[int]
    metric: ClassVar[Metric]
    published: ClassVar[tuple[Published, ...]] = ()

    train_examples: int | None = None
    eval_examples: int = 500
    eval_seed: int = 20_26

    def __post_init__(self) -> None:
        if self.train_examples is not None:
            require_at_least("train_examples", self.train_examples, 1)
        require_at_least("eval_examples", self.eval_examples, 1)

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids of inputs and targets."""

    @property
    @abstractmethod
    def splits(self) -> tuple[Split, ...]:
        """The evaluation splits; the last one is the headline."""

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator) -> Batch:
        """``n`` training sequences, padded on the right to one length."""

    @abstractmethod
    def examples(self, split: str) -> Batch:
        """The sequences of a split, the same at every call.

        Raises:
            ValueError: the task has no such split.
        """

    @abstractmethod
    def chance(self, split: str) -> float:
        """The score, in [0, 1], of guessing without the past."""

    def head(self, hidden_size: int) -> nn.Module | None:
        """A module from hidden states ``[b, t, d]`` to logits ``[b, t, v]``; None for the model's own output layer.

        Batches end at their last target, so a head that uses the last position needs a target there.
        """
        del hidden_size
        return None

    def with_data(self, folder: str | None) -> Task:
        """The task on the files of a folder; the task itself if it makes its own data.

        Raises:
            ValueError: a folder for a task that reads none, or none for one that does.
        """
        if folder is not None:
            raise ValueError(f"the task {self.name} makes its own sequences and reads no files; leave --data out.")
        return self

    def config(self) -> dict[str, Any]:
        """The settings, as JSON values."""
        return dataclasses.asdict(self)

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Endless training batches, determined by the seed.

        With ``train_examples`` every epoch has a new order of the fixed set, with sequences of similar length
        together. Every batch is cut after its last target.
        """
        require_at_least("batch_size", batch_size, 1)
        generator = torch.Generator().manual_seed(seed)
        if self.train_examples is None:
            while True:
                yield cut(self.draw(batch_size, generator))
        pool = self.draw(self.train_examples, generator)
        lengths = lengths_of(pool)
        while True:
            for rows in _epoch(lengths, min(batch_size, self.train_examples), generator):
                yield cut(Batch(pool.inputs[rows], pool.targets[rows]))

    def find_split(self, name: str) -> Split:
        """The split with this name.

        Raises:
            ValueError: the name is unknown; the message has the closest known ones.
        """
        for split in self.splits:
            if split.name == name:
                return split
        raise unknown_name(f"split of {self.name}", name, [split.name for split in self.splits])


def _epoch(lengths: Int[Tensor, " n"], batch_size: int, generator: torch.Generator) -> Iterator[Int[Tensor, " b"]]:
    """Row numbers of the full batches of one epoch."""
    order = torch.randperm(len(lengths), generator=generator)
    order = order[: len(order) // batch_size * batch_size]
    windows = [window[lengths[window].argsort(stable=True)] for window in order.split(_BUCKET * batch_size)]
    rows = [row for window in windows for row in window.split(batch_size)]
    for place in torch.randperm(len(rows), generator=generator).tolist():
        yield rows[place]


def lengths_of(batch: Batch) -> Int[Tensor, " b"]:
    """Length of each sequence up to and including its last target; 0 without a target."""
    places = torch.arange(1, batch.targets.shape[1] + 1)
    return ((batch.targets != IGNORE) * places).amax(1)


def cut(batch: Batch) -> Batch:
    """The batch without the columns after its last target, which do not change a causal model's score."""
    length = max(1, int(lengths_of(batch).max()))
    return Batch(batch.inputs[:, :length], batch.targets[:, :length])


def pad(strings: list[list[int]], targets: list[list[int]]) -> Batch:
    """Strings of different lengths as one batch, padded on the right with token 0 and target -100."""
    longest = max(map(len, strings))
    rows = [string + [0] * (longest - len(string)) for string in strings]
    answers = [target + [IGNORE] * (longest - len(target)) for target in targets]
    return Batch(torch.tensor(rows), torch.tensor(answers))


def right_by_sequence(
    predictions: Int[Tensor, "b t"], targets: Int[Tensor, "b t"]
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """Number of right answers and of targets of every sequence."""
    asked: Bool[Tensor, "b t"] = targets != IGNORE
    return ((predictions == targets) & asked).sum(1), asked.sum(1)


def accuracy(right: Int[Tensor, " n"], asked: Int[Tensor, " n"], metric: Metric) -> Score:
    """The score of sequences from their numbers of right answers and of targets.

    ``sequence accuracy``: a sequence counts if all its answers are right. ``token accuracy``: right answers over all
    answers; its standard error is that of a ratio of sums over sequences.

    Raises:
        ValueError: there is no target, or the metric is unknown.
    """
    n = len(asked)
    if n == 0 or int(asked.sum()) == 0:
        raise ValueError("there is no target to score: every position of every sequence is -100.")
    if metric == "sequence accuracy":
        whole: Float[Tensor, " n"] = (right == asked).double()
        value = whole.mean().item()
        return Score(value, (value * (1 - value) / n) ** 0.5, n)
    if metric != "token accuracy":
        raise unknown_name("metric", metric, ("token accuracy", "sequence accuracy"))
    total = asked.sum().item()
    value = right.sum().item() / total
    error = (right - value * asked).double().square().sum().sqrt().item() / total
    return Score(value, error, n)


def require_at_least(name: str, value: object, least: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
