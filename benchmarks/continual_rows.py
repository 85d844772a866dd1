"""What the benchmarks of continual learning share: rows of a table, runs that can be continued, matched step sizes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from continual_report import accuracy_chart, continual_key, matrix_chart, table, to_eval_result
from nestlearn.continual import CMS, ContinualLearner, FineTuning, Method
from nestlearn.data import TaskStream
from nestlearn.evals.bench.store import ResultStore
from nestlearn.optim import OptimizerWrapper


class StepMeter(OptimizerWrapper):
    """Measures how far each parameter moves: the mean over steps of the mean absolute change."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base)
        self.moved = [0.0 for _ in self.parameters()]
        self.steps = 0

    def update(self) -> None:
        before = [p.detach().clone() for p in self.parameters()]
        self.base.step()
        self.steps += 1
        changes = zip(self.parameters(), before, strict=True)
        self.moved = [
            total + float((p - old).abs().mean()) for total, (p, old) in zip(self.moved, changes, strict=True)
        ]

    def own_state(self) -> dict[str, Any]:
        return {"steps": self.steps, "moved": self.moved}

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.steps, self.moved = state["steps"], state["moved"]


class MeteredCMS(CMS):
    """CMS whose steps are measured."""

    def make_optimizer(self, model: nn.Module, factory: Any) -> torch.optim.Optimizer:
        self.meter = StepMeter(super().make_optimizer(model, factory))
        return self.meter


@dataclass(frozen=True)
class Row:
    """One line of the table: a method, its learning rate, and whether it is told where tasks end."""

    method: Callable[[], Method] = FineTuning
    rate: float = 1e-3
    boundaries: str = "unknown"
    options: dict[str, Any] = field(default_factory=dict)  # of the model
    matched: str = ""  # "all" or "each": the rate by which fine-tuning takes the average step of CMS


@dataclass(frozen=True)
class Bench:
    """A stream, a model and how long each task is learned.

    Attributes:
        name: of the folder and the command.
        stream, model: made from a seed.
        epochs: per task.
        settings: everything that the numbers depend on beside the rows.
        command: what repeats it.
        matched: the row whose average step fine-tuning takes where it is matched, on seed 100.
        batch_size: examples per step.
    """

    name: str
    stream: Callable[[int], TaskStream]
    model: Callable[[int, Row], nn.Module]
    epochs: int
    settings: dict[str, Any]
    command: str
    matched: Row
    batch_size: int = 32
    curves: Sequence[str] = field(default_factory=tuple)

    def learner(self, row: Row, seed: int, model: nn.Module, optimizer: Any, method: Method) -> ContinualLearner:
        """The row's learner."""
        return ContinualLearner(
            model, optimizer, method=method, epochs=self.epochs, batch_size=self.batch_size,
            boundaries=row.boundaries, seed=seed,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip

    def matched_rates(self) -> dict[str, list[float]]:
        """Rates at which fine-tuning moves as far per step as CMS does, on seed 100: one for all, one per parameter."""

        def moved(row: Row, metered: MeteredCMS) -> tuple[list[float], list[int]]:
            torch.manual_seed(100)
            model, stream = self.model(100, row), self.stream(100)
            learner = self.learner(row, 100, model, partial(torch.optim.Adam, lr=row.rate), metered)
            for place, task in enumerate(stream.tasks):
                learner.learn(task.train, place)
            return metered.meter.moved, [p.numel() for p in metered.meter.parameters()]

        given = self.matched.method()
        assert isinstance(given, CMS)
        settings = {"levels": given.levels, "projection": given.projection, "transfer": given.transfer}
        (own, sizes), (plain, _) = moved(self.matched, MeteredCMS(**settings)), moved(self.matched, MeteredCMS())
        total = sum(m * n for m, n in zip(own, sizes, strict=True)) / sum(
            m * n for m, n in zip(plain, sizes, strict=True)
        )
        each = [m / max(n, 1e-12) for m, n in zip(own, plain, strict=True)]
        return {"all": [self.matched.rate * total], "each": [self.matched.rate * ratio for ratio in each]}

    def run(self, name: str, row: Row, seed: int, rates: dict[str, list[float]]) -> tuple[Any, int]:
        """One row, one seed: the result, and how many test examples it rests on."""
        torch.manual_seed(seed)
        model, stream = self.model(seed, row), self.stream(seed)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer: Any = partial(torch.optim.Adam, lr=rates["all"][0] if row.matched else row.rate)
        if row.matched == "each":
            groups = [{"params": [p], "lr": rate} for p, rate in zip(trained, rates["each"], strict=True)]
            optimizer = torch.optim.Adam(groups)
        learner = self.learner(row, seed, model, optimizer, row.method())
        return learner.fit(stream), sum(len(task.test) for task in stream.tasks)

    def run_all(self, rows: dict[str, Row], seeds: Sequence[int], out: Path) -> None:
        """Runs what is missing, seed by seed, and writes the tables after every seed."""
        folder = out / self.name
        store, rates = ResultStore(folder), {}
        if any(row.matched for row in rows.values()):
            rates = self.matched_rates()
            print({"all": rates["all"], "each": [f"{rate:.1e}" for rate in rates["each"]]}, flush=True)
        for seed in seeds:
            for name, row in rows.items():
                if continual_key(name, seed, self.settings) in store.finished():
                    continue
                result, tested = self.run(name, row, seed, rates)
                store.append(to_eval_result(result, row=name, settings=self.settings, n=tested, command=self.command))
                print(f"{name}, seed {seed}: {100 * result.metrics.average_accuracy:.1f} %", flush=True)
            self.write(folder, store)
        print((folder / "table.md").read_text())

    def write(self, folder: Path, store: ResultStore) -> None:
        """The table, and charts of the rows worth a curve."""
        results = store.results()
        (folder / "table.md").write_text("\n".join(table(results)) + "\n")
        curves = [row for row in self.curves if any(result.config["row"] == row for result in results)]
        if curves:
            paper = '<svg style="background:white;color:black" '
            (folder / "accuracy.svg").write_text(accuracy_chart(results, curves).replace("<svg ", paper, 1))
            first = {row: next(r for r in results if r.config["row"] == row).details["matrix"] for row in curves}
            (folder / "matrix.svg").write_text(matrix_chart(first).replace("<svg ", paper, 1))


def arguments(description: str | None, groups: Sequence[str], out: str) -> argparse.ArgumentParser:
    """What the command lines share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=groups, default=groups[0])
    parser.add_argument("--rows", nargs="+", help="only rows whose names contain one of these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def chosen(rows: dict[str, Row], parts: Sequence[str] | None) -> dict[str, Row]:
    """The rows whose names contain one of the parts."""
    return {name: row for name, row in rows.items() if not parts or any(part in name for part in parts)}
