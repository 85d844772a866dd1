"""Text that comes with CPython: its documentation topics, docstrings and source.

Files are parsed, never imported, so no code runs and optional modules (Tk, curses, ...) are included. The text is that
of the running interpreter, so sizes and losses differ a little between Python versions.
"""

from __future__ import annotations

import ast
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from nestlearn.data.documents import Document, drop_near_duplicates

# Tests and bundled packages are not the standard library's own documentation; `topics` reads pydoc_data.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__", "_bundled"}
    | {"pydoc_data", "turtledemo", "__phello__"}
)
_SHORTEST = 200  # characters: shorter documents are headings without content

_Named = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    if not folder.is_dir():
        raise ValueError(
            f"The standard library of this Python is not a folder on disk ({folder}), so its documentation cannot be "
            "read. Use a regular CPython installation, or another corpus such as text:PATH."
        )
    return folder


def source_files(folder: Path) -> Iterator[Path]:
    """All Python files below `folder` except tests, bundled packages and data, in sorted order."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in _SKIPPED_FOLDERS and not path.name.startswith(("config-", ".")):
            yield from source_files(path)
        elif path.suffix == ".py":
            yield path


def parse(path: Path) -> ast.Module | None:
    """The syntax tree of a file, or None for a template or a file meant for another version of Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences in library files
        try:
            return ast.parse(path.read_bytes(), filename=str(path))
        except (SyntaxError, ValueError):
            return None


def topics(folder: Path) -> list[Document]:
    """The language reference as `help("topic")` shows it: one document per topic."""
    path = folder / "pydoc_data" / "topics.py"
    tree = parse(path) if path.is_file() else None
    if tree is None:
        return []
    tables = [node.value for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]
    entries = {name: text for table in tables for name, text in ast.literal_eval(table).items()}
    return [Document(text.strip() + "\n", f"topic/{name}") for name, text in sorted(entries.items())]


def docstrings(tree: ast.Module, module: str) -> str:
    """The docstrings of a module, its classes and functions, in source order, each below its signature."""
    sections = [module + "\n\n" + (ast.get_docstring(tree) or "")]
    sections += [f"{heading}\n\n{text}" for heading, text in _described(tree, "")]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _described(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    for node in parent.body:
        if isinstance(node, _Named):
            text = ast.get_docstring(node)
            if text:
                yield _heading(node, prefix), text
            if isinstance(node, ast.ClassDef):
                yield from _described(node, f"{prefix}{node.name}.")


def _heading(node: _Named, prefix: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {prefix}{node.name}" + (f"({bases})" if bases else "")
    return f"{prefix}{node.name}({ast.unparse(node.args)})"


def module_name(path: Path, folder: Path) -> str:
    """The module of a file: json.decoder for `json/decoder.py`, json for `json/__init__.py`."""
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@cache
def python_docs() -> tuple[Document, ...]:
    """The running Python's documentation, read once per process."""
    return read_docs(standard_library())


@cache
def python_source() -> tuple[Document, ...]:
    """The source of the running Python's standard library, read once per process."""
    return read_source(standard_library())


def read_docs(folder: Path) -> tuple[Document, ...]:
    """Documentation topics, then one document of docstrings per module; near-duplicates removed."""
    documents = topics(folder)
    for path in source_files(folder):
        tree = parse(path)
        if tree is not None:
            name = module_name(path, folder)
            documents.append(Document(docstrings(tree, name), f"module/{name}"))
    return _finished(documents, folder)


def read_source(folder: Path) -> tuple[Document, ...]:
    """Source text, one document per file; near-duplicates removed."""
    documents = []
    for path in source_files(folder):
        try:
            with tokenize.open(path) as file:  # honours the encoding a file declares
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # not Python source in the declared encoding
        documents.append(Document(text, f"source/{path.relative_to(folder).as_posix()}"))
    return _finished(documents, folder)


def _finished(documents: list[Document], folder: Path) -> tuple[Document, ...]:
    long_enough = [document for document in documents if len(document.text) >= _SHORTEST]
    if not long_enough:
        raise ValueError(
            f"No documentation found in {folder}: this Python carries no source files. "
            "Use a regular CPython installation, or another corpus such as text:PATH."
        )
    # A docstring may contain half of a surrogate pair, which UTF-8 cannot encode.
    writable = [document._replace(text=document.text.encode("utf-8", "replace").decode()) for document in long_enough]
    return tuple(drop_near_duplicates(writable))
