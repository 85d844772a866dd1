"""Train and evaluate one cell: a plain loop on batches of the task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.data.synthetic import IGNORE, Batch
from nestlearn.evals.bench.cells import Cell
from nestlearn.evals.bench.suites import Training
from nestlearn.evals.language import state_bytes_by_context
from nestlearn.evals.result import EvalResult
from nestlearn.evals.tasks.base import Score, Task, accuracy, cut, lengths_of, right_by_sequence
from nestlearn.models import HopeConfig, HopeForCausalLM

Status = Literal["solved", "finished", "unconverged", "diverged"]
_EVAL_ROWS = 128
_RANGES = 10


class CellProgress(NamedTuple):
    """The step of a training run, and the last score of the headline split."""

    step: int
    score: float


class Solver(nn.Module):
    """A model with the task's head, or with its own output layer if the task has none."""

    def __init__(self, config: HopeConfig, task: Task) -> None:
        super().__init__()
        self.model = HopeForCausalLM(config)
        self.head = task.head(config.hidden_size)

    def forward(self, inputs: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """Logits of the answer at every position."""
        if self.head is None:
            return self.model(inputs, use_cache=False).logits
        return self.head(self.model.model(inputs, use_cache=False).last_hidden_state)


@dataclass
class Run:
    """The state and the curve of a training run."""

    status: Status = "finished"
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


def run_cell(
    cell: Cell,
    limit: float | None = None,
    report: Callable[[CellProgress], None] = lambda _: None,
    command: str = "",
    device: str = "cpu",
) -> EvalResult:
    """Train the cell's model and evaluate it on every split.

    Args:
        cell: the cell.
        limit: seconds that training may take. The schedule of the learning rate follows the larger of the shares of
            steps and of seconds used, so it also ends within the limit; the run is then "unconverged".
        report: called after every evaluation during training.
        command: the command that repeats the result.
        device: where to train.

    Returns:
        The accuracy on the task's last split; ``details`` has all splits, the learning curve, the status ("solved":
        every split reached ``training.stop``; "finished": all steps; "unconverged"; "diverged": the
        loss became NaN or infinite), parameters and state size.
    """
    start = time.perf_counter()
    splits = {split.name: _to(cell.task.examples(split.name), device) for split in cell.task.splits}
    solver, run = train_cell(cell, splits, limit, report, device)
    counts = {name: _counts(solver, batch) for name, batch in splits.items()}
    scores = {name: _scores(counts[name], cell.task, name) for name in splits}
    headline = scores[cell.task.splits[-1].name]
    return EvalResult(
        task=cell.task.name,
        version=cell.task.version,
        metric=cell.task.metric,
        value=headline["value"],
        stderr=headline["stderr"],
        n=headline["n"],
        seed=cell.seed,
        seconds=time.perf_counter() - start,
        command=command,
        config=cell.settings(),
        details={
            "key": cell.key,
            "recipe": cell.recipe_key,
            "status": run.status,
            "scores": scores,
            "by_length": _by_length(counts, splits, cell.task),
            "curve": run.curve,
            "steps": run.step,
            "tokens": run.tokens,
            "train_seconds": run.seconds,
            "learning_rate": cell.training.rate(cell.mixer),
            "parameters": sum(p.numel() for p in solver.parameters()),
            "state_bytes": _state_bytes(solver.model, splits),
            "device": device,
        },
    )


def train_cell(
    cell: Cell,
    splits: dict[str, Batch],
    limit: float | None = None,
    report: Callable[[CellProgress], None] = lambda _: None,
    device: str = "cpu",
) -> tuple[Solver, Run]:
    """Train the cell's model from its seed, with evaluations on ``splits``; see `run_cell`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        solver = Solver(HopeConfig(**cell.model), cell.task).to(device)
    training, run, start = cell.training, Run(), time.perf_counter()
    batches = cell.task.batches(training.batch_size, cell.seed)
    optimizer = torch.optim.AdamW(
        solver.parameters(), lr=0.0, betas=(0.9, training.beta2), weight_decay=training.weight_decay
    )
    few = {name: _first(batch, training.check_examples) for name, batch in splits.items()}
    while run.step < training.steps and run.status == "finished":
        used = (time.perf_counter() - start) / limit if limit else 0.0
        if used >= 1:
            run.status = "unconverged"
            break
        for group in optimizer.param_groups:
            group["lr"] = training.rate(cell.mixer) * schedule(training, run.step, used)
        batch = _to(next(batches), device)
        loss = _update(solver, optimizer, batch)
        run.step, run.tokens = run.step + 1, run.tokens + batch.inputs.numel()
        if run.step % training.check_every == 0 or run.step == training.steps:
            value = loss.item()
            if not math.isfinite(value):
                run.status = "diverged"
            look = {name: _score(solver, part, cell.task).value for name, part in few.items()}
            seconds = time.perf_counter() - start
            run.curve.append({"step": run.step, "tokens": run.tokens, "seconds": seconds, "loss": value, **look})
            report(CellProgress(run.step, look[cell.task.splits[-1].name]))
            if run.status == "finished" and _solved(solver, cell, look, splits):
                run.status = "solved"
    run.seconds = time.perf_counter() - start
    return solver, run


def _solved(solver: Solver, cell: Cell, look: dict[str, float], splits: dict[str, Batch]) -> bool:
    """Whether every split has reached the score to stop at: first a few sequences are checked, then all."""
    stop = cell.training.stop
    if stop is None or min(look.values()) < stop:
        return False
    return all(_score(solver, batch, cell.task).value >= stop for batch in splits.values())


def _update(solver: Solver, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    """One step; returns the loss before it. Targets are at the positions of their answers: nothing is shifted."""
    solver.train()
    logits = solver(batch.inputs)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(solver.parameters(), 1.0)
    # No step on a gradient that is not finite: weights stay finite, and the next evaluation reports the norm as loss.
    if bool(torch.isfinite(norm)):
        optimizer.step()
        return loss.detach()
    return norm.detach()


def schedule(training: Training, step: int, used: float = 0.0) -> float:
    """The learning rate of an update as a share of the peak.

    Args:
        training: the settings.
        step: updates done.
        used: share of the allowed seconds that is used.
    """
    warm = min(1.0, (step + 1) / max(1, training.warmup))
    progress = min(1.0, max(step / training.steps, used))
    return warm * (training.final + (1 - training.final) * 0.5 * (1 + math.cos(math.pi * progress)))


class Counts(NamedTuple):
    """Per sequence, short ones first: right answers, all answers, and length."""

    right: Int[Tensor, " n"]
    asked: Int[Tensor, " n"]
    length: Int[Tensor, " n"]


@torch.inference_mode()
def _counts(solver: Solver, batch: Batch) -> Counts:
    """The answers of every sequence; a batch holds sequences of similar length."""
    solver.eval()
    lengths = lengths_of(batch)
    order = lengths.argsort(stable=True)
    parts = []
    for rows in order.split(_EVAL_ROWS):
        part = cut(Batch(batch.inputs[rows], batch.targets[rows]))
        parts.append(right_by_sequence(solver(part.inputs).argmax(-1), part.targets))
    right, asked = (torch.cat(column) for column in zip(*parts, strict=True))
    return Counts(right, asked, lengths[order])


def _score(solver: Solver, batch: Batch, task: Task) -> Score:
    counts = _counts(solver, batch)
    return accuracy(counts.right, counts.asked, task.metric)


def _scores(counts: Counts, task: Task, split: str) -> dict[str, Any]:
    """The score of a split, with both accuracies."""
    right, asked, _ = counts
    return {
        **accuracy(right, asked, task.metric)._asdict(),
        "token_accuracy": accuracy(right, asked, "token accuracy").value,
        "sequence_accuracy": accuracy(right, asked, "sequence accuracy").value,
        "chance": task.chance(split),
    }


def _by_length(counts: dict[str, Counts], splits: dict[str, Batch], task: Task) -> list[dict[str, Any]]:
    """Accuracy over ranges of length, of all splits together; empty if the splits do not differ in length.

    The name of a range is its longest length; ``trained`` says whether the first split reaches the range.
    """
    if any(split.axis != "length" for split in task.splits):
        return []
    right, asked, length = (torch.cat(column) for column in zip(*counts.values(), strict=True))
    trained = int(lengths_of(splits[task.splits[0].name]).max())
    width = max(1, math.ceil(int(length.max()) / _RANGES))
    ranges = []
    for low in range(0, int(length.max()), width):
        inside = (length > low) & (length <= low + width)
        if bool(inside.any()):
            score = accuracy(right[inside], asked[inside], task.metric)
            ranges.append({"length": low + width, "trained": low < trained, **score._asdict()})
    return ranges


def _state_bytes(model: HopeForCausalLM, splits: dict[str, Batch]) -> int:
    """State of one row after the longest evaluation sequence."""
    return state_bytes_by_context(model, [max(batch.inputs.shape[1] for batch in splits.values())])[0]


def _first(batch: Batch, rows: int) -> Batch:
    """``rows`` sequences of a split, spread evenly over it."""
    step = max(1, len(batch.inputs) // rows)
    return Batch(batch.inputs[::step][:rows], batch.targets[::step][:rows])


def _to(batch: Batch, device: str) -> Batch:
    return Batch(batch.inputs.to(device), batch.targets.to(device))
