"""Sessions on disk and in memory: an index, one file for each session, and the sessions that were used last.

All of it happens on one thread of its own, one call after the other. So a session that is opened after a commit is the
one that was committed, even if the request that began the commit was given up.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import sqlite3
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

from nestlearn.atomic import locked
from nestlearn.continual.session import MemorySession

from .errors import ApiError, bad_request, disk_error
from .index import Entry
from .limits import Limits
from .repair import file_name, open_index

P = ParamSpec("P")
T = TypeVar("T")
NAME = r"^(?!\.{1,2}$)(?! )([ -.0-~]{1,64}|[ -.0-~\u00a1-\u1fff\u2070-\ud7ff\uff00-\uffef]{1,24})(?<! )$"
"""Names of sessions: printable, and short enough for the name of a file. Characters that nobody sees are left out."""
_NAME = re.compile(NAME.replace("$", r"\Z"))  # a name has no line behind it
Id = tuple[str, str]
"""Owner and name of a session."""


class Store:
    """The sessions of a server.

    Args:
        folder: of the index and the files; one server at a time uses it.
        base: a session over the model of the server that has read nothing.
        limits: of memory, sessions and quotas.

    Attributes:
        repaired: what was mended at the start, in sentences.

    Raises:
        ValueError: another server uses the folder.
    """

    def __init__(self, folder: Path, base: MemorySession, limits: Limits) -> None:
        self.folder, self.base, self.limits = folder, base, limits
        self._files = folder / "files"
        self._files.mkdir(parents=True, exist_ok=True)
        self._open = ExitStack()
        try:
            self._open.enter_context(locked(folder / "server.lock", wait=False))
        except BlockingIOError as error:
            raise ValueError(f"another server uses {folder}. Stop it, or choose another --sessions.") from error
        self._index, self.repaired = open_index(folder / "index.sqlite", self._files, self._describe)
        self._resident: OrderedDict[Id, tuple[str, MemorySession, int]] = OrderedDict()
        self._writing: dict[Id, asyncio.Event] = {}
        self._thread = ThreadPoolExecutor(1, "nestlearn-store")

    def close(self) -> None:
        """Finish what was begun, and let another server use the folder."""
        self._thread.shutdown()
        self._index.close()
        self._open.close()

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a method of this object on its thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: function(*args, **kwargs))

    @asynccontextmanager
    async def writing(self, owner: str, name: str, *, wait: bool = False) -> AsyncIterator[None]:
        """The right to change a session, which one request at a time has.

        Raises:
            ApiError: another request has it, and this one does not ``wait`` (409).
        """
        key = (owner, check_name(name))
        while (other := self._writing.get(key)) is not None:
            if not wait:
                raise ApiError(
                    409, f"another request is changing session {name!r}. Try again when it has ended.", "session_busy",
                    retry_after=1,
                )  # fmt: skip
            await other.wait()
        self._writing[key] = asyncio.Event()
        try:
            yield
        finally:
            self._writing.pop(key).set()

    # -- on the thread of the store -----------------------------------------------------------------------------

    @property
    def resident_bytes(self) -> int:
        """Bytes of the sessions in memory."""
        return sum(size for _, _, size in list(self._resident.values()))

    def entry(self, owner: str, name: str) -> Entry:
        """The entry of a session.

        Raises:
            ApiError: there is none (404).
        """
        found = self._index.get(owner, check_name(name))
        if found is None:
            raise ApiError(404, f"there is no session {name!r}. Make it by POST /v1/sessions.", "session_not_found")
        return found

    def page(self, owner: str, after: str | None, limit: int) -> list[Entry]:
        """See `Index.page`."""
        return self._index.page(owner, after, limit)

    def open(self, owner: str, name: str) -> tuple[Entry, MemorySession]:
        """A session and its entry. The session must not be changed; a fork of it may.

        Raises:
            ApiError: there is none (404), or its file is damaged (500).
        """
        entry, key = self.entry(owner, name), (owner, name)
        if key not in self._resident or self._resident[key][0] != entry.file:
            try:
                session = MemorySession.load(self._files / entry.file, self.base.model, self.base.tokenizer)
            except (ValueError, OSError) as error:
                raise ApiError(
                    500, f"session {name!r} cannot be opened: its file on the server is damaged, or of another model. "
                    "Restore it (PUT .../file), or delete the session.", "session_damaged",
                ) from error  # fmt: skip
            self._keep(key, entry.file, session)
        self._resident.move_to_end(key)
        return entry, self._resident[key][1]

    def commit(
        self, owner: str, name: str, session: MemorySession, *, learn: bool | None = None, parent: str | None = None
    ) -> Entry:
        """Write what a session has learned to a new file, then name the file in the index, then remove the old one.

        A new session is named before its file is written.

        Raises:
            ApiError: a quota is reached (429), or the disk is full (507). Nothing has changed.
        """
        before, now = self._index.get(owner, check_name(name)), time.time()
        file = file_name(owner, name, secrets.token_hex(4))
        path = self._files / file
        known = before or Entry(owner, name, file, False, now, now, 0, 0, 0, parent)
        try:
            if before is None:  # named first, without a size: if the process dies, the next start removes it
                self._index.put(known)
            session.save(path)
            size = path.stat().st_size
            self._check_quota(owner, before, size)
            entry = replace(
                known, file=file, updated=now, tokens=session.tokens, documents=len(session.log), size=size,
                learn=known.learn if learn is None else learn,
            )  # fmt: skip
            self._index.put(entry)
        except Exception as error:
            path.unlink(missing_ok=True)
            if before is None:
                with suppress(sqlite3.Error):
                    self._index.remove(owner, name)
            if isinstance(error, OSError | sqlite3.Error):
                raise disk_error(error) from error
            raise
        if before is not None:
            with suppress(OSError):  # the next start removes it
                (self._files / before.file).unlink()
        self._keep((owner, name), file, session)
        return entry

    def set_learn(self, owner: str, name: str, learn: bool) -> Entry:
        """Say whether a session learns from conversations."""
        entry = replace(self.entry(owner, name), learn=learn, updated=time.time())
        try:
            self._index.put(entry)
        except sqlite3.Error as error:
            raise disk_error(error) from error
        return entry

    def load(self, path: Path) -> MemorySession:
        """The session of an uploaded file.

        Raises:
            ValueError: it is no session of this model.
        """
        try:
            session = MemorySession.load(path, self.base.model, self.base.tokenizer)
        except (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(str(error).replace(str(path), "the file").splitlines()[0]) from error
        session.compare = self.base.compare
        return session

    def read_file(self, owner: str, name: str) -> tuple[Entry, BinaryIO]:
        """The entry and the open file of a session; it can be read even if the session is written meanwhile."""
        entry = self.entry(owner, name)
        try:
            return entry, (self._files / entry.file).open("rb")
        except OSError as error:
            raise ApiError(500, f"the file of session {name!r} is lost.", "session_damaged") from error

    def delete(self, owner: str, name: str) -> None:
        """Remove a session: its file first, so that nothing of it is left if the process dies in between.

        Raises:
            ApiError: there is none (404), or its file cannot be removed (507); it stays as it was.
        """
        entry = self.entry(owner, name)
        try:
            (self._files / entry.file).unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error) from error
        self._resident.pop((owner, name), None)
        self._index.remove(owner, name)

    def _check_quota(self, owner: str, before: Entry | None, size: int) -> None:
        count, used = self._index.used(owner)
        quota = self.limits.quota
        used += size - (0 if before is None else before.size)
        if quota is not None and used > quota:
            raise ApiError(
                429, f"all sessions together would take {used:,} bytes; the quota is {quota:,}. Delete some, or let "
                "this one forget.", "insufficient_quota",
            )  # fmt: skip
        if before is None and count > self.limits.sessions:
            raise ApiError(429, f"there are {count - 1} sessions, the limit. Delete some.", "insufficient_quota")

    def _keep(self, key: Id, file: str, session: MemorySession) -> None:
        """Hold a session in memory, and drop those that were used longest ago. Every one of them is in its file."""
        self._resident[key] = file, session, session.nbytes
        self._resident.move_to_end(key)
        while len(self._resident) > 1 and self.resident_bytes > self.limits.memory:
            self._resident.popitem(last=False)

    def _describe(self, path: Path) -> tuple[int, int]:
        session = MemorySession.load(path, self.base.model, self.base.tokenizer)
        return session.tokens, len(session.log)


def check_name(name: str, param: str = "id") -> str:
    """The name of a session, if it can be one.

    Raises:
        ApiError: it does not match `NAME` (400).

    Example:
        >>> check_name("alice@example.com")
        'alice@example.com'
    """
    if not _NAME.match(name):
        raise bad_request(
            "the name of a session has 1 to 64 printable characters of ASCII, or up to 24 if there are others, no "
            f"slash, and no blank at its ends; received {name[:80]!a}.", param,
        )  # fmt: skip
    return name
