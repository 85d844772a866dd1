"""How the erasing term of DGD affects a network that learns digits: python benchmarks/dgd_digits.py

A perceptron 64-128-128-10 on scikit-learn's digits: 1,437 for training in batches of 64, 360 held out, the same batches
for every optimizer of a seed; constant learning rates of one grid. Writes docs/results/dgd_digits.jsonl, one record per
run, and prints the best rate of each optimizer.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from common import RESULTS, Records, batches, parse, parser, table
from nestlearn.optim import DGD

RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
Make = Callable[[nn.Module, float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda net, lr: torch.optim.SGD(net.parameters(), lr=lr),
    "AdamW": lambda net, lr: torch.optim.AdamW(net.parameters(), lr=lr),
    "DGD batch, erase 1": lambda net, lr: DGD(net.parameters(), net, lr=lr),
    "DGD batch, erase 0.1": lambda net, lr: DGD(net.parameters(), net, lr=lr, erase=0.1),
    "DGD batch, erase 0.01": lambda net, lr: DGD(net.parameters(), net, lr=lr, erase=0.01),
    "DGD batch, erase 0": lambda net, lr: DGD(net.parameters(), net, lr=lr, erase=0.0),
    "DGD sample, erase 1": lambda net, lr: DGD(net.parameters(), net, lr=lr, form="sample"),
    "DGD sample, erase 0": lambda net, lr: DGD(net.parameters(), net, lr=lr, form="sample", erase=0.0),
}


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out images and labels, pixels in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(images / 16.0, dtype=torch.float32)[order], torch.tensor(labels)[order]
    return x[360:], y[360:], x[:360], y[:360]


def run(name: str, rate: float, seed: int, epochs: int) -> dict[str, Any]:
    """One training; infinite losses where it diverged."""
    x, y, held_x, held_y = digits(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer, loss_of = OPTIMIZERS[name](net, rate), nn.CrossEntropyLoss()
    shuffler, begin = torch.Generator().manual_seed(seed), time.perf_counter()
    for _ in range(epochs):
        for rows in batches(len(x), 64, shuffler):
            optimizer.zero_grad()
            loss_of(net(x[rows]), y[rows]).backward()
            optimizer.step()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        losses = [float(loss_of(net(a), b)) for a, b in ((x, y), (held_x, held_y))]
        accuracy = float((net(held_x).argmax(1) == held_y).double().mean())
    training, held = (loss if math.isfinite(loss) else math.inf for loss in losses)
    record = {"optimizer": name, "rate": rate, "seed": seed, "epochs": epochs, "training_loss": training}
    return {**record, "held_out_loss": held, "held_out_accuracy": accuracy, "seconds": round(seconds, 2)}


def main(words: Sequence[str] | None = None) -> None:
    """Run the grid and print the best rate of each optimizer."""
    made = parser(__doc__, RESULTS / "dgd_digits.jsonl", seeds=range(3))
    made.add_argument("--epochs", type=int, default=10)
    options = parse(made, words)
    records, best = Records(options.out, fresh=True), []
    keys = ("training_loss", "held_out_loss", "held_out_accuracy", "seconds")
    for name in OPTIMIZERS:
        means = []
        # AdamW's steps are larger at the same rate: as many rates, 1,000 times smaller.
        for rate in RATES if name != "AdamW" else (rate / 1000 for rate in RATES):
            runs = [records.add(run(name, rate, seed, options.epochs)) for seed in options.seeds]
            means.append({"rate": rate} | {key: statistics.mean(r[key] for r in runs) for key in keys})
        lowest = min(means, key=lambda mean: mean["held_out_loss"])
        best.append([name, f"{lowest['rate']:g}", *(f"{lowest[key]:.4f}" for key in keys)])
    print(table(["optimizer", "rate", *keys], best))


if __name__ == "__main__":
    main()
