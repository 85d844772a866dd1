"""Does a real pretrained model know what it has read? SmolLM2-135M-Instruct on SQuAD passages, asked without them.

    make pretrained
    python benchmarks/practice.py --data ../shared/data                       # all arms, about an hour on two cores
    python benchmarks/practice.py --data ../shared/data --arms practice --passages 4 --passes 20

One passage of each of some articles is learned, then five questions about each are asked in a fresh context. Reported:

- ``right``: mean log probability per token of the right answer;
- ``margin``: the same minus the mean of three answers to questions about other passages, ``same``: about this passage;
- ``MC``: how often the right answer is the most likely of the four, for both kinds;
- ``way``: how far the margin goes from the model as it is to the model with the passage in its context;
- ``damage``: change of bits per byte of unrelated text, in percent: Wikipedia, Python source, a play.

Only questions count that the model answers, and better than before, with the passage in its context. Arms: the model as
it is and with the passage in context; ``read``: a session reads the passages once; ``again``: windows of the passages
only, as often as practice takes in time; ``practice``; ``unprotected``: practice without the memory of general inputs.
The general text is the start of Wikipedia's file, of a novel and of a module of Python; damage is measured on others.
"""

from __future__ import annotations

import argparse as source_of_code
import inspect
import json
import logging
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, Record, Records, parse, parser, table
from nestlearn import Level, MemorySession, pretrained, stack_levels
from nestlearn.continual import protect
from nestlearn.data.control_tokens import LiteralText
from nestlearn.evals.probes import answer_scores, question_ids

GENERAL_BYTES = 40_000
"""Of each kind of general text."""
ARMS = ("base", "context", "read", "again", "practice", "unprotected")


def probes_of(data: Path, seed: int, count: int) -> tuple[list[Record], list[Record]]:
    """Passages, one of each of ``count`` articles, and five questions about each with two kinds of wrong answers.

    Where there are fewer articles, they are taken in turn again.
    """
    by_title: dict[str, list[Record]] = {}
    for record in json.loads((data / "squad" / "passages.json").read_text()):
        by_title.setdefault(record["title"], []).append(record)
    draw = random.Random(seed)
    titles = draw.sample(sorted(by_title), len(by_title))
    passages: list[Record] = []
    fit = {t: [r for r in by_title[t] if len(r["questions"]) >= 5 and 500 < len(r["context"]) < 1000] for t in titles}
    while len(passages) < count and any(fit.values()):
        for title in [t for t in titles if fit[t]][: count - len(passages)]:
            passages.append(draw.choice(fit[title]))
            fit[title].remove(passages[-1])
    probes = []
    for i, passage in enumerate(passages):
        for asked in draw.sample(passage["questions"], 5):
            other = [q["answer"] for j, p in enumerate(passages) if j != i for q in p["questions"]]
            same = sorted({q["answer"] for q in passage["questions"]} - {asked["answer"]})
            wrong = {"other": draw.sample(other, 3), "same": draw.sample(same, min(3, len(same)))}
            probes.append({**asked, **wrong, "title": passage["title"], "context": passage["context"]})
    return passages, probes


class Examiner:
    """Asks a model the questions and reads unrelated text, with what a session has learned."""

    def __init__(self, model: Any, tokenizer: Any, probes: list[Record], data: Path) -> None:
        self.model, self.tokenizer, self.literal, self.probes = model, tokenizer, LiteralText(tokenizer), probes
        wiki, play = (data / "wikitext2/valid.txt").read_text(), (data / "tinyshakespeare/input.txt").read_text()
        texts = {"wiki": wiki[400_000:], "code": inspect.getsource(source_of_code), "play": play[50_000:]}
        self.unrelated = {name: self._rows(text[:40_000], 4 if name == "wiki" else 2) for name, text in texts.items()}

    def _rows(self, text: str, count: int) -> torch.Tensor:
        return torch.tensor(self.literal.ids(text)[: 1_000 * count]).view(count, 1_000)

    def scores(self, probe: Record, with_context: bool) -> tuple[float, list[float], list[float]]:
        """Mean log probability per token of the right answer, of wrong ones about other passages, and about this."""
        question = f"Topic: {probe['title']}. Question: {probe['question']} Answer in a few words."
        asked = question_ids(self.tokenizer, question, probe["context"] if with_context else "")
        answers = (probe["answer"], *probe["other"], *probe["same"])
        means = [round(score, 3) for score in answer_scores(self.model, self.tokenizer, asked, answers)]
        return means[0], means[1:4], means[4:]

    @torch.no_grad()
    def examine(self, with_context: bool = False) -> Record:
        """Scores of all questions, and nats per token of unrelated text."""
        nats = {
            name: sum(self.model(row[None], labels=row[None]).loss.item() for row in rows) / len(rows)
            for name, rows in self.unrelated.items()
        }
        return {"scores": [self.scores(probe, with_context) for probe in self.probes], "nats": nats}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def kept_probes(base: Record, context: Record) -> list[int]:
    """Questions that the model answers with the passage in context, with a larger margin than without it."""
    pairs = list(zip(base["scores"], context["scores"], strict=True))
    good = [with_text[0] > max(with_text[1]) for _, with_text in pairs]
    gains = [(b[0] - _mean(b[1])) - (a[0] - _mean(a[1])) for a, b in pairs]
    return [i for i, (right, gain) in enumerate(zip(good, gains, strict=True)) if right and gain > 0]


def summary(found: Record, kept: list[int]) -> dict[str, float]:
    """Means over the questions that count."""
    scores = [found["scores"][i] for i in kept]
    return {
        "right": _mean([right for right, _, _ in scores]),
        "margin": _mean([right - _mean(other) for right, other, _ in scores]),
        "MC": _mean([float(right > max(other)) for right, other, _ in scores]),
        "same": _mean([right - _mean(same) for right, _, same in scores]),
        "MC same": _mean([float(right > max(same)) for right, _, same in scores if same]),
    }


def general_text(data: Path) -> str:
    """An encyclopedia, a novel and source code."""
    texts = [(data / name).read_text() for name in ("wikitext2/valid.txt", "gutenberg_books/alice.txt")]
    return "\n\n".join(text[:GENERAL_BYTES] for text in (*texts, inspect.getsource(logging)))


def learn(arm: str, model: Any, tokenizer: Any, passages: list[Record], options: Any, seed: int) -> tuple[Any, Record]:
    """The session of an arm, and what it cost."""
    guard = None if arm == "unprotected" else options.protect
    session = MemorySession(model, tokenizer, compare="none", protect=guard)
    texts = [f"{p['title']}\n{p['context']}" for p in passages]
    began, cpu = time.monotonic(), time.process_time()
    if arm == "read":
        for text in texts:
            session.read(text)
    else:
        passes, questions = options.passes, 8
        if arm == "again":
            passes, questions = round(passes * options.again), 0
        session.practice(*texts, passes=passes, questions=questions, lr=options.lr, seed=seed, progress=_show)
    spent = {"seconds": time.monotonic() - began, "processor": time.process_time() - cpu, "bytes": session.nbytes}
    return session, spent


def _show(report: Any) -> None:
    if report.steps % 10 == 0:
        print(f"  {report}", flush=True)


def run(arm: str, options: Any, seed: int) -> Record:
    """Learn by an arm and examine."""
    model, tokenizer = pretrained("smollm2-135m", dtype=torch.bfloat16)
    level = Level(64, rank=options.rank, rule=options.rule, retain=1.0, momentum=0.9)
    model = stack_levels(model.eval(), [level], mode="split")
    passages, probes = probes_of(options.data, seed, options.passages)
    examiner = Examiner(model, tokenizer, probes, options.data)
    if arm in ("base", "context"):
        return examiner.examine(with_context=arm == "context")
    if arm != "unprotected":
        protect(model, tokenizer, general_text(options.data), rank=None)
    session, spent = learn(arm, model, tokenizer, passages, options, seed)
    with session.active():
        return {**examiner.examine(), **spent}


def main(words: Sequence[str] | None = None) -> None:
    """Run the arms and print a table; records go to docs/results/practice.jsonl."""
    made = parser(__doc__, RESULTS / "practice.jsonl", seeds=[0])
    made.add_argument("--data", type=Path, default=Path("../shared/data"))
    made.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    made.add_argument("--passages", type=int, default=8)
    made.add_argument("--passes", type=int, default=30)
    made.add_argument("--again", type=float, default=1.75, help="Passes of the arm `again` for one of practice.")
    made.add_argument("--lr", type=float, default=3.0)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--rule", default="orthogonalized")
    made.add_argument("--protect", type=float, default=0.03)
    options = parse(made, words)
    records, rows = Records(Path(options.out)), []
    for seed in options.seeds:
        found: dict[str, Record] = {}
        for arm in dict.fromkeys(("base", "context", *options.arms)):
            key: Record = {"arm": arm, "passages": options.passages, "seed": seed}
            if arm not in ("base", "context"):
                key |= {name: getattr(options, name) for name in ("passes", "lr", "rank", "rule", "protect")}
            if arm == "again":
                key["again"] = options.again
            found[arm] = records.get(key, lambda arm=arm, seed=seed: run(arm, options, seed))
        kept = kept_probes(found["base"], found["context"])
        print(f"seed {seed}: {len(kept)} of {len(found['base']['scores'])} questions count")
        rows += [[str(seed), arm, *_row(found, arm, kept)] for arm in found]
    heads = (
        "seed",
        "arm",
        "right",
        "margin",
        "MC",
        "same",
        "MC same",
        "way",
        "wiki",
        "code",
        "play",
        "processor s",
        "MB",
    )
    print("\n" + table(heads, rows))


def _row(found: dict[str, Record], arm: str, kept: list[int]) -> list[str]:
    base, context, here = (summary(found[name], kept) for name in ("base", "context", arm))
    way = 100 * (here["margin"] - base["margin"]) / (context["margin"] - base["margin"])
    damage = [100 * (nats / found["base"]["nats"][name] - 1) for name, nats in found[arm]["nats"].items()]
    cost = [f"{found[arm]['processor']:.0f}", f"{found[arm]['bytes'] / 1e6:.1f}"] if "bytes" in found[arm] else ["", ""]
    return [*(f"{x:.2f}" for x in here.values()), f"{way:.0f} %", *(f"{x:+.2f} %" for x in damage), *cost]


if __name__ == "__main__":
    main(sys.argv[1:])
