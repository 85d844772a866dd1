"""Methods against forgetting, as additions to plain fine-tuning on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nestlearn.continual.scoring import device_of, logits_of
from nestlearn.data.continual import Examples, TaskStream
from nestlearn.data.synthetic import IGNORE
from nestlearn.optim.checks import not_negative, one_of, whole_number

OptimizerFactory = Callable[[Any], Optimizer]
"""Makes an optimizer for parameters or parameter groups."""

Boundaries = Literal["known", "unknown"]
"""Whether a method is told the end of each task or text."""

Labels = Literal["model", "data"]
"""The labels of a Fisher matrix: drawn from the model, or given."""


class Method:
    """Plain fine-tuning, with hooks that other methods override.

    Attributes:
        name: for tables.
        needs_boundaries: whether it must know the end of each task.
        without_boundaries: what to use where it is not known, for the error message.
        makes_optimizer: whether it groups or replaces the parameters of the optimizer.
    """

    name: str = "fine-tuning"
    needs_boundaries: bool = False
    without_boundaries: str = ""
    makes_optimizer: bool = False

    def config(self) -> dict[str, Any]:
        """The method's settings."""
        return {}

    def check_boundaries(self, boundaries: Boundaries) -> None:
        """Raises ValueError for an unknown word, or if the method needs boundaries and they are unknown."""
        one_of("boundaries", boundaries, Boundaries)
        if self.needs_boundaries and boundaries == "unknown":
            raise ValueError(
                f"{self.name} acts at the ends of tasks, and boundaries is 'unknown'. {self.without_boundaries}"
            )

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model to train; called once, before the stream."""
        return model

    def make_optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        """The optimizer of the model's trainable parameters."""
        return factory([parameter for parameter in model.parameters() if parameter.requires_grad])

    def training_examples(self, stream: TaskStream, place: int) -> Examples | None:
        """The examples to learn at a place of the stream; None for none."""
        return stream.tasks[place].train

    def measures(self, place: int, tasks: int) -> bool:
        """Whether the model is tested after this place."""
        return True

    def begin_epoch(self, epoch: int, epochs: int, boundaries: bool) -> None:
        """Called before each pass over a task's examples; a method may use it only if `boundaries` are known."""

    def batch(self, batch: Examples, generator: torch.Generator) -> Examples:
        """The batch of a step, from the stream's batch."""
        return batch

    def penalty(self) -> Tensor | None:
        """A term of the loss of each step; None for none."""
        return None

    def observe(self, batch: Examples, generator: torch.Generator, first_pass: bool) -> None:
        """Called with the stream's batch after the step on it."""

    def end_task(self, model: nn.Module, train: Examples, generator: torch.Generator) -> int:
        """Called after each task if boundaries are known; returns how many examples it computed gradients for."""
        return 0

    def replace_model(self, model: nn.Module, place: int) -> nn.Module | None:
        """Another model to train after the task at `place`; None keeps this one."""
        return None

    @property
    def stored_examples(self) -> int:
        """Number of stored examples of earlier tasks."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """The method's state between tasks: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any], model: nn.Module) -> None:
        """Restores what `state_dict` returned."""


class FineTuning(Method):
    """Gradient steps on the newest examples and nothing else."""


class JointTraining(Method):
    """All tasks' examples mixed, with as many steps as the other methods take: the upper bound.

    Only the last row of R exists.
    """

    name = "joint"
    _stored = 0

    def training_examples(self, stream: TaskStream, place: int) -> Examples | None:
        """All examples at the last place, none before."""
        if place < len(stream) - 1:
            return None
        every = Examples.concatenate(task.train for task in stream.tasks)
        self._stored = len(every)
        return every

    def measures(self, place: int, tasks: int) -> bool:
        """Only after the last task."""
        return place == tasks - 1

    @property
    def stored_examples(self) -> int:
        """All examples of the stream."""
        return self._stored


class EWC(Method):
    """Elastic weight consolidation: a quadratic penalty around the weights at the end of each earlier task.

    ``λ/2 Σ_tasks Σ_i F_i (θ_i - θ*_i)²`` (Kirkpatrick et al. 2017, arXiv 1612.00796). F is the Fisher information: the
    mean over examples of the squared gradient of ``log p(y | x)``; the targets of one example count together. The sum
    over tasks is exact, in two tensors per parameter (ΣF and ΣFθ*) and a constant.

    Args:
        strength: λ.
        samples: examples per task for F, chosen at random.
        labels: "model" draws y from the model (the Fisher information), "data" takes the given labels.

    Raises:
        ValueError: strength below 0, no samples, or unknown labels.
    """

    name = "EWC"
    needs_boundaries = True
    without_boundaries = "Use CMS or ExperienceReplay, which need none."

    def __init__(self, strength: float, *, samples: int = 256, labels: Labels = "model") -> None:
        not_negative("strength", strength, "λ, the weight of the penalty")
        one_of("labels", labels, Labels)
        self.strength, self.samples = strength, whole_number("samples", samples, "examples per task for F")
        self.labels: Labels = labels
        self._parameters: dict[str, nn.Parameter] = {}
        self.fisher: dict[str, Tensor] = {}
        self.weighted: dict[str, Tensor] = {}
        self.constant = 0.0

    def config(self) -> dict[str, Any]:
        """λ and the estimate of F."""
        return {"strength": self.strength, "samples": self.samples, "labels": self.labels}

    def prepare(self, model: nn.Module) -> nn.Module:
        """Stores the trained parameters."""
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return model

    def penalty(self) -> Tensor | None:
        """``λ/2 (Σ_i ΣF_i θ_i² - 2 ΣF_iθ*_i θ_i + const)``; None before the first task ended."""
        if not self.fisher:
            return None
        # Around the weighted mean of the θ*: a difference of large squares would be lost in float32.
        terms = []
        for name, fisher in self.fisher.items():
            centre = self.weighted[name] / fisher.clamp_min(torch.finfo(fisher.dtype).tiny)
            terms.append((fisher * (self._parameters[name] - centre).square()).sum())
        return 0.5 * self.strength * (torch.stack(terms).sum() + self.constant)

    def end_task(self, model: nn.Module, train: Examples, generator: torch.Generator) -> int:
        """Adds the task's F around the current weights."""
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
        """Restores the penalty."""
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
        model: put into evaluation mode meanwhile.
        examples: x, and the given y.
        parameters: by name.
        labels: "model" draws y from the model, "data" takes the given labels.
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

    After n examples each of them is stored with probability ``capacity / n`` (Vitter's algorithm R), without task
    boundaries. Only first passes fill the store.

    Args:
        capacity: examples kept.
        batch_size: stored examples per step; by default as many as the stream's batch has.

    Raises:
        ValueError: sizes below 1.
    """

    name = "replay"

    def __init__(self, capacity: int, *, batch_size: int | None = None) -> None:
        self.capacity = whole_number("capacity", capacity, "examples kept")
        own = batch_size is None
        self.batch_size = None if own else whole_number("batch_size", batch_size, "stored examples per step")
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
        """Number of examples in the store."""
        return len(self.inputs)

    def state_dict(self) -> dict[str, Any]:
        """The store."""
        return {"seen": self.seen, "inputs": self.inputs, "targets": self.targets}

    def load_state_dict(self, state: dict[str, Any], model: nn.Module) -> None:
        """Restores the store."""
        self.seen, self.inputs, self.targets = state["seen"], state["inputs"], state["targets"]
