"""Files and folders that are complete or absent, whatever happens while they are written.

A writer fills a staging folder ``.NAME.part`` next to NAME, and renames the result. Meanwhile it holds a lock of the
operating system, which ends with its process. So the next writer or reader can tell what a killed process has left,
and removes it, from what another process is writing.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""Errors of a full disk: the operating system's, torch.save's and that of safetensors."""

_LOCK, _REPLACED = ".lock", ".replaced"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def atomic_write(path: Path, what: str, advice: str = "check free space and rights") -> Iterator[Path]:
    """A path where the block writes a file or a folder, which replaces ``path`` when the block ends well.

    Writers of the same path take turns. The result is flushed to the disk before it is renamed.

    Args:
        path: where the result belongs; the folder above is made. A folder that is there is replaced as a whole.
        what: the thing that is written, for errors.
        advice: how to go on, for errors.

    Raises:
        OSError: it cannot be written; what was at ``path`` is untouched.

    Example:
        >>> with atomic_write(Path("notes.txt"), "the notes") as temporary:
        ...     _ = temporary.write_text("complete")
        >>> Path("notes.txt").read_text()
        'complete'
    """
    try:
        with staging(path) as folder:
            yield folder / path.name
            publish(folder / path.name, path)
    except WRITE_ERRORS as error:
        raise OSError(f"could not write {what} to {path}: {error}. Nothing there was changed; {advice}.") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; see `atomic_write`."""
    with atomic_write(path, "a text") as temporary:
        temporary.write_text(text, encoding="utf-8")


def staging_folder(path: Path) -> Path:
    """The folder in which `staging` prepares the content of ``path``; on the same file system, for the rename."""
    return path.parent / f".{path.name}.part"


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """An empty folder for one writer of ``path``, removed when the block ends."""
    remove_leftovers(path.parent)
    folder = staging_folder(path)
    try:
        with locked(folder / _LOCK, wait=True):
            _finish(folder)
            try:
                yield folder
            finally:
                _finish(folder)
    finally:
        with suppress(OSError):
            folder.rmdir()


def publish(content: Path, path: Path) -> None:
    """Move finished content from a staging folder to its place."""
    for file in content.rglob("*") if content.is_dir() else [content]:
        if file.is_file():
            _flush(file, os.O_RDWR)
    if content.is_dir() and path.is_dir():
        # No rename replaces a folder that is not empty. If the process is killed between the two, `_finish` goes on.
        replaced = content.parent / _REPLACED
        os.replace(path, replaced)
        try:
            os.replace(content, path)
        except OSError:
            os.replace(replaced, path)
            raise
    else:
        os.replace(content, path)
    with suppress(OSError):  # not every system opens folders
        _flush(path.parent, os.O_RDONLY)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers have left in a folder; what a living process is writing stays.

    A folder that was finished, but not yet in its place, is put there.
    """
    for lock in list(folder.glob(f".*.part/{_LOCK}")):
        with suppress(OSError):  # another process is writing (BlockingIOError), or the folder is read-only
            with locked(lock, wait=False) as exclusive:
                if exclusive:
                    _finish(lock.parent)
            lock.parent.rmdir()


def _finish(folder: Path) -> None:
    """Empty a staging folder, except for its lock."""
    name = folder.name.removeprefix(".").removesuffix(".part")
    path, content, replaced = folder.parent / name, folder / name, folder / _REPLACED
    if replaced.exists() and not path.exists():
        os.replace(content if content.exists() else replaced, path)
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child, ignore_errors=True)
        elif child.name != _LOCK:
            child.unlink(missing_ok=True)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the operating system's lock on a file, which exists only meanwhile; False if the file system has no locks.

    The lock ends with the process, however that ends.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is False.
        OSError: the file cannot be made.
    """
    file, exclusive = _open_locked(path, wait)
    try:
        yield exclusive
    finally:
        with suppress(OSError):
            path.unlink()
        file.close()


def _open_locked(path: Path, wait: bool) -> tuple[IO[str], bool]:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except (FileNotFoundError, FileExistsError):  # the previous owner has just removed the folder
            if path.parent.exists() and not path.parent.is_dir():
                raise
            continue
        try:
            exclusive = _lock(file, wait)
        except BaseException:
            file.close()
            raise
        # The previous owner may have removed the file after it was opened here; then the lock is on nothing.
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file, exclusive
        file.close()


def _lock(file: IO[str], wait: bool) -> bool:
    """Lock an open file; False if the file system has no locks."""
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        else:
            import msvcrt

            file.seek(0)
            getattr(msvcrt, "locking")(file.fileno(), getattr(msvcrt, "LK_LOCK" if wait else "LK_NBLCK"), 1)  # noqa: B009
    except PermissionError as error:  # the name of BlockingIOError on Windows
        raise BlockingIOError(*error.args) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
