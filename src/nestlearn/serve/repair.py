"""What a server mends at its start, after a process that was killed or a disk that failed."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, unquote

from nestlearn.atomic import remove_leftovers

from .index import Entry, Index

SUFFIX = ".safetensors"


def file_name(owner: str, name: str, revision: str) -> str:
    """The path of a session's file below the folder of files. It tells owner and name, should the index be lost.

    Example:
        >>> file_name("local", "a/b@c", "01")
        'local/a%2Fb%40c.01.safetensors'
    """
    return f"{owner}/{quote(name, safe='')}.{revision}{SUFFIX}"


def parts_of(file: str) -> tuple[str, str]:
    """Owner and name of a session by the path of its file."""
    owner, _, rest = file.partition("/")
    return owner, unquote(rest.removesuffix(SUFFIX).rpartition(".")[0])


def open_index(path: Path, files: Path, describe: Callable[[Path], tuple[int, int]]) -> tuple[Index, list[str]]:
    """The index, consistent with the files; and what had to be done for it, in sentences.

    - A damaged index is set aside, and a new one is made from the files. Its keys are lost.
    - Files that a killed process was writing are removed, and so are whole files that the index does not name, where it
      names another one of the same session. Others go to the folder ``lost``.
    - An entry without its file is removed, and so is one without a size, with its file: it was being made. A file of
      another size than the entry says stays, and is reported.

    Args:
        path: of the index.
        files: the folder of all session files.
        describe: tokens and documents of a session file.
    """
    done: list[str] = []
    try:
        index = Index(path)
    except sqlite3.DatabaseError as error:
        aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
        for end in ("", "-wal", "-shm"):
            part = path.with_name(path.name + end)
            if part.exists():
                os.replace(part, aside.with_name(aside.name + end))
        index = Index(path)
        done.append(
            f"the index was damaged ({error}), and is kept as {aside.name}. Keys are lost: add them again by the same "
            "names."
        )
        done += _rebuild(index, files, describe)
    done += _match(index, files)
    return index, done


def _rebuild(index: Index, files: Path, describe: Callable[[Path], tuple[int, int]]) -> list[str]:
    done = []
    for path in sorted(files.glob(f"*/*{SUFFIX}"), key=lambda path: path.stat().st_mtime):
        file, about = path.relative_to(files).as_posix(), path.stat()
        owner, name = parts_of(file)
        try:
            tokens, documents = describe(path)
        except (ValueError, OSError) as error:
            done.append(f"{file} cannot be read and is in no index: {error}")
            continue
        index.put(Entry(owner, name, file, False, about.st_mtime, about.st_mtime, tokens, documents, about.st_size))
        done.append(f"session {name!r} of {owner!r} is again in the index, from {file}")
    return done


def _match(index: Index, files: Path) -> list[str]:
    done = []
    entries = {entry.file: entry for entry in index.all()}
    for folder in (files, *(path for path in files.glob("*") if path.is_dir())):
        remove_leftovers(folder)
    found = {path.relative_to(files).as_posix(): path for path in files.glob(f"*/*{SUFFIX}")}
    whole = {(entry.owner, entry.name) for file, entry in entries.items() if file in found}
    for file in sorted(found.keys() - entries.keys()):
        if parts_of(file) in whole:
            found[file].unlink()
            done.append(f"removed {file}, a writing that was not finished or is superseded")
        else:
            lost = files.parent / "lost" / file
            lost.parent.mkdir(parents=True, exist_ok=True)
            os.replace(found[file], lost)
            done.append(f"moved {file}, of no session in the index, to {lost}")
    for file, entry in entries.items():
        if entry.size == 0:
            index.remove(entry.owner, entry.name)
            if file in found:
                found[file].unlink()
            done.append(f"removed session {entry.name!r} of {entry.owner!r}, whose first writing was not finished")
        elif file not in found:
            index.remove(entry.owner, entry.name)
            done.append(f"removed session {entry.name!r} of {entry.owner!r} from the index: {file} does not exist")
        elif (size := found[file].stat().st_size) != entry.size:
            done.append(
                f"session {entry.name!r} of {entry.owner!r} is damaged: {file} has {size} bytes, not {entry.size}"
            )
    return done
