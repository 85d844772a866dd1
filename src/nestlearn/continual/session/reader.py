"""Text to segments, and segments into a memory: each segment is scored before it is written."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from nestlearn.data.control_tokens import LiteralText, control_ids
from nestlearn.data.text_files import find_files, read_text
from nestlearn.data.tokenizers import bytes_per_token

from .backends import Backend, PieceRead, ReadCall
from .report import SegmentScore

Conversation = Sequence[Mapping[str, str]]
"""Messages ``{"role": ..., "content": ...}``."""
Tokens = list[tuple[int, float]]
"""Tokens of a text, each with its number of bytes."""
READ_BLOCK = 1_024
"""A text is cut at the first end of a word after so many characters, and tokenized block by block."""


@dataclass(frozen=True)
class Cursor:
    """Where a session stands in its reading. Immutable.

    ``memory`` is what it has learned. ``text`` is the start of a block of text that is not complete, ``waiting`` the
    tokens (with their bytes) of a segment that is not complete. ``blocks`` and ``segments`` count those of the current
    document, ``characters`` the text of it that was taken over. ``tokens`` counts all tokens read.
    """

    memory: Any
    text: str = ""
    waiting: tuple[tuple[int, float], ...] = ()
    blocks: int = 0
    segments: int = 0
    tokens: int = 0
    characters: int = 0

    def check(self, vocabulary: int) -> None:
        """Raise ValueError unless a session over a model of so many tokens can go on here."""
        counts = {name: getattr(self, name) for name in ("blocks", "segments", "tokens", "characters")}
        if wrong := {name: x for name, x in counts.items() if type(x) is not int or x < 0}:
            raise ValueError(f"counts that are no natural numbers: {wrong}")
        if not isinstance(self.text, str):
            raise ValueError(f"a {type(self.text).__name__} in place of the text that was begun")
        for pair in self.waiting:
            token, size = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, None)
            if type(token) is not int or not 0 <= token < vocabulary:
                raise ValueError(
                    f"{pair!r:.80} in place of a token from 0 to {vocabulary - 1} that waits, and its bytes"
                )
            if not isinstance(size, int | float) or not 0 <= size < math.inf:
                raise ValueError(f"a token of {size!r:.80} bytes")

    def end_document(self, memory: Any) -> Cursor:
        """The cursor after the end of the document, with the memory after it; incomplete blocks and segments are
        dropped."""
        return Cursor(memory, tokens=self.tokens)


class DocumentReader:
    """Reads documents, segment by segment.

    For comparison it reads the same text alongside with memories that ignore writes.

    Args:
        backend: of the model.
        tokens_of: tokenizes blocks of text.
        memory: the memory at the start of the reading.
        writes: whether anything is learned.
        compare: ``"off"`` compares with all writes of the reading ignored, ``"levels"`` also with those of each level
            ignored, ``"none"`` with nothing.
    """

    def __init__(
        self,
        backend: Backend,
        tokens_of: BlockTokenizer,
        memory: Any,
        *,
        writes: bool = True,
        compare: str = "none",
    ) -> None:
        self.backend, self.tokens_of, self.writes = backend, tokens_of, writes
        ignored: list[int | None] = {"none": [], "off": [None], "levels": [None, *backend.levels]}[compare]
        self._views: dict[int | None, Any] = dict.fromkeys(ignored, memory)
        # Without a comparison nobody needs the memory of the start, which may be large.
        self._before = memory if ignored else None
        self._later: list[list[int]] = []
        self._starts = False
        self.scores: list[SegmentScore] = []

    def documents(self, source: Any) -> tuple[Iterator[Iterable[str | Tokens]], int | None]:
        """See `documents_of`. A conversation comes without the start token, which the backend reads, and without tokens
        at which the model forgets."""
        if not is_conversation(source):
            return documents_of(source)  # pyright: ignore[reportReturnType]
        forgetting, start = self.backend.forgetting_tokens(), self.backend.start_tokens
        tokens = [pair for pair in self.tokens_of.conversation(source) if pair[0] not in forgetting]
        again = bool(start) and tuple(token for token, _ in tokens[: len(start)]) == start
        return iter([[tokens[len(start) * again :]]]), None

    def take(self, cursor: Cursor, piece: str | Tokens | None) -> Cursor:
        """Tokenize a piece of the document as far as it completes blocks. None, the end, completes the last one, and so
        do tokens, which follow it."""
        if isinstance(piece, list):
            before = self.take(cursor, None)
            return replace(before, waiting=(*before.waiting, *piece), blocks=before.blocks + 1)
        blocks, rest = ([cursor.text], "") if piece is None else cut_read_blocks(cursor.text + piece)
        for block in filter(None, blocks):
            tokens = self.tokens_of(block, first=cursor.blocks == 0)
            cursor = replace(cursor, waiting=(*cursor.waiting, *tokens), blocks=cursor.blocks + 1)
        return replace(cursor, text=rest, characters=cursor.characters + len(piece or ""))

    def next_segment(self, cursor: Cursor, *, ending: bool) -> int:
        """Tokens of the next segment, 0 if it is not complete; at the end of a document it may be shorter."""
        waiting, segment = len(cursor.waiting), self.backend.segment
        return segment if waiting >= segment else waiting if ending else 0

    def read(self, cursor: Cursor, count: int) -> Generator[list[ReadCall], list[PieceRead], Cursor]:
        """Score the first ``count`` waiting tokens, write them, and move the cursor behind them.

        It asks for what is to be read, and adds the score to `scores`.
        """
        tokens, start = cursor.waiting[:count], cursor.segments == 0
        ids = [token for token, _ in tokens]
        views = {level: view for level, view in self._views.items() if level is not None}
        asked = [ReadCall(cursor.memory, ids, self.writes, start)]
        for level, view in views.items():
            asked.append(ReadCall(view.ignoring((level,), cursor.memory, self._before), ids, False, start))
        read, *others = yield asked
        self._views.update({level: other.memory for level, other in zip(views, others, strict=True)})
        score = SegmentScore(
            tokens=count,
            bytes=sum(size for (_, size), nats in zip(tokens, read.nats, strict=True) if nats is not None),
            nats=_total(read.nats),
            without={level: _total(other.nats) for level, other in zip(views, others, strict=True)},
        )
        if None in self._views:
            if sum(map(len, self._later)) + count > self.backend.room(self._views[None]):
                yield from self.compare()
            self._starts = self._starts if self._later else start
            self._later.append(ids)
        self.scores.append(score)
        return replace(
            cursor,
            memory=read.memory,
            waiting=cursor.waiting[count:],
            segments=cursor.segments + 1,
            tokens=cursor.tokens + count,
        )

    def compare(self) -> Generator[list[ReadCall], list[PieceRead], None]:
        """Score with all writes ignored the segments that were not yet: ``off`` of the last ones in `scores`."""
        if not self._later:
            return
        ids, view = [token for part in self._later for token in part], self._views[None]
        [read] = yield [ReadCall(view.ignoring(None, view, self._before), ids, False, self._starts)]
        self._views[None], at = read.memory, 0
        for i, part in enumerate(self._later, len(self.scores) - len(self._later)):
            self.scores[i] = replace(self.scores[i], off=_total(read.nats[at : at + len(part)]))
            at += len(part)
        self._later = []

    def end_document(self, cursor: Cursor) -> Generator[list[ReadCall], list[PieceRead], Cursor]:
        """End the document, for the memories of the comparison too."""
        yield from self.compare()
        self._views = {level: self.backend.end_document(memory) for level, memory in self._views.items()}
        return cursor.end_document(self.backend.end_document(cursor.memory))


def _total(nats: list[float | None]) -> float:
    return sum(x for x in nats if x is not None)


class SourceFailed(Exception):
    """An error of the source of a text (its cause), told apart from errors of the model."""


def pieces_of(documents: Iterable[Iterable[str | Tokens]], end: bool) -> Iterator[str | Tokens | None]:
    """Pieces of at most `READ_BLOCK` characters, and tokens as they are; None where a document ends, the last one with
    ``end`` only.

    Raises:
        SourceFailed: the source raised an error, or gave something that is no text.
    """
    started = False
    for document in documents:
        if started:
            yield None
        started, pieces = True, iter(document)
        while True:
            try:
                piece = next(pieces)
                if isinstance(piece, list):
                    yield piece
                    continue
                piece = check_text(piece, "a piece of the stream")
            except StopIteration:
                break
            except Exception as error:
                raise SourceFailed(str(error)) from error
            yield from (piece[at : at + READ_BLOCK] for at in range(0, len(piece), READ_BLOCK))
    if end:
        yield None


def cut_read_blocks(text: str) -> tuple[list[str], str]:
    """Whole blocks at the start of a text, and the rest, which more text may complete.

    Where a block ends depends on the text alone, so a stream gives the same tokens in whatever pieces it comes. A block
    ends before the first blank after a word at or beyond `READ_BLOCK` characters, or at twice as many.

    Example:
        >>> blocks, rest = cut_read_blocks("word " * 300)
        >>> [len(block) for block in blocks], len(rest)
        ([1024], 476)
    """
    blocks, start = [], 0
    while len(text) - start > READ_BLOCK:
        limit = start + 2 * READ_BLOCK
        known = range(start + READ_BLOCK, min(limit, len(text)))
        end = next((i for i in known if text[i].isspace() and not text[i - 1].isspace()), None)
        if end is None:
            if len(text) < limit:
                break
            end = limit
        blocks.append(text[start:end])
        start = end
    return blocks, text[start:]


class BlockTokenizer:
    """Tokens of blocks of text, each with its number of bytes.

    Args:
        tokenizer: any Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._literal = LiteralText(tokenizer)
        try:
            self._bytes = bytes_per_token(tokenizer).tolist()
            for token in self._literal.controls:
                self._bytes[token] = 0
        except TypeError:
            self._bytes = None  # its tokens do not spell out bytes: a block's bytes are spread evenly
        # SentencePiece puts a blank before what it is given, so a block must come without its own.
        joined, parted = self._ids("one two"), self._ids("one") + self._ids(" two")
        self._drop_blank = joined != parted and joined == self._ids("one") + self._ids("two")

    def _ids(self, text: str) -> list[int]:
        # A control token spelled out in a text is its letters: a document cannot end itself.
        return self._literal.ids(text)

    def __call__(self, block: str, first: bool) -> Tokens:
        """``(token, bytes)`` of a block; ``first`` if a document starts with it.

        Example:
            >>> BlockTokenizer(byte_tokenizer())("hé", first=True)
            [(104, 1), (195, 1), (169, 1)]
        """
        given = block[1:] if self._drop_blank and not first and block.startswith(" ") else block
        return self._with_bytes(self._ids(given), block)

    def conversation(self, messages: Conversation) -> Tokens:
        """``(token, bytes)`` of a conversation by the chat template. Control tokens count no bytes where tokens spell
        out their text.

        Raises:
            ValueError: no messages, or a tokenizer without chat template.
            TypeError: a message without text as role and content.
        """
        if not messages:
            raise ValueError("the conversation has no messages. Give at least one: {'role': 'user', 'content': ...}.")
        for number, message in enumerate(messages):
            for key in ("role", "content"):
                check_text(message.get(key), f"{key!r} of message {number}")
        pieces = self._literal.templated(messages, answer=False)
        found = [self._with_bytes(control_ids(self._literal.tokenizer, piece), piece) for piece in pieces]
        return [token for piece in found for token in piece]

    def _with_bytes(self, ids: list[int], text: str) -> Tokens:
        if self._bytes is not None:
            return [(token, self._bytes[token]) for token in ids]
        return [(token, len(text.encode()) / len(ids)) for token in ids]


def is_conversation(source: object) -> TypeGuard[Conversation]:
    """Whether a source is a list of messages; other sequences are pieces of text."""
    return isinstance(source, list | tuple) and all(isinstance(message, Mapping) for message in source)


def name_of_source(source: object) -> str:
    """A name for what was read: the path of a file, or the beginning of a text or of a conversation.

    Example:
        >>> name_of_source("The lamp is red. " * 9)
        "'The lamp is red. The lamp is red. The la...'"
    """
    if isinstance(source, Path):
        return str(source)
    if is_conversation(source):
        return f"conversation {name_of_source(str(source[0]['content']))}"
    if not isinstance(source, str):
        return "a stream"
    text = " ".join(source.split())
    return repr(text if len(text) <= 40 else f"{text[:40].rstrip()}...")


def check_text(text: object, where: str) -> str:
    """The text, if it is one.

    Raises:
        TypeError: it is bytes or something else.
        ValueError: it contains a NUL character or half a surrogate pair.
    """
    if not isinstance(text, str):
        fix = " Open the file in text mode: open(path, encoding='utf-8')." if isinstance(text, bytes) else ""
        raise TypeError(f"{where} must be str, got {type(text).__name__}.{fix}")
    if "\0" in text:
        raise ValueError(f"{where} is binary: character {text.index(chr(0))} is NUL. Give text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} is not Unicode text: character {error.start} is half of a pair ({error})."
        ) from error
    return text


def documents_of(source: str | Path | Iterable[str]) -> tuple[Iterator[Iterable[str]], int | None]:
    """The documents of a source, each as pieces of text, and the bytes of all if they are known beforehand.

    A string is one document, a path is a file or a folder of files (each a document), and anything else is iterated
    over: one document in pieces. Files are read once to be checked before anything is learned.

    Raises:
        ValueError: a path that does not exist, cannot be read, is binary or not UTF-8; a string that names a file.
        TypeError: nothing of these.
    """
    if isinstance(source, str):
        if source and len(source) < 256 and "\n" not in source and _is_file(source):
            raise ValueError(f"{source!r} is the name of a file. To read the file, give pathlib.Path({source!r}).")
        check_text(source, "the text")
        return iter([[source]]), len(source.encode())
    if isinstance(source, Path):
        files = find_files(str(source))
        size = sum(len(read_text(file).encode()) for file in files)
        return (_content(file) for file in files), size
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise TypeError(f"a session reads a str, a pathlib.Path or an iterable of str, got {type(source).__name__}.")
    return iter([source]), None


def _content(file: Path) -> Iterator[str]:
    """The text of a file, read when its turn comes: if it has vanished, the source has failed."""
    yield read_text(file)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False
