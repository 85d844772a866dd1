"""Does a pretrained model with stacked levels learn what it reads, keep it, and leave the rest as it was?

    python benchmarks/stacked_reading.py train --seeds 0 1 2      # small byte-level Llamas, about 10 minutes each
    python benchmarks/stacked_reading.py tune --seeds 0           # step sizes and rules, on the tuning documents
    python benchmarks/stacked_reading.py read --seeds 0 1 2       # what docs/results/stacked-reading.md reports

No pretrained model ships with this package, so three are trained here (1.08 M parameters, bytes, on novels and
Wikipedia). Then each reads documents that it has never seen, with levels stacked in each mode. Reported, in bits per
byte:

- ``online``: the second half of a document while reading on, each segment before it is written; ``off`` the same with
  writes off;
- ``before``, ``after``: the second half in a fresh context, before and after the first half was read;
- ``other``: the same after the first half of another document was read instead (a control: is it this document?);
- ``unrelated_before``, ``unrelated_after``: held-out Wikipedia, before and after the whole document was read.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from common import RESULTS, Record, Records, parse, parser, plus_minus, table, update, windows
from nestlearn import Level, MemorySession, stack_levels
from nestlearn.continual import ReadReport
from nestlearn.data import byte_tokenizer, load_corpus
from nestlearn.models.stacking.plan import Mode

CONTEXT = 256
TRAINING = ("gutenberg_books/two_cities.txt", "gutenberg_books/sherlock_holmes.txt", "wikitext2/valid.txt")
HELD_OUT = 60_000  # last bytes of wikitext: unrelated text that nothing is trained on


def training_text(data: Path) -> Tensor:
    """Bytes of the training texts, one after the other."""
    parts = [(data / name).read_bytes() for name in TRAINING]
    parts[-1] = parts[-1][:-HELD_OUT]
    return torch.frombuffer(bytearray(b"\n\n".join(parts)), dtype=torch.uint8).long()


def train(seed: int, data: Path, out: Path, steps: int, batch: int = 16) -> None:
    """Train one small Llama and save it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=CONTEXT, bos_token_id=256, eos_token_id=257, pad_token_id=258,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    text, start = training_text(data), torch.full((batch, 1), 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * s / steps)) + 0.01
    )
    losses = []
    for step in range(steps):
        ids = torch.cat([start, windows(text, batch, CONTEXT)[:, :-1]], 1)
        loss = update(model, model(input_ids=ids, labels=ids).loss, optimizer, schedule)
        losses.append(loss.item() / math.log(2))
        if step % 50 == 49:
            print(f"seed {seed} step {step + 1}: {statistics.mean(losses[-50:]):.3f} bits per byte", flush=True)
    folder = out / f"seed{seed}"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


MODES: dict[str, tuple[Mode, list[Level]]] = {
    "split": ("split", [Level(32, lr=4), Level(256)]),
    "copy": ("copy", [Level(32, lr=4), Level(256)]),
    "add": ("add", [Level(32, lr=4, hidden=128), Level(256, hidden=128)]),
}
SETTINGS: dict[str, tuple[Mode, list[Level]]] = {
    "descent, lr 1 and 1": ("split", [Level(32), Level(256)]),
    "descent, lr 2 and 2": ("split", [Level(32, lr=2), Level(256, lr=2)]),
    "descent, lr 4 and 1": ("split", [Level(32, lr=4), Level(256)]),
    "three levels, lr 4, 1, 1": ("split", [Level(32, lr=4), Level(256), Level(2048)]),
    "nothing forgotten, lr 1": ("split", [Level(32, retain=1.0), Level(256, retain=1.0)]),
    "nothing forgotten, lr 4": ("split", [Level(32, lr=4, retain=1.0), Level(256, lr=4, retain=1.0)]),
    "delta, lr 8, nothing decays": (
        "split",
        [Level(32, rule="delta", lr=8, retain=1.0), Level(256, rule="delta", lr=8, retain=1.0)],
    ),
}


def documents(data: Path, length: int, tuning: bool) -> dict[str, str]:
    """Texts that nothing was trained on; tuning and reported ones have nothing in common."""
    if tuning:
        intents = json.loads((data / "clinc150/data_small.json").read_text())["train"]
        return {
            "dracula": (data / "gutenberg_books/dracula.txt").read_text()[100_000:][:length],
            "clinc150": "\n".join(text for text, _ in intents[::7])[:length],
        }
    python = next(doc for doc in load_corpus("python-docs", "validation") if doc.name == "topic/execmodel")
    return {
        "alice": (data / "gutenberg_books/alice.txt").read_text()[20_000:][:length],
        "shakespeare": (data / "tinyshakespeare/input.txt").read_text()[200_000:][:length],
        "python docs": python.text[:length],
    }


def read_document(model: Any, tokenizer: Any, text: str) -> tuple[MemorySession, MemorySession, ReadReport]:
    """The session after half of a document and after all of it, and the report."""
    session, halves = MemorySession(model, tokenizer, compare="off"), []

    def watch(report: ReadReport) -> None:
        if not halves and report.bytes >= len(text.encode()) / 2:
            halves.append(session.fork())

    report = session.read(text, progress=watch)
    return halves[0], session, report


def read(seed: int, name: str, setting: tuple[Mode, list[Level]], texts: dict[str, str], args: Any) -> list[Record]:
    """One model with one kind of levels reads every document: a record per document."""
    folder, records = args.out / f"seed{seed}", []
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    mode, levels = setting
    stack_levels(model, levels, mode=mode)
    unrelated = (args.data / TRAINING[-1]).read_bytes()[-HELD_OUT:].decode("utf-8", "ignore")
    unrelated = unrelated[2_000:][: args.length // 2]
    plain = MemorySession(model, tokenizer)
    halves = {title: (text[: len(text) // 2], text[len(text) // 2 :]) for title, text in texts.items()}
    before = {title: plain.score(second) for title, (_, second) in halves.items()}
    unrelated_before = plain.score(unrelated)
    read_whole = {title: read_document(model, tokenizer, text) for title, text in texts.items()}
    titles = list(halves)
    for number, title in enumerate(titles):
        half, finished, report = read_whole[title]
        other, second = read_whole[titles[number - 1]][0], halves[title][1]
        part = report.part(0.5, 1)
        records.append({
            "seed": seed, "levels": name, "document": title, "online": part.bits_per_byte, "off": part.off,
            "before": before[title], "after": half.score(second), "other": other.score(second),
            "unrelated_before": unrelated_before, "unrelated_after": finished.score(unrelated),
            "state_bytes": finished.nbytes, "seconds": report.seconds,
        })  # fmt: skip
        print(json.dumps(records[-1]), flush=True)
    return records


HEADER = ("levels", "document", "second half, fresh context: before", "after its first half", "after another's",
          "reading on: writes off", "on", "unrelated text")  # fmt: skip


def tabulate(records: list[Record]) -> str:
    """Means over seeds, with standard errors of the changes, in percent of what was before."""
    rows = []
    for key in dict.fromkeys((record["levels"], record["document"]) for record in records):
        mine = [record for record in records if (record["levels"], record["document"]) == key]

        def change(new: str, old: str, mine: list[Record] = mine) -> str:
            return f"{plus_minus([100 * (record[new] / record[old] - 1) for record in mine], digits=2)} %"

        first, off = (f"{statistics.mean(record[field] for record in mine):.3f}" for field in ("before", "off"))
        changes = [change("after", "before"), change("other", "before"), off, change("online", "off")]
        rows.append([*key, first, *changes, change("unrelated_after", "unrelated_before")])
    return table(HEADER, rows, left=2)


def main(words: Sequence[str] | None = None) -> None:
    """Train the models, or let them read."""
    made = parser(__doc__, "runs/stacked_reading", seeds=range(3))
    made.add_argument("what", choices=["train", "tune", "read"])
    made.add_argument("--data", type=Path, default=Path("shared/data"), help="folder with gutenberg_books, ...")
    made.add_argument("--steps", type=int, default=1200)
    made.add_argument("--levels", nargs="+", choices=list(MODES), default=list(MODES), help="what `read` stacks")
    made.add_argument("--length", type=int, default=8_000, help="characters of a document")
    made.add_argument("--results", type=Path, default=RESULTS / "stacked-reading.jsonl")
    options = parse(made, words)
    if options.what == "train":
        for seed in options.seeds:
            train(seed, options.data, options.out, options.steps)
        return
    disable_progress_bar()
    texts = documents(options.data, options.length, options.what == "tune")
    settings = SETTINGS if options.what == "tune" else {name: MODES[name] for name in options.levels}
    rows = [
        row for seed in options.seeds for name, s in settings.items() for row in read(seed, name, s, texts, options)
    ]
    if options.what == "read":
        # Records of other seeds and levels stay, so that a run may be done in parts.
        done = {(row["seed"], row["levels"]) for row in rows}
        rows = [row for row in Records(options.results).all if (row["seed"], row["levels"]) not in done] + rows
        rows.sort(key=lambda row: list(MODES).index(row["levels"]))
        options.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(tabulate(rows))


if __name__ == "__main__":
    main()
