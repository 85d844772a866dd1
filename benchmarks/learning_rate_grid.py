"""The learning rates of the presets: one common grid, short runs, the same text, seed and batches.

    python benchmarks/learning_rate_grid.py
    python benchmarks/learning_rate_grid.py --presets hope-tiny transformer-tiny --rates 1e-3 2e-3 4e-3 --steps 200
    python benchmarks/learning_rate_grid.py --presets hope-tiny --fields '{"mixer": {"conv_size": 1}}'

Each run has a whole cosine schedule of its own. Finished runs in --out are not repeated, so the command can be
stopped and started again; the table is printed after every run.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from nestlearn.allocator import tune_allocator
from nestlearn.train import NonFiniteError, TrainConfig, read_log, train
from nestlearn.train.load import model_fields

PRESETS = ("hope-tiny", "transformer-tiny")
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Find learning rates on one common grid.")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--corpus", default="python-docs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--fields", type=json.loads, default={}, help="JSON with HopeConfig fields for every run")
    parser.add_argument("--out", type=Path, default=Path("runs/learning_rate_grid"))
    options = parser.parse_args()
    unknown = set(options.fields) - model_fields()
    if unknown:
        parser.error(f"unknown model field {sorted(unknown)[0]!r}")
    return options


def run(preset: str, rate: float, options: argparse.Namespace, console: Console) -> dict[str, Any]:
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
            return {"preset": preset, "rate": rate, "bits_per_byte": float("inf")}
    last = next(line for line in reversed(read_log(folder)) if "eval_bits_per_byte" in line)
    return {"preset": preset, "rate": rate, "bits_per_byte": last["eval_bits_per_byte"], "seconds": last["seconds"]}


def table(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Markdown: a row per preset, a column per rate, the best in bold."""
    lines = [
        f"Held-out bits per byte after {options.steps} steps of {options.batch_size} x {options.sequence_length}:",
        "",
        "| preset | " + " | ".join(f"{rate:g}" for rate in options.rates) + " |",
        "|---|" + "--:|" * len(options.rates),
    ]
    for preset in options.presets:
        found = {r["rate"]: r["bits_per_byte"] for r in results if r["preset"] == preset}
        best = min(found.values(), default=0.0)
        cells = [
            "" if rate not in found else f"**{found[rate]:.3f}**" if found[rate] == best else f"{found[rate]:.3f}"
            for rate in options.rates
        ]
        lines.append(f"| {preset} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the grid and write its table beside the runs."""
    options = parse()
    tune_allocator()
    console = Console()
    results: list[dict[str, Any]] = []
    for preset in options.presets:
        for rate in options.rates:
            results.append(run(preset, rate, options, console))
            text = table(results, options)
            console.print(text, soft_wrap=True)
            (options.out / "grid.md").write_text(text + "\n")
            (options.out / "grid.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
