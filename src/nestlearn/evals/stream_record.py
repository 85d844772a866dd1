"""Records of a model that learns a stream of documents: the content of results.json, from which a run can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nestlearn.atomic import write_text
from nestlearn.continual.session import SegmentScore
from nestlearn.data.documents import Document


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
class Reading:
    """A document that a session is reading. With the session's file it tells where to go on.

    Attributes:
        before: score of the document before it was learned.
        tokens: that the session had read before this document.
        pass_tokens: tokens of one pass over the document; None until one is complete.
        segments: scores of the first pass so far. The file of the session may hold fewer.
        seconds: of learning so far.
    """

    before: float
    tokens: int
    pass_tokens: int | None = None
    segments: tuple[SegmentScore, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class StreamRecord:
    """A whole stream: the content of results.json and of the report of `nestlearn learn`.

    Attributes:
        stream: digests of the documents in order (see `document_digest`), learned or not.
        documents: those that were learned.
        reading: the next one, if it has been begun.
    """

    model: str
    method: str
    settings: dict[str, Any]
    known_name: str
    known_before: float
    documents: tuple[DocumentRecord, ...]
    command: str = ""
    stream: tuple[str, ...] = ()
    reading: Reading | None = None

    @property
    def finished(self) -> bool:
        """Whether every document of the stream was learned."""
        return len(self.documents) >= len(self.stream)

    def save(self, path: Path) -> None:
        """Write as JSON, at first under a temporary name."""
        write_text(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> StreamRecord:
        """The record that `save` wrote.

        Raises:
            ValueError: there is no such file, or it is no record of a stream.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            documents = tuple(_document(entry) for entry in content.pop("documents"))
            stream, reading = tuple(content.pop("stream")), content.pop("reading")
            return cls(**content, documents=documents, stream=stream, reading=reading and _reading(reading))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no record of `nestlearn learn` that could be continued ({error!r}). Restore it from a "
                "copy, or begin again in another folder."
            ) from error


def document_digest(document: Document) -> str:
    """A digest of the name and text of a document."""
    return hashlib.blake2b(f"{document.name}\0{document.text}".encode(), digest_size=8).hexdigest()


def stream_digests(documents: Sequence[Document]) -> tuple[str, ...]:
    """The digests of a stream, in order."""
    return tuple(map(document_digest, documents))


def _document(entry: dict[str, Any]) -> DocumentRecord:
    online = entry.pop("online")
    return DocumentRecord(**entry, online=online and _online(online))


def _online(entry: dict[str, Any]) -> Online:
    segments, segments_off = tuple(entry.pop("segments")), tuple(entry.pop("segments_off"))
    by_level = {int(level): bits for level, bits in entry.pop("by_level").items()}
    return Online(**entry, segments=segments, segments_off=segments_off, by_level=by_level)


def _reading(entry: dict[str, Any]) -> Reading:
    segments = []
    for score in entry.pop("segments"):
        without = {int(level): nats for level, nats in score.pop("without").items()}
        segments.append(SegmentScore(**score, without=without))
    return Reading(**entry, segments=tuple(segments))
