"""Class-incremental intents: CLINC150 in 10 tasks of 15 classes, Banking77 in 7 of 11; one head, no task identity.

    python benchmarks/continual_text.py --data FOLDER --stream clinc150 --encoder features
    python benchmarks/continual_text.py --data FOLDER --stream banking77 --encoder features
    python benchmarks/continual_text.py --data FOLDER --stream clinc150 --encoder model
    python benchmarks/continual_text.py --data FOLDER --stream banking77 --encoder model
    python benchmarks/continual_text.py --data FOLDER --stream banking77 --encoder model --thawed last|blocks|all
    python benchmarks/continual_text.py --data FOLDER --stream banking77 --group in-context
    python benchmarks/continual_text.py ... --group grid --seeds 100                       (tuning)

FOLDER holds clinc150/data_full.json, banking77/train.csv and test.csv, and, for the model, gutenberg_books/*.txt. The
seed is of the order of the classes, the initial weights and the order of the examples.

A perceptron with one hidden layer learns, on features that have seen the training texts without labels. `features`:
TF-IDF of word pairs and an SVD to 300 dimensions. `model`: outputs of a causal language model of this package (BPE
tokens, benchmarks/intent_language_model.py), frozen, or with a part that learns too (`--thawed`): the linear maps of
its last block, those of all blocks, or all of it.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import parse
from continual_report import continual_key, to_eval_result
from continual_rows import Bench, Row, arguments, chosen
from intent_language_model import PooledOutputs, pretrained
from nestlearn import HopeForCausalLM
from nestlearn.continual import CMS, EWC, ExperienceReplay, InContextLearner, JointTraining, LoRA, Projection, Transfer
from nestlearn.data import IntentTexts, TaskStream, load_banking77, load_clinc150
from nestlearn.data.continual_text import Encoder, ngram_features, token_encoder
from nestlearn.evals.bench.store import ResultStore

TASKS = {"clinc150": 10, "banking77": 7}
LENGTH = {"clinc150": 20, "banking77": 32}
EPOCHS = {"features": 10, "model": 10, "thawed": 3}
DIMENSIONS, HIDDEN, SLOW = 300, 512, 64
SHOWN = 4  # test texts per task for in-context learning


class FeatureNet(nn.Module):
    """Features, a hidden layer, classes."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(nn.functional.gelu(self.inner(x)))


class TextNet(nn.Module):
    """A language model of which a part is trained, a hidden layer, classes.

    Features are scaled to a mean square of 1: a language model that learns would change their size.
    """

    def __init__(self, body: PooledOutputs, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, FeatureNet(body.width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(nn.functional.rms_norm(self.body(ids), (self.body.width,)))


def load(name: str, data: Path) -> IntentTexts:
    """A data set from the folder."""
    return load_clinc150(data / "clinc150") if name == "clinc150" else load_banking77(data / "banking77")


def levels(model: Any) -> list[Any]:
    """Two slow levels in the perceptron. With a language model that learns, it is slow and the perceptron fast."""
    if isinstance(model, FeatureNet):
        return [(model.outer, 16), (model.inner, 64)]
    return [(model.head, 1), (model.body, SLOW)]


def method_rows(tuned: dict[str, Any]) -> dict[str, Row]:
    """All methods, with what the grid chose for the stream."""
    projection = Projection(alpha=tuned["alpha"], period=tuned["periods"][0])
    transfer = Transfer(rate=tuned["transfer"], period=tuned["periods"][1])
    ends = Projection(alpha=tuned["alpha_at_ends"], period=None, last_epoch_only=True)
    rate = tuned["cms_rate"]
    return {
        "fine-tuning, 1e-3": Row(),
        "fine-tuning, best rate": Row(rate=tuned["rate"]),
        "fine-tuning, average step of CMS": Row(matched="all"),
        "fine-tuning, average step of CMS in each layer": Row(matched="each"),
        "EWC": Row(lambda: EWC(tuned["strength"]), rate=tuned["ewc_rate"], boundaries="known"),
        # A frozen encoder has no trained layer to adapt before the first task; the language model has.
        "LoRA, rank 8": Row(
            lambda: LoRA(8, trained=["head"]) if tuned["thawed"] else LoRA(8, after_task=0, trained=["outer"]),
            boundaries="known",
        ),
        "CMS: levels": Row(lambda: CMS(levels=levels), rate=rate),
        "transfer": Row(lambda: CMS(transfer=transfer), rate=rate),
        "projection": Row(lambda: CMS(projection=projection), rate=rate),
        "projection, transfer": Row(lambda: CMS(projection=projection, transfer=transfer), rate=rate),
        "CMS: levels, projection, transfer": Row(
            lambda: CMS(levels=levels, projection=projection, transfer=transfer), rate=rate
        ),
        "projection at task ends": Row(lambda: CMS(projection=ends), rate=rate, boundaries="known"),
        "replay, 5 per class": Row(lambda: ExperienceReplay(5 * tuned["classes"])),
        "joint": Row(JointTraining),
    }


def grid_rows() -> dict[str, Row]:
    """What is tried on an order of classes that is not reported."""
    rows = {f"fine-tuning, {r:g}": Row(rate=r) for r in (2e-5, 3e-5, 5e-5, 7e-5, 1e-4, 3e-4, 1e-3)}
    pairs = [(s, r) for r in (1e-3, 2e-4, 1e-4, 7e-5, 5e-5) for s in (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)]
    pairs += [(s, 3e-4) for s in (1e3, 1e4, 1e5)]  # for a language model that learns too
    for s, r in pairs:
        rows[f"EWC, λ {s:g}, rate {r:g}"] = Row(lambda s=s: EWC(s), rate=r, boundaries="known")
    for a in (1e3, 3e3, 1e4, 3e4):
        projection, ends = Projection(alpha=a, period=300), Projection(alpha=a / 10, period=None, last_epoch_only=True)
        rows[f"projection, α {a:g}"] = Row(lambda p=projection: CMS(projection=p))
        rows[f"projection, α {a:g}, transfer"] = Row(
            lambda p=projection: CMS(projection=p, transfer=Transfer(rate=0.5, period=100))
        )
        rows[f"at task ends, α {a / 10:g}"] = Row(lambda p=ends: CMS(projection=p), boundaries="known")
    rows["replay"], rows["joint"] = Row(lambda: ExperienceReplay(5 * 77)), Row(JointTraining)
    return rows


# Chosen on seed 100 (group grid), for both streams.
TUNED: dict[str, dict[str, Any]] = {
    "features": {
        "rate": 3e-5, "strength": 10.0, "ewc_rate": 5e-5,
        "alpha": 1e4, "alpha_at_ends": 300.0, "transfer": 0.5, "periods": (300, 100), "cms_rate": 1e-3,
    },
    "model": {
        "rate": 7e-5, "strength": 10.0, "ewc_rate": 1e-4,
        "alpha": 1e4, "alpha_at_ends": 300.0, "transfer": 0.5, "periods": (300, 100), "cms_rate": 1e-3,
    },
    "thawed": {
        "rate": 3e-4, "strength": 1e3, "ewc_rate": 3e-4,
        "alpha": 1e4, "alpha_at_ends": 300.0, "transfer": 0.5, "periods": (90, 30), "cms_rate": 1e-3,
    },
}  # fmt: skip


def references(stream: TaskStream) -> dict[str, float]:
    """Final accuracy of classifiers on the frozen features that need no gradient: class means, and ridge regression."""
    train = [task.train for task in stream.tasks]
    x, y = torch.cat([part.inputs for part in train]).double(), torch.cat([part.targets for part in train])
    one_hot = nn.functional.one_hot(y, stream.num_classes).double()
    means = nn.functional.normalize((one_hot.T @ x) / one_hot.sum(0)[:, None], dim=-1)
    ridge = torch.linalg.solve(x.T @ x + 300.0 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ one_hot)

    def accuracy(weights: Tensor) -> float:
        scores = [
            float(((task.test.inputs.double() @ weights).argmax(-1) == task.test.targets).double().mean())
            for task in stream.tasks
        ]
        return sum(scores) / len(scores)

    return {"nearest class mean": accuracy(means.T), "streaming ridge regression": accuracy(ridge)}


def language_model(options: argparse.Namespace) -> tuple[HopeForCausalLM, Any]:
    """The language model and its tokenizer."""
    unlabelled = [text for name in sorted(TASKS) for text in load(name, options.data).train]
    return pretrained(options.out / "language-model", options.data / "gutenberg_books", unlabelled)


def encoder(options: argparse.Namespace, texts: IntentTexts) -> tuple[Encoder, PooledOutputs | None]:
    """From texts to what the model reads, and the language model if there is one."""
    if options.encoder == "features":
        return ngram_features(texts.train, dimensions=DIMENSIONS), None
    base, tokenizer = language_model(options)
    tokens = token_encoder(tokenizer, LENGTH[options.stream])
    body = PooledOutputs(base.eval(), tokens(texts.train))
    body.thaw(options.thawed)
    if options.thawed != "none":
        return tokens, body
    return lambda batch: torch.cat([body(part).detach() for part in tokens(batch).split(256)]), body


def in_context(options: argparse.Namespace, texts: IntentTexts) -> None:
    """Classify by the frozen language model: its prompt holds an example of each class, as many as fit."""
    base, tokenizer = language_model(options)
    settings = {"group": options.group, "stream": options.stream, "encoder": "model"}
    folder = options.out / f"{options.group}-{options.stream}"
    store = ResultStore(folder)
    labels = [name.replace("_", " ") for name in texts.classes]
    for seed in options.seeds:
        if continual_key("in-context", seed, settings) in store.finished():
            continue
        stream = texts.stream(token_encoder(tokenizer, 8), tasks=TASKS[options.stream], order_seed=seed)
        learner = InContextLearner(base, tokenizer, labels=labels, context=128, test_limit=SHOWN, seed=seed)
        result = learner.fit(stream, texts.texts_by_task(stream))
        command = f"python benchmarks/continual_text.py --data FOLDER --stream {options.stream} --group in-context"
        store.append(
            to_eval_result(result, row="in-context", settings=settings, n=SHOWN * len(stream), command=command)
        )
        print(f"in-context, seed {seed}: {100 * result.metrics.average_accuracy:.1f} %, {result.config}", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables after every seed."""
    parser = arguments(__doc__, ["methods", "grid", "in-context"], "runs/continual_text")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stream", choices=list(TASKS), default="clinc150")
    parser.add_argument("--encoder", choices=["features", "model"], default="features")
    parser.add_argument("--thawed", choices=["none", "last", "blocks", "all"], default="none")
    options = parse(parser, words)
    texts, thawed = load(options.stream, options.data), options.thawed != "none"
    if options.group == "in-context":
        in_context(options, texts)
        return
    classes, kind = len(texts.classes), "thawed" if thawed else options.encoder
    encode, body = encoder(options, texts)
    encode = cache(encode)
    shown = {"thawed": options.thawed} if thawed else {}

    @cache
    def stream(seed: int) -> TaskStream:
        return texts.stream(encode, tasks=TASKS[options.stream], order_seed=seed, encoder=options.encoder, **shown)

    def model(seed: int, row: Row) -> nn.Module:
        torch.manual_seed(seed)
        if thawed and body is not None:
            return TextNet(copy.deepcopy(body), classes)
        return FeatureNet(DIMENSIONS if body is None else body.width, classes)

    best = "CMS: levels, projection, transfer" if thawed else "projection, transfer"
    tuned = TUNED[kind] | {"classes": classes, "thawed": thawed}
    rows = grid_rows() if options.group == "grid" else method_rows(tuned)
    settings = {"group": options.group, "stream": options.stream, "encoder": options.encoder} | shown
    words = [f"--{name} {value}" for name, value in settings.items() if (name, value) != ("group", "methods")]
    settings["epochs"] = EPOCHS[kind]
    bench = Bench(
        "-".join([options.group, options.stream, options.encoder, *shown.values()]), stream=stream, model=model,
        epochs=EPOCHS[kind], settings=settings,
        command=f"python benchmarks/continual_text.py --data FOLDER {' '.join(words)}",
        matched=method_rows(tuned)[best],
        curves=("fine-tuning, best rate", "EWC", best, "replay, 5 per class", "joint"),
    )  # fmt: skip
    bench.run_all(chosen(rows, options.rows), options.seeds, options.out)
    if not thawed:
        print(json.dumps({seed: references(stream(seed)) for seed in options.seeds}))


if __name__ == "__main__":
    main()
