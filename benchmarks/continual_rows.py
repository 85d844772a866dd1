"""What the benchmarks of continual learning share: rows of a table, runs that can be continued, matched step sizes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import parser, save_svg
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
        name: of the folder.
        stream, model: made from a seed.
        epochs: per task.
        settings: everything other than the row that the numbers depend on.
        command: the command that repeats the records.
        matched: the row whose average step, on seed 100, a row with ``matched`` takes.
        batch_size: examples per step.
        curves: rows that the charts show.
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

        def moved(metered: MeteredCMS) -> tuple[Tensor, Tensor]:
            """Mean step of each parameter, and its size."""
            torch.manual_seed(100)
            optimizer = partial(torch.optim.Adam, lr=self.matched.rate)
            learner = self.learner(self.matched, 100, self.model(100, self.matched), optimizer, metered)
            for place, task in enumerate(self.stream(100).tasks):
                learner.learn(task.train, place)
            return torch.tensor(metered.meter.moved), torch.tensor([p.numel() for p in metered.meter.parameters()])

        given = self.matched.method()
        assert isinstance(given, CMS)
        settings = {"levels": given.levels, "projection": given.projection, "transfer": given.transfer}
        (own, sizes), (plain, _) = moved(MeteredCMS(**settings)), moved(MeteredCMS())
        total, each = (own @ sizes.float()) / (plain @ sizes.float()), own / plain.clamp(min=1e-12)
        return {"all": [self.matched.rate * float(total)], "each": (self.matched.rate * each).tolist()}

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
            save_svg(folder / "accuracy.svg", accuracy_chart(results, curves))
            first = {row: next(r for r in results if r.config["row"] == row).details["matrix"] for row in curves}
            save_svg(folder / "matrix.svg", matrix_chart(first))


def arguments(description: str | None, groups: Sequence[str], out: str) -> argparse.ArgumentParser:
    """The options that the command lines share."""
    made = parser(description, out, seeds=range(3))
    made.add_argument("--group", choices=groups, default=groups[0])
    made.add_argument("--rows", nargs="+", help="only rows whose names contain one of these")
    return made


def chosen(rows: dict[str, Row], parts: Sequence[str] | None) -> dict[str, Row]:
    """The rows whose names contain one of the parts."""
    return {name: row for name, row in rows.items() if not parts or any(part in name for part in parts)}
