"""The ablations of NL Table 6 on a small language model, each model also read with its memories switched off.

    python benchmarks/language_ablations.py --out runs/language_ablations
    python benchmarks/language_ablations.py --rows default "default, static projections" --steps 1000 --out runs/longer
    python benchmarks/language_ablations.py --rows nested "nested, by gradient" "nested, sequential" --out runs/nested

All rows of a seed see the same batches and start from the same weights where they have the same parameters, so the
difference from their baseline is paired. Finished runs in --out are not repeated: the command can be stopped and
started again. Records are in results.jsonl, the tables in table.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.allocator import tune_allocator
from nestlearn.data import byte_tokenizer, bytes_per_token, load_corpus, train_bpe
from nestlearn.data.documents import Document
from nestlearn.evals.language import document_tokens, loss_by_position

STREAMS = ("q", "k", "v", "eta", "alpha")
COMMON: dict[str, Any] = {
    "tie_word_embeddings": True,
    "cms": [{"period": 64, "expansion": 0.5}, {"expansion": 3}],
}  # fmt: skip
NO_CMS = [{"period": None, "expansion": 3.5}]
NESTED: dict[str, Any] = {
    "cms": [{"period": 16, "expansion": 0.5}, {"period": 64, "expansion": 0.5}, {"expansion": 3}],
    "cms_variant": "nested",
}  # fmt: skip


def _without(*names: str) -> dict[str, Any]:
    return {"adaptive": [name for name in STREAMS if name not in names]}


def _hope(**changes: Any) -> dict[str, Any]:
    """All mechanisms of NL Table 6, with some options of the mixer changed."""
    return {"mixer": {"momentum": True, "adaptive": list(STREAMS)} | changes}


def _default(**changes: Any) -> dict[str, Any]:
    """This package's default, no momentum and a static query, with some options of the mixer changed."""
    return {"mixer": _without("q") | changes}


# Row: what it is compared with, its fields.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "hope": ("hope", _hope()),
    "w/o DGD": ("hope", _hope(delta=False)),
    "w/o momentum": ("hope", _hope(momentum=False)),
    "w/o weight decay": ("hope", _hope(retention=False)),
    "w/o CMS": ("hope", _hope() | {"cms": NO_CMS}),
    "w/o inner-projection k": ("hope", _hope(**_without("k"))),
    "w/o inner-projection v": ("hope", _hope(**_without("v"))),
    "w/o inner-projection q": ("hope", _hope(**_without("q"))),
    "static projections": ("hope", _hope(adaptive=[])),
    "given values": ("hope", _hope(self_values=False)),
    "default": ("default", _default()),
    "default, static projections": ("default", _default(adaptive=[])),
    "default, given values": ("default", _default(self_values=False)),
    "default, trained without writes": ("default", _default()),
    "nested": ("nested", _default() | NESTED),
    "nested, by gradient": ("nested", _default() | NESTED | {"cms_transfer_by": "gradient"}),
    "nested, sequential": ("nested", _default() | NESTED | {"cms_variant": "sequential"}),
}
PUBLISHED = {
    "hope": 12.24, "w/o DGD": 13.41, "w/o momentum": 13.58, "w/o weight decay": 13.71, "w/o CMS": 13.04,
    "w/o inner-projection k": 13.77, "w/o inner-projection v": 13.90, "w/o inner-projection q": 12.19,
}  # fmt: skip
"""Perplexities of NL (arXiv 2512.24695), Table 6."""
CONDITIONS = ("on", "off", "shuffled")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Ablate a small language model, with its writes on and off.")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--conv-size", type=int, default=0, help="0: context reaches a token through memories alone")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=32, help="tokens per chunk of the main memory")
    parser.add_argument("--projection-chunk", type=int, default=64)
    parser.add_argument("--initializer-range", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--corpus", default="python-source")
    parser.add_argument("--vocabulary", type=int, default=1024, help="byte-pair tokens; 259 for bytes alone")
    parser.add_argument("--pieces", type=int, default=32, help="held-out pieces of twice the length")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/language_ablations"))
    return parser.parse_args()


def settings(row: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What identifies a run."""
    names = ("steps", "batch_size", "length", "layers", "conv_size", "width", "heads", "chunk", "projection_chunk",
             "initializer_range", "learning_rate", "corpus", "vocabulary", "pieces")  # fmt: skip
    return {"row": row, "seed": seed} | {name: getattr(options, name) for name in names}


def build(row: str, seed: int, options: argparse.Namespace) -> HopeForCausalLM:
    """The row's model; parameters that its baseline has too start from the baseline's values."""

    def fresh(fields: dict[str, Any]) -> HopeForCausalLM:
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"hidden_size": options.width, "num_attention_heads": options.heads}
        sizes["num_hidden_layers"] = options.layers
        first = options.vocabulary - 3
        sizes |= {
            "vocab_size": options.vocabulary,
            "bos_token_id": first,
            "eos_token_id": first + 1,
            "pad_token_id": first + 2,
            "reset_token_id": first,
        }
        sizes["initializer_range"] = options.initializer_range
        mixer = {
            "type": "self_modifying",
            "expansion": 2,
            "chunk_size": options.chunk,
            "projection_chunk_size": options.projection_chunk,
            "conv_size": options.conv_size,
        }
        return HopeForCausalLM(HopeConfig(**(COMMON | sizes | fields | {"mixer": mixer | fields["mixer"]})))

    base, fields = ROWS[row]
    model, shared = fresh(fields), dict(fresh(ROWS[base][1]).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in shared and shared[name].shape == parameter.shape:
                parameter.copy_(shared[name])
    return model


@dataclass(frozen=True)
class Text:
    """What is read: a tokenizer, all training documents one after the other, and pieces of held-out ones."""

    tokenizer: PreTrainedTokenizerBase
    stream: Tensor
    pieces: list[Document]


def read_text(options: argparse.Namespace) -> Text:
    """The corpus in byte-pair tokens, each document as `<s> text </s>`."""
    documents = list(load_corpus(options.corpus))
    bytes_only = options.vocabulary == 259
    tokenizer = byte_tokenizer() if bytes_only else train_bpe(documents, options.vocabulary)
    stream = torch.tensor([token for document in documents for token in document_tokens(tokenizer, document.text)])
    mean_bytes = float(bytes_per_token(tokenizer)[stream].double().mean())
    return Text(tokenizer, stream, held_out(tokenizer, mean_bytes, options))


def held_out(tokenizer: PreTrainedTokenizerBase, mean_bytes: float, options: argparse.Namespace) -> list[Document]:
    """Pieces of held-out text, spread over the documents, of more tokens than twice the training length."""
    size = math.ceil(2 * options.length * mean_bytes * (1.0 if options.vocabulary == 259 else 1.25)) + 64
    pieces = [
        Document(document.text[start : start + size], f"{document.name}:{start}")
        for document in load_corpus(options.corpus, "validation")
        for start in range(0, len(document.text) - size, size)
    ]
    pieces = pieces[:: max(1, len(pieces) // (2 * options.pieces))]
    long = [piece for piece in pieces if len(document_tokens(tokenizer, piece.text)) > 2 * options.length]
    return long[:: max(1, len(long) // options.pieces)][: options.pieces]


def train(row: str, seed: int, text: Text, options: argparse.Namespace) -> tuple[HopeForCausalLM, float]:
    """A trained model, and its mean loss over the last tenth of training in bits per token."""
    model = build(row, seed, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    warmup = max(1, options.steps // 20)

    def rate(step: int) -> float:
        # Constant until the last fifth: reading the memories is learned late, and only at a high rate.
        left = (options.steps - step) / (0.2 * options.steps)
        return min((step + 1) / warmup, max(0.05, min(1.0, left)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(seed)
    writes = row != "default, trained without writes"
    losses: list[Tensor] = []
    stream, start_token = text.stream, text.tokenizer.bos_token_id
    for _ in range(options.steps):
        starts = torch.randint(len(stream) - options.length, (options.batch_size,), generator=generator)
        ids = stream[starts[:, None] + torch.arange(options.length)]
        ids[:, 0] = start_token
        loss = model(ids, labels=ids, writes=writes).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    last = torch.stack(losses[-max(1, options.steps // 10) :]).mean()
    return model.eval(), float(last) / math.log(2)


def run(row: str, seed: int, text: Text, options: argparse.Namespace) -> dict[str, Any]:
    """One record: settings, size, seconds of a core, bits per byte by position and condition."""
    began = time.process_time()
    model, training_bits = train(row, seed, text, options)
    seconds = time.process_time() - began
    result = loss_by_position(
        model, text.tokenizer, text.pieces, length=2 * options.length, documents=options.pieces, conditions=CONDITIONS
    )
    return settings(row, seed, options) | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_bits_per_token": training_bits,
        "documents": result.n,
        "edges": result.details["edges"],
        "bits_per_byte": result.details["bits_per_byte"],
        "train_cpu_seconds": seconds,
        "cpu_seconds": time.process_time() - began,
    }


def between(record: dict[str, Any], condition: str, low: int, high: int) -> float:
    """Mean bits per byte of the positions low to high - 1."""
    total = width = 0.0
    for (start, end), bits in zip(pairwise(record["edges"]), record["bits_per_byte"][condition], strict=True):
        if start >= low and end <= high:
            total, width = total + bits * (end - start), width + end - start
    return total / width


def differences(records: list[dict[str, Any]], row: str, base: str, condition: str, low: int, high: int) -> list[float]:
    """Bits per byte of a row minus those of its baseline, by seed."""
    of_base = {r["seed"]: between(r, condition, low, high) for r in records if r["row"] == base}
    return [
        between(r, condition, low, high) - of_base[r["seed"]]
        for r in records
        if r["row"] == row and r["seed"] in of_base
    ]


def mean(values: list[float]) -> float:
    """The mean, NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def pooled_deviation(samples: list[list[float]]) -> tuple[float, int]:
    """Standard deviation of one value around the mean of its sample, over all samples together; degrees of freedom."""
    squares = sum((x - mean(sample)) ** 2 for sample in samples for x in sample)
    freedom = sum(len(sample) - 1 for sample in samples if sample)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def ablation_table(records: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """A row per model: bits per byte with writes on and off, and the difference from its baseline beside NL's."""
    length = options.length
    found = [row for row in ROWS if any(r["row"] == row for r in records)]
    changed = [row for row in found if ROWS[row][0] != row]
    by_row = {row: differences(records, row, ROWS[row][0], "on", 0, length) for row in changed}
    without_writes = {row: mean(differences(records, row, ROWS[row][0], "off", 0, length)) for row in changed}
    deviation, freedom = pooled_deviation(list(by_row.values()))
    needed = float(student.ppf(0.975, freedom)) if freedom else math.inf
    noise = (
        f", standard error from the deviation between seeds pooled over the rows ({freedom} degrees of freedom: "
        f"{needed:.2f} standard errors are needed at the 5 % level)."
    )
    lines = [
        f"Held-out bits per byte at positions 0-{length - 1}; difference from the row's baseline, paired by seed "
        "(positive: worse)" + (noise if freedom else "."),
        "",
        "| row | parameters | seeds | writes on | writes off | off - on | difference | difference with writes off | "
        "published, per token | sign |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in found:
        own = [r for r in records if r["row"] == row]
        on, off = (mean([between(r, condition, 0, length) for r in own]) for condition in ("on", "off"))
        sizes = " | ".join((f"{own[0]['parameters']:,}", str(len(own)), f"{on:.3f}", f"{off:.3f}", f"{off - on:+.3f}"))
        difference = off_part = published = sign = ""
        if by_row.get(row):
            value, error = mean(by_row[row]), deviation / math.sqrt(len(by_row[row]))
            difference = f"{value:+.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")
            off_part = f"{without_writes[row]:+.3f}"
            sign = "below noise" if abs(value) < needed * error else ""
            if row in PUBLISHED:
                theirs = math.log2(PUBLISHED[row] / PUBLISHED["hope"])
                published = f"{theirs:+.3f}"
                agrees = "same" if (theirs > 0) == (value > 0) else "opposite"
                sign = f"{agrees}, {sign}" if sign else agrees
            if math.isnan(error):
                sign += ", one seed" if sign else "one seed"
        lines.append(f"| {row} | {sizes} | {difference} | {off_part} | {published} | {sign} |")
    return lines


def position_table(records: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """Bits per byte by position, with writes on, off and with the memories of another text."""
    length = options.length
    ranges = [(0, 32), (32, length // 4), (length // 4, length // 2), (length // 2, length), (length, 2 * length)]
    lines = [
        f"Bits per byte by position (trained to {length}); shuffled: memories of another text from {length} on.",
        "",
        "| row | writes | " + " | ".join(f"{low}-{high - 1}" for low, high in ranges) + " |",
        "|---|---|" + "--:|" * len(ranges),
    ]
    for row in ROWS:
        own = [r for r in records if r["row"] == row]
        for condition in CONDITIONS if own else ():
            cells = [
                "" if condition == "shuffled" and low < length else
                f"{mean([between(r, condition, low, high) for r in own]):.3f}"
                for low, high in ranges
            ]  # fmt: skip
            lines.append(f"| {row} | {condition} | " + " | ".join(cells) + " |")
    return lines


def load(path: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The finished runs with these settings, whatever their row and seed."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in records if settings(r["row"], r["seed"], options).items() <= r.items()]


def main() -> None:
    """Run what is missing, seed by seed, and print the tables after every run."""
    options = parse()
    tune_allocator()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.jsonl"
    text = read_text(options)
    for seed in options.seeds:
        for row in options.rows:
            if not any(r["row"] == row and r["seed"] == seed for r in load(path, options)):
                record = run(row, seed, text, options)
                with path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                on, off = (between(record, condition, 0, options.length) for condition in ("on", "off"))
                print(
                    f"{row}, seed {seed}: on {on:.3f}, off {off:.3f}, {record['cpu_seconds']:.0f} s of a core",
                    flush=True,
                )
            records = load(path, options)
            lines = [*ablation_table(records, options), "", *position_table(records, options)]
            (options.out / "table.md").write_text("\n".join(lines) + "\n")
    print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main()
