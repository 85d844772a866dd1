"""Documents, corpora and the choices made by hash: which split, which order, which are copies of each other.

Everything here is a function of the documents' names and texts (and a seed) alone. BLAKE2 is used instead of Python's
`hash` (salted per process) and of library random numbers (which may change between releases), so the same corpus gives
the same split and order on every machine.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, overload, runtime_checkable

Split = Literal["train", "validation"]
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
    """Anything that can be iterated again and again over the same documents in the same order."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> Split: ...
    def __iter__(self) -> Iterator[Document]: ...


@dataclass(frozen=True)
class LocalCorpus(Sequence[Document]):
    """Documents held in memory.

    Args:
        name: the spec it was loaded from.
        split: `"train"` or `"validation"`.
        documents: in a fixed order.

    Example:
        >>> corpus = LocalCorpus("example", "train", (Document("to be", "a"), Document("or not", "b")))
        >>> len(corpus), corpus.num_bytes
        (2, 11)
    """

    name: str
    split: Split
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
    """A 64-bit hash of the parts' text forms, equal in every process and on every machine."""
    joined = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def shuffled(documents: Sequence[Document], seed: int) -> list[Document]:
    """The documents in an order that depends on the seed and their names alone."""
    return sorted(documents, key=lambda document: (stable_hash("order", seed, document.name), document.name))


def split_documents(
    documents: Sequence[Document], split: Split, seed: int = 0, share: float = VALIDATION_SHARE
) -> tuple[Document, ...]:
    """The part of `documents` that belongs to `split`.

    A document goes to validation where the hash of (seed, name) falls below `share`, so that adding documents never
    moves another one. In a collection so small that none falls below, the one with the lowest hash goes there.

    Args:
        documents: with distinct names.
        split: which part to return; the two parts never share a document.
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
    """Hashes of all runs of eight words, ignoring case, punctuation and layout.

    A text of fewer words has one shingle, all of it.
    """
    words = _WORD.findall(text.lower())
    if len(words) <= _SHINGLE_WORDS:
        return {zlib.crc32(" ".join(words).encode())}
    # A rolling combination of word hashes: hashing each run as a string would cost eight times as much.
    hashes = [zlib.crc32(word.encode()) | 1 for word in words]
    runs = zip(*(hashes[offset:] for offset in range(_SHINGLE_WORDS)), strict=False)
    return {hash(run) for run in runs}  # tuples of integers hash without a salt


def drop_near_duplicates(documents: Sequence[Document], max_overlap: float = _MAX_OVERLAP) -> list[Document]:
    """Removes documents that mostly repeat text that others have.

    Longest first, a document is kept if at most `max_overlap` of its eight-word runs occur in the documents kept so
    far (together). This removes copies, lightly edited copies and excerpts, wherever the pieces come from, so held-out
    text is not text seen in training. The order of the rest is kept.
    """
    seen: set[int] = set()
    kept: set[str] = set()
    for document in sorted(documents, key=lambda document: (-len(document.text), document.name)):
        own = shingles(document.text)
        if len(own & seen) <= max_overlap * len(own):
            seen |= own
            kept.add(document.name)
    return [document for document in documents if document.name in kept]
