"""How soon a layer predicts what it has read before: random tokens, over and over.

    python benchmarks/induction.py                     # all rows, some minutes on one core
    python benchmarks/induction.py --rows hope attention --seeds 0 1 2

48 random tokens out of 64 are repeated up to 160; only what was read tells what comes next. Nats per token of the
repetitions (chance is 4.16) after some numbers of steps, for layers with their own initial values, with random ones
(projections, maps and convolutions), and with aligned ones (`nestlearn.nn.conv.align_streams`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import RESULTS, Record, Records, parse, parser, table, update
from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.nn.conv import align_streams

TOKENS, PATTERN, LENGTH, BATCH = 64, 48, 160, 8
MATRIX = {"type": "self_modifying", "architecture": "matrix"}
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "hope": (MATRIX, "own"),
    "hope, random": (MATRIX, "random"),
    "deltanet": ({"type": "memory", "memory": "deltanet"}, "own"),
    "deltanet, aligned": ({"type": "memory", "memory": "deltanet"}, "aligned"),
    "gated_deltanet, aligned": ({"type": "memory", "memory": "gated_deltanet"}, "aligned"),
    "linear_attention, aligned": ({"type": "memory", "memory": "linear_attention"}, "aligned"),
    "titans": ({"type": "memory", "memory": "titans"}, "own"),
    "titans, aligned": ({"type": "memory", "memory": "titans"}, "aligned"),
    "attention": ({"type": "attention", "conv_size": 4}, "own"),
}


@torch.no_grad()
def start(mixer: Any, how: str) -> None:
    """Replace the initial values of a layer."""
    if how == "random":
        nn.init.normal_(mixer.streams.weight, std=0.02)
        mixer.conv.reset_parameters()
        for weights in mixer.maps.values():
            nn.init.normal_(weights, std=mixer.d_head**-0.5)
    if how == "aligned":
        align_streams(mixer.qkv.weight, mixer.conv, mixer.num_heads)


def build(row: str, heads: int, seed: int) -> HopeForCausalLM:
    """Two layers of width 64."""
    mixer, how = ROWS[row]
    torch.manual_seed(seed)
    model = HopeForCausalLM(
        HopeConfig(vocab_size=TOKENS, hidden_size=64, num_hidden_layers=2, num_attention_heads=heads, mixer=mixer,
                   cms=[{"period": None, "expansion": 2}], initializer_range=0.04, tie_word_embeddings=True)
    )  # fmt: skip
    for layer in model.model.layers:
        start(layer.mixer, how)
    return model


def batch(generator: torch.Generator) -> Tensor:
    """Rows of a pattern, over and over."""
    pattern = torch.randint(0, TOKENS, (BATCH, PATTERN), generator=generator)
    return pattern.repeat(1, -(-LENGTH // PATTERN))[:, :LENGTH]


def losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Nats of every token but the first."""
    logits = model(tokens, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(BATCH, -1)


def learn(row: str, heads: int, seed: int, steps: Sequence[int]) -> Record:
    """Nats per token of the repetitions after each number of steps."""
    model = build(row, heads, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator, held_out, found = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + seed), {}
    for step in range(1, max(steps) + 1):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, step / 20)
        update(model, losses(model, batch(generator)).mean(), optimizer)
        if step in steps:
            with torch.no_grad():
                found[str(step)] = round(losses(model, batch(held_out))[:, PATTERN + 12 :].mean().item(), 3)
    return {"nats": found}


def main(words: Sequence[str] | None = None) -> None:
    """Train and print a table; records go to docs/results/induction.jsonl."""
    made = parser(__doc__, RESULTS / "induction.jsonl", seeds=[0])
    made.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    made.add_argument("--heads", type=int, default=1)
    made.add_argument("--steps", nargs="+", type=int, default=[50, 100, 150])
    options = parse(made, words)
    records = Records(Path(options.out))
    rows = []
    for row in options.rows:
        for seed in options.seeds:
            key = {"row": row, "heads": options.heads, "seed": seed, "steps": max(options.steps)}
            nats = records.get(key, lambda row=row, seed=seed: learn(row, options.heads, seed, options.steps))["nats"]
            rows.append([row, str(seed), *(f"{nats[str(step)]:.2f}" for step in options.steps)])
    print("\n" + table(("row", "seed", *(f"{step} steps" for step in options.steps)), rows))


if __name__ == "__main__":
    main(sys.argv[1:])
