"""The measurements behind decision 54: python benchmarks/m3_choices.py [--out runs/m3_choices.jsonl]

The language model of optimizers.py, 150 steps at a rate of 0.01, seed 100, with other weights of the slow direction,
slow periods and damping; and a perceptron with ReLU on the digits, 300 steps, with other damping. One record per run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from common import Records, parse, parser
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


def main(words: Sequence[str] | None = None) -> None:
    """Run every setting."""
    made = parser(__doc__, "runs/m3_choices.jsonl")
    made.add_argument("--task", choices=["relu", "language"], nargs="*", default=["relu", "language"])
    options = parse(made, words)
    records = Records(options.out)
    for damping in DAMPING if "relu" in options.task else ():
        records.add(relu(damping))
    for settings in LANGUAGE if "language" in options.task else ():
        records.add(language(settings))


if __name__ == "__main__":
    main()
