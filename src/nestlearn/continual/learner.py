"""`ContinualLearner`: trains a model on one task or document after the other."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nestlearn.continual.methods import Boundaries, FineTuning, Method, OptimizerFactory
from nestlearn.continual.progress import StreamProgress
from nestlearn.continual.result import ContinualResult
from nestlearn.continual.scoring import ScoreKind, device_of, loss_of, score_examples
from nestlearn.data.continual import Examples, TaskStream
from nestlearn.data.documents import stable_hash
from nestlearn.optim import OptimizerWrapper
from nestlearn.optim.checks import one_of, positive, whole_number

_NOT_FINITE = (
    "The weights are as they were before this step. Check the inputs for values that are not finite, the weights as "
    "they were loaded, and a batch for targets that are all ignored; otherwise lower the learning rate or a penalty's "
    "strength, or give max_grad_norm."
)


class ContinualLearner:
    """Trains a model on a stream of tasks or documents, in order, and measures what it keeps.

    Args:
        model: maps a batch of inputs to logits, or to an object with `.logits`: ``[b, classes]``, or
            ``[b, t, vocabulary]`` where the targets are tokens.
        optimizer: makes the optimizer of parameters or groups, such as ``functools.partial(torch.optim.Adam,
            lr=1e-3)``. It can be an optimizer, but methods that group or replace parameters (`CMS`, `LoRA`) refuse
            one. For levels that step at their own period use `CMS`, or `nestlearn.optim.MultiTimescale` by hand.
        method: against forgetting; plain fine-tuning by default.
        epochs: passes over each task's examples.
        batch_size: examples per step.
        boundaries: "known" tells the method where a task begins and ends. With "unknown" it sees one long stream.
        score: "accuracy" over all targets, or "bits": minus bits per target.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        seed: of the order of examples, of dropout and of the method's random choices.
        shuffle: whether each pass has an order of its own. False: the order of the examples.
        generator: of the method's random choices, in place of one made of the seed.

    Attributes:
        steps, examples, seconds: the cost so far: updates, examples that gradients were computed for, wall time.

    Raises:
        TypeError: an optimizer object where the method needs to make one.
        ValueError: sizes below 1, unknown names, a method that needs boundaries where they are unknown, or an
            optimizer of parameters that are not the model's.

    Example:
        >>> from functools import partial
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        >>> learner = ContinualLearner(model, partial(torch.optim.Adam, lr=1e-2), epochs=5)
        >>> result = learner.fit(split_digits(tasks=5))
        >>> result.metrics.forgetting > 0.5  # fine-tuning: the old classes are lost
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | OptimizerFactory,
        *,
        method: Method | None = None,
        epochs: int = 1,
        batch_size: int = 32,
        boundaries: Boundaries = "known",
        score: ScoreKind = "accuracy",
        max_grad_norm: float | None = None,
        seed: int = 0,
        shuffle: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        one_of("score", score, ScoreKind)
        self.epochs = whole_number("epochs", epochs, "passes over each task's examples")
        self.batch_size = whole_number("batch_size", batch_size, "examples per step")
        if max_grad_norm is not None:
            positive("max_grad_norm", max_grad_norm, "a bound of the norm of the gradients, or None for no bound")
        self.method = method or FineTuning()
        self.method.check_boundaries(boundaries)
        self._unused_method = copy.deepcopy(self.method)  # for copies of the learner
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.boundaries: Boundaries = boundaries
        self.score: ScoreKind = score
        self.shuffle = shuffle
        self.steps = self.examples = 0
        self.seconds = 0.0
        self._generator = generator or torch.Generator().manual_seed(stable_hash("method", seed) >> 1)
        self._factory = None if isinstance(optimizer, Optimizer) else optimizer
        self.model = self.method.prepare(model)
        self.optimizer = optimizer if isinstance(optimizer, Optimizer) else self.method.make_optimizer(model, optimizer)
        if isinstance(optimizer, Optimizer) and self.method.makes_optimizer:
            raise TypeError(
                f"{self.method.name} makes its own parameter groups; give a function that makes the optimizer, such as "
                "functools.partial(torch.optim.Adam, lr=1e-3), in place of the optimizer."
            )
        own = set(self.model.parameters())
        self._left_out = self._untrained()
        foreign = sum(parameter not in own for parameter in self._stepped())
        if foreign:
            raise ValueError(
                f"{foreign} parameters of the {type(self.optimizer).__name__} are not the model's, so training would "
                "not change the model. Make the optimizer from this model's parameters, after all changes to its "
                "modules."
            )

    # ---- learning ----

    def learn(self, examples: Examples, place: int = 0) -> list[float]:
        """Learns from one task's or document's examples, without ending the task.

        Args:
            examples: of the task.
            place: its number in the stream; it decides the order.

        Returns:
            The loss of each step in nats per target, without the method's penalty.

        Raises:
            ValueError: a loss or bounded gradient that is not finite, or a model whose parameters were replaced since
                the learner was made.
        """
        self._check_parameters()
        began, was_training = time.perf_counter(), self.model.training
        order = torch.Generator().manual_seed(stable_hash("order", self.seed, place) >> 1)
        losses: list[float] = []
        self.model.train()
        try:
            for epoch in range(self.epochs):
                self.method.begin_epoch(epoch, self.epochs, self.boundaries == "known")
                count = len(examples)
                rows = torch.randperm(count, generator=order) if self.shuffle else torch.arange(count)
                for chosen in rows.split(self.batch_size):
                    losses.append(self._step(examples[chosen].to(device_of(self.model)), first_pass=epoch == 0))
        finally:
            self.model.train(was_training)
        self.seconds += time.perf_counter() - began
        return losses

    def end_task(self, examples: Examples, place: int = 0, generator: torch.Generator | None = None) -> None:
        """Tells the method that a task has ended, where boundaries are known.

        Args:
            examples: of the task.
            place: its number in the stream.
            generator: of the method's random choices here; the learner's own by default.
        """
        if self.boundaries == "unknown":
            return
        began = time.perf_counter()
        self.examples += self.method.end_task(self.model, examples, generator or self._generator)
        self._replace_model(place)
        self.seconds += time.perf_counter() - began

    def _step(self, batch: Examples, first_pass: bool) -> float:
        """One update from a batch and what the method adds to it; the loss in nats, without the penalty."""
        together = self.method.batch(batch, self._generator).to(device_of(self.model))
        loss, penalty = loss_of(self.model, together), self.method.penalty()
        total = loss if penalty is None else loss + penalty
        where = f"at step {self.steps + 1} of {self.method.name}, counted from 1"
        if not math.isfinite(value := total.item()):
            part = "" if penalty is None else f" ({loss.item()} and a penalty of {penalty.item()})"
            raise ValueError(f"The loss is {value}{part} {where}. {_NOT_FINITE}")
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        if self.max_grad_norm is not None:
            # Only parameters of the optimizer: others still hold the gradients of all earlier steps.
            norm = nn.utils.clip_grad_norm_(list(self._stepped()), self.max_grad_norm).item()
            if not math.isfinite(norm):
                self.optimizer.zero_grad(set_to_none=True)
                raise ValueError(f"The gradients' norm is {norm} {where}, with a loss of {value}. {_NOT_FINITE}")
        self.optimizer.step()
        self.method.observe(batch, self._generator, first_pass)
        self.steps += 1
        self.examples += len(together)
        return loss.item()

    def _stepped(self) -> Iterator[Tensor]:
        """The parameters of the optimizer."""
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def _untrained(self) -> set[nn.Parameter]:
        """Trainable parameters of the model that the optimizer does not have."""
        stepped = set(self._stepped())
        return {p for p in self.model.parameters() if p.requires_grad and p not in stepped}

    def _check_parameters(self) -> None:
        """Refuses parameters that joined the model after the optimizer was made: they would never be trained."""
        new = self._untrained() - self._left_out
        names = [name for name, parameter in self.model.named_parameters() if parameter in new]
        if names:
            raise ValueError(
                f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)} parameters) joined the model "
                f"after the learner was made: neither the {type(self.optimizer).__name__} nor {self.method.name} knows "
                "them, so they would never be trained. Make a new ContinualLearner for the changed model, give the "
                "model a head for all tasks at the start, or copy new values into the old parameter (torch.no_grad())."
            )

    def _replace_model(self, place: int) -> None:
        """Goes on with the method's other model, whose parameters need an optimizer of their own (`LoRA`)."""
        changed = self.method.replace_model(self.model, place)
        if changed is not None and self._factory is not None:
            # Weights that are frozen from now on must not keep the gradients of their last step.
            self.model.zero_grad()
            self.model = changed
            self.optimizer = self.method.make_optimizer(changed, self._factory)
            self._left_out = self._untrained()

    def fork(self) -> ContinualLearner:
        """An independent copy: of model, optimizer, method and random choices.

        Raises:
            TypeError: the learner was given an optimizer and not a function that makes one.
        """
        if self._factory is None:
            raise TypeError(
                f"The learner has a {type(self.optimizer).__name__} that it did not make, and cannot make one for a "
                "copy; give it a function such as functools.partial(torch.optim.Adam, lr=1e-3)."
            )
        other = copy.copy(self)
        other.model, other.method = copy.deepcopy(self.model), copy.deepcopy(self._unused_method)
        other.optimizer = other.method.make_optimizer(other.model, self._factory)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.method.load_state_dict(copy.deepcopy(self.method.state_dict()), other.model)
        other._generator = torch.Generator()
        other._generator.set_state(self._generator.get_state())
        other._left_out = other._untrained()
        return other

    def fit(
        self,
        stream: TaskStream,
        *,
        checkpoint: str | Path | None = None,
        on_task: Callable[[int, tuple[float, ...]], None] | None = None,
    ) -> ContinualResult:
        """Learns all tasks in order and tests all of them before the first and after each.

        Args:
            stream: the tasks.
            checkpoint: a file written after each task; where it exists, learning continues after the last task in it.
            on_task: called with the task's number and its row of R.

        Raises:
            ValueError: the checkpoint is of another stream, method or seed, or no checkpoint; or a loss is not finite.
        """
        config = self.config(stream)
        progress = StreamProgress(None if checkpoint is None else Path(checkpoint), config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            rows = progress.resume(self)
            if not rows:
                rows = [self.evaluate(stream)]
            for place in range(len(rows) - 1, len(stream)):
                train = self.method.training_examples(stream, place)
                if train is not None:
                    self.learn(train, place)
                    self.end_task(stream.tasks[place].train, place)
                measured = self.method.measures(place, len(stream))
                rows.append(self.evaluate(stream) if measured else (float("nan"),) * len(stream))
                progress.save(self, rows)
                if on_task is not None:
                    on_task(place, rows[-1])
        return ContinualResult(
            stream=stream.name, method=self.method.name, tasks=tuple(task.name for task in stream.tasks),
            score=self.score, matrix=tuple(rows[1:]), initial=rows[0], seed=self.seed, steps=self.steps,
            examples=self.examples, stored_examples=self.method.stored_examples, seconds=self.seconds, config=config,
        )  # fmt: skip

    # ---- testing ----

    def evaluate(self, stream: TaskStream) -> tuple[float, ...]:
        """The score on every task's test examples."""
        return tuple(score_examples(self.model, task.test, self.score) for task in stream.tasks)

    def config(self, stream: TaskStream) -> dict[str, Any]:
        """Settings that the result depends on, for a record of the run and to continue it."""
        groups = [{k: v for k, v in g.items() if k != "params" and _plain(v)} for g in self.optimizer.param_groups]
        return {
            "stream": {"name": stream.name, "tasks": len(stream)} | stream.config,
            "method": {"name": self.method.name} | self.method.config(),
            "optimizer": {
                "name": type(self.optimizer).__name__,
                "groups": groups,
                "wrappers": _wrappers(self.optimizer),
            },
            "score": self.score,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "boundaries": self.boundaries,
            "max_grad_norm": self.max_grad_norm,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seed": self.seed,
        } | ({} if self.shuffle else {"shuffle": False})

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next task depends on: weights, states, random numbers, counts."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "random": {"own": self._generator.get_state(), "torch": torch.get_rng_state()},
            "counts": {"steps": self.steps, "examples": self.examples, "seconds": self.seconds},
        }

    def load_state_dict(self, state: dict[str, Any], learned: int) -> None:
        """Continues after `learned` tasks."""
        for place in range(learned):
            self._replace_model(place)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"], self.model)
        self._generator.set_state(state["random"]["own"])
        torch.set_rng_state(state["random"]["torch"])
        self.steps, self.examples, self.seconds = (state["counts"][k] for k in ("steps", "examples", "seconds"))


def _wrappers(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Kind and settings of each wrapper, from the outside in, then the kind of the wrapped optimizer; [] if none."""
    if not isinstance(optimizer, OptimizerWrapper):
        return []
    inner = _wrappers(optimizer.base) or [{"kind": type(optimizer.base).__name__}]
    return [{"kind": type(optimizer).__name__, **optimizer.settings()}, *inner]


def _plain(value: object) -> bool:
    return isinstance(value, (int, float, str, bool, tuple, type(None)))
