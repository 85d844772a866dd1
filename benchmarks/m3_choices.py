"""What decision 54 rests on: python benchmarks/m3_choices.py [--out runs/m3_choices.jsonl]

The language model of optimizers.py, 150 steps at a rate of 0.01, seed 100, with other weights of the slow direction,
slow periods and damping; and a perceptron with ReLU on the digits, 300 steps, with other damping. One record per run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from nestlearn.allocator import tune_allocator
from nestlearn.optim import M3
from optimizer_tasks import EXPERIMENTS, digits, train
from optimizers import of_package

LANGUAGE: list[dict[str, Any]] = [
    {"alpha": 0.5, "damping": 0.0},
    {"alpha": 0.25, "damping": 0.0},
    {"alpha": 0.25, "slow_period": 50, "damping": 0.0},
    {"alpha": 0.1, "damping": 0.0},
    {"alpha": 0.0, "damping": 0.0},
    {"alpha": 0.1, "damping": 0.01},
    {"alpha": 0.1, "damping": 0.1},
    {"alpha": 0.1, "damping": 0.3},
    {"alpha": 0.1, "damping": 1.0},
]
DAMPING = (0.0, 0.01, 0.1, 0.3, 1.0)


def language(settings: dict[str, Any]) -> dict[str, Any]:
    """Held-out bits per token of one run."""
    run = train(EXPERIMENTS["language"], lambda m: of_package(M3, **settings)(m, 0.01, 1e-3), 100, 150, points=3)
    return {"task": "language", **settings, "held-out bits per token": run["curve"][-1]["held-out bits per token"]}


def relu(damping: float, steps: int = 300) -> dict[str, Any]:
    """Training loss at the end, and the mean share of the 16 largest elements in the update of the middle map."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = M3(model.parameters(), lr=3e-3, weight_decay=0.0, damping=damping)
    generator, data, middle = torch.Generator().manual_seed(1), digits().train, model[2]
    assert isinstance(middle, nn.Linear)
    losses, shares = [], []
    for _ in range(steps):
        batch = torch.randint(len(data.inputs), (32,), generator=generator)
        loss = F.cross_entropy(model(data.inputs[batch]), data.targets[batch])
        optimizer.zero_grad()
        loss.backward()
        before = middle.weight.detach().clone()
        optimizer.step()
        squares = (middle.weight.detach() - before).flatten().square()
        shares.append(float(squares.topk(16).values.sum() / squares.sum()))
        losses.append(loss.item())
    return {"task": "relu", "damping": damping, "training loss": sum(losses[-5:]) / 5, "share": sum(shares) / steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/m3_choices.jsonl"))
    parser.add_argument("--task", choices=["relu", "language"], nargs="*", default=["relu", "language"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as file:
        for task, settings in [("relu", x) for x in DAMPING] + [("language", x) for x in LANGUAGE]:
            if task in options.task:
                record = relu(settings) if isinstance(settings, float) else language(settings)
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    tune_allocator()
    main()
