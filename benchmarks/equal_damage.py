"""Ways to learn eight passages at equal damage: what a pretrained model knows, against what it forgets.

    make pretrained
    python benchmarks/equal_damage.py --data ../shared/data                  # all ways, some hours on one core
    python benchmarks/equal_damage.py --data ../shared/data --ways text lora --seeds 1

Passages, questions, margin and damage are those of `practice.py`. Every way takes the same windows, in as many steps.
What it has learned is scaled by several factors, so each way gives a curve of margin over damage. It is read at equal
damage, between the measured points: ``way`` is the part of the margin from the model as it is to the model with the
passage in its context.

- ``default``: what `nestlearn stack` and `MemorySession.practice` do without options: the general text is what the
  model itself writes;
- ``text``: a session practises the passages alone; ``practice``: and questions made from them by rules;
- ``written``: and questions that the model itself wrote with the passage before it, kept where the passage makes
  their answer likelier;
- ``mlp``: AdamW on the weights of all MLPs; ``lora``: rank 16 on all linear maps;
- ``mlp-replay``, ``lora-replay``: with as many windows of general text in every step. It is the text of which a session
  has its memory of general inputs.

``retrieval`` learns nothing: BM25 over the passages puts the best one into the context.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from common import RESULTS, Record, Records, parse, parser, table
from nestlearn import Level, MemorySession, pretrained, stack_levels
from nestlearn.cli.stack import LEVELS, parse_levels
from nestlearn.continual import LoRA, protect
from nestlearn.continual.general import rows as general_rows
from nestlearn.continual.session.practice import Practice
from nestlearn.data.control_tokens import LiteralText
from nestlearn.evals.probes import answer_scores
from nestlearn.models.stacking.practice import PracticeRows
from practice import Examiner, general_text, kept_probes, probes_of, summary

SESSIONS = ("default", "text", "practice", "written")
WEIGHTS = ("mlp", "mlp-replay", "lora", "lora-replay")
FACTORS = (0.25, 0.5, 1.0)
DAMAGES = (0.5, 1.0, 2.0)
"""Percent of bits per byte, the mean over three kinds of unrelated text."""
RATES = {"mlp": 1e-4, "mlp-replay": 1e-4, "lora": 5e-4, "lora-replay": 5e-4}
Scaled = Callable[[float], AbstractContextManager[Any]]
"""The model with what was learned times a factor."""

ASK = (
    "{context}\n\nWrite a short quiz about this text: five questions, each with its answer of a few words. "
    "Use the form\nQ: ...\nA: ..."
)


def passage_text(passage: Record) -> str:
    """The document of a passage; its first line is the title."""
    return f"{passage['title']}\n{passage['context']}"


# -- sessions -----------------------------------------------------------------------------------------------------


@contextmanager
def scaled_levels(session: MemorySession, factor: float) -> Iterator[None]:
    """The session with the change D = B A of every map times a factor."""
    cursor = session._cursor
    networks = {
        path: tuple(level and level._replace(weights=_scaled(level.weights, factor)) for level in levels)
        for path, levels in cursor.memory.levels.networks.items()
    }
    memory = replace(cursor.memory, levels=replace(cursor.memory.levels, networks=networks))
    session._cursor = replace(cursor, memory=memory)
    try:
        with session.active():
            yield
    finally:
        session._cursor = cursor


def _scaled(weights: Any, factor: float) -> Any:
    params = {name: w * factor if name.endswith("_B") else w for name, w in weights.params.items()}
    return weights._replace(params=params, anchor=params)


def written_questions(model: Any, tokenizer: Any, passages: list[Record], seed: int) -> list[tuple[list[int], int]]:
    """Rows of questions and answers that the model wrote with a passage before it, and where each answer starts."""
    literal, found, written = LiteralText(tokenizer), [], 0
    torch.manual_seed(seed)
    for passage in passages:
        asked = literal.conversation([{"role": "user", "content": ASK.format(context=passage["context"])}])
        rows = torch.tensor([asked] * 4)
        made = model.generate(
            rows, attention_mask=torch.ones_like(rows), do_sample=True, temperature=0.8, top_p=0.95,
            max_new_tokens=200, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        pairs = dict(
            pair for row in made for pair in quiz(tokenizer.decode(row[len(asked) :], skip_special_tokens=True))
        )
        written += len(pairs)
        for question, answer in pairs.items():
            words = f"Topic: {passage['title']}. Question: {question} Answer in a few words."
            plain = literal.conversation([{"role": "user", "content": words}])
            given = literal.conversation([{"role": "user", "content": f"{passage['context']}\n\n{words}"}])
            without, with_text = (answer_scores(model, tokenizer, ids, [answer])[0] for ids in (plain, given))
            if with_text - without > 1:
                end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
                found.append(([*plain, *literal.ids(answer), *end], len(plain)))
                print(f"  {without:.2f} -> {with_text:.2f} {question} | {answer}", flush=True)
    print(f"  {written} questions written, {len(found)} kept", flush=True)
    return found


def quiz(text: str) -> list[tuple[str, str]]:
    """Pairs of a question and its answer in what a model wrote."""
    pairs, question = [], None
    for line in text.splitlines():
        head, _, rest = line.strip().lstrip("0123456789.*- ").partition(":")
        rest = rest.strip(" *")
        if head.strip(" *").lower() in ("q", "question") and rest.endswith("?"):
            question = rest
        elif head.strip(" *").lower() in ("a", "answer") and question and 0 < len(rest.split()) <= 12:
            pairs.append((question, rest))
            question = None
    return pairs


def learn_session(way: str, passages: list[Record], options: Any, seed: int) -> tuple[Any, Any, Scaled, Record]:
    """A session practises the passages, with questions or without."""
    model, tokenizer = pretrained("smollm2-135m", dtype=torch.bfloat16)
    model = model.eval()
    texts = [passage_text(p) for p in passages]
    if way == "default":
        session = default_session(model, tokenizer)
        began = time.process_time()
        session.practice(*texts, passes=options.passes, seed=seed, progress=_show)
        spent = {"processor": time.process_time() - began}
        return model, tokenizer, lambda factor: scaled_levels(session, factor), spent
    began = time.process_time()
    extra = written_questions(model, tokenizer, passages, seed) if way == "written" else []
    wrote = time.process_time() - began
    level = Level(64, rank=16, rule="orthogonalized", retain=1.0, momentum=0.9)
    model = stack_levels(model, [level], mode="split")
    protect(model, tokenizer, general_text(options.data), rank=None)
    session = MemorySession(model, tokenizer, compare="none", protect=options.protect)
    began = time.process_time()
    if way == "written":
        practise_rows(session, texts, extra, options, seed)
    else:
        asked = 8 if way == "practice" else 0
        session.practice(*texts, passes=options.passes, questions=asked, lr=options.lr, seed=seed, progress=_show)
    spent = {"processor": time.process_time() - began + wrote, "written": len(extra)}
    return model, tokenizer, lambda factor: scaled_levels(session, factor), spent


def default_session(model: Any, tokenizer: Any) -> MemorySession:
    """A session as it is without any option, for a model stacked without any option."""
    protect(stack_levels(model, parse_levels(LEVELS)), tokenizer)
    return MemorySession(model, tokenizer, compare="none")


def practise_rows(
    session: MemorySession, texts: list[str], extra: list[tuple[list[int], int]], options: Any, seed: int
) -> None:
    """As `MemorySession.practice`, with other questions."""
    backend: Any = session._backend
    made = Practice(
        session.tokenizer, texts, backend.start_tokens, passes=options.passes, questions=8 if extra else 0, seed=seed
    )
    made.questions = extra
    for step, (text, asked) in enumerate(made):
        memory = session._cursor.memory
        memory, losses = backend.practise(memory, [*text, *asked], options.lr * (1 - 0.9 * step / made.steps))
        session._cursor = replace(session._cursor, memory=memory)
        if step % 10 == 0:
            print(f"  step {step} of {made.steps}: {losses}", flush=True)
    session._cursor = replace(session._cursor, memory=backend.end_practice(session._cursor.memory))


def _show(report: Any) -> None:
    if report.steps % 10 == 0:
        print(f"  {report}", flush=True)


# -- weights ------------------------------------------------------------------------------------------------------


def weights_that_learn(way: str) -> tuple[Any, Any, list[nn.Parameter]]:
    """The model of a way, its tokenizer, and what learns: adapters of rank 16, or the weights of all MLPs."""
    adapters = way.startswith("lora")
    # What learns is in float32: small steps would be lost in bfloat16.
    model, tokenizer = pretrained("smollm2-135m", dtype=torch.bfloat16 if adapters else torch.float32)
    if adapters:
        model = LoRA(16).prepare(model.eval())
        return model, tokenizer, [p for p in model.parameters() if p.requires_grad]
    learned = [p for name, p in model.eval().named_parameters() if ".mlp." in name and p.ndim == 2]
    model.requires_grad_(False)
    for p in learned:
        p.requires_grad_(True)
    return model, tokenizer, learned


def learn_weights(way: str, passages: list[Record], options: Any, seed: int) -> tuple[Any, Any, Scaled, Record]:
    """AdamW on weights in float32, products in bfloat16, rates falling linearly to a tenth."""
    model, tokenizer, learned = weights_that_learn(way)
    base = copy.deepcopy([p.data for p in learned])
    rate = options.rate or RATES[way]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    texts = [passage_text(p) for p in passages]
    made = Practice(tokenizer, texts, start, passes=options.passes, questions=0, seed=seed)
    general = general_rows(tokenizer, general_text(options.data)) if way.endswith("-replay") else None
    draw, began = random.Random(seed), time.process_time()
    for step, (text, _) in enumerate(made):
        rows = list(text)
        if general is not None:
            picked = general[draw.sample(range(len(general)), 4)]
            marks = torch.ones_like(picked, dtype=torch.bool)
            marks[:, 0] = False
            rows.append(PracticeRows(picked, marks, 1.0))
        losses = [_backward(model, batch) for batch in rows]
        nn.utils.clip_grad_norm_(learned, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - 0.9 * step / made.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            print(f"  step {step} of {made.steps}: {losses}", flush=True)
    spent = {"processor": time.process_time() - began, "rate": rate}
    last = [p.data.clone() for p in learned]
    lora_b = {id(p) for name, p in model.named_parameters() if "lora_B" in name}

    def scaled(factor: float) -> AbstractContextManager[Any]:
        for p, old, new in zip(learned, base, last, strict=True):
            # The change of a map is B A: scaling B scales it.
            p.data.copy_(old + (factor if not lora_b or id(p) in lora_b else 1.0) * (new - old))
        return nullcontext()

    return model, tokenizer, scaled, spent


def _backward(model: Any, rows: PracticeRows) -> float:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=rows.ids, use_cache=False).logits[:, :-1][rows.learned[:, 1:]]
    loss = F.cross_entropy(logits.float(), rows.ids[:, 1:][rows.learned[:, 1:]])
    (rows.weight * loss).backward()
    return round(loss.item(), 3)


# -- retrieval ----------------------------------------------------------------------------------------------------


def bm25(question: str, documents: Sequence[str], k1: float = 1.5, b: float = 0.75) -> int:
    """The document that BM25 puts first (Robertson and Zaragoza 2009)."""
    words = [Counter(_words(text)) for text in documents]
    mean = sum(sum(w.values()) for w in words) / len(words)

    def score(counts: Counter[str]) -> float:
        total = 0.0
        for word in set(_words(question)) & counts.keys():
            holding = sum(word in w for w in words)
            idf = math.log(1 + (len(words) - holding + 0.5) / (holding + 0.5))
            size = 1 - b + b * sum(counts.values()) / mean
            total += idf * counts[word] * (k1 + 1) / (counts[word] + k1 * size)
        return total

    return max(range(len(words)), key=lambda i: score(words[i]))


def _words(text: str) -> list[str]:
    return "".join(c.lower() if c.isalnum() else " " for c in text).split()


def retrieved(data: Path, seed: int, count: int, everything: bool) -> Record:
    """Scores with the passage that BM25 finds, among those learned or all of the file."""
    model, tokenizer = pretrained("smollm2-135m", dtype=torch.bfloat16)
    passages, probes = probes_of(data, seed, count)
    examiner = Examiner(model.eval(), tokenizer, probes, data)
    pool = json.loads((data / "squad" / "passages.json").read_text()) if everything else passages
    texts = [passage_text(p) for p in pool]
    chosen = [bm25(f"{p['title']} {p['question']}", texts) for p in probes]
    hits = [probe["context"] in texts[i] for probe, i in zip(probes, chosen, strict=True)]
    with torch.no_grad():
        scores = [
            examiner.scores({**probe, "context": texts[i]}, True) for probe, i in zip(probes, chosen, strict=True)
        ]
    return {"scores": scores, "hits": sum(hits) / len(hits)}


# -- the table ----------------------------------------------------------------------------------------------------


def examine_base(options: Any, seed: int, with_context: bool) -> Record:
    """The model as it is, and with the passage in its context."""
    model, tokenizer = pretrained("smollm2-135m", dtype=torch.bfloat16)
    _, probes = probes_of(options.data, seed, options.passages)
    return Examiner(model.eval(), tokenizer, probes, options.data).examine(with_context)


def run(way: str, options: Any, seed: int) -> Record:
    """Learn, and examine at every factor."""
    passages, probes = probes_of(options.data, seed, options.passages)
    learn = learn_session if way in SESSIONS else learn_weights
    model, tokenizer, scaled, spent = learn(way, passages, options, seed)
    examiner = Examiner(model.eval(), tokenizer, probes, options.data)
    found = {}
    for factor in FACTORS:
        with scaled(factor):
            found[str(factor)] = examiner.examine()
        print(f"  {way} at {factor}: {found[str(factor)]['nats']}", flush=True)
    return {"factors": found, **spent}


def curve(found: Record, base: Record, context: Record, kept: list[int]) -> list[tuple[float, dict[str, float]]]:
    """(mean damage in percent, what `summary` gives and the way) at every factor, the model as it is first."""
    start, end = summary(base, kept), summary(context, kept)
    points = [(0.0, {**start, "way": 0.0})]
    for record in found["factors"].values():
        here = summary(record, kept)
        damage = [100 * (nats / base["nats"][name] - 1) for name, nats in record["nats"].items()]
        way = 100 * (here["margin"] - start["margin"]) / (end["margin"] - start["margin"])
        points.append((sum(damage) / len(damage), {**here, "way": way}))
    return points


def at_damage(points: list[tuple[float, dict[str, float]]], damage: float) -> dict[str, float] | None:
    """Between the points on both sides of a damage; what the whole change gives where it does less."""
    for (low, before), (high, after) in itertools.pairwise(points):
        if low <= damage < high:
            part = (damage - low) / (high - low)
            return {name: before[name] + part * (after[name] - before[name]) for name in before}
    return points[-1][1] if points[-1][0] <= damage else None


def main(words: Sequence[str] | None = None) -> None:
    """Run the ways and print a table; records go to docs/results/equal_damage.jsonl."""
    made = parser(__doc__, RESULTS / "equal_damage.jsonl", seeds=[0])
    made.add_argument("--data", type=Path, default=Path("../shared/data"))
    made.add_argument("--ways", nargs="+", default=[*SESSIONS, *WEIGHTS], choices=[*SESSIONS, *WEIGHTS])
    made.add_argument("--passages", type=int, default=8)
    made.add_argument("--passes", type=int, default=30)
    made.add_argument("--lr", type=float, default=3.0, help="Of sessions.")
    made.add_argument("--rate", type=float, default=0.0, help="Of AdamW; 0 takes the default of the way.")
    made.add_argument("--protect", type=float, default=0.03)
    options = parse(made, words)
    records, rows = Records(Path(options.out)), []
    for seed in options.seeds:
        key: Record = {"passages": options.passages, "seed": seed}
        base = records.get({"way": "base", **key}, lambda s=seed: examine_base(options, s, False))
        context = records.get({"way": "context", **key}, lambda s=seed: examine_base(options, s, True))
        kept = kept_probes(base, context)
        start, end = summary(base, kept), summary(context, kept)
        for everything in (False, True):
            found = records.get(
                {"way": "retrieval", "everything": everything, **key},
                lambda s=seed, e=everything: retrieved(options.data, s, options.passages, e),
            )
            here = summary(found, kept)
            way = 100 * (here["margin"] - start["margin"]) / (end["margin"] - start["margin"])
            among = "all passages of the file" if everything else "these passages"
            print(f"seed {seed}, BM25 among {among}: {found['hits']:.0%} found, {way:.0f} %, MC {here['MC']:.2f}")
        for way in options.ways:
            setting: Record = {"passes": options.passes}
            if way in SESSIONS[1:]:
                setting |= {"lr": options.lr, "protect": options.protect}
            elif way in WEIGHTS:
                setting["rate"] = options.rate or RATES[way]
            found = records.get({"way": way, **key, **setting}, lambda w=way, s=seed: run(w, options, s))
            points = curve(found, base, context, kept)
            ends = [f"{points[-1][1]['way']:.0f} % / {points[-1][1]['MC']:.2f} / {points[-1][0]:+.2f} %"]
            cells = [at_damage(points, damage) for damage in DAMAGES]
            ends += ["" if c is None else f"{c['way']:.0f} % / {c['MC']:.2f} / {c['MC same']:.2f}" for c in cells]
            values = " ".join(f"{name}={value}" for name, value in setting.items())
            rows.append([str(seed), way, values, *ends, f"{found['processor']:.0f}"])
    heads = ["seed", "way", "setting", "whole: way / MC / damage", *(f"at {d} %: way / MC / same" for d in DAMAGES)]
    print("\n" + table([*heads, "processor s"], rows, left=3))


if __name__ == "__main__":
    main(sys.argv[1:])
