"""Does reading a document lower the loss of its rest, on a real pretrained model? Levels of many kinds, and controls.

    make pretrained
    python benchmarks/pretrained_reading.py --data ../shared/data
    python benchmarks/pretrained_reading.py --data ../shared/data --only "ortho 64, lr 4" "lora 0.001" --documents docs

SmolLM2-135M-Instruct in bfloat16 reads a document from its start, in blocks of 1,024 tokens of attention. Every segment
is scored before it is learned. Reported: bits per byte of the second half of the document,

- ``off``: nothing is written; ``longer``: the same with blocks of 2,048 tokens, whose keys and values take 24 MB more;
- a setting of levels; ``lora``: dynamic evaluation, one step of AdamW on rank-16 adapters of all linear maps after each
  segment;

and ``unrelated``: the change of bits per byte of other text (Wikipedia, Python source, a play) by what was learned.
The documents: ``novel``: Dracula, ``play``: Shakespeare (the model has seen both), ``code``: a module of transformers
that is younger than the model, ``docs``: docs/decisions.md of this repository.
"""

from __future__ import annotations

import inspect
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.generation.continuous_batching import continuous_api

from common import RESULTS, Record, Records, parse, parser, table
from nestlearn import Level, pretrained, stack_levels
from nestlearn.continual import LoRA, protect
from nestlearn.data.control_tokens import LiteralText
from nestlearn.models.stacking import LevelState, read_segment
from nestlearn.models.stacking.network import reading
from practice import Examiner, general_text

BLOCK = 1024
DOCUMENTS = ("novel", "play", "code", "docs")


def ortho(period: int, lr: float, rank: int | None = 16, **more: Any) -> Level:
    """A level that writes orthogonalized momentum."""
    return Level(period, rank=rank, rule="orthogonalized", lr=lr, **more)


SETTINGS: dict[str, Any] = {
    "off": BLOCK,
    "longer": 2 * BLOCK,
    "stack's default: ortho 64, lr 3, all kept": [ortho(64, 3.0, retain=1.0)],
    "ortho 64, lr 1": [ortho(64, 1.0)],
    "ortho 64, lr 4": [ortho(64, 4.0)],
    "ortho 64, lr 12": [ortho(64, 12.0)],
    "ortho 64, lr 4, all kept": [ortho(64, 4.0, retain=1.0)],
    "ortho 256, lr 4": [ortho(256, 4.0)],
    "descent 64, lr 8, whole maps": [Level(64, lr=8.0)],
    "ortho 64, lr 4, whole maps": [ortho(64, 4.0, rank=None)],
    "ortho 64 and 512, lr 4": [ortho(64, 4.0), ortho(512, 4.0)],
    "lora 0.001": 1e-3,
    "lora 0.003": 3e-3,
}
"""A list of levels, the rate of LoRA, or the tokens of a block without learning."""


@lru_cache(2)
def model_with(levels: tuple[Level, ...] | None, data: Path) -> tuple[Any, Any]:
    """The model with levels and a memory of general inputs; None: as it is."""
    model, tokenizer = pretrained("smollm2-135m", dtype=torch.bfloat16)
    model = model.eval()
    if levels is not None:
        model = stack_levels(model, list(levels), mode="split")
        if len(levels) > 1:
            protect(model, tokenizer, general_text(data))
        else:
            for path, directions in general_directions(data).items():
                for name, rows in directions.items():
                    model.stacked_mlps()[path].remember(0, name, rows)
    return model, tokenizer


@cache
def general_directions(data: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What a single level remembers of general inputs: the same for every kind of level, since it reads all units."""
    model, tokenizer = pretrained("smollm2-135m", dtype=torch.bfloat16)
    model = protect(stack_levels(model.eval(), [Level(64)], mode="split"), tokenizer, general_text(data))
    kept = {path: mlp.level(0) for path, mlp in model.stacked_mlps().items()}
    return {path: {"up": level.general_up, "down": level.general_down} for path, level in kept.items()}


@cache
def unrelated_before(data: Path) -> Record:
    """Nats per token of unrelated text by the model as it is: levels and adapters add nothing at first."""
    model, tokenizer = model_with(None, data)
    return Examiner(model, tokenizer, [], data).examine()["nats"]


def document(name: str, data: Path, tokenizer: Any, tokens: int) -> tuple[torch.Tensor, list[int]]:
    """Its first tokens, and the bytes of each."""
    texts = {
        "novel": lambda: (data / "gutenberg_books/dracula.txt").read_text()[100_000:],
        "play": lambda: (data / "tinyshakespeare/input.txt").read_text()[200_000:],
        "code": lambda: inspect.getsource(continuous_api),
        "docs": lambda: (Path(__file__).parents[1] / "docs/decisions.md").read_text(),
    }
    ids = LiteralText(tokenizer).ids(texts[name]())[:tokens]
    return torch.tensor(ids), [len(tokenizer.decode([i]).encode()) for i in ids]


def segments(ids: torch.Tensor, length: int, block: int) -> list[tuple[bool, torch.Tensor]]:
    """(whether a block of attention begins, tokens)."""
    return [(at % block == 0, part) for at, part in zip(range(0, len(ids), length), ids.split(length), strict=True)]


def nats_of(last: torch.Tensor | None, logits: torch.Tensor, ids: torch.Tensor) -> list[float]:
    """Of every token, given the last logits before them; 0 for a first token without a context."""
    logits = logits.float()
    rest = F.cross_entropy(logits[:-1], ids[1:], reduction="none").tolist()
    return [0.0 if last is None else F.cross_entropy(last[None].float(), ids[:1]).item(), *rest]


def read_levels(model: Any, start: int, ids: torch.Tensor, block: int, how: Record) -> tuple[list[float], LevelState]:
    """Nats of every token while levels read, and what they learned."""
    state, keys, last, found = LevelState(), (), None, []
    for begins, part in segments(ids, model.stack_plan.segment, block):
        if begins:
            first = read_segment(model, torch.tensor([[start]]), state, writes=False, protect=how["protect"])
            keys, last = first.keys, first.logits[0, -1]
        read = read_segment(model, part[None], state, keys, writes=how["writes"], protect=how["protect"])
        found += nats_of(last, read.logits[0], part)
        state, keys, last = read.state, read.keys, read.logits[0, -1]
    return found, state


def read_plain(model: Any, start: int, ids: torch.Tensor, block: int) -> list[float]:
    """Nats of every token without learning."""
    found: list[float] = []
    for part in ids.split(block):
        row = torch.cat([torch.tensor([start]), part])
        with torch.no_grad():
            logits = model(row[None, :-1]).logits[0].float()
        found += F.cross_entropy(logits, part, reduction="none").tolist()
    return found


def read_lora(model: Any, start: int, ids: torch.Tensor, block: int, rate: float, length: int = 256) -> list[float]:
    """Nats of every token while adapters take a step after every segment."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    keys: list[tuple[torch.Tensor, torch.Tensor]] = []
    last, found = None, []
    for begins, part in segments(ids, length, block):
        if begins:
            with torch.no_grad():
                first = model(torch.tensor([[start]]), use_cache=True)
            keys, last = _pairs(first.past_key_values), first.logits[0, -1]
        made = model(part[None], past_key_values=DynamicCache(keys), use_cache=True)
        F.cross_entropy(made.logits[0, :-1].float(), part[1:]).backward()
        found += nats_of(last, made.logits[0].detach(), part)
        keys, last = _pairs(made.past_key_values), made.logits[0, -1].detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found


def _pairs(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys.detach(), layer.values.detach()) for layer in cache.layers]


def run(name: str, kind: Any, where: str, options: Any, damage: bool) -> Record:
    """Read one document; ``kind`` is a list of levels, the rate of LoRA, or the tokens of a block without learning."""
    levels = tuple(kind) if isinstance(kind, list) else None
    if isinstance(kind, float):
        plain, tokenizer = pretrained("smollm2-135m", dtype=torch.bfloat16)
        model = LoRA(16).prepare(plain.eval())
    else:
        model, tokenizer = model_with(levels, options.data)
    ids, sizes = document(where, options.data, tokenizer, options.tokens)
    examiner = Examiner(model, tokenizer, [], options.data) if damage else None
    began, active, nbytes = time.process_time(), nullcontext(), 0
    start = int(tokenizer.bos_token_id)
    if levels is not None:
        guard = None if options.unprotected else options.protect
        nats, state = read_levels(model, start, ids, BLOCK, {"writes": True, "protect": guard})
        active, nbytes = reading(model.stack_plan, state, None, guard), state.nbytes
    elif isinstance(kind, float):
        nats = read_lora(model, start, ids, BLOCK, kind)
    else:
        nats = read_plain(model, start, ids, kind)
    spent = time.process_time() - began
    half = len(ids) // 2
    bits = [sum(nats[at:]) / math.log(2) / sum(sizes[at:]) for at in (0, half)]
    found: Record = {"whole": bits[0], "second half": bits[1], "processor": spent, "bytes": nbytes}
    if examiner:
        with active:
            after = examiner.examine()["nats"]
        before = unrelated_before(options.data)
        found["unrelated"] = sum(100 * (after[n] / before[n] - 1) for n in before) / len(before)
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Read and print a table; records go to docs/results/pretrained_reading.jsonl."""
    made = parser(__doc__, RESULTS / "pretrained_reading.jsonl")
    made.add_argument("--data", type=Path, default=Path("../shared/data"))
    made.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    made.add_argument("--documents", nargs="+", default=list(DOCUMENTS), choices=DOCUMENTS)
    made.add_argument("--tokens", type=int, default=3072)
    made.add_argument("--protect", type=float, default=0.03)
    made.add_argument("--unprotected", action="store_true", help="Write without the memory of general inputs.")
    options = parse(made, words)
    records = Records(Path(options.out))
    kinds = {name: SETTINGS[name] for name in dict.fromkeys(("off", "longer", *options.only))}
    rows = []
    for name, kind in kinds.items():
        found = []
        for where in options.documents:
            key: Record = {"setting": name, "document": where, "tokens": options.tokens}
            if isinstance(kind, list):
                key["protect"] = None if options.unprotected else options.protect
                key["levels"] = [{k: v for k, v in asdict(level).items() if v is not None} for level in kind]
            learns = not isinstance(kind, int)
            found.append(records.get(key, lambda n=name, k=kind, w=where, d=learns: run(n, k, w, options, d)))
        rows.append((name, found))
    best = [min(r["second half"] for r in column) for column in zip(*(f for _, f in rows[:2]), strict=True)]
    cells = []
    for name, found in rows:
        changes = [100 * (r["second half"] / b - 1) for r, b in zip(found, best, strict=True)]
        second = [f"{r['second half']:.3f} ({c:+.1f} %)" for r, c in zip(found, changes, strict=True)]
        unrelated = [r["unrelated"] for r in found if "unrelated" in r]
        worst = f"{max(unrelated):+.2f} %" if unrelated else ""
        cells.append([name, *second, f"{sum(changes) / len(changes):+.2f} %", worst, f"{found[0]['processor']:.0f}"])
    print("\n" + table(["setting", *options.documents, "mean change", "unrelated, worst", "processor s"], cells))


if __name__ == "__main__":
    main(sys.argv[1:])
