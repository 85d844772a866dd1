"""Where parity fails beyond the trained lengths: at which symbol the first wrong answer of a string is.

    python benchmarks/parity_boundaries.py                 (15 minutes with one thread)

Hope of the suite `formal` (`nestlearn bench formal --tasks parity`), but with chunks of 16 tokens in the main memory
and 32 in the projections, so that strings cross boundaries of chunks. With and without convolution, with adaptive and
static projections, and with chunks that hold a whole string. Training is on 2 to 50 symbols. Writes a record per model
to docs/results/formal-boundaries.jsonl: of the longer strings how many are right, and at which symbols (from 0)
the others are first wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from common import RESULTS, Records, parse, parser
from nestlearn.evals.bench.cells import Cell, plan
from nestlearn.evals.bench.suites import find_suite
from nestlearn.evals.bench.training import train_cell

CHUNKS = "hope-normalized:chunk_size=16:projection_chunk_size=32"
MIXERS = (CHUNKS, f"{CHUNKS}:adaptive=", f"{CHUNKS}:conv_size=0", f"{CHUNKS}:conv_size=0:adaptive=", "hope-normalized",
          "hope-normalized:conv_size=0")  # fmt: skip


def measure(cell: Cell) -> dict[str, Any]:
    """Train the cell's model, and count where its answers to the longest strings are first wrong."""
    splits = {split.name: cell.task.examples(split.name) for split in cell.task.splits}
    solver, run = train_cell(cell, splits)
    longest = splits[cell.task.splits[-1].name]
    solver.eval()
    with torch.inference_mode():
        answers = solver(longest.inputs).argmax(-1)
    wrong = (answers != longest.targets) & (longest.targets >= 0)
    first = Counter(int(row.nonzero()[0]) for row in wrong if bool(row.any()))
    return {
        "mixer": cell.mixer, "seed": cell.seed, "steps": run.step, "status": run.status, "strings": len(wrong),
        "right": len(wrong) - first.total(), "first_wrong": dict(sorted(first.items())), "seconds": run.seconds,
    }  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    """Train and measure every mixer and seed."""
    made = parser(__doc__, RESULTS / "formal-boundaries.jsonl")
    made.add_argument("--mixers", nargs="*", default=list(MIXERS))
    made.add_argument("--seeds", type=int, default=2, help="how many")
    made.add_argument("--first-seed", type=int, default=0)
    made.add_argument("--steps", type=int, help="the suite's by default")
    options = parse(made, words)
    settings = {"seeds": options.seeds, "first_seed": options.first_seed, "steps": options.steps}
    records = Records(options.out, fresh=True)
    for cell in plan(find_suite("formal"), options.mixers, tasks=["parity"], **settings):
        records.add(measure(cell))


if __name__ == "__main__":
    main()
