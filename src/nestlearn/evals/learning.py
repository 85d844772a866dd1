"""A model learns from a stream of documents by one of several methods; records of what it learns and keeps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.atomic import write_text
from nestlearn.continual.learner import ContinualLearner
from nestlearn.continual.methods import EWC, ExperienceReplay, FineTuning, Method
from nestlearn.continual.readers import windows
from nestlearn.continual.session import MemorySession, at_most_every
from nestlearn.data.documents import Document
from nestlearn.data.synthetic import IGNORE
from nestlearn.fields import unknown_name

METHODS = ("cms", "finetune", "ewc", "replay", "lora")


@dataclass(frozen=True)
class Online:
    """How a document was read: bits per byte of its segments, each scored before it is learned.

    Attributes:
        bits_per_byte: of the whole document, while it is learned.
        off: of the same text without learning any of this document.
        segments, segments_off: the curves; a segment is the text between two writes.
        by_level: by a level's number, the bits per byte without what this level has learned.
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
        before, after: its score before and after it was learned.
        known: score of the known text after this document.
        first: score of the stream's first document after this one, which shows forgetting.
        seconds: of learning it.
        online: for methods that score while they learn, how it was read.
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
    """A whole stream: the content of results.json and of the report of `nestlearn learn`."""

    model: str
    method: str
    settings: dict[str, Any]
    known_name: str
    known_before: float
    documents: tuple[DocumentRecord, ...]
    command: str = ""

    def save(self, path: Path) -> None:
        """Write as JSON, at first under a temporary name."""
        write_text(path, json.dumps(asdict(self), indent=1))


class StreamMethod(Protocol):
    """A model that learns documents."""

    def learn(self, document: Document, progress: Callable[[str], None]) -> Online | None:
        """Learn one document."""
        ...

    def score(self, text: str) -> float:
        """Bits per byte of a text by the current model, which does not learn it."""
        ...

    def save(self, out: Path) -> Path:
        """Write what was learned into the folder ``out``; returns the file or folder written."""
        ...


class SessionMethod:
    """A `MemorySession`: its levels learn, the model's weights do not change.

    Args:
        session: its memory learns.
        passes: times each document is read; the first one is scored.
        file: name of the session's file in the output folder.
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
        """By the current memory."""
        return self.session.score(text)

    def save(self, out: Path) -> Path:
        """One file with the differences to the model."""
        path = out / self.file
        self.session.save(path)
        return path


class TrainingMethod:
    """Gradient steps on the weights: plain fine-tuning, EWC, replay or LoRA.

    Args:
        learner: trains a causal language model; with boundaries and one window per step.
        tokenizer: the model's.
        context_length: tokens of a training sequence.
        known: documents of what the model knew before, for methods that protect it (EWC) or replay it.
    """

    def __init__(
        self, learner: ContinualLearner, tokenizer: Any, context_length: int = 256, known: Sequence[Document] = ()
    ) -> None:
        self.learner, self.tokenizer, self.context_length = learner, tokenizer, context_length
        self._generator = torch.Generator().manual_seed(learner.seed)
        self._learned = 0
        for document in known:
            examples = windows(tokenizer, document.text, context_length)
            for row in range(len(examples)):
                learner.method.observe(examples[torch.tensor([row])], self._generator, True)
            learner.method.end_task(learner.model, examples, self._generator)

    def learn(self, document: Document, progress: Callable[[str], None]) -> None:
        """Train on the document's windows."""
        examples = windows(self.tokenizer, document.text, self.context_length)
        progress(f"{document.name}: {len(examples)} sequences")
        self.learner.learn(examples, self._learned)
        self.learner.end_task(examples, self._learned, self._generator)
        self._learned += 1

    def score(self, text: str) -> float:
        """By the current weights."""
        return model_bits_per_byte(self.learner.model, self.tokenizer, text, self.context_length)

    def save(self, out: Path) -> Path:
        """A folder with the model, or with the adapter."""
        path = out / "model"
        model: Any = self.learner.model
        model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        return path


def training_method(name: str, *, strength: float = 1.0, capacity: int = 256, rank: int = 8) -> Method:
    """The method with this name: ``finetune``, ``ewc`` (strength), ``replay`` (capacity) or ``lora`` (rank).

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
    raise unknown_name("method", name, METHODS)


@torch.inference_mode()
def model_bits_per_byte(model: Any, tokenizer: Any, text: str, context_length: int) -> float:
    """Bits per byte of a text in blocks of ``context_length`` tokens, each without the context of the others.

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
    """Learn documents in order, and yield a record after each.

    Args:
        method: learns and scores.
        documents: the stream.
        known: text that the model knew before; its score measures retention.
        progress: called with what is being done.
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
