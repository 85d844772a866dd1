"""`ContinualLearner`: a model, an optimizer and a method, taught one task or document after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from nestlearn.continual.methods import Boundaries, FineTuning, Method, OptimizerFactory
from nestlearn.continual.progress import Progress
from nestlearn.continual.result import ContinualResult
from nestlearn.continual.scoring import Score, device_of, score_examples
from nestlearn.continual.step import training_step
from nestlearn.data.continual import Examples, TaskStream
from nestlearn.data.documents import stable_hash
from nestlearn.optim import OptimizerWrapper


class ContinualLearner:
    """Teaches a model a stream of tasks or documents, in order, and measures what it keeps.

    Args:
        model: maps a batch of inputs to logits (or to an object with `.logits`): ``[b, classes]``, or
            ``[b, t, vocabulary]`` where the targets are tokens.
        optimizer: makes the optimizer of parameters or groups, such as
            ``functools.partial(torch.optim.Adam, lr=1e-3)``; or an optimizer, which methods that group or replace
            parameters (`CMS`, `LoRA`) refuse. Levels that step at their own period are
            `nestlearn.optim.MultiTimescale`, by hand or through `CMS`.
        method: against forgetting; plain fine-tuning by default.
        epochs: passes over each task's examples.
        batch_size: examples per step.
        boundaries: "known" tells the method where a task begins and ends, "unknown" does not: it sees one long stream.
        score: "accuracy" over all targets, or "bits": minus bits per target.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        seed: of the order of examples, of dropout and of the method's random choices.

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
        score: Score = "accuracy",
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        if score not in get_args(Score):
            raise ValueError(f"score is {score!r}; it must be one of {', '.join(get_args(Score))}.")
        if epochs < 1 or batch_size < 1:
            raise ValueError(f"epochs is {epochs} and batch_size {batch_size}; both must be at least 1.")
        self.method = method or FineTuning()
        self.method.check_boundaries(boundaries)
        self.epochs, self.batch_size, self.max_grad_norm, self.seed = epochs, batch_size, max_grad_norm, seed
        self.boundaries: Boundaries = boundaries
        self.score: Score = score
        self.steps = self.examples = 0
        self.seconds = 0.0
        self._generator = torch.Generator().manual_seed(stable_hash("method", seed) >> 1)
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
        foreign = sum(parameter not in own for group in self.optimizer.param_groups for parameter in group["params"])
        if foreign:
            raise ValueError(
                f"{foreign} parameters of the {type(self.optimizer).__name__} are not the model's, so training would "
                "not change what they are of: make the optimizer of this model's parameters, after all changes to its "
                "modules."
            )

    # ---- learning ----

    def learn(self, examples: Examples, place: int = 0) -> None:
        """Learns from one task's or document's examples; `place` is its number in the stream.

        Raises:
            ValueError: a loss that is not finite, or a model whose parameters were replaced since the learner was made.
        """
        self._check_parameters()
        began = time.perf_counter()
        order = torch.Generator().manual_seed(stable_hash("order", self.seed, place) >> 1)
        self.model.train()
        for epoch in range(self.epochs):
            self.method.begin_epoch(epoch, self.epochs, self.boundaries == "known")
            for chosen in torch.randperm(len(examples), generator=order).split(self.batch_size):
                self._step(examples[chosen].to(device_of(self.model)), first_pass=epoch == 0)
        self.seconds += time.perf_counter() - began

    def _untrained(self) -> set[nn.Parameter]:
        """Trainable parameters of the model that the optimizer does not have."""
        stepped = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        return {p for p in self.model.parameters() if p.requires_grad and p not in stepped}

    def _check_parameters(self) -> None:
        """A module that was replaced after the optimizer was made, such as a head, would never be trained."""
        new = self._untrained() - self._left_out
        names = [name for name, parameter in self.model.named_parameters() if parameter in new]
        if names:
            raise ValueError(
                f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)} parameters) joined the model "
                f"after the learner was made: neither the {type(self.optimizer).__name__} nor {self.method.name} knows "
                "them, so they would never be trained. Make a new ContinualLearner for the changed model; or give the "
                "model a head for all tasks at the start; or keep the parameter and copy new values into it, with "
                "torch.no_grad()."
            )

    def _step(self, batch: Examples, first_pass: bool) -> None:
        _, used = training_step(
            self.model, self.optimizer, self.method, batch, self._generator, number=self.steps + 1,
            first_pass=first_pass, max_grad_norm=self.max_grad_norm,
        )  # fmt: skip
        self.steps += 1
        self.examples += used

    def _learn_task(self, stream: TaskStream, place: int) -> None:
        train = self.method.training_examples(stream, place)
        if train is None:
            return
        self.learn(train, place)
        if self.boundaries == "known":
            began = time.perf_counter()
            self.examples += self.method.end_task(self.model, stream.tasks[place].train, self._generator)
            self._replace_model(place)
            self.seconds += time.perf_counter() - began

    def _replace_model(self, place: int) -> None:
        """LoRA begins when the first task has been learned: its parameters need an optimizer of their own."""
        changed = self.method.replace_model(self.model, place)
        if changed is not None and self._factory is not None:
            # The weights that are frozen from now on must not keep the gradients of their last step.
            self.model.zero_grad()
            self.model = changed
            self.optimizer = self.method.make_optimizer(changed, self._factory)
            self._left_out = self._untrained()

    def fit(
        self,
        stream: TaskStream,
        *,
        checkpoint: str | Path | None = None,
        on_task: Callable[[int, tuple[float, ...]], None] | None = None,
    ) -> ContinualResult:
        """Learns all tasks in order, testing all of them before the first and after each.

        Args:
            stream: the tasks.
            checkpoint: a file written after each task; where it exists, learning continues after the last task in it.
            on_task: called with the task's number and its row of R.

        Raises:
            ValueError: the checkpoint is of another stream, method or seed, or no checkpoint; or a loss is not finite.
        """
        config = self.config(stream)
        progress = Progress(None if checkpoint is None else Path(checkpoint), config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            rows = progress.resume(self)
            if not rows:
                rows = [self.evaluate(stream)]
            for place in range(len(rows) - 1, len(stream)):
                self._learn_task(stream, place)
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
        """What the result depends on, beside the model and the optimizer."""
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
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that learning the next task depends on."""
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
    """Kind and settings of each wrapper, from the outside in, and the kind of what they wrap; [] without wrappers."""
    if not isinstance(optimizer, OptimizerWrapper):
        return []
    inner = _wrappers(optimizer.base) or [{"kind": type(optimizer.base).__name__}]
    return [{"kind": type(optimizer).__name__, **optimizer.settings()}, *inner]


def _plain(value: object) -> bool:
    return isinstance(value, (int, float, str, bool, tuple, type(None)))
