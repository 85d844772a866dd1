"""Ten permuted-digit tasks, one head: what each part of a Continuum Memory System keeps, with its controls.

    python benchmarks/continual_digits.py --out runs/continual_digits
    python benchmarks/continual_digits.py --group levels --out runs/continual_digits
    python benchmarks/continual_digits.py --unequal --seeds 0 1 2 3 4 --out runs/continual_digits
    python benchmarks/continual_digits.py --group grid --seeds 100 101 --out runs/continual_digits

A residual network of perceptron blocks learns the digits with its pixels in ten different orders, one after the other:
Adam, 10 epochs of 1,347 images a task, batches of 32, nothing stored but by replay. Finished runs in --out are not
repeated; results.jsonl has a record per run, table.md the tables.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from common import parse
from continual_rows import Bench, Row, arguments, chosen
from nestlearn.continual import CMS, EWC, ExperienceReplay, JointTraining, LoRA, Projection, Transfer
from nestlearn.data import Examples, TaskStream, permuted_digits

TASKS, EPOCHS = 10, 10
UNEQUAL = (2, 20)
"""Fewest and most passes over a task of unequal length."""


class Block(nn.Module):
    """``x + W_out gelu(W_in norm(x))``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(nn.functional.gelu(self.inner(self.norm(x))))


class ResidualNet(nn.Module):
    """64 pixels, a linear map to the stream, residual blocks, a linear map to ten classes."""

    def __init__(self, seed: int, width: int = 128, hidden: int = 128, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(64, width)
        self.blocks = nn.Sequential(*(Block(width, hidden) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.last = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.blocks(self.first(x))))


def levels(*periods: int, ends: int) -> Callable[[nn.Module], list[Any]]:
    """Levels of a network: the periods of its blocks, and the period of its first and last map."""

    def of(model: Any) -> list[Any]:
        by_period: dict[int, list[nn.Module]] = {}
        for block, period in zip(model.blocks, periods, strict=True):
            by_period.setdefault(period, []).append(block)
        by_period.setdefault(ends, []).extend([model.first, model.last])
        return [(modules, period) for period, modules in by_period.items()]

    return of


def unequal_tasks(stream: TaskStream, seed: int) -> TaskStream:
    """The stream with a random number of passes over each task; learn it in one epoch."""
    draw = random.Random(seed)
    tasks = []
    for task in stream.tasks:
        passes = draw.randint(*UNEQUAL)
        train = Examples(task.train.inputs.repeat(passes, 1), task.train.targets.repeat(passes))
        tasks.append(replace(task, train=train))
    return replace(stream, tasks=tuple(tasks), config=stream.config | {"passes": list(UNEQUAL)})


# Periods that no task length (430 steps) is a multiple of.
PROJECTION, TRANSFER = Projection(alpha=300.0, period=300), Transfer(rate=0.5, period=100)
THREE_LEVELS = levels(1, 16, 128, ends=128)
TRIAL = Projection(alpha=100.0, period=215, apply_to="gradient")
AT_ENDS = Projection(alpha=10.0, period=None, last_epoch_only=True, apply_to="gradient")


def full(**changes: Any) -> Row:
    """CMS with projection and transfer, but for the changes."""
    return Row(lambda: CMS(**({"projection": PROJECTION, "transfer": TRANSFER} | changes)))


METHODS = {
    "fine-tuning, 1e-3": Row(),
    "fine-tuning, best rate": Row(rate=1e-5),
    "fine-tuning, average step of CMS": Row(matched="all"),
    "fine-tuning, average step of CMS in each layer": Row(matched="each"),
    "EWC": Row(lambda: EWC(100.0), boundaries="known"),
    "LoRA, rank 8, after task 1": Row(lambda: LoRA(8, after_task=0), boundaries="known"),
    "CMS: levels": Row(lambda: CMS(levels=THREE_LEVELS)),
    "transfer": full(projection=None),
    "projection": full(transfer=None),
    "projection, transfer": full(),
    "CMS: levels, projection, transfer": full(levels=levels(1, 4, 16, ends=16)),
    "projection at task ends": Row(
        lambda: CMS(projection=Projection(alpha=30.0, period=None, last_epoch_only=True)), boundaries="known"
    ),
    "replay, 200 stored": Row(lambda: ExperienceReplay(200)),
    "joint": Row(JointTraining),
}
TRIALS = {
    "gradient projected at task ends, α 10": Row(lambda: CMS(projection=AT_ENDS), boundaries="known"),
    "gradient projected, α 100, period 215": Row(lambda: CMS(projection=TRIAL)),
    "the same and transfer 0.5 every 86": Row(
        lambda: CMS(projection=TRIAL, transfer=Transfer(rate=0.5, period=86))
    ),
    "update projected, α 100, period 215": Row(lambda: CMS(projection=Projection(alpha=100.0, period=215))),
}  # fmt: skip
LEVELS = {
    "1 level": Row(),
    **{f"2 levels, slowest {s}": Row(lambda s=s: CMS(levels=levels(1, 1, 1, ends=s))) for s in (16, 64, 256)},
    **{f"3 levels, slowest {s}": Row(lambda s=s: CMS(levels=levels(1, 1, s // 4, ends=s))) for s in (16, 64, 256)},
    **{f"4 levels, slowest {s}": Row(lambda s=s: CMS(levels=levels(1, s // 8, s // 4, ends=s))) for s in (16, 64, 256)},
}
PERIODS = {
    f"projection period {p}, transfer period {q}": full(
        projection=Projection(alpha=300.0, period=p), transfer=Transfer(rate=0.5, period=q)
    )
    for p, q in ((100, 100), (200, 100), (430, 86), (700, 100), (300, 37), (300, 220))
}
GRID = {
    **{f"fine-tuning, {r:g}": Row(rate=r) for r in (1e-5, 3e-5, 1e-4, 2e-4, 5e-4, 2e-3)},
    **{
        f"EWC, λ {s:g}, rate {r:g}": Row(lambda s=s: EWC(s), rate=r, boundaries="known")
        for s in (10.0, 30.0, 100.0, 300.0, 1e3, 1e4)
        for r in (1e-3, 2e-4)
    },
    **{f"LoRA, rank {k}": Row(lambda k=k: LoRA(k, after_task=0), boundaries="known") for k in (2, 8, 32)},
    **{
        f"projection α {a:g}, transfer {r:g}": full(
            projection=Projection(alpha=a, period=300), transfer=Transfer(rate=r, period=100) if r < 1 else None
        )
        for a in (100.0, 300.0, 1000.0)
        for r in (0.3, 0.5, 1.0)
    },
    **{
        f"at task ends, α {a:g}": Row(
            lambda a=a: CMS(projection=Projection(alpha=a, period=None, last_epoch_only=True)), boundaries="known"
        )
        for a in (3.0, 10.0, 30.0, 100.0)
    },
}


GROUPS = {"methods": METHODS, "trials": TRIALS, "levels": LEVELS, "periods": PERIODS, "grid": GRID}
CURVES = ("fine-tuning, best rate", "EWC", "CMS: levels", "projection, transfer", "replay, 200 stored")


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables after every seed."""
    parser = arguments(__doc__, [*GROUPS], "runs/continual_digits")
    parser.add_argument("--hidden", type=int, default=128, help="hidden units of a block")
    parser.add_argument("--unequal", action="store_true", help="2 to 20 passes over each task in place of ten")
    options = parse(parser, words)
    settings = {"group": options.group, "hidden": options.hidden} | ({"unequal": UNEQUAL} if options.unequal else {})

    def stream(seed: int) -> TaskStream:
        equal = permuted_digits(TASKS, seed=seed)
        return unequal_tasks(equal, seed) if options.unequal else equal

    bench = Bench(
        f"{options.group}-{options.hidden}" + "-unequal" * options.unequal,
        stream=stream,
        model=lambda seed, row: ResidualNet(seed, hidden=options.hidden, **row.options),
        epochs=1 if options.unequal else EPOCHS,
        settings=settings,
        command=f"python benchmarks/continual_digits.py --group {options.group} --hidden {options.hidden}"
        + " --unequal" * options.unequal,
        matched=full(),
        curves=CURVES,
    )
    bench.run_all(chosen(GROUPS[options.group], options.rows), options.seeds, options.out)


if __name__ == "__main__":
    main()
