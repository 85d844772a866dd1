"""Optimizers side by side: the learning rate of each from one grid, then three seeds at equal steps and at equal time.

    python benchmarks/optimizers.py --task vit --out runs/optimizers
    python benchmarks/optimizers.py --task language --out runs/optimizers
    python benchmarks/optimizers.py --task permuted --out runs/optimizers
    python benchmarks/optimizers.py --task vit --optimizers adamw muon m3 --seeds 0 1 2 3

Rates are chosen on seed 100 by the task's measure, climbing the grid from a start until both neighbours are worse.
AdamW is tuned first; its rate then is that of the parameters that are no matrices under every other rule. "Equal time"
repeats a run with as many steps as fit into the seconds (of one core) that AdamW took. Finished runs in --out are not
repeated; results.jsonl has a record per run, from which benchmarks/optimizer_report.py makes tables and curves.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nestlearn.allocator import tune_allocator
from nestlearn.optim import (
    DGD,
    M3,
    AssociativeMomentum,
    DeepMomentum,
    DeltaMomentum,
    DeltaRule,
    HigherOrderMomentum,
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
    """One whose steps are of the gradient's size, at rates of SGD.

    Decoupled decay is by the rate: at 3 in place of 1e-3 it would take a third of every weight in one step. So matrices
    lose as much in a step as AdamW's do.
    """

    def make(model: nn.Module, lr: float, rest: float) -> Optimizers:
        groups = param_groups(model, lr=lr, adamw_lr=rest, weight_decay=DECAY)
        for group in groups:
            if group["rule"] == "matrix":
                group["weight_decay"] *= rest / lr
        watched = {"model": model} if kind is DGD else {}
        return [kind(groups, **watched, **settings)]

    return make


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
}


class Runs:
    """The records of a folder: what is finished is not run again."""

    def __init__(self, path: Path, task: Task, steps: int) -> None:
        self.path, self.task, self.steps = path, task, steps
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def get(self, name: str, lr: float, rest: float, seed: int, steps: int) -> dict[str, Any]:
        """The record of a run, made now if there is none."""
        key = {"task": self.task.name, "optimizer": name, "lr": lr, "adamw_lr": rest, "seed": seed, "steps": steps}
        for record in self.records:
            if all(record[field] == value for field, value in key.items()):
                return record
        make = OPTIMIZERS[name][0]
        record = key | train(self.task, lambda model: make(model, lr, rest), seed, steps, points=10)
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        end = {} if record["diverged"] else record["curve"][-1]
        print(json.dumps(key | end), flush=True)
        return record

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=EXPERIMENTS, required=True)
    parser.add_argument("--optimizers", nargs="*", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of a run (the task's own by default)")
    parser.add_argument("--equal-steps-only", action="store_true", help="no runs at equal time")
    parser.add_argument("--tune-steps", type=int, help="of a run that tunes (as many by default)")
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = EXPERIMENTS[options.task]
    steps = options.steps or task.steps
    runs = Runs(options.out / task.name / "results.jsonl", task, steps)
    tune_steps = options.tune_steps or steps
    rest = runs.tune("adamw", None, tune_steps)
    base = [runs.get("adamw", rest, rest, seed, steps) for seed in options.seeds]
    seconds = statistics.mean(record["cpu_seconds"] for record in base)
    for name in options.optimizers:
        lr = rest if name == "adamw" else runs.tune(name, rest, tune_steps)
        full = [runs.get(name, lr, rest, seed, steps) for seed in options.seeds]
        own = statistics.mean(record["cpu_seconds"] for record in full)
        if own > 1.02 * seconds and not options.equal_steps_only:
            for seed in options.seeds:
                runs.get(name, lr, rest, seed, round(steps * seconds / own))
        print(table(runs.records), flush=True)


if __name__ == "__main__":
    tune_allocator()
    main()
