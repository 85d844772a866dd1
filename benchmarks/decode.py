"""Tokens per second of decoding with a cache, Hope beside a Transformer, at several lengths of the context.

    python benchmarks/decode.py                              # 1,024 to 16,384 tokens, some minutes
    python benchmarks/decode.py --contexts 1024 131072

The models take turns, some tokens at a time, so that a slow phase of the machine hits both. Nothing is reported for a
model whose tokens, read one by one with a cache, do not give the logits of the whole text.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import Record, parse, parser, processor, table
from train_throughput import MODELS, build

NAMES = ("hope", "deltanet", "transformer")
PREFILL = 4096
"""Tokens of the context that are read at once."""


class Operations(TorchDispatchMode):
    """Counts the operations that reach the dispatcher, views among them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def gate(model: Any) -> float:
    """Largest difference of logits, token by token with a cache, from those of the whole text.

    Raises:
        RuntimeError: it is too large.
    """
    tokens = torch.randint(0, model.config.vocab_size, (1, 150), generator=torch.Generator().manual_seed(1))
    cache, parts = None, []
    for token in tokens.split(1, 1):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    error = (torch.cat(parts, 1) - model(tokens, use_cache=False).logits).abs().max().item()
    if error > 1e-3:
        raise RuntimeError(f"read token by token, the logits differ by {error:.1e}")
    return error


def filled(model: Any, context: int) -> Any:
    """The cache after so many tokens."""
    tokens = torch.randint(0, model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(2))
    cache = None
    for part in tokens.split(PREFILL, 1):
        cache = model(part, past_key_values=cache, use_cache=True).past_key_values
    return cache


def measure(models: dict[str, Any], context: int, rounds: int, count: int) -> list[Record]:
    """Seconds per token of every model at one length."""
    caches = {name: filled(model, context) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    token = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(rounds + 1):
        for name, model in models.items():
            began = time.perf_counter()
            for _ in range(count):
                caches[name] = model(token, past_key_values=caches[name], use_cache=True).past_key_values
            seconds[name].append((time.perf_counter() - began) / count)
    records = []
    for name, model in models.items():
        with Operations() as operations:
            model(token, past_key_values=caches[name], use_cache=True)
        rate = 1 / statistics.median(seconds[name][1:])
        records.append({"model": name, "context": context, "tokens_per_second": rate, "operations": operations.count,
                        "cache_bytes": caches[name].nbytes()})  # fmt: skip
    base = next((r["tokens_per_second"] for r in records if r["model"] == "transformer"), None)
    return [r | ({} if base is None else {"of_transformer": r["tokens_per_second"] / base}) for r in records]


def markdown(report: Record) -> str:
    """The report as a table."""
    header = ("model", "context", "tokens/s", "of Transformer", "operations per token", "cache")
    rows = [
        (r["model"], f"{r['context']:,}", f"{r['tokens_per_second']:.1f}", f"{r.get('of_transformer', 0):.2f}",
         f"{r['operations']:,}", f"{r['cache_bytes'] / 2**20:.2f} MiB")
        for r in report["records"]
    ]  # fmt: skip
    setting = f"{report['machine']}; d 256, 4 layers, 4 heads, batch 1, float32."
    return f"# Decoding, {report['date']}\n\n{setting}\n\n{table(header, rows)}"


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write benchmarks/results/decode_*.json and .md."""
    made = parser(__doc__, Path(__file__).parent / "results", threads=2)
    made.add_argument("--models", nargs="+", default=list(NAMES), choices=list(MODELS), metavar="NAME")
    made.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 16384])
    made.add_argument("--rounds", type=int, default=6)
    made.add_argument("--count", type=int, default=20, help="tokens of a turn")
    options = parse(made, words)
    with torch.inference_mode():
        models = {name: build(name, {}).eval() for name in options.models}
        errors = {name: gate(model) for name, model in models.items()}
        records = [r for n in options.contexts for r in measure(models, n, options.rounds, options.count)]
    report = {
        "version": 1,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {options.threads} of {os.cpu_count()} threads, torch {torch.__version__}",
        "gate": errors,
        "records": records,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = "decode_" + "".join(c if c.isalnum() else "-" for c in processor().lower()).strip("-")
    (options.out / f"{name}.json").write_text(json.dumps(report, indent=1))
    (options.out / f"{name}.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
