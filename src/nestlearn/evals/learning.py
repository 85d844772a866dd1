"""Let a saved model learn from a stream of documents by one of several methods, and measure what it keeps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.continual.learner import ContinualLearner
from nestlearn.continual.methods import EWC, ExperienceReplay, FineTuning, Method
from nestlearn.continual.readers import windows
from nestlearn.continual.session import MemorySession, at_most_every
from nestlearn.data.documents import Document
from nestlearn.data.synthetic import IGNORE
from nestlearn.train.checkpoint import write_text

METHODS = ("cms", "finetune", "ewc", "replay", "lora")


@dataclass(frozen=True)
class Online:
    """How a document was read: bits per byte of its segments, each scored before it is learned.

    Attributes:
        bits_per_byte: of the whole document, while it is learned.
        off: the same text, nothing of this document learned.
        segments, segments_off: the curves; a segment is what is read between two writes.
        by_level: by number of a level, the bits per byte without what this level has learned.
    """

    bits_per_byte: float
    off: float | None = None
    segments: tuple[float, ...] = ()
    segments_off: tuple[float, ...] = ()
    by_level: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DocumentRecord:
    """One document of the stream; all figures in bits per byte.

    Attributes:
        name: of the document.
        bytes: of its text.
        before, after: its score before and after it was learned, by the memory as it then was.
        known: score of the known text after the document.
        first: score of the stream's first document after this one, to see it being forgotten.
        seconds: of learning it.
        online: how it was read, for methods that score while they learn.
    """

    name: str
    bytes: int
    before: float
    after: float
    known: float
    first: float
    seconds: float
    online: Online | None = None


@dataclass(frozen=True)
class StreamRecord:
    """A whole stream: what `nestlearn learn` writes as results.json and shows in its report."""

    model: str
    method: str
    settings: dict[str, Any]
    known_name: str
    known_before: float
    documents: tuple[DocumentRecord, ...]
    command: str = ""

    def save(self, path: Path) -> None:
        """Write as JSON, under a temporary name first."""
        write_text(path, json.dumps(asdict(self), indent=1))


class StreamMethod(Protocol):
    """A model that learns documents."""

    def learn(self, document: Document, progress: Callable[[str], None]) -> Online | None:
        """Learn one document."""
        ...

    def score(self, text: str) -> float:
        """Bits per byte of a text by the model as it is; learns nothing."""
        ...

    def save(self, out: Path) -> Path:
        """Write what was learned below ``out``; returns the file or folder."""
        ...


class SessionMethod:
    """A `MemorySession`: levels learn, the model's weights stay.

    Args:
        session: what learns.
        passes: times each document is read; the first one is scored.
        file: name of the session's file below the output folder.
    """

    def __init__(self, session: MemorySession, passes: int = 1, file: str = "session.safetensors") -> None:
        self.session, self.passes, self.file = session, passes, file

    def learn(self, document: Document, progress: Callable[[str], None]) -> Online:
        """Read the document."""
        size = max(1, len(document.text.encode()))
        report = self.session.read(
            document.text,
            progress=at_most_every(0.5, lambda now: progress(f"{document.name}: {now.bytes / size:.0%} read, {now}")),
        )
        for _ in range(self.passes - 1):
            self.session.read(document.text)
        scored = [segment for segment in report.segments if segment.bytes]
        return Online(
            report.bits_per_byte,
            report.off,
            tuple(segment.bits_per_byte for segment in scored),
            tuple(segment.off / math.log(2) / segment.bytes for segment in scored if segment.off is not None),
            report.by_level,
        )

    def score(self, text: str) -> float:
        """By the memory as it is."""
        return self.session.score(text)

    def save(self, out: Path) -> Path:
        """One file: only what differs from the model."""
        path = out / self.file
        self.session.save(path)
        return path


class TrainingMethod:
    """Gradient steps on the weights: plain fine-tuning, EWC, replay or LoRA.

    Args:
        model: a causal language model; it is trained in place.
        tokenizer: its tokenizer.
        method: one of `nestlearn.continual.methods`.
        optimizer: makes the optimizer of parameters.
        context_length: tokens of a training sequence.
        passes: times each document is gone through.
        known: documents of what the model knew before, for methods that protect it (EWC) or replay it.
        seed: of all random choices.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        method: Method,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        context_length: int = 256,
        passes: int = 1,
        known: Sequence[Document] = (),
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        self._generator = torch.Generator().manual_seed(seed)
        self.learner = ContinualLearner(
            model, optimizer, method=method, epochs=passes, batch_size=1, score="bits", max_grad_norm=1.0, seed=seed
        )
        for document in known:
            examples = windows(tokenizer, document.text, context_length)
            for row in range(len(examples)):
                method.observe(examples[torch.tensor([row])], self._generator, True)
            method.end_task(model, examples, self._generator)
        self._learned = 0

    def learn(self, document: Document, progress: Callable[[str], None]) -> None:
        """Train on the document's windows."""
        examples = windows(self.tokenizer, document.text, self.context_length)
        progress(f"{document.name}: {len(examples)} sequences")
        self.learner.learn(examples, self._learned)
        self.learner.end_task(examples, self._learned, self._generator)
        self._learned += 1

    def score(self, text: str) -> float:
        """By the weights as they are."""
        return model_bits_per_byte(self.learner.model, self.tokenizer, text, self.context_length)

    def save(self, out: Path) -> Path:
        """A model folder, or the adapter's."""
        path = out / "model"
        model: Any = self.learner.model
        model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        return path


def training_method(name: str, *, strength: float = 1.0, capacity: int = 256, rank: int = 8) -> Method:
    """The method of a name: ``finetune``, ``ewc`` (strength), ``replay`` (capacity) or ``lora`` (rank).

    Raises:
        ValueError: unknown name.
    """
    if name == "finetune":
        return FineTuning()
    if name == "ewc":
        return EWC(strength, samples=64, labels="data")
    if name == "replay":
        return ExperienceReplay(capacity)
    if name == "lora":
        from nestlearn.continual.lora import LoRA

        return LoRA(rank)
    raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}.")


@torch.inference_mode()
def model_bits_per_byte(model: Any, tokenizer: Any, text: str, context_length: int) -> float:
    """Bits per byte of a text in blocks of ``context_length`` tokens, each with a context of its own.

    Raises:
        ValueError: the text has no token to predict, or the model's loss on it is not finite.
    """
    was_training = model.training
    model.eval()
    nats = 0.0
    examples = windows(tokenizer, text, context_length)
    for row in range(len(examples)):
        one = examples[torch.tensor([row])]
        logits: Tensor = model(one.inputs.to(model.device)).logits
        targets = one.targets.to(logits.device).flatten()
        nats += float(F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORE, reduction="sum"))
    model.train(was_training)
    if not math.isfinite(nats):
        raise ValueError(
            f"The model's loss on a text of {len(text)} characters is {nats} nats, which is no score. Check its "
            "weights for values that are not finite; a model that was trained needs a lower learning rate."
        )
    return nats / math.log(2) / len(text.encode())


def learn_stream(
    method: StreamMethod,
    documents: Sequence[Document],
    known: str,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[DocumentRecord]:
    """Learn documents in order; a record of each as soon as it is learned.

    Args:
        method: what learns.
        documents: the stream.
        known: text that the model knew before; its score is the retention probe.
        progress: told what is being done.
    """
    for document in documents:
        progress(f"{document.name}: scoring before")
        before = method.score(document.text)
        started = time.perf_counter()
        online = method.learn(document, progress)
        seconds = time.perf_counter() - started
        progress(f"{document.name}: scoring after")
        after, known_now, first = map(method.score, (document.text, known, documents[0].text))
        yield DocumentRecord(
            document.name, len(document.text.encode()), before, after, known_now, first, seconds, online
        )
