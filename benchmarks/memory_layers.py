"""Memories of the catalog as layers of a small byte model, each also read with its memories switched off.

    python benchmarks/memory_layers.py --out runs/memory_layers
    python benchmarks/memory_layers.py --rows titans deltanet --seeds 0 1 2 --steps 300 --out runs/longer

All rows of a seed see the same batches at the same rate. Layers have the same width, not the same parameters. Finished
runs in --out are not repeated. Records are in results.jsonl, the table in table.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from common import Record, Records, parse, parser, plus_minus, table, token_stream, update, windows
from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data import byte_tokenizer, load_corpus
from nestlearn.evals.bench.mixers import mixer_fields
from nestlearn.evals.language import loss_by_position

ROWS = ("titans", "yaad", "moneta", "dla", "ttt_mlp", "ttt_linear", "memora", "deltanet", "attention", "transformer")
SETTINGS: dict[str, Any] = {
    "batch_size": 8, "layers": 2, "width": 32, "heads": 1, "chunk": 64, "expansion": 2, "ffn": 2.0,
    "learning_rate": 4e-3, "corpus": "python-docs", "documents": 32,
}  # fmt: skip


def command_line() -> argparse.ArgumentParser:
    """The options."""
    made = parser(__doc__, "runs/memory_layers", seeds=range(1))
    made.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--length", type=int, default=256, help="bytes per sequence")
    return made


def build(row: str, seed: int) -> HopeForCausalLM:
    """The row's model."""
    torch.manual_seed(seed)
    tokenizer, chunks = byte_tokenizer(), {"chunk_size": SETTINGS["chunk"], "expansion": SETTINGS["expansion"]}
    sizes: dict[str, Any] = {
        "hidden_size": SETTINGS["width"], "num_hidden_layers": SETTINGS["layers"],
        "num_attention_heads": SETTINGS["heads"], "cms": [{"expansion": SETTINGS["ffn"]}],
        "vocab_size": len(tokenizer), "tie_word_embeddings": True, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    return HopeForCausalLM(HopeConfig(**(sizes | mixer_fields(row, chunks))))


def train(model: HopeForCausalLM, stream: Tensor, seed: int, options: argparse.Namespace) -> HopeForCausalLM:
    """The model after its steps on random windows of the stream."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=SETTINGS["learning_rate"], betas=(0.9, 0.98), weight_decay=0.1)
    warmup, start = max(1, options.steps // 20), byte_tokenizer().bos_token_id

    def rate(step: int) -> float:
        return min((step + 1) / warmup, max(0.05, min(1.0, (options.steps - step) / (0.3 * options.steps))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(options.steps):
        ids = windows(stream, SETTINGS["batch_size"], options.length, generator)
        ids[:, 0] = start
        update(model, model(ids, labels=ids).loss, optimizer, schedule)
    return model.eval()


def run(row: str, seed: int, stream: Tensor, options: argparse.Namespace) -> Record:
    """Size, seconds, and bits per byte by position with writes and without."""
    began = time.process_time()
    model = train(build(row, seed), stream, seed, options)
    seconds = time.process_time() - began
    read = loss_by_position(
        model, byte_tokenizer(), load_corpus(SETTINGS["corpus"], "validation"), length=2 * options.length,
        documents=SETTINGS["documents"], conditions=("on", "off"),
    )  # fmt: skip
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "documents": read.n, "train_cpu_seconds": seconds,
        "edges": read.details["edges"], "bits_per_byte": read.details["bits_per_byte"],
    }  # fmt: skip


def between(record: Record, condition: str, low: int, high: int) -> float:
    """Mean bits per byte of the positions low to high - 1."""
    edges = pairwise(record["edges"])
    inside = [
        (end - start, bits)
        for (start, end), bits in zip(edges, record["bits_per_byte"][condition], strict=True)
        if start >= low and end <= high
    ]
    return sum(width * bits for width, bits in inside) / sum(width for width, _ in inside)


def result_table(records: list[Record], length: int) -> str:
    """Bits per byte within the training length and beyond it, with writes and without."""
    lines = []
    for row in dict.fromkeys(record["row"] for record in records):
        own = [record for record in records if record["row"] == row]
        cells = [
            plus_minus([between(record, condition, low, high) for record in own], 3).replace(" ± nan", "")
            for condition in ("on", "off")
            for low, high in ((0, length), (length, 2 * length))
        ]
        seconds = sum(record["train_cpu_seconds"] for record in own) / len(own)
        lines.append([row, f"{own[0]['parameters']:,}", *cells, str(len(own)), f"{seconds:.0f}"])
    ends = [f"{low}-{high}" for low, high in ((0, length), (length, 2 * length))]
    header = ["layer", "parameters", *ends, *(f"{end}, writes off" for end in ends), "seeds", "CPU seconds"]
    return table(header, lines)


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing, seed by seed, and write the table after every run."""
    options = parse(command_line(), words)
    records, shared = (
        Records(options.out / "results.jsonl"),
        SETTINGS | {k: vars(options)[k] for k in ("steps", "length")},
    )
    stream = token_stream(byte_tokenizer(), load_corpus(SETTINGS["corpus"]))
    for seed, row in product(options.seeds, options.rows):
        records.get({"row": row, "seed": seed} | shared, lambda row=row, seed=seed: run(row, seed, stream, options))
        (options.out / "table.md").write_text(result_table(records.where(**shared), options.length))
    print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main()
