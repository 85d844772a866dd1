"""The measurements behind decision 53: python benchmarks/newton_schulz.py appends to docs/results/newton_schulz.jsonl.

Times of one Newton-Schulz iteration in bfloat16, per matrix, with products of matrices, of batches of one and of
eight, and of ``X X^T`` at once and by blocks (medians of calls that take turns); and the part of a step of M3 that is
Newton-Schulz.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from unittest import mock

import torch
from torch import Tensor, nn

from common import RESULTS, Records, parse, parser
from nestlearn.memory.kernels.newton_schulz import newton_schulz, self_product
from nestlearn.optim import M3, orthogonal

SHAPES = [(64, 64), (446, 446), (256, 1024), (1024, 4096)]
COUNT = 8


def matrices(x: Tensor) -> None:
    """One iteration, matrix by matrix."""
    for m in x:
        gram = m @ m.mT
        torch.addmm(m, torch.addmm(gram, gram, gram, beta=-4.8, alpha=2.0), m, beta=3.4)


def batches(x: Tensor, size: int) -> None:
    """One iteration, some matrices at a time."""
    for m in x.split(size):
        gram = m @ m.mT
        torch.baddbmm(m, torch.baddbmm(gram, gram, gram, beta=-4.8, alpha=2.0), m, beta=3.4)


def milliseconds(runs: dict[str, Callable[[], object]], rounds: int = 9) -> dict[str, float]:
    """Median time of each call, per matrix."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for current in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if current:
                taken[name].append(time.perf_counter() - began)
    return {name: 1e3 * statistics.median(values) / COUNT for name, values in taken.items()}


def share() -> float:
    """Part of M3's steps over eight matrices of 446 x 446 that is Newton-Schulz, over twenty steps."""
    weights = [nn.Parameter(torch.randn(446, 446)) for _ in range(COUNT)]
    for weight in weights:
        weight.grad = torch.randn(446, 446)
    optimizer, inside = M3(weights), [0.0]
    optimizer.step()

    def timed(*args: object, **settings: object) -> Tensor:
        began = time.perf_counter()
        result = newton_schulz(*args, **settings)  # pyright: ignore[reportArgumentType]
        inside[0] += time.perf_counter() - began
        return result

    with mock.patch.object(orthogonal, "newton_schulz", timed):
        began = time.perf_counter()
        for _ in range(20):
            optimizer.step()
        return inside[0] / (time.perf_counter() - began)


@torch.no_grad()
def main(words: Sequence[str] | None = None) -> None:
    """Check the product by blocks, then time everything."""
    options = parse(parser(__doc__, RESULTS / "newton_schulz.jsonl"), words)
    records = Records(options.out)
    for shape in SHAPES:
        x = torch.randn(COUNT, *shape).bfloat16() / shape[1] ** 0.5
        if not torch.equal(self_product(x[0]), x[0] @ x[0].T):
            raise RuntimeError(f"X X^T by blocks differs at {shape}; it must be right before it is timed.")
        runs = {
            "matrices": lambda x=x: matrices(x),
            "batches of 1": lambda x=x: batches(x, 1),
            "batches of 8": lambda x=x: batches(x, 8),
            "product": lambda x=x: [m @ m.mT for m in x],
            "product by blocks": lambda x=x: [self_product(m) for m in x],
        }
        records.add({"shape": shape, "threads": options.threads, "milliseconds": milliseconds(runs)})
    records.add({"part of a step of M3": share(), "threads": options.threads})


if __name__ == "__main__":
    main()
