"""Optimizers side by side: the learning rate of each from one grid, then three seeds at equal steps and at equal time.

    python benchmarks/optimizers.py --task vit --out runs/optimizers
    python benchmarks/optimizers.py --task language --out runs/optimizers
    python benchmarks/optimizers.py --task permuted --out runs/optimizers
    python benchmarks/optimizers.py --task small-language --tune-steps 150 --out runs/optimizers --optimizers \
        adamw muon m3 "muon, outer nesterov" "muon, mixed before" "dgd, inverse"
    python benchmarks/optimizers.py --task vit --optimizers adamw muon m3 --seeds 0 1 2 3

Rates are chosen on seed 100 by the task's measure, climbing the grid from a start until both neighbours are worse.
AdamW is tuned first; its rate then is that of the parameters that are no matrices under every other rule. "Equal time"
repeats a run with as many steps as fit into the seconds (of one core) that AdamW took. Finished runs in --out are not
repeated; results.jsonl has a record per run, from which benchmarks/optimizer_report.py makes tables and curves.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import Record, Records, parse, parser
from nestlearn.optim import (
    DGD,
    M3,
    AssociativeMomentum,
    DeepMomentum,
    DeltaMomentum,
    DeltaRule,
    HigherOrderMomentum,
    NestedTransfer,
    NewtonSchulz,
    param_groups,
)
from optimizer_report import TUNED, final, table
from optimizer_tasks import EXPERIMENTS, Optimizers, Task, train

GRID = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, 100.0)
DECAY = 0.1
Make = Callable[[nn.Module, float, float], Optimizers]


def adamw(model: nn.Module, lr: float, rest: float) -> Optimizers:
    """AdamW for everything."""
    groups = param_groups(model, lr=lr, weight_decay=DECAY)
    plain = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
    return [torch.optim.AdamW(plain, betas=(0.9, 0.95))]


def muon(model: nn.Module, lr: float, rest: float) -> Optimizers:
    """torch's Muon for matrices, AdamW for the rest."""
    groups = param_groups(model, lr=lr, adamw_lr=rest, weight_decay=DECAY)
    plain = {rule: [{key: group[key] for key in ("params", "lr", "weight_decay")}
             for group in groups if group["rule"] == rule] for rule in ("matrix", "adamw")}  # fmt: skip
    return [
        torch.optim.Muon(plain["matrix"], adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(plain["adamw"], betas=(0.9, 0.95)),
    ]


def of_package(kind: Any, **settings: Any) -> Make:
    """An optimizer of this package on the groups of the model; its steps are of AdamW's size at AdamW's rate."""

    def make(model: nn.Module, lr: float, rest: float) -> Optimizers:
        return [kind(param_groups(model, lr=lr, adamw_lr=rest, weight_decay=DECAY), **settings)]

    return make


def gradient_sized(kind: Any, **settings: Any) -> Make:
    """An optimizer whose steps are of the gradient's size, at rates of SGD.

    Decoupled decay is proportional to the rate: at a rate of 3 it would take a third of every weight in one step. So
    the decay of matrices is set to that of AdamW's.
    """

    def make(model: nn.Module, lr: float, rest: float) -> Optimizers:
        groups = param_groups(model, lr=lr, adamw_lr=rest, weight_decay=DECAY)
        for group in groups:
            if group["rule"] == "matrix":
                group["weight_decay"] *= rest / lr
        watched = {"model": model} if kind is DGD else {}
        return [kind(groups, **watched, **settings)]

    return make


def outer_nesterov(model: nn.Module, lr: float, rest: float) -> Optimizers:
    """Muon inside, and Nesterov's step on the weights every 30 steps."""
    muon = M3(param_groups(model, lr=lr, adamw_lr=rest, weight_decay=DECAY), **MUON)
    return [NestedTransfer(muon, rate=1.0, period=30, momentum=0.5)]


def inverse(model: nn.Module, lr: float, rest: float) -> Optimizers:
    """DGD with the inverse second moment of the inputs, at rates of AdamW."""
    return [DGD(param_groups(model, lr=lr, adamw_lr=rest, weight_decay=DECAY), model, precondition="inverse")]


MUON = {"alpha": 0.0, "second_moment": False}
BEFORE = {"second_moment": False, "mix": "before", "alpha": 0.3, "timescales": (100.0,), "slow_from": 100}

# Name: how it is made, and where on the grid the search begins.
OPTIMIZERS: dict[str, tuple[Make, float]] = {
    "adamw": (adamw, 3e-3),
    "muon": (muon, 1e-2),
    "m3": (of_package(M3), 3e-3),
    "m3, damping 0": (of_package(M3, damping=0.0), 1e-2),
    "m3, no slow memory, damping 0": (of_package(M3, alpha=0.0, damping=0.0), 1e-2),
    "m3, α = 0.5, damping 0": (of_package(M3, alpha=0.5, damping=0.0), 3e-3),
    "m3, α = 0.5, no second moment": (of_package(M3, alpha=0.5, second_moment=False), 3e-3),
    "m3, algorithm 1": (of_package(M3, alpha=0.5, accumulate="paper", nesterov=False, adjust_lr=None), 1e-4),
    "momentum": (gradient_sized(AssociativeMomentum), 1e-1),
    "momentum, orthogonalized": (of_package(AssociativeMomentum, output=NewtonSchulz()), 3e-3),
    "delta momentum": (gradient_sized(DeltaMomentum), 1e-1),
    "delta momentum, orthogonalized": (of_package(AssociativeMomentum, delta=DeltaRule(), output=NewtonSchulz()), 1e-3),
    "higher-order momentum": (gradient_sized(HigherOrderMomentum), 1e-1),
    "deep momentum": (gradient_sized(DeepMomentum), 1e-1),
    "deep momentum, orthogonalized": (of_package(DeepMomentum, momentum=0.9, output=NewtonSchulz()), 1e-3),
    "dgd": (gradient_sized(DGD, erase=1.0), 1.0),
    "dgd, nothing erased": (gradient_sized(DGD, erase=0.0), 3.0),
    "muon, mixed before": (of_package(M3, **BEFORE), 3e-3),
    "muon, outer nesterov": (outer_nesterov, 3e-3),
    "dgd, inverse": (inverse, 3e-3),
}


class Runs:
    """The runs of one task; finished ones are not repeated."""

    def __init__(self, path: Path, task: Task) -> None:
        self.records, self.task = Records(path), task

    def get(self, name: str, lr: float, rest: float, seed: int, steps: int) -> Record:
        """The record of a run."""
        key = {"task": self.task.name, "optimizer": name, "lr": lr, "adamw_lr": rest, "seed": seed, "steps": steps}
        make = OPTIMIZERS[name][0]
        return self.records.get(
            key, lambda: train(self.task, lambda model: make(model, lr, rest), seed, steps, points=10)
        )

    def tune(self, name: str, rest: float | None, steps: int) -> float:
        """The best rate of the grid on seed 100, by climbing from the start."""
        scores: dict[int, float] = {}

        def score(place: int) -> float:
            if place not in scores:
                inside = 0 <= place < len(GRID)
                record = self.get(name, GRID[place], rest or GRID[place], TUNED, steps) if inside else None
                scores[place] = final(record) if record else float("inf")
            return scores[place]

        place = GRID.index(OPTIMIZERS[name][1])
        while True:
            best = min((place, place - 1, place + 1), key=score)
            if best == place:
                return GRID[place]
            place = best


def main(words: Sequence[str] | None = None) -> None:
    """Tune every optimizer, run it on all seeds, and print the table after each."""
    made = parser(__doc__, "runs/optimizers", seeds=range(3))
    made.add_argument("--task", choices=EXPERIMENTS, required=True)
    made.add_argument("--optimizers", nargs="*", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    made.add_argument("--steps", type=int, help="of a run (the task's own by default)")
    made.add_argument("--equal-steps-only", action="store_true", help="no runs at equal time")
    made.add_argument("--tune-steps", type=int, help="of a run that tunes (as many by default)")
    options = parse(made, words)
    task = EXPERIMENTS[options.task]
    steps = options.steps or task.steps
    tune_steps = options.tune_steps or steps
    runs = Runs(options.out / task.name / "results.jsonl", task)
    rest = runs.tune("adamw", None, tune_steps)
    seconds = statistics.mean(runs.get("adamw", rest, rest, seed, steps)["cpu_seconds"] for seed in options.seeds)
    for name in options.optimizers:
        lr = rest if name == "adamw" else runs.tune(name, rest, tune_steps)
        own = statistics.mean(runs.get(name, lr, rest, seed, steps)["cpu_seconds"] for seed in options.seeds)
        if own > 1.02 * seconds and not options.equal_steps_only:
            for seed in options.seeds:
                runs.get(name, lr, rest, seed, round(steps * seconds / own))
        print(table(runs.records.all), flush=True)


if __name__ == "__main__":
    main()
