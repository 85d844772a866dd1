"""Questions about what was read once: facts among other text, and two invented languages one after the other.

    python benchmarks/reading_base.py --out runs/reading-base
    python benchmarks/reading.py --base runs/reading-base --out runs/reading

Every method reads the same texts in the same order from the same pretrained model. Rates are chosen per method on texts
of other seeds than those reported. Finished cells are kept in results.jsonl and not repeated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from common import Record, Records, parse, parser, plus_minus, table
from nestlearn import Level, MemorySession, stack_levels
from nestlearn.continual import (
    CMS,
    EWC,
    ExperienceReplay,
    FineTuningReader,
    InContextReader,
    Method,
    Projection,
    Reader,
    Transfer,
)
from nestlearn.data.invented_facts import invent_facts
from nestlearn.data.text_files import read_text
from nestlearn.evals.knowledge import ask, facts_text, knowledge_incorporation
from nestlearn.evals.learning import model_bits_per_byte
from nestlearn.evals.translation import continual_translation, invented_course
from reading_base import WORLD_PEOPLE, WORLD_SEED

LENGTHS = (0, 1000, 4000, 16000)
TUNING_SEED = 900
CONTEXT = 256
Make = Callable[[Any, Any, float], Reader]
Row = tuple[Make, tuple[float, ...]]
"""What makes the reader, and the rates to choose from."""


@dataclass(frozen=True)
class Tuned:
    """What the grid chose for a task: α at the ends of texts, α and period of the stream, transfer, rate, λ of EWC."""

    at_ends: float
    alpha: float
    period: int
    transfer: Transfer
    rate: float
    strength: float


TUNED = {
    "translation": Tuned(30.0, 30.0, 150, Transfer(rate=0.5, period=12), 3e-3, 1.0),
    "knowledge": Tuned(1.0, 0.1, 12, Transfer(rate=0.5, period=4), 1e-3, 1e4),
}
TUNED["other_text"] = TUNED["knowledge"]


def trained(
    model: Any, tokenizer: Any, rate: float, method: Method | None = None, ends: bool = False, fixed_norms: bool = False
) -> Reader:
    """Weights by AdamW and a method: all of them, or those of linear maps and embeddings."""
    if fixed_norms:
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(isinstance(module, (nn.Linear, nn.Embedding)))
    optimizer = partial(torch.optim.AdamW, lr=rate)
    return FineTuningReader(
        model, tokenizer, optimizer, CONTEXT, method=method, boundaries="known" if ends else "unknown"
    )


def ewc(strength: float, fixed_norms: bool = False) -> Make:
    """EWC with the gradients of 64 windows of each text."""
    method = EWC(strength, samples=64, labels="data")
    return partial(trained, method=method, ends=True, fixed_norms=fixed_norms)


def steps_projection(alpha: float, period: int | None = None) -> Projection:
    """The memory of inputs with α in steps; without a period it is refreshed where a text ends."""
    return Projection(alpha=alpha, unit="steps", period=period)


def cms(projection: Projection | None = None, transfer: Transfer | None = None, fixed_norms: bool = True) -> Make:
    """The memory of inputs and nested transfer; what the memory does not cover, norms, stays as it is."""
    ends = projection is not None and projection.period is None
    return partial(trained, method=CMS(projection=projection, transfer=transfer), ends=ends, fixed_norms=fixed_norms)


def levels(model: Any, tokenizer: Any, rate: float, periods: Sequence[int], rule: Any = "descent") -> Reader:
    """A session over levels that share the MLPs; the pretrained weights stay, and nothing written fades by itself."""
    chosen = [Level(period, lr=rate, rule=rule, retain=1.0) for period in periods]
    stacked = stack_levels(model, chosen, mode="split").eval()
    return MemorySession(stacked, tokenizer, context_length=CONTEXT, compare="none")


def methods(task: str) -> dict[str, Row]:
    """The rows of a task's table."""
    tuned = TUNED[task]
    ends, lagged = steps_projection(tuned.at_ends), steps_projection(tuned.alpha, tuned.period)
    rate, transfer = (tuned.rate,), tuned.transfer
    # The facts' α keeps most and learns little of the other text; ten times α learns more of it.
    wide_ends, wide = steps_projection(10 * tuned.at_ends), steps_projection(10 * tuned.alpha, tuned.period)
    return {
        "in context": (lambda model, tokenizer, _: InContextReader(model, tokenizer, 1024), (0.0,)),
        "fine-tuning": (trained, (1e-4, 3e-4, 1e-3, 3e-3)),
        "fine-tuning, norms fixed": (partial(trained, fixed_norms=True), rate),
        "EWC": (ewc(1e-3), rate),
        "EWC, norms fixed": (ewc(tuned.strength, fixed_norms=True), rate),
        "transfer": (cms(transfer=transfer), rate),
        "projection": (cms(lagged), rate),
        "projection, transfer": (cms(lagged, transfer), rate),
        "projection at ends": (cms(ends), rate),
        "projection at ends, transfer": (cms(ends, transfer), rate),
        "projection of 10 α, transfer": (cms(wide, transfer), rate),
        "projection of 10 α at ends, transfer": (cms(wide_ends, transfer), rate),
        "replay": (partial(trained, method=ExperienceReplay(1000)), rate),
        "levels 32": (partial(levels, periods=(32,)), (2.0, 4.0, 8.0)),
        "levels 32, 256": (partial(levels, periods=(32, 256)), (2.0, 4.0, 8.0)),
        "levels 32, 256, 2048": (partial(levels, periods=(32, 256, 2048)), (2.0, 4.0, 8.0)),
        "levels 32, orthogonalized": (partial(levels, periods=(32,), rule="orthogonalized"), (1.0, 2.0, 4.0)),
    }


def grid(task: str) -> dict[str, Row]:
    """What is tried on the tuning seed."""
    rows: dict[str, Row] = {}
    transfer = TUNED[task].transfer
    if task != "translation":
        rates = 3e-4, 1e-3, 3e-3
        for alpha in (0.1, 1.0, 10.0, 100.0):
            rows[f"at ends, α {alpha:g}"] = (cms(steps_projection(alpha)), rates)
            rows[f"at ends, α {alpha:g}, transfer"] = (cms(steps_projection(alpha), transfer), rates)
            rows[f"period 12, α {alpha:g}"] = (cms(steps_projection(alpha, 12)), rates)
        for strength in (1.0, 100.0, 1e3, 1e4):
            rows[f"EWC, λ {strength:g}, norms fixed"] = (ewc(strength, fixed_norms=True), (1e-3,))
        return rows
    rates = (3e-3,)
    for strength in (1e-3, 1e-2, 0.1, 1.0):
        rows[f"EWC, λ {strength:g}"] = (ewc(strength), rates)
    for strength in (0.1, 1.0, 10.0):
        rows[f"EWC, λ {strength:g}, norms fixed"] = (ewc(strength, fixed_norms=True), rates)
    for alpha in (1.0, 10.0, 30.0, 100.0):
        ends = steps_projection(alpha)
        rows[f"at ends, α {alpha:g}, norms trained"] = (cms(ends, fixed_norms=False), rates)
        rows[f"at ends, α {alpha:g}"] = (cms(ends), rates)
        rows[f"at ends, α {alpha:g}, transfer"] = (cms(ends, transfer), rates)
    for alpha, period in ((100.0, 24), (30.0, 96), (30.0, 150)):
        lagged = steps_projection(alpha, period)
        rows[f"period {period}, α {alpha:g}"] = (cms(lagged), rates)
        rows[f"period {period}, α {alpha:g}, transfer"] = (cms(lagged, transfer), rates)
    return rows


def knowledge(reader: Reader, seed: int, book: str) -> dict[str, Any]:
    """Facts about six people, said ten times each, asked for after more and more of a book."""
    facts, known = invent_facts(6, seed), invent_facts(WORLD_PEOPLE, WORLD_SEED)[:60]
    result = knowledge_incorporation(reader, facts, book, LENGTHS, wordings=(0, 1) * 5, known=known, seed=seed)
    return result.details


def translation(reader: Reader, seed: int, _: str) -> dict[str, Any]:
    """Two languages, one after the other."""
    courses = [invented_course(2 * seed + i, sentences=120, exam=20, repeats=12) for i in range(2)]
    facts = invent_facts(WORLD_PEOPLE, WORLD_SEED)[:60]

    def probe(studied: Reader) -> float:
        return mean(ask(studied, facts))

    return continual_translation(reader, courses, max_new_tokens=40, alone=False, probe=probe, seed=seed).details


def other_text(reader: Reader, seed: int, book: str) -> dict[str, Any]:
    """Whether the text that must not erase the facts is learned at all: bits per byte of what follows it."""
    if not isinstance(reader, FineTuningReader):
        raise ValueError(f"the task other_text is for trained weights, not for a {type(reader).__name__}.")
    follows = book[LENGTHS[-1] : LENGTHS[-1] + 4000]
    before = model_bits_per_byte(reader.model, reader.tokenizer, follows, CONTEXT)
    reader.read(facts_text(invent_facts(6, seed), (0, 1) * 5))
    for start, end in pairwise(LENGTHS):
        reader.read(book[start:end])
    return {"before": before, "after": model_bits_per_byte(reader.model, reader.tokenizer, follows, CONTEXT)}


TASKS = {"knowledge": knowledge, "translation": translation, "other_text": other_text}


def merit(task: str, details: dict[str, Any]) -> float:
    """What a rate is chosen by: what was learned and what is kept, equally."""
    if task == "knowledge":
        return mean(details["accuracy"]) + mean(details["known"][1:])
    if task == "other_text":
        return -details["after"]
    return mean(details["chrf"][-1])


def run_cell(base: Path, task: str, make: Make, rate: float, seed: int, book: str) -> Record:
    """What one method gives at one rate and seed."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    started = time.perf_counter()
    details = TASKS[task](make(model, tokenizer, rate), seed, book)
    return {"seconds": round(time.perf_counter() - started, 1)} | details


def knowledge_cells(rows: list[dict[str, Any]]) -> list[str]:
    """Facts after each length, and what was known before."""
    values = [(*r["accuracy"], r["known"][0], r["known"][-1]) for r in rows]
    return [plus_minus([100 * value for value in column]) for column in zip(*values, strict=True)]


def translation_cells(rows: list[dict[str, Any]]) -> list[str]:
    """The first language after its course and at the end, the second, their mean, and the facts known before."""
    values = [(r["chrf"][1][0], *r["chrf"][-1], mean(r["chrf"][-1])) for r in rows]
    cells = [plus_minus(column) for column in zip(*values, strict=True)]
    known = [100 * r["probe"][-1] for r in rows if "probe" in r]
    return [*cells, plus_minus(known) if known else ""]


def other_text_cells(rows: list[dict[str, Any]]) -> list[str]:
    """Bits per byte before and after."""
    return [plus_minus([r[when] for r in rows], digits=2) for when in ("before", "after")]


COLUMNS = {
    "knowledge": [*(f"facts after {length:,}" for length in LENGTHS), "known before", "known at the end"],
    "translation": ["first language after its course", "at the end", "second at the end", "mean", "known facts"],
    "other_text": ["bits per byte before", "after"],
}
CELLS = {"knowledge": knowledge_cells, "translation": translation_cells, "other_text": other_text_cells}


def tables(records: Records, chosen: dict[tuple[str, str], float], seeds: Sequence[int]) -> str:
    """A Markdown table per task."""
    parts = []
    for task, columns in COLUMNS.items():
        lines = []
        for method, rate in ((method, rate) for (of, method), rate in chosen.items() if of == task):
            rows = [r for r in records.where(task=task, method=method, rate=rate) if r["seed"] in seeds]
            if rows:
                lines.append([method, f"{rate:g}", *CELLS[task](rows), f"{mean(r['seconds'] for r in rows):.0f}"])
        parts.append(table(["", "rate", *columns, "seconds"], lines))
    return "\n".join(parts)


def main(words: Sequence[str] | None = None) -> None:
    """Choose the rate of each method, read with all seeds, and print the tables."""
    made = parser(__doc__, "runs/reading", seeds=range(3))
    made.add_argument("--base", type=Path, default=Path("runs/reading-base"))
    made.add_argument("--book", type=Path, default=Path("../shared/data/gutenberg_books/alice.txt"))
    made.add_argument("--tasks", default="knowledge,translation")
    made.add_argument("--group", choices=("methods", "grid"), default="methods")
    made.add_argument("--methods", help="some of the group, with commas; commas in a name as ;")
    made.add_argument("--rates", type=float, nargs="+", help="to choose from; default: those of each method")
    options = parse(made, words)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    records, book = Records(options.out / "results.jsonl"), read_text(options.book)
    rows, seeds = (methods, options.seeds) if options.group == "methods" else (grid, [TUNING_SEED])

    def cell(task: str, method: str, rate: float, seed: int) -> Record:
        key = {"task": task, "method": method, "rate": rate, "seed": seed}
        return records.get(key, lambda: run_cell(options.base, task, rows(task)[method][0], rate, seed, book))

    chosen: dict[tuple[str, str], float] = {}
    for task in options.tasks.split(","):
        names = [name.replace(";", ", ") for name in options.methods.split(",")] if options.methods else rows(task)
        for method in names:
            rates = options.rates or rows(task)[method][1]
            best = rates[0]
            if len(rates) > 1:
                best = max(rates, key=lambda rate, t=task, m=method: merit(t, cell(t, m, rate, TUNING_SEED)))
            chosen[task, method] = best
            for seed in seeds:
                cell(task, method, best, seed)
    text = tables(records, chosen, seeds)
    (options.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
