"""Class-incremental intents: CLINC150 in 10 tasks of 15 classes, Banking77 in 7 of 11; one head, no task identity.

    python benchmarks/continual_text.py --data FOLDER --stream clinc150 --encoder features
    python benchmarks/continual_text.py --data FOLDER --stream banking77 --encoder features
    python benchmarks/continual_text.py --data FOLDER --stream clinc150 --encoder model
    python benchmarks/continual_text.py --data FOLDER --stream banking77 --encoder model
    python benchmarks/continual_text.py ... --group grid --seeds 100                       (tuning)

FOLDER holds clinc150/data_full.json, banking77/train.csv and test.csv, and, for the model, gutenberg_books/*.txt. The
seed is of the order of the classes, the initial weights and the order of the examples.

`features`: TF-IDF of word pairs and an SVD to 300 dimensions, fitted on the training texts without labels and frozen;
a perceptron with one hidden layer learns. `model`: a two-layer causal language model of this package (BPE tokens),
trained before on the books, then learning in full with a new head on the mean of its outputs.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from continual_rows import Bench, Row, arguments, chosen
from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.continual import CMS, ElasticWeights, ExperienceReplay, JointTraining, LoRA, Projection, Transfer
from nestlearn.data import IntentTexts, TaskStream, load_banking77, load_clinc150, load_corpus, train_bpe
from nestlearn.data.continual_text import ngram_features, token_ids

TASKS = {"clinc150": 10, "banking77": 7}
LENGTH = {"clinc150": 20, "banking77": 32}
EPOCHS = {"features": 10, "model": 3}
DIMENSIONS, HIDDEN, VOCABULARY = 300, 512, 2048


class FeatureNet(nn.Module):
    """Features, a hidden layer, classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(DIMENSIONS, HIDDEN), nn.Linear(HIDDEN, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(nn.functional.gelu(self.inner(x)))


class TextNet(nn.Module):
    """A language model's layers, the mean of their outputs over the text, classes."""

    def __init__(self, base: HopeForCausalLM, classes: int) -> None:
        super().__init__()
        self.layers = base.model
        self.head = nn.Linear(base.config.hidden_size, classes)
        self.padding = base.config.pad_token_id

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids != self.padding
        outputs = self.layers(ids, attention_mask=mask).last_hidden_state
        mean = (outputs * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(mean)


def load(name: str, data: Path) -> IntentTexts:
    """A data set from the folder."""
    return load_clinc150(data / "clinc150") if name == "clinc150" else load_banking77(data / "banking77")


def config(tokenizer: Any) -> HopeConfig:
    """Two layers of attention and feed-forward networks, 361,000 parameters."""
    return HopeConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, mixer="attention",
        cms=[{"period": None, "expansion": 4}], initializer_range=0.05, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def pretrained(tokenizer: Any, data: Path, folder: Path, steps: int = 800) -> Path:
    """A language model trained on the books, made once."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    model = HopeForCausalLM(config(tokenizer))
    documents = load_corpus(f"text:{data / 'gutenberg_books'}")
    ids = torch.tensor([token for document in documents for token in tokenizer(document.text)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        starts = torch.randint(len(ids) - 64, (16, 1))
        batch = ids[starts + torch.arange(64)]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"language model, step {step + 1}: {float(loss.detach()):.2f} nats per token", flush=True)
    model.save_pretrained(folder)
    return folder


def levels(model: Any) -> list[Any]:
    """The first map and the head are slow."""
    if isinstance(model, FeatureNet):
        return [(model.outer, 16), (model.inner, 64)]
    return [(model.layers.embed_tokens, 64), (model.head, 16)]


def method_rows(tuned: dict[str, Any]) -> dict[str, Row]:
    """All methods, with what the grid chose for the stream."""
    projection = Projection(alpha=tuned["alpha"], period=300)
    transfer = Transfer(rate=tuned["transfer"], period=100)
    ends = Projection(alpha=tuned["alpha_at_ends"], period=None, last_epoch_only=True)
    rate = tuned["cms_rate"]
    return {
        "fine-tuning, 1e-3": Row(),
        "fine-tuning, best rate": Row(rate=tuned["rate"]),
        "fine-tuning, average step of CMS": Row(matched="all"),
        "fine-tuning, average step of CMS in each layer": Row(matched="each"),
        "EWC": Row(lambda: ElasticWeights(tuned["strength"]), rate=tuned["ewc_rate"], boundaries="known"),
        # A frozen encoder has no trained layer to adapt before the first task; the language model has.
        "LoRA, rank 8": Row(
            lambda: (
                LoRA(8, after_task=0, trained=["outer"])
                if tuned["encoder"] == "features"
                else LoRA(8, trained=["head"])
            ),
            boundaries="known",
        ),
        "CMS: levels": Row(lambda: CMS(levels=levels), rate=rate),
        "CMS: transfer": Row(lambda: CMS(transfer=transfer), rate=rate),
        "CMS: projection": Row(lambda: CMS(projection=projection), rate=rate),
        "CMS: projection, transfer": Row(lambda: CMS(projection=projection, transfer=transfer), rate=rate),
        "CMS: levels, projection, transfer": Row(
            lambda: CMS(levels=levels, projection=projection, transfer=transfer), rate=rate
        ),
        "CMS: projection at task ends": Row(lambda: CMS(projection=ends), rate=rate, boundaries="known"),
        "replay, 5 per class": Row(lambda: ExperienceReplay(5 * tuned["classes"])),
        "joint": Row(JointTraining),
    }


def grid_rows() -> dict[str, Row]:
    """What is tried on an order of classes that is not reported."""
    rows = {f"fine-tuning, {r:g}": Row(rate=r) for r in (2e-5, 3e-5, 5e-5, 1e-4, 3e-4, 1e-3)}
    for r in (1e-3, 2e-4, 1e-4, 5e-5):
        for s in (10.0, 30.0, 100.0, 300.0):
            rows[f"EWC, λ {s:g}, rate {r:g}"] = Row(lambda s=s: ElasticWeights(s), rate=r, boundaries="known")
    for a in (1e3, 3e3, 1e4, 3e4):
        projection, ends = Projection(alpha=a, period=300), Projection(alpha=a / 10, period=None, last_epoch_only=True)
        rows[f"projection, α {a:g}"] = Row(lambda p=projection: CMS(projection=p))
        rows[f"projection, α {a:g}, transfer"] = Row(
            lambda p=projection: CMS(projection=p, transfer=Transfer(rate=0.5, period=100))
        )
        rows[f"at task ends, α {a / 10:g}"] = Row(lambda p=ends: CMS(projection=p), boundaries="known")
    for a in (3.0, 10.0, 30.0):  # one α for maps that see every token and for the head, which sees one vector a text
        ends = Projection(alpha=a, unit="steps", period=None, last_epoch_only=True)
        lagged = Projection(alpha=10 * a, unit="steps", period=60)
        rows[f"at task ends, α {a:g} steps"] = Row(lambda p=ends: CMS(projection=p), boundaries="known")
        rows[f"projection, α {10 * a:g} steps, period 60, transfer"] = Row(
            lambda p=lagged: CMS(projection=p, transfer=Transfer(rate=0.5, period=25))
        )
    rows["replay"], rows["joint"] = Row(lambda: ExperienceReplay(5 * 77)), Row(JointTraining)
    return rows


# Chosen on seed 100 (group grid).
_TUNED: dict[str, Any] = {
    "rate": 3e-5, "strength": 10.0, "ewc_rate": 5e-5,
    "alpha": 1e4, "alpha_at_ends": 300.0, "transfer": 0.5, "cms_rate": 1e-3,
}  # fmt: skip
TUNED: dict[tuple[str, str], dict[str, Any]] = {
    ("banking77", "features"): _TUNED,
    ("clinc150", "features"): _TUNED,
    ("banking77", "model"): _TUNED,
    ("clinc150", "model"): _TUNED,
}


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


def main() -> None:
    """Run what is missing and print the tables after every seed."""
    parser = arguments(__doc__, ["methods", "grid"], "runs/continual_text")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stream", choices=list(TASKS), default="clinc150")
    parser.add_argument("--encoder", choices=list(EPOCHS), default="features")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts, encoder = load(options.stream, options.data), options.encoder
    name = f"{options.stream}-{encoder}"
    if encoder == "features":
        encode = ngram_features(texts.train, dimensions=DIMENSIONS)
    else:
        tokenizer = train_bpe(load_corpus(f"text:{options.data / 'gutenberg_books'}"), VOCABULARY)
        base = pretrained(tokenizer, options.data, options.out / "language-model")
        encode = token_ids(tokenizer, LENGTH[options.stream])

    @cache
    def stream(seed: int) -> TaskStream:
        return texts.stream(encode, tasks=TASKS[options.stream], order_seed=seed, encoder=encoder)

    def model(seed: int, row: Row) -> nn.Module:
        torch.manual_seed(seed)
        classes = len(texts.classes)
        return FeatureNet(classes) if encoder == "features" else TextNet(HopeForCausalLM.from_pretrained(base), classes)

    tuned = TUNED[options.stream, encoder] | {"classes": len(texts.classes), "encoder": encoder}
    rows = grid_rows() if options.group == "grid" else method_rows(tuned)
    settings = {"group": options.group, "stream": options.stream, "encoder": encoder, "epochs": EPOCHS[encoder]}
    bench = Bench(
        f"{options.group}-{name}", stream=stream, model=model, epochs=EPOCHS[encoder], settings=settings,
        command=f"python benchmarks/continual_text.py --data FOLDER --stream {options.stream} --encoder {encoder}",
        matched=method_rows(tuned)["CMS: projection, transfer"],
        curves=("fine-tuning, best rate", "EWC", "CMS: projection, transfer", "replay, 5 per class", "joint"),
    )  # fmt: skip
    bench.run_all(chosen(rows, options.rows), options.seeds, options.out)
    if encoder == "features":
        print(json.dumps({seed: references(stream(seed)) for seed in options.seeds}))


if __name__ == "__main__":
    main()
