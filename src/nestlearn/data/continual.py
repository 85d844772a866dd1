"""Streams of tasks for continual learning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from nestlearn.data.documents import Document, stable_hash
from nestlearn.data.synthetic import IGNORE


@dataclass(frozen=True)
class Examples:
    """Inputs and their targets.

    Attributes:
        inputs: features, or token ids; the first axis counts examples.
        targets: class per example, Long[n], or token per position, Long[n, t], with -100 where there is no target.
    """

    inputs: Shaped[Tensor, "n ..."]
    targets: Int[Tensor, "n *t"]

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets) or not len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs for {len(self.targets)} targets; give one target per input.")

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: Tensor) -> Examples:
        return Examples(self.inputs[index], self.targets[index])

    def to(self, device: torch.device | str) -> Examples:
        """The same examples on a device."""
        return Examples(self.inputs.to(device), self.targets.to(device))

    @classmethod
    def concatenate(cls, parts: Iterable[Examples]) -> Examples:
        """All examples of several sets, in order. Token sequences are padded to the longest; padding has no target."""
        every = list(parts)
        inputs, targets = [part.inputs for part in every], [part.targets for part in every]
        lengths = {part.shape[1] for part in targets if part.ndim > 1}
        if len(lengths) > 1:
            inputs = [nn.functional.pad(part, (0, max(lengths) - part.shape[1])) for part in inputs]
            targets = [nn.functional.pad(part, (0, max(lengths) - part.shape[1]), value=IGNORE) for part in targets]
        return cls(torch.cat(inputs), torch.cat(targets))


@dataclass(frozen=True)
class StreamTask:
    """A part of a stream: training and test examples.

    Attributes:
        name: name in tables.
        train, test: examples; no example is in both.
        classes: the classes that occur, if targets are classes.
    """

    name: str
    train: Examples
    test: Examples
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class TaskStream:
    """Tasks in the order in which they are learned.

    Attributes:
        name: name in tables.
        tasks: the tasks in order.
        num_classes: outputs of the model: all tasks share one head.
        config: the settings that made the tasks.

    Example:
        >>> stream = permuted_digits(tasks=3)
        >>> len(stream), stream.num_classes, stream.tasks[0].train.inputs.shape
        (3, 10, torch.Size([1347, 64]))
    """

    name: str
    tasks: tuple[StreamTask, ...]
    num_classes: int
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"The stream {self.name!r} has no tasks.")

    def __len__(self) -> int:
        return len(self.tasks)


def _digits(train: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 digits in [0, 1], shuffled by the seed: train and test pixels, train and test classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn, which is not installed: pip install 'nestlearn[continual]'."
        ) from error
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(stable_hash("digits", seed) >> 1))
    x = torch.as_tensor(pixels, dtype=torch.float32)[order] / 16.0
    y = torch.as_tensor(classes, dtype=torch.long)[order]
    if not 0 < train < len(y):
        raise ValueError(
            f"train is {train}; it must be from 1 to {len(y) - 1}, to leave some of the {len(y)} digits for the test."
        )
    return x[:train], x[train:], y[:train], y[train:]


def permuted_digits(tasks: int = 10, seed: int = 0, train: int = 1347) -> TaskStream:
    """The digits with a different order of their 64 pixels in each task; ten classes, one head, no task identity.

    Args:
        tasks: number of tasks; the first has the pixels in their original order.
        seed: seed of the split and of the permutations.
        train: number of training examples (by default three quarters of the 1,797); the others are the test.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    x_train, x_test, y_train, y_test = _digits(train, seed)
    made = []
    for place in range(tasks):
        generator = torch.Generator().manual_seed(stable_hash("permutation", seed, place) >> 1)
        pixels = torch.randperm(64, generator=generator) if place else torch.arange(64)
        learned, held = Examples(x_train[:, pixels], y_train), Examples(x_test[:, pixels], y_test)
        made.append(StreamTask(f"permutation {place}", learned, held, classes=tuple(range(10))))
    return TaskStream("permuted-digits", tuple(made), 10, {"tasks": tasks, "seed": seed, "train": train})


def split_digits(tasks: int = 5, seed: int = 0, train: int = 1347) -> TaskStream:
    """The digits by class (class-incremental): ``10 / tasks`` new classes in each task, one head over all ten."""
    x_train, x_test, y_train, y_test = _digits(train, seed)
    return class_incremental(
        "split-digits", Examples(x_train, y_train), Examples(x_test, y_test), tasks=tasks, order_seed=None,
        config={"seed": seed, "train": train},
    )  # fmt: skip


def class_incremental(
    name: str,
    train: Examples,
    test: Examples,
    *,
    tasks: int,
    order_seed: int | None = 0,
    names: Sequence[str] = (),
    config: dict[str, Any] | None = None,
) -> TaskStream:
    """A labelled data set as a stream in which each task has new classes; one head over all classes.

    Args:
        name: name of the stream.
        train, test: all examples; targets are classes 0 to n - 1.
        tasks: number of tasks; each gets the same number of classes.
        order_seed: seed of the order of the classes; None keeps the order.
        names: names of the classes, for the tasks' names.
        config: further settings that made the examples.

    Raises:
        ValueError: the number of classes is no multiple of the number of tasks, or a class has no training or no test
            examples.
    """
    count = 1 + int(max(train.targets.max(), test.targets.max()))
    for part, examples in (("train", train), ("test", test)):
        missing = sorted(set(range(count)).difference(examples.targets.unique().tolist()))
        if missing:
            named = ", ".join(f"{label} ({names[label]})" if label < len(names) else f"{label}" for label in missing)
            raise ValueError(
                f"{name}: of the classes 0 to {count - 1}, {named} {'has' if len(missing) == 1 else 'have'} no "
                f"examples in {part}. Leave them out of both and number the others from 0, or split the data by class."
            )
    if tasks < 1 or count % tasks:
        raise ValueError(f"{count} classes cannot be divided evenly over {tasks} tasks.")
    order = list(range(count))
    if order_seed is not None:
        order.sort(key=lambda label: stable_hash("class order", order_seed, label))
    made = []
    for place in range(tasks):
        classes = tuple(sorted(order[place * count // tasks : (place + 1) * count // tasks]))
        wanted = torch.tensor(classes)
        learned, held = (part[torch.isin(part.targets, wanted).nonzero()[:, 0]] for part in (train, test))
        title = f"{names[classes[0]]} ..." if names else f"classes {', '.join(map(str, classes[:3]))} ..."
        made.append(StreamTask(title, learned, held, classes=classes))
    return TaskStream(name, tuple(made), count, {"tasks": tasks, "order_seed": order_seed} | (config or {}))


def document_stream(
    documents: Iterable[Document], tokenizer: Any, *, length: int = 256, held_out: float = 0.2, name: str = "documents"
) -> TaskStream:
    """Documents in sequence for a language model: each is a task of windows with next-token targets.

    Args:
        documents: the documents in reading order.
        tokenizer: a Hugging Face tokenizer.
        length: tokens per window; a document's last window is padded, and padding has no target.
        held_out: share of a document's windows for the test, spread evenly over it; at least one, and not all.

    Raises:
        ValueError: a document is too short for one training and one test window, the length is below 1, or the share
            is not between 0 and 1.
    """
    if length < 1 or not 0.0 < held_out < 1.0:
        raise ValueError(
            f"length is {length} and held_out {held_out}; give at least 1 token per window, and a share of windows for "
            "the test between 0 and 1, such as 0.2."
        )
    made = []
    for document in documents:
        ids = torch.tensor(tokenizer(document.text, add_special_tokens=False)["input_ids"], dtype=torch.long)
        windows = -(-(len(ids) - 1) // length)
        if windows < 2:
            raise ValueError(
                f"Document {document.name!r} has {len(ids)} tokens; it needs more than {length + 1} for a window of "
                f"{length} for training and one for the test. Choose a smaller length or join documents."
            )
        padded = torch.full((windows * length + 1,), IGNORE)
        padded[: len(ids)] = ids
        inputs, targets = padded[:-1].clamp_min(0).view(windows, length), padded[1:].view(windows, length)
        tested = _spread(windows, held_out)
        learned, held = (Examples(inputs[chosen], targets[chosen]) for chosen in (~tested, tested))
        made.append(StreamTask(document.name, learned, held))
    return TaskStream(name, tuple(made), len(tokenizer), {"length": length, "held_out": held_out})


def _spread(windows: int, share: float) -> Bool[Tensor, " windows"]:
    """Test windows among at least two: those where ``share * place`` passes a whole number, but not none or all."""
    place = torch.arange(windows, dtype=torch.float64)
    # 1e-9: a share such as 0.1 is no binary fraction, but ten of them must make 1.
    tested = ((place + 1) * share + 1e-9).floor() > (place * share + 1e-9).floor()
    tested[-1] |= not bool(tested.any())
    tested[0] &= not bool(tested.all())
    return tested
