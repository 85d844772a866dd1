"""Documents and corpora; split, order and near-duplicates of documents by hash.

All choices depend on the documents' names and texts and a seed alone. BLAKE2 replaces Python's `hash` (salted per
process) and library random numbers (which may change between releases), so a corpus has the same split and order on
every machine.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, overload, runtime_checkable

SplitName = Literal["train", "validation"]
"""Part of a corpus."""

VALIDATION_SHARE = 0.1
"""Share of the documents held out for validation."""

_SHINGLE_WORDS = 8
_MAX_OVERLAP = 0.3
_WORD = re.compile(r"\w+")


class Document(NamedTuple):
    """A text and the name by which it is assigned to a split."""

    text: str
    name: str


@runtime_checkable
class Corpus(Protocol):
    """Documents that can be iterated repeatedly, in the same order each time."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> SplitName: ...
    def __iter__(self) -> Iterator[Document]: ...


@dataclass(frozen=True)
class LocalCorpus(Sequence[Document]):
    """Documents held in memory.

    Args:
        name: the spec that it was loaded from.
        split: `"train"` or `"validation"`.
        documents: the documents in a fixed order.

    Example:
        >>> corpus = LocalCorpus("example", "train", (Document("to be", "a"), Document("or not", "b")))
        >>> len(corpus), corpus.num_bytes
        (2, 11)
    """

    name: str
    split: SplitName
    documents: tuple[Document, ...]

    def __len__(self) -> int:
        return len(self.documents)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Document, ...]: ...
    def __getitem__(self, index: int | slice) -> Document | tuple[Document, ...]:
        return self.documents[index]

    @property
    def num_bytes(self) -> int:
        """Total size of the texts in UTF-8 bytes, the unit of bits per byte."""
        return sum(len(document.text.encode()) for document in self.documents)

    def __repr__(self) -> str:
        return f"LocalCorpus({self.name!r}, {self.split!r}, documents={len(self)}, num_bytes={self.num_bytes})"


def stable_hash(*parts: object) -> int:
    """A 64-bit hash of the parts as text, equal in every process and on every machine."""
    joined = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def shuffled(documents: Sequence[Document], seed: int) -> list[Document]:
    """The documents in an order that depends only on the seed and their names."""
    return sorted(documents, key=lambda document: (stable_hash("order", seed, document.name), document.name))


def split_documents(
    documents: Sequence[Document], split: SplitName, seed: int = 0, share: float = VALIDATION_SHARE
) -> tuple[Document, ...]:
    """The part of `documents` that belongs to `split`.

    A document goes to validation if the hash of (seed, name) is below `share`, so adding documents never moves
    another one. If no hash of a small collection is below it, the document with the lowest hash goes there.

    Args:
        documents: documents with distinct names.
        split: the part to return; the two parts share no document.
        seed: another seed gives another split.
        share: expected share of validation documents, between 0 and 1.
    """
    hashes = {document.name: stable_hash("split", seed, document.name) for document in documents}
    if len(hashes) != len(documents):
        raise ValueError(f"{len(documents)} documents have only {len(hashes)} distinct names; names decide the split.")
    held_out = {name for name, value in hashes.items() if value < share * 2**64}
    if not held_out and len(documents) > 1:
        held_out = {min(hashes, key=hashes.__getitem__)}
    return tuple(document for document in documents if (document.name in held_out) == (split == "validation"))


def shingles(text: str) -> set[int]:
    """Hashes of all runs of eight words, without case, punctuation and layout.

    A shorter text has one shingle: all of it.
    """
    words = _WORD.findall(text.lower())
    if len(words) <= _SHINGLE_WORDS:
        return {zlib.crc32(" ".join(words).encode())}
    # A rolling combination of word hashes: hashing each run as a string would cost eight times as much.
    hashes = [zlib.crc32(word.encode()) | 1 for word in words]
    runs = zip(*(hashes[offset:] for offset in range(_SHINGLE_WORDS)), strict=False)
    return {hash(run) for run in runs}  # tuples of integers hash without a salt


def drop_near_duplicates(documents: Sequence[Document], max_overlap: float = _MAX_OVERLAP) -> list[Document]:
    """Documents without those that mostly repeat text of others, in the same order.

    Longest first, a document is kept if at most `max_overlap` of its eight-word runs occur in all documents kept so
    far. This removes copies, lightly edited copies and excerpts, so held-out text does not occur in training.
    """
    seen: set[int] = set()
    kept: set[str] = set()
    for document in sorted(documents, key=lambda document: (-len(document.text), document.name)):
        own = shingles(document.text)
        if len(own & seen) <= max_overlap * len(own):
            seen |= own
            kept.add(document.name)
    return [document for document in documents if document.name in kept]
