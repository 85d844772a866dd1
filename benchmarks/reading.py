"""What is read once is asked later: facts among other text, and two invented languages one after the other.

    python benchmarks/reading_base.py --out runs/reading-base
    python benchmarks/reading.py --base runs/reading-base --out runs/reading

Every method reads the same texts in the same order from the same pretrained model. Rates are chosen per method on texts
of other seeds than those reported. Finished cells are kept in results.jsonl and not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from nestlearn import Level, MemorySession, stack_levels
from nestlearn.continual import FineTuningReader, InContextReader, Reader
from nestlearn.data.invented_facts import invent_facts
from nestlearn.data.text_files import read_text
from nestlearn.evals.knowledge import knowledge_incorporation
from nestlearn.evals.translation import continual_translation, invented_course
from nestlearn.train.allocator import tune_allocator
from reading_base import WORLD_PEOPLE, WORLD_SEED

LENGTHS = (0, 1000, 4000, 16000)
TUNING_SEED = 900
CONTEXT = 256
Make = Callable[[Any, Any, float], Reader]


def trained(model: Any, tokenizer: Any, rate: float) -> Reader:
    """All weights, AdamW."""
    return FineTuningReader(model, tokenizer, partial(torch.optim.AdamW, lr=rate), CONTEXT)


def levels(model: Any, tokenizer: Any, rate: float, periods: Sequence[int], rule: Any = "descent") -> Reader:
    """A session over levels that share the MLPs; the pretrained weights stay, and nothing written fades by itself."""
    chosen = [Level(period, lr=rate, rule=rule, retain=1.0) for period in periods]
    stacked = stack_levels(model, chosen, mode="split").eval()
    return MemorySession(stacked, tokenizer, context_length=CONTEXT, compare="none")


METHODS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "in context": (lambda model, tokenizer, _: InContextReader(model, tokenizer, 1024), (0.0,)),
    "fine-tuning": (trained, (3e-4, 1e-3, 3e-3)),
    "levels 32": (partial(levels, periods=(32,)), (2.0, 4.0, 8.0)),
    "levels 32, 256": (partial(levels, periods=(32, 256)), (2.0, 4.0, 8.0)),
    "levels 32, 256, 2048": (partial(levels, periods=(32, 256, 2048)), (2.0, 4.0, 8.0)),
    "levels 32, orthogonalized": (partial(levels, periods=(32,), rule="orthogonalized"), (1.0, 2.0, 4.0)),
}


def knowledge(reader: Reader, seed: int, book: str) -> dict[str, Any]:
    """Facts about six people, said ten times each, asked for after more and more of a book."""
    facts, known = invent_facts(6, seed), invent_facts(WORLD_PEOPLE, WORLD_SEED)[:60]
    result = knowledge_incorporation(reader, facts, book, LENGTHS, wordings=(0, 1) * 5, known=known, seed=seed)
    return result.details


def translation(reader: Reader, seed: int, _: str) -> dict[str, Any]:
    """Two languages, one after the other."""
    courses = [invented_course(2 * seed + i, sentences=120, exam=20, repeats=12) for i in range(2)]
    return continual_translation(reader, courses, max_new_tokens=40, seed=seed).details


TASKS = {"knowledge": knowledge, "translation": translation}


def merit(task: str, details: dict[str, Any]) -> float:
    """What a rate is chosen by: what was learned and what is kept, equally."""
    if task == "knowledge":
        return mean(details["accuracy"]) + mean(details["known"][1:])
    return mean(details["chrf"][-1])


def run_cell(options: argparse.Namespace, task: str, method: str, rate: float, seed: int, book: str) -> dict[str, Any]:
    """One method, rate and seed."""
    model = AutoModelForCausalLM.from_pretrained(options.base).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    started = time.perf_counter()
    details = TASKS[task](METHODS[method][0](model, tokenizer, rate), seed, book)
    seconds = time.perf_counter() - started
    return {"task": task, "method": method, "rate": rate, "seed": seed, "seconds": round(seconds, 1)} | details


def plus_minus(values: Sequence[float], scale: float = 100) -> str:
    """Mean and standard error."""
    middle = mean(values)
    error = math.sqrt(sum((v - middle) ** 2 for v in values) / max(len(values) - 1, 1) / len(values))
    return f"{scale * middle:.1f} ± {scale * error:.1f}"


def table(records: list[dict[str, Any]], chosen: dict[tuple[str, str], float], seeds: Sequence[int]) -> str:
    """Both tasks as Markdown."""
    header = " | ".join(f"facts after {length:,}" for length in LENGTHS)
    lines = [f"| | rate | {header} | known before | known at the end | seconds |", "|---|--:|" + "--:|" * 7]
    for task in TASKS:
        if task == "translation":
            lines += ["", "| | rate | first language | second | first, alone | mean at the end | seconds |"]
            lines.append("|---|--:|" + "--:|" * 5)
        for method in METHODS:
            rate = chosen.get((task, method))
            rows = [r for r in records if (r["task"], r["method"], r["rate"]) == (task, method, rate)
                    and r["seed"] in seeds]  # fmt: skip
            if not rows:
                continue
            seconds = f"{mean(r['seconds'] for r in rows):.0f}"
            if task == "knowledge":
                cells = [plus_minus([r["accuracy"][i] for r in rows]) for i in range(len(LENGTHS))]
                cells += [plus_minus([r["known"][0] for r in rows]), plus_minus([r["known"][-1] for r in rows])]
            else:
                cells = [plus_minus([r["chrf"][-1][i] for r in rows], 1) for i in range(2)]
                cells.append(plus_minus([r["alone"][0] for r in rows], 1))
                cells.append(plus_minus([mean(r["chrf"][-1]) for r in rows], 1))
            lines.append(f"| {method} | {rate:g} | " + " | ".join(cells) + f" | {seconds} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/reading-base"))
    parser.add_argument("--out", type=Path, default=Path("runs/reading"))
    parser.add_argument("--book", type=Path, default=Path("../shared/data/gutenberg_books/alice.txt"))
    parser.add_argument("--tasks", default="knowledge,translation")
    parser.add_argument("--methods", default=",".join(METHODS).replace(", ", ";"), help="commas in a name as ;")
    parser.add_argument("--rates", type=float, nargs="+", help="to choose from; default: those of each method")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tune_allocator()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    file, book = options.out / "results.jsonl", read_text(options.book)
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def cell(task: str, method: str, rate: float, seed: int) -> dict[str, Any]:
        for record in records:
            if (record["task"], record["method"], record["rate"], record["seed"]) == (task, method, rate, seed):
                return record
        record = run_cell(options, task, method, rate, seed, book)
        records.append(record)
        with file.open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(task, method, rate, seed, f"{merit(task, record):.3f}", f"{record['seconds']} s", flush=True)
        return record

    chosen: dict[tuple[str, str], float] = {}
    for task in options.tasks.split(","):
        for method in (name.replace(";", ", ") for name in options.methods.split(",")):
            rates = options.rates or METHODS[method][1]
            best = max(rates, key=lambda rate, t=task, m=method: merit(t, cell(t, m, rate, TUNING_SEED)))
            chosen[task, method] = best
            for seed in options.seeds:
                cell(task, method, best, seed)
    text = table(records, chosen, options.seeds)
    (options.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
