"""Streams to and from Avalanche (avalanche-lib), and its training strategies with the optimizers of this package.

Avalanche is an optional import: only `to_avalanche` and `refresh_plugin` need it, `from_avalanche` reads any object
with its interface. A strategy takes an optimizer of `nestlearn.optim` like any other:

    optimizer = InputProjection(torch.optim.Adam(model.parameters()), model, alpha=300.0)
    strategy = Naive(model=model, optimizer=optimizer, ..., plugins=[refresh_plugin(optimizer)])
    for experience in to_avalanche(permuted_digits()).train_stream:
        strategy.train(experience)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nestlearn.data.continual import Examples, StreamTask, TaskStream
from nestlearn.optim import InputProjection


def from_avalanche(benchmark: Any, name: str = "avalanche") -> TaskStream:
    """A benchmark of Avalanche as a stream for `ContinualLearner`: an experience becomes a task.

    Args:
        benchmark: has `train_stream` and `test_stream`, whose experiences have `dataset`: items (input, class, ...).
        name: of the stream.

    Raises:
        TypeError: no such streams, or items of another form.
        ValueError: not one test experience per training experience.
    """
    try:
        pairs = list(benchmark.train_stream), list(benchmark.test_stream)
    except AttributeError as error:
        raise TypeError(
            f"A {type(benchmark).__name__} is no Avalanche benchmark: {error}. Give what avalanche.benchmarks made, "
            "such as nc_benchmark(train, test, n_experiences=5, task_labels=False)."
        ) from error
    if len(pairs[0]) != len(pairs[1]):
        raise ValueError(
            f"The benchmark has {len(pairs[0])} training and {len(pairs[1])} test experiences; a matrix of scores "
            "needs one test experience per training experience."
        )
    tasks = []
    for place, (learned, held) in enumerate(zip(*pairs, strict=True)):
        train, test = _examples(learned.dataset), _examples(held.dataset)
        classes = tuple(sorted({int(label) for label in train.targets}))
        tasks.append(StreamTask(f"experience {place}", train, test, classes))
    count = 1 + max(max(task.classes) for task in tasks)
    return TaskStream(name, tuple(tasks), count, {"experiences": len(tasks)})


def _examples(dataset: Any) -> Examples:
    inputs, targets = [], []
    for item in dataset:
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise TypeError(f"An item of the benchmark is a {type(item).__name__}; it must be (input, class, ...).")
        inputs.append(torch.as_tensor(item[0]))
        targets.append(int(item[1]))
    return Examples(torch.stack(inputs), torch.tensor(targets))


class LabelledTensors(Dataset[tuple[Tensor, int]]):
    """Examples as a data set with `targets`, what Avalanche makes its own data sets of.

    Example:
        >>> task = permuted_digits(tasks=1).tasks[0]
        >>> pixels, label = LabelledTensors(task.train)[0]
        >>> pixels.shape, label == int(task.train.targets[0])
        (torch.Size([64]), True)
    """

    def __init__(self, examples: Examples) -> None:
        self.inputs = examples.inputs
        self.targets = [int(label) for label in examples.targets]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], self.targets[index]


def to_avalanche(stream: TaskStream) -> Any:
    """A stream of classes as an Avalanche benchmark with `train_stream` and `test_stream`; no task labels but 0.

    Raises:
        ImportError: Avalanche is not installed.
    """
    _avalanche()
    from avalanche.benchmarks import benchmark_from_datasets  # pyright: ignore[reportMissingImports]
    from avalanche.benchmarks.utils import as_taskaware_classification_dataset  # pyright: ignore[reportMissingImports]

    parts = {
        part: [as_taskaware_classification_dataset(LabelledTensors(getattr(task, part))) for task in stream.tasks]
        for part in ("train", "test")
    }
    return benchmark_from_datasets(**parts)


def refresh_plugin(optimizer: InputProjection) -> Any:
    """A plugin for Avalanche's strategies: the projection is refreshed after each experience.

    Only a projection without a period needs it.

    Raises:
        ImportError: Avalanche is not installed.
    """
    _avalanche()
    from avalanche.core import SupervisedPlugin  # pyright: ignore[reportMissingImports]

    class Refresh(SupervisedPlugin):
        """Takes the inputs stored so far into the projection in use."""

        def after_training_exp(self, strategy: Any, *_args: Any, **_more: Any) -> None:
            optimizer.refresh()

    return Refresh()


def _avalanche() -> Any:
    try:
        import avalanche  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "Avalanche is not installed: pip install avalanche-lib (it brings torchvision, which must match the "
            "installed torch). Reading a benchmark with from_avalanche, and ContinualLearner, do without it."
        ) from error
    return avalanche
