"""The learning rates of the presets: one common grid, short runs, the same text, seed and batches.

    python benchmarks/learning_rate_grid.py
    python benchmarks/learning_rate_grid.py --presets hope-tiny transformer-tiny --rates 1e-3 2e-3 4e-3 --steps 200
    python benchmarks/learning_rate_grid.py --presets hope-tiny --fields '{"mixer": {"conv_size": 1}}'

Each run has a whole cosine schedule of its own. Finished runs in --out are not repeated, so the command can be
stopped and started again; the table is printed after every run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Sequence

from rich.console import Console

from common import parse, parser, table
from nestlearn.train import NonFiniteError, TrainConfig, read_log, train
from nestlearn.train.load import model_fields

PRESETS = ("hope-tiny", "transformer-tiny")
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def run(preset: str, rate: float, options: argparse.Namespace, console: Console) -> float:
    """Held-out bits per byte of one run, infinite if it was no longer finite."""
    suffix = re.sub(r"[^\w.]+", "-", json.dumps(options.fields, sort_keys=True)).rstrip("-")
    folder = options.out / f"{preset}{suffix}-{rate:g}-{options.steps}"
    if not (folder / "model.safetensors").exists():
        config = TrainConfig(
            preset=preset,
            corpus=options.corpus,
            out=str(folder),
            steps=options.steps,
            batch_size=options.batch_size,
            sequence_length=options.sequence_length,
            learning_rate=rate,
            seed=options.seed,
            threads=options.threads,
            save_interval=options.steps,
            keep_checkpoints=1,
            model=options.fields,
        )
        try:
            train(config, resume=(folder / "train_config.json").exists(), console=console)
        except NonFiniteError as error:
            console.print(f"{preset} at {rate:g}: {error}")
            return math.inf
    return next(line["eval_bits_per_byte"] for line in reversed(read_log(folder)) if "eval_bits_per_byte" in line)


def main(words: Sequence[str] | None = None) -> None:
    """Run the grid and write its table next to the runs."""
    made = parser(__doc__, "runs/learning_rate_grid")
    made.add_argument("--presets", nargs="+", default=list(PRESETS))
    made.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    made.add_argument("--steps", type=int, default=150)
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--sequence-length", type=int, default=256)
    made.add_argument("--corpus", default="python-docs")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--fields", type=json.loads, default={}, help="JSON with HopeConfig fields for every run")
    options = parse(made, words)
    unknown = set(options.fields) - model_fields()
    if unknown:
        made.error(f"unknown model field {sorted(unknown)[0]!r}")
    console, results = Console(), {}
    for preset, rate in itertools.product(options.presets, options.rates):
        results[preset, rate] = run(preset, rate, options, console)
        rows = []
        for name in options.presets:
            found = [results.get((name, at)) for at in options.rates]
            best = min((value for value in found if value is not None), default=None)
            texts = ["" if value is None else f"{value:.3f}" for value in found]
            rows.append([name, *(f"**{x}**" if x and y == best else x for x, y in zip(texts, found, strict=True))])
        text = table(["preset", *(f"{rate:g}" for rate in options.rates)], rows)
        print(f"Held-out bits per byte after {options.steps} steps:\n\n{text}", flush=True)
        (options.out / "grid.md").write_text(text)
        content = [{"preset": name, "rate": at, "bits_per_byte": bits} for (name, at), bits in results.items()]
        (options.out / "grid.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
