"""Passages learned one after another: what stays of the first ones, and what other text loses.

    make pretrained
    python benchmarks/passage_stream.py --data ../shared/data                 # some hours on one core
    python benchmarks/passage_stream.py --data ../shared/data --ways default --passages 8 --at 1 8

Every way learns the passages of `practice.py` in order, each as often as the others, and never sees an earlier one
again. After 1, 8 and 32 passages it is asked about all of them so far, without the passages. ``way`` is the part of the
margin from the model as it is to the model with the passage in its context; ``first``: of the first eight passages.

- ``default``: a session as it is without any option practises (`nestlearn stack`, `MemorySession.practice`);
- ``lora``, ``mlp``: AdamW on adapters of rank 16, or on the weights of all MLPs, by the text of each passage.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import RESULTS, Record, Records, parse, parser, table
from equal_damage import RATES, _backward, default_session, passage_text, weights_that_learn
from nestlearn import pretrained
from nestlearn.continual.session.practice import Practice
from practice import Examiner, kept_probes, probes_of, summary

QUESTIONS = 5
"""Of every passage."""
Learner = tuple[Any, Any, Callable[[str, int], None], Callable[[], AbstractContextManager[Any]]]


def session_learner(options: Any, seed: int) -> Learner:
    """A session that practises one passage after another."""
    model, tokenizer = pretrained("smollm2-135m", dtype=torch.bfloat16)
    session = default_session(model.eval(), tokenizer)

    def learn(text: str, number: int) -> None:
        session.practice(text, passes=options.passes, seed=1000 * seed + number)

    return model, tokenizer, learn, session.active


def weight_learner(way: str, options: Any, seed: int) -> Learner:
    """AdamW at a constant rate, in as many steps on each passage."""
    model, tokenizer, learned = weights_that_learn(way)
    optimizer = torch.optim.AdamW(learned, lr=options.rate or RATES[way], weight_decay=0.0)
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]

    def learn(text: str, number: int) -> None:
        for windows, _ in Practice(tokenizer, [text], start, passes=options.passes, questions=0, seed=seed + number):
            for rows in windows:
                _backward(model, rows)
            nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return model, tokenizer, learn, nullcontext


def run(way: str, options: Any, seed: int) -> Record:
    """Learn the stream, and examine after each number of passages."""
    passages, probes = probes_of(options.data, seed, options.passages)
    model, tokenizer, learn, learned = (
        session_learner(options, seed) if way == "default" else weight_learner(way, options, seed)
    )
    torch.manual_seed(seed)
    random.seed(seed)
    after, spent = {}, 0.0
    for number, passage in enumerate(passages, 1):
        began = time.process_time()
        learn(passage_text(passage), number)
        spent += time.process_time() - began
        print(f"  {way}: {number} passages, {spent:.0f} processor s", flush=True)
        if number in options.at:
            with learned():
                after[str(number)] = examine(model, tokenizer, probes[: QUESTIONS * number], options)
    return {"after": after, "processor": spent}


def examine(model: Any, tokenizer: Any, probes: list[Record], options: Any, with_context: bool = False) -> Record:
    """Scores of the questions, and nats per token of unrelated text."""
    return Examiner(model, tokenizer, probes, options.data).examine(with_context)


def base(options: Any, seed: int) -> Record:
    """The model as it is, without and with the passages in its context."""
    model, tokenizer = pretrained("smollm2-135m", dtype=torch.bfloat16)
    _, probes = probes_of(options.data, seed, options.passages)
    found = {name: examine(model.eval(), tokenizer, probes, options, name == "context") for name in ("base", "context")}
    return {"after": found}


def rows_of(way: str, found: Record, start: Record) -> list[list[str]]:
    """A row for every number of passages."""
    without, context = start["after"]["base"], start["after"]["context"]
    kept, rows = kept_probes(without, context), []
    for number, here in found["after"].items():
        asked = [i for i in kept if i < QUESTIONS * int(number)]
        first = [i for i in asked if i < QUESTIONS * 8]
        cells = []
        for chosen in (asked, first):
            low, high, now = (summary(record, chosen) for record in (without, context, here))
            part = 100 * (now["margin"] - low["margin"]) / (high["margin"] - low["margin"])
            cells += [str(len(chosen)), f"{part:.0f} %", f"{low['MC']:.2f} / {now['MC']:.2f} / {high['MC']:.2f}"]
        damage = [100 * (nats / without["nats"][name] - 1) for name, nats in here["nats"].items()]
        rows.append([way, number, *cells, *(f"{x:+.2f} %" for x in damage)])
    rows[-1].append(f"{found['processor']:.0f}")
    return [[*row, *[""] * (12 - len(row))] for row in rows]


def main(words: Sequence[str] | None = None) -> None:
    """Run the ways and print a table; records go to docs/results/passage_stream.jsonl."""
    made = parser(__doc__, RESULTS / "passage_stream.jsonl", seeds=[0])
    made.add_argument("--data", type=Path, default=Path("../shared/data"))
    made.add_argument("--ways", nargs="+", default=["default", "lora", "mlp"], choices=["default", "lora", "mlp"])
    made.add_argument("--passages", type=int, default=32)
    made.add_argument("--at", type=int, nargs="+", default=[1, 8, 32])
    made.add_argument("--passes", type=int, default=30)
    made.add_argument("--rate", type=float, default=0.0, help="Of AdamW; 0 takes the default of the way.")
    options = parse(made, words)
    records, rows = Records(Path(options.out)), []
    for seed in options.seeds:
        key: Record = {"passages": options.passages, "seed": seed}
        start = records.get({"way": "start", **key}, lambda s=seed: base(options, s))
        for way in options.ways:
            rate: Record = {} if way == "default" else {"rate": options.rate or RATES[way]}
            setting = {"way": way, "passes": options.passes, **rate, **key}
            rows += rows_of(way, records.get(setting, lambda w=way, s=seed: run(w, options, s)), start)
    choices = "MC: as it is / now / in context"
    heads = ["way", "passages", "questions", "margin", choices, "first", "margin, first", f"{choices}, first"]
    print("\n" + table([*heads, "Wikipedia", "code", "play", "processor s"], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
