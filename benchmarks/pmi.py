"""What working and long-term memory bring on relational questions and on bAbI, at equal parameters.

    python benchmarks/pmi.py clevr                        # Sort-of-CLEVR in symbols, three seeds
    python benchmarks/pmi.py babi --data FOLDER --seeds 0   # bAbI jointly; FOLDER holds qa1_train.txt and so on

Models of two layers: attention first, then attention again ("transformer") or the memories of PMI. "code" does what the
published code does: a sum for the outer product, and a long-term memory that is drawn anew for each batch. "persistent"
keeps its long-term memory from batch to batch, in evaluation too. All arms see the same batches; the width of the
feed-forward network makes their parameters equal. A finished run is not repeated.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common import RESULTS, Record, Records, parse, parser, plus_minus, table, update
from nestlearn import HopeCache, HopeConfig, HopeForCausalLM
from nestlearn.data.synthetic import IGNORE, Batch
from nestlearn.evals.bench.cells import parameters
from nestlearn.evals.bench.suites import Training
from nestlearn.evals.bench.training import schedule
from nestlearn.evals.tasks import Babi, SortOfClevr, Task
from nestlearn.evals.tasks.base import accuracy, cut, lengths_of, right_by_sequence

ATTENTION: dict[str, Any] = {"type": "attention", "conv_size": 4}
PMI: dict[str, Any] = {"type": "pmi"}
ARMS: dict[str, dict[str, Any]] = {
    "transformer": ATTENTION,
    "working": PMI | {"long_term": "none"},
    "code": PMI | {"merge": "sum", "long_term": "random"},
    "sum": PMI | {"merge": "sum"},
    "outer": PMI,
    "persistent": PMI | {"persistent": True},
}
CHUNKS = {"clevr": 5, "babi": 8}
TRAINING = {
    "clevr": Training(steps=600, batch_size=32, learning_rate=4e-3),
    "babi": Training(steps=400, batch_size=32, learning_rate=4e-3),
}
SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.1}
EXPANSION, EVAL_ROWS = 2.0, 100


def fields_of(task: Task, suite: str, arm: str) -> dict[str, Any]:
    """The model of an arm, with as many parameters as "outer" has."""

    def made(name: str, expansion: float) -> dict[str, Any]:
        mixer = ARMS[name] | ({"chunk_size": CHUNKS[suite]} if ARMS[name]["type"] == "pmi" else {})
        network = {"cms": [{"period": None, "expansion": expansion}], "ffn_activation": "gelu"}
        return SIZES | network | {"vocab_size": task.vocab_size, "mixer": [ATTENTION, mixer]}

    target, count = parameters(made("outer", EXPANSION)), parameters(made(arm, EXPANSION))
    slope = (parameters(made(arm, EXPANSION + 4)) - count) / 4
    return made(arm, round(EXPANSION + (target - count) / slope, 3))


def mask_of(batch: Batch) -> Tensor:
    """Padding after the last target is not read: a memory that persists would keep it."""
    return (torch.arange(batch.inputs.shape[1]) < lengths_of(batch).unsqueeze(1)).long()


def begin(cache: HopeCache | None, rows: int) -> HopeCache:
    """A cache at the start of a document in so many rows, with the long-term memories of the given one."""
    if cache is None or not cache.layers:
        return HopeCache()
    cache = cache.detach()
    if cache.batch_size != rows:
        cache.reorder_cache(torch.arange(rows) % cache.batch_size)
    cache.reset(list(range(rows)))
    return cache


def train(task: Task, suite: str, arm: str, seed: int) -> tuple[HopeForCausalLM, HopeCache | None, Record]:
    """A model, the cache after its last batch (None if nothing persists), and what training took."""
    training, start = TRAINING[suite], time.process_time()
    torch.manual_seed(seed)
    model = HopeForCausalLM(HopeConfig(**fields_of(task, suite, arm)))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, training.beta2), weight_decay=training.weight_decay
    )
    batches, cache, losses = task.batches(training.batch_size, seed), None, []
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * schedule(training, step)
        batch = next(batches)
        held = begin(cache, len(batch.inputs)) if arm == "persistent" else None
        kept: dict[str, Any] = {"use_cache": False} if held is None else {"past_key_values": held}
        logits = model(batch.inputs, attention_mask=mask_of(batch), **kept).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        losses.append(update(model, loss, optimizer).item())
        cache = held
    last = sum(losses[-50:]) / 50
    spent = {"steps": training.steps, "train_loss": last, "cpu_seconds": round(time.process_time() - start, 1)}
    return model, cache, spent | {"parameters": sum(p.numel() for p in model.parameters())}


@torch.no_grad()
def scores(model: HopeForCausalLM, task: Task, cache: HopeCache | None = None, writes: bool = True) -> dict[str, float]:
    """Accuracy of every split, in percent."""
    found = {}
    for split in task.splits:
        whole, counts = task.examples(split.name), []
        for rows in lengths_of(whole).argsort().split(EVAL_ROWS):
            batch = cut(Batch(whole.inputs[rows], whole.targets[rows]))
            held = None if cache is None else begin(cache, len(rows))
            kept: dict[str, Any] = {"use_cache": False} if held is None else {"past_key_values": held}
            logits = model(batch.inputs, attention_mask=mask_of(batch), writes=writes, **kept).logits
            counts.append(right_by_sequence(logits.argmax(-1), batch.targets))
        right, asked = (torch.cat(column) for column in zip(*counts, strict=True))
        found[split.name] = round(100 * accuracy(right, asked, task.metric).value, 2)
    return found


def run(task: Task, suite: str, arm: str, seed: int) -> Record:
    """Train an arm and evaluate it; memories also without writes, persistent ones also without what they kept."""
    torch.manual_seed(seed)
    model, cache, spent = train(task, suite, arm, seed)
    model.eval()
    found = spent | {"scores": scores(model, task, cache)}
    if arm != "transformer":
        found["without_writes"] = scores(model, task, cache, writes=False)
    if cache is not None:
        found["without_kept"] = scores(model, task)
    return found


def report(records: Records, task: Task, suite: str) -> str:
    """Mean and standard error over seeds of every arm and split."""
    names = [split.name for split in task.splits]
    rows = []
    for arm in ARMS:
        own = records.where(suite=suite, arm=arm)
        for key in ("scores", "without_writes", "without_kept"):
            values = [record[key] for record in own if key in record]
            if values:
                shown = [plus_minus([value[name] for value in values]) for name in names]
                label = arm if key == "scores" else f"{arm}, {key.replace('_', ' ')}"
                rows.append([label, str(len(values)), f"{own[0]['parameters']:,}", *shown])
    chance = [f"{100 * task.chance(name):.1f}" for name in names]
    return table(["arm", "seeds", "parameters", *names], [*rows, ["most frequent answer", "", "", *chance]])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table."""
    made = parser(__doc__, RESULTS / "pmi.jsonl", seeds=(0, 1, 2))
    made.add_argument("suite", choices=list(TRAINING))
    made.add_argument("--data", help="folder of the files of bAbI")
    made.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    options = parse(made, arguments)
    task: Task = SortOfClevr() if options.suite == "clevr" else Babi(eval_examples=50).with_data(options.data)
    records = Records(options.out)
    for seed in options.seeds:
        for arm in options.arms:
            key = {"suite": options.suite, "arm": arm, "seed": seed}
            records.get(key, lambda arm=arm, seed=seed: run(task, options.suite, arm, seed))
    print(report(records, task, options.suite))


if __name__ == "__main__":
    main()
