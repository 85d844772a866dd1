"""Does the layer learn? Multi-query recall and parity, against attention, DeltaNet and static projections.

    python benchmarks/recall_and_parity.py recall --mixers hope,static,deltanet,attention --seeds 3
    python benchmarks/recall_and_parity.py parity --mixers hope,static,deltanet,attention --seeds 3

Every model has 2 layers of width 32 and one head, fresh batches of 64 sequences, AdamW with a cosine schedule. Recall:
vocabulary 64, length 64, 16 pairs, accuracy over queries. Parity: trained on lengths 2-50, accuracy over whole
strings (every prefix right) of lengths 2-50 and 51-100.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

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


# Widths of 32 want large embeddings where tokens must be told apart, small ones where a bit must be tracked.
RECIPES = {
    "recall": Recipe(64, 600, 6e-3, 64, 0.2, multi_query_recall, lambda score: score["queries"] > 0.99),
    "parity": Recipe(2, 600, 4e-3, 64, 0.02, parity, lambda score: score["2-50"] == 1 and score["51-100"] > 0.97),
}


@dataclass(frozen=True)
class Outcome:
    """One trained model."""

    task: str
    mixer: str
    seed: int
    steps: int
    seconds: float
    parameters: int
    scores: dict[str, float]


def build(task: str, mixer: str) -> HopeForCausalLM:
    """The 2-layer, width-32 model of a mixer."""
    settings = dict(MIXERS[mixer])
    if task == "parity" and settings["type"] == "self_modifying":
        settings |= STATE_TRACKING
    config = HopeConfig(
        vocab_size=RECIPES[task].vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        cms=[{"period": None, "expansion": 4}],
        ffn_activation="gelu",
        initializer_range=RECIPES[task].initializer_range,
        mixer=settings,
    )
    return HopeForCausalLM(config)


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


def learn(task: str, mixer: str, seed: int, steps: int | None = None, report: bool = False) -> Outcome:
    """Train one model until it is good enough or its steps are used up."""
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
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            scores = score(model, task)
            if report:
                print(f"  {mixer} seed {seed} step {step} loss {loss.item():.4f} {scores}", flush=True)
            if recipe.enough(scores):
                break
    seconds = time.perf_counter() - start
    return Outcome(task, mixer, seed, step, seconds, sum(p.numel() for p in model.parameters()), scores)


def median(outcomes: list[Outcome]) -> dict[str, float]:
    """Median of every score over seeds."""
    names = outcomes[0].scores
    return {name: torch.tensor([o.scores[name] for o in outcomes]).median().item() for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(RECIPES))
    parser.add_argument("--mixers", default=",".join(MIXERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the task's own number")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="append every outcome to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for mixer in arguments.mixers.split(","):
        if mixer not in MIXERS:
            parser.error(f"unknown mixer {mixer!r}: known are {', '.join(MIXERS)}")
        seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        outcomes = [learn(arguments.task, mixer, seed, arguments.steps, report=True) for seed in seeds]
        if arguments.json:
            with open(arguments.json, "a") as file:
                file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)
        print(f"{mixer}: median {median(outcomes)} steps {[o.steps for o in outcomes]}", flush=True)


if __name__ == "__main__":
    main()
