"""`measure`: run a nested system over a stream and count what its levels really do."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .health import LevelHealth, Measured, judge
from .probe import NUMBER, states_of
from .stacked import learns_by_reading, level_numbers, observe_levels, read_text
from .system import Component, NestedSystem
from .trace import arguments, call, counted_updates, undisturbed
from .writes import Written, can_stop_writing, effective_rank, norm, observe, real, without_writes

Loss = Callable[[Any, Any], Tensor]


def measure(
    system: NestedSystem,
    stream: Iterable[Any],
    *,
    loss: Loss | None = None,
    steps: int | None = None,
    tokens: int = 64,
    switch_off: bool = True,
) -> LevelHealth:
    """Train on a stream, count what each level does, and find levels that do nothing.

    Every component gets the updates that really happened, the norms of gradients and of changes, the effective rank of
    its changes, and the cosine between its changes and those of neighbouring levels. With ``switch_off`` the stream is
    run again for each: without the component's changes, and with its changes taken back at the end. Model and optimizer
    are then as they were before.

    Args:
        system: of `nestlearn.levels.nested_system`, with its model.
        stream: batches: token ids ``[rows, tokens]``, mappings of named arguments, or pairs of input and target.
        loss: ``loss(output, target)``. For token ids and mappings None is the model's own loss.
        steps: batches to take; None takes all. A stream that ends earlier is measured as far as it goes.
        tokens: read one by one to count the updates of memories, at most.
        switch_off: run again without each component.

    Returns:
        The measured components, and findings: a period longer than the stream, a level that does not move, two that do
        the same, a memory whose writes change nothing, a state of the optimizer that never matters.

    Raises:
        ValueError: an empty stream, a system without a model, a batch without a loss, or a loss that is not finite.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 2)
        >>> system = nested_system(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(5)]
        >>> health = measure(system, batches, loss=torch.nn.functional.mse_loss)
        >>> [(m.component.name, m.updates) for m in health.measured], health.findings
        ([('SGD.momentum_buffer', 5), ('parameters', 5)], ())
    """
    if system.model is None:
        raise ValueError("this system has no model to run; measure what nested_system(model, optimizer) returns.")
    batches = list(itertools.islice(stream, steps))
    if not batches:
        raise ValueError("the stream is empty: it gave no batch, so nothing can be measured. Give at least one.")
    notes = []
    if steps is not None and len(batches) < steps:
        notes.append(f"The stream ended after {len(batches)} of {steps} batches; figures are of these.")
    run = _Run(system, batches, loss)
    with run.kept():
        online, watched = run.learn(watch=True)
        written, carried = run.read(tokens), run.carried(tokens)
        effects = run.effects(online, watched) if switch_off else {}
    rows = tuple(_measured(c, watched, written, carried, effects) for c in system.components)
    length = max(_length(batch) for batch in batches)
    health = LevelHealth(system, rows, (), sum(online) / len(online), len(batches), length, tuple(notes))
    return judge(health)


class Watch:
    """What happened to the tensors of one component: sums over the steps of a run."""

    def __init__(self) -> None:
        self.updates, self.gradients, self.steps = 0, [], 0
        self.start: dict[str, Tensor] = {}
        self.end: dict[str, Tensor] = {}
        self.moved = 0.0

    def saw(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], gradients: Iterable[Tensor]) -> None:
        """Note one batch."""
        self.start = self.start or dict(before) or {name: torch.zeros_like(x) for name, x in after.items()}
        changed = [n for n, x in after.items() if n not in before or not torch.equal(before[n], x)]
        self.steps += 1
        self.updates += bool(changed)
        self.moved += math.hypot(*(norm(after[n] - before.get(n, 0)) for n in changed))
        norms = [norm(g) for g in gradients]
        if norms:
            self.gradients.append(math.hypot(*norms))
        self.end = dict(after)

    @property
    def change(self) -> Tensor:
        """The change over the whole run, as one vector."""
        parts = [real(self.end[n] - self.start[n]).flatten() for n in sorted(self.end) if n in self.start]
        return torch.cat(parts) if parts else torch.zeros(0)

    @property
    def relative(self) -> float:
        """The length of the way over all steps, relative to the largest norm of the tensors."""
        sizes = [math.hypot(*(norm(x) for x in held.values())) for held in (self.start, self.end) if held]
        return self.moved / max(sizes) if sizes and max(sizes) > 0 else 0.0


class _Run:
    """A model and its optimizers on the batches, from the same start each time."""

    def __init__(self, system: NestedSystem, batches: list[Any], loss: Loss | None) -> None:
        assert system.model is not None
        self.system, self.model, self.optimizers = system, system.model, system.optimizers
        self.batches, self.loss = batches, loss
        self.parameters, self.modules = dict(self.model.named_parameters()), dict(self.model.named_modules())
        self.reads = learns_by_reading(self.model) and not self.optimizers
        self.off: set[int] = set()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Leave parameters, gradients, buffers, states, modes and random numbers as they are now."""
        self.start = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.buffers = {n: b.detach().clone() for n, b in self.model.named_buffers()}
        self.states = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers]
        gradients = {n: p.grad for n, p in self.parameters.items()}
        with undisturbed(self.model, train=True):
            try:
                yield
            finally:
                self.restore()
                for name, parameter in self.parameters.items():
                    parameter.grad = gradients[name]

    @torch.no_grad()
    def restore(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.start[name])
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self.buffers[name])
        for optimizer, state in zip(self.optimizers, self.states, strict=True):
            optimizer.load_state_dict(copy.deepcopy(state))

    def learn(self, off: Component | None = None, watch: bool = False) -> tuple[list[float], dict[str, Watch]]:
        """The loss of each batch before it is learned; ``off`` does not change."""
        self.restore()
        torch.manual_seed(0)
        self.model.train(not self.reads)
        self.off = level_numbers(off) if self.reads and off is not None else set()
        kinds = WATCHED if self.optimizers else ("statistics",)
        watched = {c.label: Watch() for c in self.system.components if watch and c.kind in kinds}
        losses, held = [], {} if off is None else self.tensors(off)
        still = (
            [self.modules[n] for n in off.members if n in self.modules]
            if off is not None and off.kind == "memory"
            else []
        )
        with without_writes(still):
            for i, batch in enumerate(self.batches):
                before = {c: self.tensors(self.system[c]) for c in watched}
                value = self.step(batch, i, finite=off is None)
                losses.append(value)
                for label, note in watched.items():
                    component = self.system[label]
                    gradients = (self.parameters[n].grad for n in component.members if component.kind != "statistics")
                    note.saw(before[label], self.tensors(component), [g for g in gradients if g is not None])
                if off is not None:
                    held = self.hold(off, held)
        return losses, watched

    def step(self, batch: Any, i: int, finite: bool) -> float:
        """One batch, and a step of the optimizers where one is due."""
        count = self.system.accumulation
        if i % count == 0:
            for parameter in self.parameters.values():
                parameter.grad = None
        value = self.loss_of(batch)
        trains = bool(self.optimizers) and value.requires_grad
        if trains:
            (value / count).backward()
        reached = float(value.detach())
        if finite and not math.isfinite(reached):
            raise ValueError(f"the loss of batch {i} is {reached}: this stream cannot be measured.")
        if trains and (i + 1) % count == 0:
            for optimizer in self.optimizers:
                step: Any = optimizer.step
                closure = inspect.signature(step).parameters.get("closure")
                if closure is not None and closure.default is inspect.Parameter.empty:
                    step(lambda: self._again(batch))
                else:
                    step()
        return reached

    def _again(self, batch: Any) -> Tensor:
        for parameter in self.parameters.values():
            parameter.grad = None
        value = self.loss_of(batch)
        value.backward()
        return value

    def loss_of(self, batch: Any) -> Tensor:
        if self.reads and self.loss is None:
            return read_text(self.model, _ids(batch), self.off).loss
        names = arguments(self.model)
        if isinstance(batch, Tensor) and "input_ids" in names:
            batch = {"input_ids": batch}
        if isinstance(batch, Mapping) and self.loss is None:
            labels = {"labels": batch["input_ids"]} if "labels" in names and "input_ids" in batch else {}
            output = call(self.model, {**labels, **batch})
            found = getattr(output, "loss", None)
        elif self.loss is None:
            found = None
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            found = self.loss(call(self.model, batch[0]), batch[1])
        else:
            found = self.loss(call(self.model, batch), batch)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"a batch of type {type(batch).__name__} gave no loss. Give loss=, called with the output and the "
                "target, or batches of token ids or named arguments for a model that computes its loss."
            )
        return found

    @torch.no_grad()
    def tensors(self, component: Component) -> dict[str, Tensor]:
        """Copies of the tensors of weights, states and statistics, by name."""
        if component.kind == "statistics":
            wanted = tuple(f"{name}." for name in component.members)
            named = {n: b for n, b in self.model.named_buffers() if n.startswith(wanted) and b.is_floating_point()}
        elif component.kind == "optimizer state":
            key = component.name.partition(".")[2]
            named = {
                f"{n}.{key}": x
                for n in component.members
                for optimizer in self.optimizers
                for found, x in states_of(optimizer, self.parameters[n])
                if NUMBER.sub(".*", found) == key
            }
        elif component.kind in WATCHED:
            named = {n: self.parameters[n] for n in component.members}
        else:
            named = {}
        return {name: x.detach().clone() for name, x in named.items()}

    @torch.no_grad()
    def hold(self, component: Component, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put the tensors of a component back; those of a state to their values after the first step."""
        if component.kind in ("weights", "initial weights"):
            for name, value in held.items():
                self.parameters[name].copy_(value)
        elif component.kind == "optimizer state":
            key = component.name.partition(".")[2]
            for n in component.members:
                for optimizer in self.optimizers:
                    for found, x in states_of(optimizer, self.parameters[n]):
                        if NUMBER.sub(".*", found) == key:
                            x.copy_(held.setdefault(f"{n}.{key}", x.clone()))
        return held

    def read(self, tokens: int) -> dict[str, Written]:
        """What memories write in the first batch, at the weights before training."""
        self.restore()
        with undisturbed(self.model):
            if self.reads:
                self.off = set()
                return observe_levels(self.model, _ids(self.batches[0]), self.system.components)
            return observe(self.model, lambda: self.loss_of(self.batches[0]), self.system.components, tokens)

    def carried(self, tokens: int) -> dict[str, tuple[int, int]]:
        """Updates of caches and carried states, and the tokens read for it."""
        ids = _ids(self.batches[0])
        found = [c for c in self.system.components if any("." in n and n not in self.modules for n in c.members)]
        found = [c for c in found if c.kind in ("cache", "memory")]
        if not {"input_ids", "past_key_values"} <= set(arguments(self.model)) or not isinstance(ids, Tensor):
            return {}
        ids = ids[:, :tokens]
        return {c.label: (counted_updates(self.model, ids, c.members), ids.shape[1]) for c in found}

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss of all batches at the present weights."""
        with undisturbed(self.model):
            return sum(float(self.loss_of(batch)) for batch in self.batches) / len(self.batches)

    def effects(self, online: list[float], watched: Mapping[str, Watch]) -> dict[str, dict[str, float]]:
        """Per label: the change of the loss without its writes, and with them taken back; the change of the weights."""
        found: dict[str, dict[str, float]] = {}
        if self.optimizers:
            self.learn()
        end = {n: p.detach().clone() for n, p in self.parameters.items()}
        after = self.evaluate() if self.optimizers else 0.0
        path = math.hypot(*(norm(p - self.start[n]) for n, p in end.items()))
        for component in self.system.components:
            effect = {}
            if component.kind == "memory":
                if not any(n in self.modules and can_stop_writing(self.modules[n]) for n in component.members):
                    continue
            elif component.label not in watched or component.kind == "statistics" or not self.optimizers:
                continue
            losses, _ = self.learn(off=component)
            effect["writes off"] = (sum(losses) - sum(online)) / len(online)
            if component.kind == "optimizer state" and path > 0:
                other = (norm(p.detach() - end[n]) for n, p in self.parameters.items())
                effect["weights"] = math.hypot(*other) / path
            if component.kind in ("weights", "initial weights"):
                effect["initial"] = self._taken_back(component, end) - after
            found[component.label] = effect
        return found

    @torch.no_grad()
    def _taken_back(self, component: Component, end: Mapping[str, Tensor]) -> float:
        self.restore()
        for name, parameter in self.parameters.items():
            if name not in component.members:
                parameter.copy_(end[name])
        return self.evaluate()


WATCHED = ("weights", "initial weights", "optimizer state", "statistics")


def _ids(batch: Any) -> Any:
    """The first argument of a batch, such as its token ids."""
    if isinstance(batch, Mapping):
        return batch.get("input_ids")
    return batch[0] if isinstance(batch, tuple | list) else batch


def _length(batch: Any) -> int:
    """Tokens of a sequence: the second size of ids; 1 for batches without them."""
    batch = _ids(batch)
    if not isinstance(batch, Tensor) or batch.dim() < 2 or (batch.is_floating_point() and batch.dim() != 3):
        return 1
    return batch.shape[1]


def _measured(
    component: Component,
    watched: Mapping[str, Watch],
    written: Mapping[str, Written],
    carried: Mapping[str, tuple[int, int]],
    effects: Mapping[str, Mapping[str, float]],
) -> Measured:
    effect = effects.get(component.label, {})
    both: dict[str, Any] = {"writes_off": effect.get("writes off"), "initial": effect.get("initial")}
    if component.label in written:
        w = written[component.label]
        return Measured(component, w.updates, w.tokens, None, w.size, w.rank, w.change, share=w.share, **both)
    if component.label in watched:
        seen = watched[component.label]
        gradient = sum(seen.gradients) / len(seen.gradients) if seen.gradients else None
        rank = effective_rank(seen.end[n] - seen.start[n] for n in sorted(seen.end) if n in seen.start)
        shapes = tuple(tuple(x.shape) for _, x in sorted(seen.end.items()))
        figures = (seen.updates, seen.steps, gradient, seen.relative, rank, seen.change, shapes)
        return Measured(component, *figures, share=effect.get("weights"), **both)
    updates, inputs = carried.get(component.label, (None, 0))
    return Measured(component, updates, inputs, None, None, None, None, **both)
