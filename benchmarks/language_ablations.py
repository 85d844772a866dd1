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
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from statistics import fmean
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common import Record, Records, parse, parser, table, token_stream, update, windows
from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data import bytes_per_token, load_corpus, train_bpe
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
    """The default of this package (no momentum, a static query), with some options of the mixer changed."""
    return {"mixer": _without("q") | changes}


# Row: its baseline, its fields.
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
SETTINGS: dict[str, Any] = {
    "batch_size": 4, "layers": 1, "conv_size": 0, "width": 32, "heads": 1, "chunk": 32, "projection_chunk": 64,
    "initializer_range": 0.1, "learning_rate": 1e-2, "corpus": "python-source", "vocabulary": 1024, "pieces": 32,
}  # fmt: skip
"""Settings of every run, as its record has them. Without a convolution context reaches a token only by memories."""
FIRST = SETTINGS["vocabulary"] - 3
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 1, "num_hidden_layers": 1, "initializer_range": 0.1,
    "vocab_size": SETTINGS["vocabulary"], "bos_token_id": FIRST, "eos_token_id": FIRST + 1, "pad_token_id": FIRST + 2,
    "reset_token_id": FIRST,
}  # fmt: skip
MIXER = {"type": "self_modifying", "expansion": 2, "chunk_size": 32, "projection_chunk_size": 64, "conv_size": 0}


def command_line() -> argparse.ArgumentParser:
    """The options."""
    made = parser(__doc__, "runs/language_ablations", seeds=range(3))
    made.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    made.add_argument("--steps", type=int, default=700)
    made.add_argument("--length", type=int, default=256, help="tokens per sequence")
    return made


def settings(options: argparse.Namespace) -> Record:
    """What identifies a run, other than its row and seed."""
    return {"steps": options.steps, "length": options.length} | SETTINGS


def build(row: str, seed: int) -> HopeForCausalLM:
    """The row's model. Parameters that its baseline has too start from the baseline's values."""

    def fresh(fields: dict[str, Any]) -> HopeForCausalLM:
        torch.manual_seed(seed)
        return HopeForCausalLM(HopeConfig(**(COMMON | SIZES | fields | {"mixer": MIXER | fields["mixer"]})))

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


def read_text(length: int) -> Text:
    """The corpus in byte-pair tokens, each document as `<s> text </s>`."""
    documents = list(load_corpus(SETTINGS["corpus"]))
    tokenizer = train_bpe(documents, SETTINGS["vocabulary"])
    stream = token_stream(tokenizer, documents)
    mean_bytes = float(bytes_per_token(tokenizer)[stream].double().mean())
    return Text(tokenizer, stream, held_out(tokenizer, mean_bytes, length))


def held_out(tokenizer: PreTrainedTokenizerBase, mean_bytes: float, length: int) -> list[Document]:
    """Pieces of held-out text, spread over the documents, of more tokens than twice the training length."""
    size, wanted = math.ceil(2.5 * length * mean_bytes) + 64, SETTINGS["pieces"]
    pieces = [
        Document(document.text[start : start + size], f"{document.name}:{start}")
        for document in load_corpus(SETTINGS["corpus"], "validation")
        for start in range(0, len(document.text) - size, size)
    ]
    pieces = pieces[:: max(1, len(pieces) // (2 * wanted))]
    long = [piece for piece in pieces if len(document_tokens(tokenizer, piece.text)) > 2 * length]
    return long[:: max(1, len(long) // wanted)][:wanted]


def train(row: str, seed: int, text: Text, options: argparse.Namespace) -> tuple[HopeForCausalLM, float]:
    """A trained model, and its mean loss over the last tenth of training in bits per token."""
    model = build(row, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SETTINGS["learning_rate"], betas=(0.9, 0.98), weight_decay=0.1)
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
        ids = windows(stream, SETTINGS["batch_size"], options.length, generator)
        ids[:, 0] = start_token
        losses.append(update(model, model(ids, labels=ids, writes=writes).loss, optimizer, schedule))
    last = torch.stack(losses[-max(1, options.steps // 10) :]).mean()
    return model.eval(), float(last) / math.log(2)


def run(row: str, seed: int, text: Text, options: argparse.Namespace) -> Record:
    """Size, seconds of a core, and bits per byte by position and condition."""
    began = time.process_time()
    model, training_bits = train(row, seed, text, options)
    seconds = time.process_time() - began
    result = loss_by_position(
        model,
        text.tokenizer,
        text.pieces,
        length=2 * options.length,
        documents=SETTINGS["pieces"],
        conditions=CONDITIONS,
    )
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_bits_per_token": training_bits,
        "documents": result.n,
        "edges": result.details["edges"],
        "bits_per_byte": result.details["bits_per_byte"],
        "train_cpu_seconds": seconds,
        "cpu_seconds": time.process_time() - began,
    }


def between(record: Record, condition: str, low: int, high: int) -> float:
    """Mean bits per byte of the positions low to high - 1."""
    total = width = 0.0
    for (start, end), bits in zip(pairwise(record["edges"]), record["bits_per_byte"][condition], strict=True):
        if start >= low and end <= high:
            total, width = total + bits * (end - start), width + end - start
    return total / width


def differences(records: list[Record], row: str, condition: str, length: int) -> list[float]:
    """Bits per byte of a row minus those of its baseline, by seed."""
    values = {(r["row"], r["seed"]): between(r, condition, 0, length) for r in records}
    base = ROWS[row][0]
    return [v - values[base, seed] for (of, seed), v in values.items() if of == row and (base, seed) in values]


def pooled_deviation(samples: list[list[float]]) -> tuple[float, int]:
    """Standard deviation of one value around the mean of its sample, over all samples together; degrees of freedom."""
    squares = sum((x - fmean(sample)) ** 2 for sample in samples for x in sample)
    freedom = sum(len(sample) - 1 for sample in samples if sample)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def judged(row: str, values: list[float], deviation: float, needed: float) -> list[str]:
    """Difference, the paper's difference, and whether they agree, for a row of the table."""
    value, error = fmean(values), deviation / math.sqrt(len(values))
    published, signs = "", []
    if row in PUBLISHED:
        theirs = math.log2(PUBLISHED[row] / PUBLISHED["hope"])
        published = f"{theirs:+.3f}"
        signs.append("same" if (theirs > 0) == (value > 0) else "opposite")
    if abs(value) < needed * error:
        signs.append("below noise")
    if math.isnan(error):
        signs.append("one seed")
    return [f"{value:+.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}"), published, ", ".join(signs)]


def ablation_table(records: list[Record], length: int) -> str:
    """A row per model: bits per byte with writes on and off, and the difference from its baseline next to NL's."""
    found = [row for row in ROWS if any(r["row"] == row for r in records)]
    by_row = {row: differences(records, row, "on", length) for row in found if ROWS[row][0] != row}
    deviation, freedom = pooled_deviation(list(by_row.values()))
    needed = float(student.ppf(0.975, freedom)) if freedom else math.inf
    rows = []
    for row in found:
        own = [r for r in records if r["row"] == row]
        on, off = (fmean(between(r, condition, 0, length) for r in own) for condition in ("on", "off"))
        cells = [row, f"{own[0]['parameters']:,}", str(len(own)), f"{on:.3f}", f"{off:.3f}", f"{off - on:+.3f}"]
        difference = without = published = sign = ""
        if by_row.get(row):
            difference, published, sign = judged(row, by_row[row], deviation, needed)
            without = f"{fmean(differences(records, row, 'off', length)):+.3f}"
        rows.append([*cells, difference, without, published, sign])
    header = ["row", "parameters", "seeds", "writes on", "writes off", "off - on", "difference",
              "difference with writes off", "published, per token", "sign"]  # fmt: skip
    return (
        f"Held-out bits per byte at positions 0-{length - 1}; difference from the row's baseline, paired by seed "
        "(positive: worse). The standard error is from the deviation between seeds, pooled over the rows ("
        f"{freedom} degrees of freedom: {needed:.2f} standard errors are needed at the 5 % level).\n\n"
        f"{table(header, rows)}"
    )


def position_table(records: list[Record], length: int) -> str:
    """Bits per byte by position, with writes on, off and with the memories of another text."""
    ranges = [(0, 32), (32, length // 4), (length // 4, length // 2), (length // 2, length), (length, 2 * length)]
    rows = []
    for row, condition in product(ROWS, CONDITIONS):
        own = [r for r in records if r["row"] == row]
        cells = [
            "" if condition == "shuffled" and low < length
            else f"{fmean(between(r, condition, low, high) for r in own):.3f}"
            for low, high in ranges if own
        ]  # fmt: skip
        rows += [[row, condition, *cells]] if own else []
    header = ["row", "writes", *(f"{low}-{high - 1}" for low, high in ranges)]
    return (
        f"Bits per byte by position (trained to {length}); shuffled: memories of another text from {length} on.\n\n"
        f"{table(header, rows, left=2)}"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing, seed by seed, and write the tables after every run."""
    options = parse(command_line(), words)
    records, shared, text = Records(options.out / "results.jsonl"), settings(options), read_text(options.length)
    for seed, row in product(options.seeds, options.rows):
        records.get({"row": row, "seed": seed} | shared, lambda row=row, seed=seed: run(row, seed, text, options))
        done = records.where(**shared)
        tables = f"{ablation_table(done, options.length)}\n{position_table(done, options.length)}"
        (options.out / "table.md").write_text(tables)
    print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main()
