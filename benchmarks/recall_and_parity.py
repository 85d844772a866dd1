"""Does the layer learn? Multi-query recall and parity, against attention, DeltaNet and static projections.

    python benchmarks/recall_and_parity.py recall --mixers hope static deltanet attention
    python benchmarks/recall_and_parity.py parity --mixers hope static deltanet attention

Every model has 2 layers of width 32 and one head, fresh batches of 64 sequences, AdamW with a cosine schedule. Recall:
vocabulary 64, length 64, 16 pairs, accuracy over queries. Parity: trained on lengths 2-50, accuracy over whole
strings (every prefix right) of lengths 2-50 and 51-100.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from common import Record, Records, parse, parser, update
from nestlearn.data.synthetic import IGNORE, Batch, multi_query_recall, parity
from nestlearn.models import HopeConfig, HopeForCausalLM

# On parity the first map takes steps up to 2 on unit keys (eigenvalues down to -1), the second stays proximal.
STATE_TRACKING = {"step_size": "normalized", "max_step": 2.0}
SELF_MODIFYING = {"type": "self_modifying", "expansion": 2, "chunk_size": 16, "projection_chunk_size": 32}
MIXERS: dict[str, dict[str, Any]] = {
    "hope": SELF_MODIFYING,
    "static": SELF_MODIFYING | {"adaptive": []},
    "deltanet": {"type": "memory", "memory": "deltanet"},
    "attention": {"type": "attention", "conv_size": 4},
}


@dataclass(frozen=True)
class Recipe:
    """How one task is trained and when it may stop."""

    vocabulary: int
    steps: int
    learning_rate: float
    batch: int
    initializer_range: float
    draw: Callable[[int, torch.Generator], Batch]
    enough: Callable[[dict[str, float]], bool]


# At width 32, large initial embeddings help to tell tokens apart, small ones help to track a bit.
RECIPES = {
    "recall": Recipe(64, 600, 6e-3, 64, 0.2, multi_query_recall, lambda score: score["queries"] > 0.99),
    "parity": Recipe(2, 600, 4e-3, 64, 0.02, parity, lambda score: score["2-50"] == 1 and score["51-100"] > 0.97),
}


def build(task: str, mixer: str) -> HopeForCausalLM:
    """The 2-layer, width-32 model of a mixer."""
    settings = dict(MIXERS[mixer])
    if task == "parity" and settings["type"] == "self_modifying":
        settings |= STATE_TRACKING
    recipe = RECIPES[task]
    sizes = {"vocab_size": recipe.vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1}
    fields = {"cms": [{"period": None, "expansion": 4}], "ffn_activation": "gelu", "mixer": settings}
    return HopeForCausalLM(HopeConfig(**sizes, **fields, initializer_range=recipe.initializer_range))


@torch.inference_mode()
def score(model: HopeForCausalLM, task: str) -> dict[str, float]:
    """Accuracy on sequences never trained on, the same for all models."""
    generator = torch.Generator().manual_seed(777)
    model.eval()
    if task == "recall":
        batch = multi_query_recall(512, generator)
        asked = batch.targets != IGNORE
        right = (model(batch.inputs, use_cache=False).logits.argmax(-1) == batch.targets) & asked
        return {"queries": right.sum().item() / asked.sum().item()}
    scores = {}
    for name, lengths in (("2-50", range(2, 51, 3)), ("51-100", range(51, 101, 4))):
        whole = []
        for length in lengths:
            batch = parity(48, generator, shortest=length, longest=length)
            whole.append((model(batch.inputs, use_cache=False).logits.argmax(-1) == batch.targets).all(1))
        scores[name] = torch.cat(whole).double().mean().item()
    return scores


def learn(task: str, mixer: str, seed: int, steps: int | None = None) -> Record:
    """Train one model until it is good enough or its steps are used up; steps, seconds, parameters and scores."""
    recipe = RECIPES[task]
    steps = recipe.steps if steps is None else steps
    torch.manual_seed(seed)
    model = build(task, mixer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1, i / steps))))
    )
    generator = torch.Generator().manual_seed(seed + 1)
    start, scores, step = time.perf_counter(), {}, 0
    for step in range(1, steps + 1):
        model.train()
        batch = recipe.draw(recipe.batch, generator)
        logits = model(batch.inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        update(model, loss, optimizer, schedule)
        if step % 50 == 0 or step == steps:
            scores = score(model, task)
            if recipe.enough(scores):
                break
    size = sum(p.numel() for p in model.parameters())
    return {"steps": step, "seconds": time.perf_counter() - start, "parameters": size, "scores": scores}


def median(outcomes: Sequence[Record]) -> dict[str, float]:
    """Median of every score over seeds."""
    return {name: statistics.median(o["scores"][name] for o in outcomes) for name in outcomes[0]["scores"]}


def main(words: Sequence[str] | None = None) -> None:
    """Train every mixer with every seed; finished runs in --out are not repeated."""
    made = parser(__doc__, "runs/recall_and_parity.jsonl", seeds=range(3), threads=2)
    made.add_argument("task", choices=list(RECIPES))
    made.add_argument("--mixers", nargs="+", choices=list(MIXERS), default=list(MIXERS))
    made.add_argument("--steps", type=int, help="instead of the task's own number")
    options = parse(made, words)
    records = Records(options.out)
    for mixer in options.mixers:
        settings = {"task": options.task, "mixer": mixer, "limit": options.steps}
        outcomes = [
            records.get(settings | {"seed": seed}, lambda m=mixer, s=seed: learn(options.task, m, s, options.steps))
            for seed in options.seeds
        ]
        print(f"{mixer}: median {median(outcomes)} steps {[o['steps'] for o in outcomes]}", flush=True)


if __name__ == "__main__":
    main()
