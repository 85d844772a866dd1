"""What pays in the Hope of the presets: adaptive projections, own values, writes, the gradient's sign, chunk sizes.

    python benchmarks/hope_ablations.py                                  # three seeds, some hours on one core
    python benchmarks/hope_ablations.py --streams silu                   # not centered; or plain: without SiLU as well
    python benchmarks/hope_ablations.py --seeds 3 --corpus wikitext.txt  # other seeds, other text

Models of 3 million parameters (`hope-tiny` at width 256; the Transformer with the same convolution and as many FLOPs
per token) read the same batches of 1,024 tokens, with products in bfloat16. Held-out documents are read to four times
that length: with writes, without, with the memories of another document from the middle on, and with the sign of every
write turned. "equal time" gives the Transformer the processor seconds of Hope. A finished run is not repeated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from common import RESULTS, Record, Records, parse, parser, plus_minus, table, token_stream, update, windows
from language_ablations import between
from nestlearn import HopeConfig, HopeForCausalLM, flops
from nestlearn.data import load_corpus, train_bpe
from nestlearn.evals.language import document_tokens, loss_by_position
from nestlearn.memory import use_engine
from nestlearn.nn.self_modifying.matrix import SelfModifyingMatrix

LENGTH, BATCH, VOCABULARY, REACH, WIDTH = 1024, 2, 1024, 4, 256
CONVOLVED: dict[str, Any] = {"type": "attention", "conv_size": 4}
HOPE: dict[str, Any] = {"type": "self_modifying", "architecture": "matrix", "self_values": False}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "hope": ("hope-tiny", {}),
    "static": ("hope-tiny", {"mixer": HOPE | {"adaptive": []}}),
    "own values": ("hope-tiny", {"mixer": HOPE | {"self_values": True}}),
    "static, own values": ("hope-tiny", {"mixer": HOPE | {"adaptive": [], "self_values": True}}),
    "adaptive gates": ("hope-tiny", {"mixer": HOPE | {"adaptive": ["eta", "alpha"]}}),
    "adaptive values and gates": ("hope-tiny", {"mixer": HOPE | {"adaptive": ["v", "eta", "alpha"]}}),
    "adaptive queries too": ("hope-tiny", {"mixer": HOPE | {"adaptive": ["q", "k", "v", "eta", "alpha"]}}),
    "trained without writes": ("hope-tiny", {}),
    "trained with turned writes": ("hope-tiny", {}),
    "static, trained with turned writes": ("hope-tiny", {"mixer": HOPE | {"adaptive": []}}),
    "chunks of 16": ("hope-tiny", {"mixer": HOPE | {"chunk_size": 16}}),
    "chunks of 256": ("hope-tiny", {"mixer": HOPE | {"chunk_size": 256}}),
    "transformer": ("transformer-tiny", {"mixer": CONVOLVED, "num_attention_heads": 4}),
    "transformer, equal time": ("transformer-tiny", {"mixer": CONVOLVED, "num_attention_heads": 4}),
}
TURNED = "trained with turned writes"
BOUNDS = (0, 64, 256, 1024, 2048, 4096)
"""Positions between which losses are averaged."""


@contextmanager
def turned_writes(model: HopeForCausalLM, turned: bool = True) -> Iterator[None]:
    """Every write goes up its objective: with the dot product the gradient's sign is the value's."""
    kept = [(layer, layer._project) for layer in memory_layers(model)]
    for layer, project in kept if turned else ():

        def negated(*given: Any, project: Any = project) -> Any:
            q, k, v, gates = project(*given)
            return q, k, -v, gates

        layer._project = negated
    try:
        with use_engine("chunked"):  # kernels project by themselves
            yield
    finally:
        for layer, project in kept:
            layer._project = project


def memory_layers(model: HopeForCausalLM) -> list[SelfModifyingMatrix]:
    """The layers of matrix memories."""
    return [module for module in model.modules() if isinstance(module, SelfModifyingMatrix)]


def build(row: str, seed: int, streams: str = "centered") -> HopeForCausalLM:
    """The model of a row. The feed-forward width of the Transformer gives it Hope's FLOPs per token."""
    preset, fields = ROWS[row]
    special = {"bos_token_id": VOCABULARY - 3, "eos_token_id": VOCABULARY - 2, "pad_token_id": VOCABULARY - 1}
    shape = {"hidden_size": WIDTH, "vocab_size": VOCABULARY, "reset_token_id": VOCABULARY - 3, **special}

    def config(**changes: Any) -> HopeConfig:
        return HopeConfig.from_preset(preset, **(shape | fields | changes))

    if preset == "transformer-tiny":
        goal = flops(HopeConfig.from_preset("hope-tiny", **shape), LENGTH)
        widths = [{"period": None, "expansion": n / 8} for n in range(16, 64)]
        fields = fields | {"cms": [min(widths, key=lambda w: abs(flops(config(cms=[w]), LENGTH) - goal))]}
    torch.manual_seed(seed)
    model = HopeForCausalLM(config())
    for layer in memory_layers(model):
        assert layer.conv is not None
        layer.center, layer.conv.silu = streams == "centered", streams != "plain"
    return model


def train(row: str, seed: int, stream: Tensor, start_token: int, options: Any, seconds: float | None) -> Any:
    """A trained model, processor seconds, steps. With ``seconds``, as many steps as fit into them."""
    model, steps = build(row, seed, options.streams), options.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    draws, spent, step, first = torch.Generator().manual_seed(seed), 0.0, 0, 20
    writes = {} if row != "trained without writes" else {"writes": False}
    with turned_writes(model, row.endswith(TURNED)):
        while step < steps:
            began = time.process_time()
            # Constant, then linear to a tenth over the last fifth.
            rate = min((step + 1) / (0.05 * steps), 1.0, max(0.1, (steps - step) / (0.2 * steps)))
            for group in optimizer.param_groups:
                group["lr"] = options.lr * rate
            ids = windows(stream, BATCH, LENGTH, draws)
            ids[:, 0] = start_token
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids, labels=ids, use_cache=False, **writes).loss
            update(model, loss, optimizer)
            spent, step = spent + time.process_time() - began, step + 1
            if seconds is not None and step == first:
                steps = max(first + 1, round(seconds * first / spent))
    return model.eval(), spent, step


def run(row: str, seed: int, text: Any, options: Any, seconds: float | None) -> Record:
    """Train, and read held-out documents in every condition."""
    tokenizer, stream, documents = text
    model, spent, steps = train(row, seed, stream, tokenizer.bos_token_id, options, seconds)
    hope = row not in ("transformer", "transformer, equal time")
    read = {"length": REACH * LENGTH, "documents": options.documents, "batch_size": 4, "segment": LENGTH}
    with turned_writes(model, row.endswith(TURNED)):
        found = loss_by_position(
            model, tokenizer, documents, conditions=("on", "off", "shuffled")[: 3 if hope else 1], **read
        )
    losses = dict(found.details["bits_per_byte"])
    if hope and not row.endswith(TURNED):
        with turned_writes(model):
            turned = loss_by_position(model, tokenizer, documents, conditions=("on",), **read)
        losses["turned"] = turned.details["bits_per_byte"]["on"]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_token": flops(model.config, LENGTH),
        "steps_made": steps,
        "documents": found.n,
        "edges": found.details["edges"],
        "bits_per_byte": losses,
        "processor_seconds": round(spent, 1),
    }


def read_text(options: Any) -> Any:
    """A tokenizer of the corpus, its training tokens in one row, and its long held-out documents."""
    training, held_out = list(load_corpus(options.corpus)), list(load_corpus(options.corpus, "validation"))
    tokenizer = train_bpe(training, VOCABULARY)
    long = [d for d in held_out if len(document_tokens(tokenizer, d.text)) > REACH * LENGTH]
    return tokenizer, token_stream(tokenizer, training), long[:: max(1, len(long) // options.documents)]


def tables(records: list[Record]) -> str:
    """Bits per byte by position and condition, and paired differences from `hope`."""
    pairs = list(pairwise(BOUNDS))
    rows, seconds = [], {}
    for row, condition in product(ROWS, ("on", "off", "turned", "shuffled")):
        own = [r for r in records if r["row"] == row and condition in r["bits_per_byte"]]
        base = {r["seed"]: r for r in records if r["row"] == "hope"}
        if not own:
            continue
        seconds[row] = fmean(r["processor_seconds"] for r in own)
        cells = [
            "" if condition == "shuffled" and high <= REACH * LENGTH // 2
            else f"{fmean(between(r, condition, low, high) for r in own):.3f}"
            for low, high in pairs
        ]  # fmt: skip
        paired = [
            between(r, "on", 0, LENGTH) - between(base[r["seed"]], "on", 0, LENGTH) for r in own if r["seed"] in base
        ]
        difference = plus_minus(paired, 3) if paired and condition == "on" and row != "hope" else ""
        size = [f"{own[0]['parameters']:,}", f"{own[0]['flops_per_token'] / 1e6:.2f}", f"{seconds[row]:.0f}"]
        first = condition == "on"
        rows.append([row, condition, *(size if first else [""] * 3), str(len(own)), *cells, difference])
    heads = [f"{low}-{high - 1}" for low, high in pairs]
    header = ["row", "writes", "parameters", "MFLOP / token", "processor s", "seeds", *heads, "0-1023 minus hope"]
    return table(header, rows, left=2)


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing, seed by seed, and print the table."""
    made = parser(__doc__, RESULTS / "hope_ablations.jsonl", seeds=range(3))
    made.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    made.add_argument("--steps", type=int, default=300)
    made.add_argument("--lr", type=float, default=3e-3)
    made.add_argument("--documents", type=int, default=12)
    made.add_argument("--corpus", default="python-source")
    kinds = ["centered", "silu", "plain"]
    made.add_argument("--streams", choices=kinds, default="centered", help="As shipped, not centered, or without SiLU.")
    options = parse(made, words)
    records, text = Records(Path(options.out)), read_text(options)
    shared = {"steps": options.steps, "lr": options.lr, "corpus": options.corpus}
    shared |= {"documents": options.documents, "streams": options.streams}
    for seed, row in product(options.seeds, options.rows):
        seconds = None
        if row == "transformer, equal time":
            (hope,) = records.where(row="hope", seed=seed, **shared) or [{"processor_seconds": math.nan}]
            seconds = hope["processor_seconds"]
            if math.isnan(seconds):
                print("equal time needs the row hope of the seed first")
                continue
        records.get({"row": row, "seed": seed, **shared}, lambda r=row, s=seed, t=seconds: run(r, s, text, options, t))
    print(tables(records.where(**shared)))


if __name__ == "__main__":
    main()
