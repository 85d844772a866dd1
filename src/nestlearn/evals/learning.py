"""A model learns from a stream of documents by one of several methods."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.continual.learner import ContinualLearner
from nestlearn.continual.methods import EWC, ExperienceReplay, FineTuning, Method
from nestlearn.continual.readers import windows
from nestlearn.continual.session import MemorySession, ReadReport, SegmentScore, at_most_every
from nestlearn.data.documents import Document
from nestlearn.data.synthetic import IGNORE
from nestlearn.evals.stream_record import DocumentRecord, Online, Reading
from nestlearn.fields import unknown_name

SaveReading = Callable[[Callable[[], Reading]], None]
"""May save where a method stands inside a document. It gets a function, because a record costs time to make."""
METHODS = ("cms", "finetune", "ewc", "replay", "lora")


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

    def begin(self, before: float) -> Reading:
        """The record of a document that is about to be read."""
        return Reading(before, self.session.tokens)

    def learn(
        self,
        document: Document,
        progress: Callable[[str], None],
        reading: Reading | None = None,
        save: SaveReading = lambda _: None,
    ) -> Online:
        """Read the document.

        Args:
            document: to be read.
            progress: called with what is being done.
            reading: where the session stands in the document, if it has begun it; see `begin`.
            save: called after every segment with the record by which the reading can go on.
        """
        session, reading = self.session, reading or self.begin(math.nan)
        done = session.tokens - reading.tokens
        if reading.pass_tokens is None and done and session.unfinished is None:
            reading = replace(reading, pass_tokens=done)  # the first pass ended, and its end was not recorded
        # A pass whose last segment was read, but whose end was not, is still that pass.
        ended = done - (session.unfinished is not None)
        for number in range(max(ended, 0) // reading.pass_tokens if reading.pass_tokens else 0, self.passes):
            reading = self._pass(document, number, progress, reading, save)
        report = ReadReport(list(reading.segments))
        scored = [segment for segment in report.segments if segment.bytes]
        return Online(
            report.bits_per_byte,
            report.off,
            tuple(segment.bits_per_byte for segment in scored),
            tuple(segment.off / math.log(2) / segment.bytes for segment in scored if segment.off is not None),
            report.by_level,
        )

    def _pass(
        self, document: Document, number: int, progress: Callable[[str], None], reading: Reading, save: SaveReading
    ) -> Reading:
        """Read the document once, from where the session stands in it."""
        place, size = self.session.unfinished, max(1, len(document.text))
        start, earlier = (0, 0) if place is None else place
        compared = _uncompared if start else _same
        kept, seconds, first = tuple(map(compared, reading.segments[:earlier])), reading.seconds, number == 0

        def now(report: ReadReport) -> Reading:
            scores = (*kept, *map(compared, report.segments)) if first else reading.segments
            return replace(reading, segments=scores, seconds=seconds + report.seconds)

        def tell(report: ReadReport) -> None:
            share = (start + report.bytes) / size
            progress(f"{document.name}: {min(share, 1):.0%} of pass {number + 1} of {self.passes} read, {report}")

        often = at_most_every(0.5, tell)

        def after_segment(report: ReadReport) -> None:
            often(report)
            save(lambda: now(report))

        end = now(self.session.read(document.text[start:], progress=after_segment, name=document.name))
        tokens = self.session.tokens - reading.tokens
        return replace(end, pass_tokens=reading.pass_tokens or tokens)

    def score(self, text: str) -> float:
        """By the current memory."""
        return self.session.score(text)

    def save(self, out: Path) -> Path:
        """One file with the differences to the model."""
        path = out / self.file
        self.session.save(path)
        return path


def _same(score: SegmentScore) -> SegmentScore:
    return score


def _uncompared(score: SegmentScore) -> SegmentScore:
    """After a resume writes are ignored since then only, and no longer since the start of the document."""
    return replace(score, off=None, without={})


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
    learned: int = 0,
    reading: Reading | None = None,
    save: SaveReading = lambda _: None,
) -> Iterator[DocumentRecord]:
    """Learn documents in order, and yield a record after each.

    Args:
        method: learns and scores.
        documents: the stream.
        known: text that the model knew before; its score measures retention.
        progress: called with what is being done.
        learned: documents at the start of the stream that the method has learned in an earlier run.
        reading: where a `SessionMethod` stands in the document after these.
        save: called with where a `SessionMethod` stands, before a document and after every segment.
    """
    for document in documents[learned:]:
        progress(f"{document.name}: scoring before")
        before = method.score(document.text) if reading is None else reading.before
        started, earlier = time.perf_counter(), 0.0 if reading is None else reading.seconds
        if isinstance(method, SessionMethod):
            if reading is None:
                begun = reading = method.begin(before)
                save(lambda begun=begun: begun)
            online = method.learn(document, progress, reading, save)
        else:
            online = method.learn(document, progress)
        seconds, reading = earlier + time.perf_counter() - started, None
        progress(f"{document.name}: scoring after")
        after, known_now, first = map(method.score, (document.text, known, documents[0].text))
        yield DocumentRecord(
            document.name, len(document.text.encode()), before, after, known_now, first, seconds, online
        )
