"""The text a session reads: from a string, files or a stream to blocks, and from blocks to tokens with their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nestlearn.data.control_tokens import LiteralText
from nestlearn.data.text_files import find_files, read_text
from nestlearn.data.tokenizers import bytes_per_token

BLOCK = 1_024
"""Characters after which a text is cut at the next end of a word, to be tokenized block by block."""


def cut_blocks(text: str) -> tuple[list[str], str]:
    """Whole blocks at the start of a text, and the rest, which more text may complete.

    Where a block ends depends on the text alone, so a stream gives the same tokens in whatever pieces it comes. A block
    ends before the first blank after a word at or beyond `BLOCK` characters, or at twice as many.

    Example:
        >>> blocks, rest = cut_blocks("word " * 300)
        >>> [len(block) for block in blocks], len(rest)
        ([1024], 476)
    """
    blocks, start = [], 0
    while len(text) - start > BLOCK:
        limit = start + 2 * BLOCK
        known = range(start + BLOCK, min(limit, len(text)))
        end = next((i for i in known if text[i].isspace() and not text[i - 1].isspace()), None)
        if end is None:
            if len(text) < limit:
                break
            end = limit
        blocks.append(text[start:end])
        start = end
    return blocks, text[start:]


class TokenReader:
    """Tokens of blocks of text, each with its number of bytes.

    Args:
        tokenizer: any Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._literal = LiteralText(tokenizer)
        try:
            self._bytes = bytes_per_token(tokenizer).tolist()
        except TypeError:
            self._bytes = None  # its tokens do not spell out bytes: a block's bytes are spread evenly
        # SentencePiece puts a blank before what it is given, so a block must come without its own.
        joined, parted = self._ids("one two"), self._ids("one") + self._ids(" two")
        self._drop_blank = joined != parted and joined == self._ids("one") + self._ids("two")

    def _ids(self, text: str) -> list[int]:
        # A control token spelled out in a text is its letters: a document cannot end itself.
        return self._literal.ids(text)

    def __call__(self, block: str, first: bool) -> list[tuple[int, float]]:
        """``(token, bytes)`` of a block; ``first`` if a document starts with it.

        Example:
            >>> TokenReader(byte_tokenizer())("hé", first=True)
            [(104, 1), (195, 1), (169, 1)]
        """
        given = block[1:] if self._drop_blank and not first and block.startswith(" ") else block
        ids = self._ids(given)
        if self._bytes is not None:
            return [(token, self._bytes[token]) for token in ids]
        return [(token, len(block.encode()) / len(ids)) for token in ids]


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
    return iter([(check_text(piece, "a piece of the stream") for piece in source)]), None


def _content(file: Path) -> Iterator[str]:
    """The text of a file, read when its turn comes: if it has vanished, the source has failed."""
    yield read_text(file)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False
