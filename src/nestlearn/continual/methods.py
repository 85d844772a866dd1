"""Methods against forgetting, in one harness: what each adds to plain fine-tuning on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nestlearn.continual.scoring import device_of, logits_of
from nestlearn.data.continual import Examples, TaskStream
from nestlearn.data.synthetic import IGNORE

OptimizerFactory = Callable[[Any], Optimizer]
"""Makes an optimizer of parameters or parameter groups."""

Boundaries = Literal["known", "unknown"]
"""Whether a method is told where a task or text ends."""

Labels = Literal["model", "data"]
"""Where the labels of a Fisher matrix are from: drawn from the model, or given."""


class Method:
    """Plain fine-tuning, and the places where a method may do something else.

    Attributes:
        name: for tables.
        needs_boundaries: whether it must know where a task ends.
        without_boundaries: what to use where it is not known, for the error.
        makes_optimizer: whether it groups or replaces the parameters that the optimizer gets.
    """

    name: str = "fine-tuning"
    needs_boundaries: bool = False
    without_boundaries: str = ""
    makes_optimizer: bool = False

    def config(self) -> dict[str, Any]:
        """The method's settings."""
        return {}

    def check_boundaries(self, boundaries: Boundaries) -> None:
        """Raises ValueError for an unknown word, or where the method needs boundaries and they are unknown."""
        if boundaries not in get_args(Boundaries):
            raise ValueError(f"boundaries is {boundaries!r}; it must be one of {', '.join(get_args(Boundaries))}.")
        if self.needs_boundaries and boundaries == "unknown":
            raise ValueError(
                f"{self.name} acts at the ends of tasks, and boundaries is 'unknown'. {self.without_boundaries}"
            )

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model to train, before the stream."""
        return model

    def make_optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        """The optimizer of the model's trainable parameters."""
        return factory([parameter for parameter in model.parameters() if parameter.requires_grad])

    def training_examples(self, stream: TaskStream, place: int) -> Examples | None:
        """What is learned at a place of the stream; None learns nothing there."""
        return stream.tasks[place].train

    def measures(self, place: int, tasks: int) -> bool:
        """Whether the model after this place is one to be tested."""
        return True

    def begin_epoch(self, epoch: int, epochs: int, boundaries: bool) -> None:
        """Called before each pass over a task's examples; `boundaries` says whether that may be used."""

    def batch(self, batch: Examples, generator: torch.Generator) -> Examples:
        """What a step trains on, given the stream's batch."""
        return batch

    def penalty(self) -> Tensor | None:
        """Added to the loss of a step."""
        return None

    def observe(self, batch: Examples, generator: torch.Generator, first_pass: bool) -> None:
        """The stream's batch, after the step on it."""

    def end_task(self, model: nn.Module, train: Examples, generator: torch.Generator) -> int:
        """Called after each task where boundaries are known; returns for how many examples it computed gradients."""
        return 0

    def replace_model(self, model: nn.Module, place: int) -> nn.Module | None:
        """Another model to go on with after the task at `place`; None keeps it."""
        return None

    @property
    def stored_examples(self) -> int:
        """How many examples of earlier tasks are kept."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """What it must remember between tasks: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any], model: nn.Module) -> None:
        """Takes over what `state_dict` returned."""


class FineTuning(Method):
    """Gradient steps on the newest examples and nothing else."""


class JointTraining(Method):
    """All tasks' examples mixed, for as many epochs as the stream has: the ceiling, with as many steps as the others.

    Only the last row of R exists.
    """

    name = "joint"
    _stored = 0

    def training_examples(self, stream: TaskStream, place: int) -> Examples | None:
        """Everything at the last place, nothing before."""
        if place < len(stream) - 1:
            return None
        every = Examples.concatenate(task.train for task in stream.tasks)
        self._stored = len(every)
        return every

    def measures(self, place: int, tasks: int) -> bool:
        """Only the end."""
        return place == tasks - 1

    @property
    def stored_examples(self) -> int:
        """All of the stream."""
        return self._stored


class EWC(Method):
    """Elastic weight consolidation: a quadratic penalty around the weights that earlier tasks ended with.

    ``λ/2 Σ_tasks Σ_i F_i (θ_i - θ*_i)²`` (Kirkpatrick et al. 2017, arXiv 1612.00796), F the Fisher
    information: the mean over examples of the squared gradient of ``log p(y | x)``. The sum over tasks is kept exactly
    in two tensors per parameter, ΣF and ΣFθ*, and a constant. Targets of several positions
    are one example: the gradient of their sum.

    Args:
        strength: λ.
        samples: examples per task for F, chosen at random.
        labels: "model" draws y from the model (the Fisher information), "data" takes the given ones.

    Raises:
        ValueError: strength below 0, no samples, or unknown labels.
    """

    name = "EWC"
    needs_boundaries = True
    without_boundaries = "Use CMS or ExperienceReplay, which need none."

    def __init__(self, strength: float, *, samples: int = 256, labels: Labels = "model") -> None:
        if strength < 0.0 or samples < 1 or labels not in get_args(Labels):
            raise ValueError(
                f"strength is {strength}, samples {samples}, labels {labels!r}; strength must be at least 0, samples "
                "at least 1 and labels 'model' or 'data'."
            )
        self.strength, self.samples = strength, samples
        self.labels: Labels = labels
        self._parameters: dict[str, nn.Parameter] = {}
        self.fisher: dict[str, Tensor] = {}
        self.weighted: dict[str, Tensor] = {}
        self.constant = 0.0

    def config(self) -> dict[str, Any]:
        """λ and how F is estimated."""
        return {"strength": self.strength, "samples": self.samples, "labels": self.labels}

    def prepare(self, model: nn.Module) -> nn.Module:
        """Remembers which parameters are trained."""
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return model

    def penalty(self) -> Tensor | None:
        """``λ/2 (Σ_i ΣF_i θ_i² - 2 ΣF_iθ*_i θ_i + const)``; None before the first task ended."""
        if not self.fisher:
            return None
        # Around the weighted mean of the θ*, not as a difference of large squares: float32 would lose it.
        terms = []
        for name, fisher in self.fisher.items():
            centre = self.weighted[name] / fisher.clamp_min(torch.finfo(fisher.dtype).tiny)
            terms.append((fisher * (self._parameters[name] - centre).square()).sum())
        return 0.5 * self.strength * (torch.stack(terms).sum() + self.constant)

    def end_task(self, model: nn.Module, train: Examples, generator: torch.Generator) -> int:
        """Adds the task's F around the weights as they are."""
        chosen = torch.randperm(len(train), generator=generator)[: self.samples]
        estimate = fisher_information(model, train[chosen], self._parameters, self.labels, generator)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                new, anchor = estimate[name], parameter.detach()
                old = self.fisher.get(name, torch.zeros_like(new))
                centre = self.weighted.get(name, torch.zeros_like(new)) / old.clamp_min(torch.finfo(new.dtype).tiny)
                # Two parabolas are one: F1 (θ-a)² + F2 (θ-b)² = (F1+F2)(θ-c)² + F1 F2/(F1+F2) (a-b)².
                reduced = old * new / (old + new).clamp_min(torch.finfo(new.dtype).tiny)
                self.constant += float((reduced * (centre - anchor).square()).sum())
                self.fisher[name] = old + new
                self.weighted[name] = old * centre + new * anchor
        return len(chosen)

    def state_dict(self) -> dict[str, Any]:
        """The penalty."""
        return {"fisher": self.fisher, "weighted": self.weighted, "constant": self.constant}

    def load_state_dict(self, state: dict[str, Any], model: nn.Module) -> None:
        """Takes over the penalty."""
        self.prepare(model)
        self.fisher, self.weighted, self.constant = (state[key] for key in ("fisher", "weighted", "constant"))


def fisher_information(
    model: nn.Module,
    examples: Examples,
    parameters: dict[str, nn.Parameter],
    labels: Labels,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The diagonal Fisher information: the mean over examples of the squared gradient of ``log p(y | x)``.

    Args:
        model: in evaluation mode while it runs.
        examples: x, and the given y.
        parameters: by name.
        labels: "model" draws y from the model, "data" takes the given ones.
        generator: of the drawn labels.
    """
    training = model.training
    model.eval()
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for index in range(len(examples)):
        one = examples[torch.tensor([index])].to(device_of(model))
        logits, targets = logits_of(model, one.inputs).flatten(0, -2), one.targets.flatten()
        if labels == "model":
            # Drawn on the CPU, where the generator is.
            drawn = torch.multinomial(logits.detach().cpu().softmax(-1), 1, generator=generator)[:, 0]
            targets = torch.where(targets == IGNORE, targets, drawn.to(targets.device))
        loss = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                total[name].add_(gradient.square(), alpha=1 / len(examples))
    model.train(training)
    return total


class ExperienceReplay(Method):
    """Each step trains on the stream's batch and as many stored examples; the store is a reservoir.

    After n examples each of them is stored with probability ``capacity / n`` (Vitter's algorithm R), which needs no
    task boundaries. Only first passes fill it.

    Args:
        capacity: examples kept.
        batch_size: stored examples per step; as many as the stream's batch has by default.

    Raises:
        ValueError: sizes below 1.
    """

    name = "replay"

    def __init__(self, capacity: int, *, batch_size: int | None = None) -> None:
        if capacity < 1 or (batch_size is not None and batch_size < 1):
            raise ValueError(f"capacity is {capacity} and batch_size {batch_size}; both must be at least 1.")
        self.capacity, self.batch_size = capacity, batch_size
        self.seen = 0
        self.inputs: list[Tensor] = []
        self.targets: list[Tensor] = []

    def config(self) -> dict[str, Any]:
        """Sizes."""
        return {"capacity": self.capacity, "batch_size": self.batch_size}

    def batch(self, batch: Examples, generator: torch.Generator) -> Examples:
        """The batch and stored examples, drawn without repetition."""
        if not self.inputs:
            return batch
        chosen = torch.randperm(len(self.inputs), generator=generator)[: self.batch_size or len(batch)].tolist()
        stored = (Examples(self.inputs[i][None], self.targets[i][None]) for i in chosen)
        return Examples.concatenate([batch, *stored])

    def observe(self, batch: Examples, generator: torch.Generator, first_pass: bool) -> None:
        """Stores some of the batch."""
        if not first_pass:
            return
        for x, y in zip(batch.inputs, batch.targets, strict=True):
            self.seen += 1
            if len(self.inputs) < self.capacity:
                self.inputs.append(x.clone())
                self.targets.append(y.clone())
            else:
                place = int(torch.randint(self.seen, (), generator=generator))
                if place < self.capacity:
                    self.inputs[place], self.targets[place] = x.clone(), y.clone()

    @property
    def stored_examples(self) -> int:
        """How full the store is."""
        return len(self.inputs)

    def state_dict(self) -> dict[str, Any]:
        """The store."""
        return {"seen": self.seen, "inputs": self.inputs, "targets": self.targets}

    def load_state_dict(self, state: dict[str, Any], model: nn.Module) -> None:
        """Takes over the store."""
        self.seen, self.inputs, self.targets = state["seen"], state["inputs"], state["targets"]
