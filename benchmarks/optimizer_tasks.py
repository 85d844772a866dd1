"""What the optimizers are compared on: a vision Transformer, two language models, ten tasks in sequence."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import batches, token_stream, windows
from continual_digits import ResidualNet
from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data import load_corpus, permuted_digits, train_bpe
from nestlearn.evals.language import document_tokens

Optimizers = list[torch.optim.Optimizer]


class Attention(nn.Module):
    """Self-attention of four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class ViTBlock(nn.Module):
    """Attention and a perceptron, each with a norm before it and a residual path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class ViT(nn.Module):
    """8 x 8 pixels in patches of 2 x 2, four blocks of width 64, the mean over patches, ten classes."""

    def __init__(self, width: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.patches = nn.Linear(4, width)
        self.positions = nn.Embedding(16, width)
        self.blocks = nn.Sequential(*(ViTBlock(width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def get_output_embeddings(self) -> nn.Linear:
        """The head, as Hugging Face models name theirs."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        h = self.patches(patches) + self.positions.weight
        return self.head(self.norm(self.blocks(h)).mean(1))


@dataclass(frozen=True)
class Task:
    """A model to train and how it is evaluated.

    Attributes:
        name: in records and tables.
        steps: of a run.
        measure: the measure by which learning rates are chosen; less is better.
        model: makes a model from a seed.
        losses: from a model and a seed to the loss of each training step.
        score: all measures of a model.
    """

    name: str
    steps: int
    measure: str
    model: Callable[[int], nn.Module]
    losses: Callable[[nn.Module, int], Iterator[Tensor]]
    score: Callable[[nn.Module], dict[str, float]]


def seeded(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """A model with initial weights of a seed."""

    def of(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return make()

    return of


@cache
def digits() -> Any:
    """The digits, 1,347 to learn from and 450 held out."""
    return permuted_digits(1).tasks[0]


def image_losses(tasks: Sequence[Any], epochs: int, model: nn.Module, seed: int) -> Iterator[Tensor]:
    """Cross-entropy on batches of 32 shuffled images: all epochs of a task, then those of the next."""
    generator = torch.Generator().manual_seed(seed)
    for task in tasks:
        for _ in range(epochs):
            for batch in batches(len(task.train.inputs), 32, generator):
                yield F.cross_entropy(model(task.train.inputs[batch]), task.train.targets[batch])


def vit_losses(model: nn.Module, seed: int) -> Iterator[Tensor]:
    """Losses on the digits, without an end."""
    return image_losses([digits()], 10**9, model, seed)


def vit_score(model: nn.Module) -> dict[str, float]:
    """Held-out cross-entropy and errors in percent."""
    data = digits().test
    logits = model(data.inputs)
    errors = (logits.argmax(-1) != data.targets).double().mean()
    return {"held-out loss": float(F.cross_entropy(logits, data.targets)), "errors, %": 100 * float(errors)}


VOCABULARY, LENGTH, ROWS = 1024, 256, 4


@cache
def source_text() -> tuple[Tensor, Tensor]:
    """Python source in byte-pair tokens: all training documents in a row, and 32 held-out pieces of 256 tokens."""
    documents = list(load_corpus("python-source"))
    tokenizer = train_bpe(documents, VOCABULARY)
    stream = token_stream(tokenizer, documents)
    held = [document_tokens(tokenizer, document.text) for document in load_corpus("python-source", "validation")]
    pieces = [tokens[:LENGTH] for tokens in held if len(tokens) >= LENGTH]
    return stream, torch.tensor(pieces[:: max(1, len(pieces) // 32)][:32])


def language_model(depth: int = 6, width: int = 224) -> nn.Module:
    """A Transformer; with these numbers of 3.1 million parameters."""
    mixer = {"type": "attention", "conv_size": 4}
    layers = {"mixer": mixer, "num_hidden_layers": depth, "hidden_size": width, "num_attention_heads": width // 32}
    ends = {"vocab_size": VOCABULARY, "bos_token_id": 1021, "eos_token_id": 1022, "pad_token_id": 1023}
    cms = [{"period": None, "expansion": 8 / 3}]
    return HopeForCausalLM(HopeConfig(**layers, **ends, cms=cms, reset_token_id=1021, tie_word_embeddings=True))


def language_losses(model: nn.Module, seed: int) -> Iterator[Tensor]:
    """Next-token loss of four windows of 256 tokens."""
    generator, (stream, _) = torch.Generator().manual_seed(seed), source_text()
    while True:
        ids = windows(stream, ROWS, LENGTH, generator)
        yield model(ids, labels=ids).loss


def language_score(model: nn.Module) -> dict[str, float]:
    """Held-out loss in bits per token."""
    _, pieces = source_text()
    losses = [float(model(piece, labels=piece).loss) for piece in pieces.split(8)]
    return {"held-out bits per token": sum(losses) / len(losses) / math.log(2)}


TASKS, EPOCHS = 10, 10


@cache
def permuted() -> Any:
    """Ten tasks of digits, their pixels in another order in each."""
    return permuted_digits(TASKS)


def permuted_losses(model: nn.Module, seed: int) -> Iterator[Tensor]:
    """Losses on ten epochs of each task, one task after the other."""
    return image_losses(permuted().tasks, EPOCHS, model, seed)


def permuted_score(model: nn.Module) -> dict[str, float]:
    """Errors in percent, mean over all tasks, and of the last one."""
    errors = [
        100 * float((model(task.test.inputs).argmax(-1) != task.test.targets).double().mean())
        for task in permuted().tasks
    ]
    return {"errors in all tasks, %": sum(errors) / len(errors), "errors in the last task, %": errors[-1]}


def residual_net() -> nn.Module:
    """The network of continual_digits.py, with its last map as the head."""
    net = ResidualNet(int(torch.initial_seed()))
    net.get_output_embeddings = lambda: net.last  # pyright: ignore[reportAttributeAccessIssue]
    return net


PER_TASK = EPOCHS * math.ceil(1347 / 32)
EXPERIMENTS = {
    "vit": Task("vit", 20 * math.ceil(1347 / 32), "held-out loss", seeded(ViT), vit_losses, vit_score),
    "language": Task(
        "language", 300, "held-out bits per token", seeded(language_model), language_losses, language_score
    ),
    "small-language": Task(
        "small-language",
        300,
        "held-out bits per token",
        seeded(partial(language_model, depth=4, width=96)),
        language_losses,
        language_score,
    ),
    "permuted": Task(
        "permuted", TASKS * PER_TASK, "errors in all tasks, %", seeded(residual_net), permuted_losses, permuted_score
    ),
}


def rate(step: int, steps: int, constant: bool) -> float:
    """Part of the learning rate at a step: a twentieth of warm-up, then a cosine to a tenth, or constant."""
    warmup = max(1, steps // 20)
    cosine = 0.55 + 0.45 * math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))
    return min((step + 1) / warmup, 1.0 if constant else cosine)


def train(task: Task, make: Callable[[nn.Module], Optimizers], seed: int, steps: int, points: int) -> dict[str, Any]:
    """One run: its curve of (step, seconds of a core, training loss since the last point, measures), and the end."""
    model = task.model(seed)
    optimizers = make(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    curve: list[dict[str, float]] = []
    recent: list[Tensor] = []
    seconds = in_optimizer = 0.0
    losses = task.losses(model, seed)
    for step in range(steps):
        began = time.process_time()
        for group, base in zip(groups, rates, strict=True):
            group["lr"] = base * rate(step, steps, constant=task.name == "permuted")
        loss = next(losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = time.process_time()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ended = time.process_time()
        seconds, in_optimizer = seconds + ended - began, in_optimizer + ended - before
        recent.append(loss.detach())
        if (step + 1) % max(1, steps // points) == 0 or step + 1 == steps:
            mean = float(torch.stack(recent).mean())
            if not math.isfinite(mean):
                break
            with torch.no_grad():
                measures = task.score(model.eval())
            model.train()
            curve.append({"step": step + 1, "seconds": seconds, "training loss": mean, **measures})
            recent = []
    diverged = not curve or curve[-1]["step"] < steps or not math.isfinite(curve[-1][task.measure])
    return {"curve": curve, "diverged": diverged, "cpu_seconds": seconds, "optimizer_cpu_seconds": in_optimizer}
