"""Documents from local text files: one file, a folder, or a glob pattern."""

from __future__ import annotations

import glob
from pathlib import Path

from nestlearn.data.documents import Document, LocalCorpus, SplitName, split_documents, stable_hash

_BLOCK = 65_536  # characters: long enough for a document, short compared with a book
_BLOCKS = 20  # one block in twenty is held out
_FIX = "Give a file, a folder or a quoted glob pattern of UTF-8 text, e.g. 'text:notes/**/*.md'."


def text_corpus(path: str, split: SplitName, seed: int = 0) -> LocalCorpus:
    """The corpus `text:PATH`.

    If there are several files, each is a document. The hash of its path below the folder or pattern decides its split.
    Blank files are left out, and files with the same words are read once. A single file is cut at line ends into at
    least twenty blocks of at most 65,536 characters. Every twentieth block goes to validation. The runs of blocks
    between them are the training documents, so that a book keeps its long range.

    Raises:
        ValueError: no file is found, all are blank, the content is binary, or a file is too short to be split.
    """
    files = find_files(path)
    name = f"text:{path}"
    if len(files) == 1:
        text = read_text(files[0])
        if not text.strip():
            raise ValueError(f"{files[0]} is empty ({len(text)} characters): it has no text to learn from. {_FIX}")
        return LocalCorpus(name, split, split_blocks(text, files[0].name, split, seed))
    root = Path(path) if Path(path).is_dir() else _common_folder(files)
    documents = [Document(read_text(file), file.relative_to(root).as_posix()) for file in files]
    documents = drop_copies([document for document in documents if document.text.strip()])
    if len(documents) < 2:
        raise ValueError(
            f"The {len(files)} files of {path!r} hold {len(documents)} different texts; at least 2 are needed."
        )
    return LocalCorpus(name, split, split_documents(documents, split, seed))


def find_files(path: str) -> list[Path]:
    """All files of a path or pattern, sorted, without hidden files of a folder."""
    target = Path(path).expanduser()
    if target.is_file():
        return [target]
    if target.is_dir():
        inside = (file for file in target.rglob("*") if file.is_file())
        files = [file for file in inside if not any(p.startswith(".") for p in file.relative_to(target).parts)]
    else:
        files = [Path(found) for found in glob.glob(str(target), recursive=True) if Path(found).is_file()]
    if not files:
        state = "is an empty folder" if target.is_dir() else "does not exist and matches no file"
        raise ValueError(f"text:{path} cannot be read: {path!r} {state}. {_FIX}")
    return sorted(files)


def read_text(path: Path) -> str:
    """The unchanged text of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: the file cannot be opened, contains a NUL byte or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}. {_FIX}") from error
    if b"\0" in content:
        position = content.index(b"\0")
        raise ValueError(f"{path} is a binary file: byte {position} is NUL. {_FIX} Or leave it out of the pattern.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}. "
            f"Convert it, e.g. `iconv -f latin1 -t utf-8 {path.name}`. {_FIX}"
        ) from error


def split_blocks(text: str, name: str, split: SplitName, seed: int = 0) -> tuple[Document, ...]:
    """The part of one text that belongs to `split`: blocks for validation, the runs between them for training."""
    blocks = cut_blocks(text, min(_BLOCK, max(1, len(text) // _BLOCKS)))
    if len(blocks) < 2:
        raise ValueError(f"{name} is too short to be split: {len(text)} characters. Give a longer file, or a folder.")
    period = min(_BLOCKS, len(blocks))
    held_out = stable_hash("block", seed, name) % period
    documents: list[Document] = []
    run: list[str] = []
    for index, block in enumerate([*blocks, ""]):
        last = index == len(blocks)
        if not last and index % period != held_out:
            run.append(block)
            continue
        if run and split == "train":
            documents.append(Document("".join(run), f"{name}#{index - len(run)}"))
        if not last and split == "validation":
            documents.append(Document(block, f"{name}#{index}"))
        run = []
    return tuple(documents)


def cut_blocks(text: str, size: int) -> list[str]:
    """The text in blocks, cut after the first line end at or beyond each multiple of `size`, or within a long line."""
    blocks = []
    start = 0
    while start < len(text):
        end = text.find("\n", start + size - 1, start + 2 * size) + 1 or start + size
        blocks.append(text[start:end])
        start = end
    return blocks


def drop_copies(documents: list[Document]) -> list[Document]:
    """The documents without later ones that have the same words."""
    first = {stable_hash(*document.text.split()): document for document in reversed(documents)}
    return [document for document in documents if first[stable_hash(*document.text.split())] is document]


def _common_folder(files: list[Path]) -> Path:
    folder = files[0].parent
    while not all(file.is_relative_to(folder) for file in files):
        folder = folder.parent
    return folder
