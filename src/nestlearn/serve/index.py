"""The index of all sessions of a server, an SQLite database (WAL).

A session is in the index or it does not exist: the index names the one file that holds it. So a new file is written
before the transaction that names it, and the old one is removed after it. The first file of a session is named without
its size before it is written.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    owner TEXT NOT NULL, name TEXT NOT NULL, file TEXT NOT NULL, learn INTEGER NOT NULL, created REAL NOT NULL,
    updated REAL NOT NULL, tokens INTEGER NOT NULL, documents INTEGER NOT NULL, size INTEGER NOT NULL,
    parent TEXT,
    PRIMARY KEY (owner, name)
);
"""


def connect(path: Path, schema: str) -> sqlite3.Connection:
    """A database with these tables, checked. Every statement is a transaction.

    Raises:
        sqlite3.DatabaseError: the file is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, check_same_thread=False, timeout=10, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        # A transaction that was answered must survive a loss of power too.
        database.execute("PRAGMA synchronous=FULL")
        database.executescript(schema)
        [(found,)] = database.execute("PRAGMA quick_check(1)").fetchall()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database


@dataclass(frozen=True)
class Entry:
    """One session of the index.

    Args:
        owner: the name of the key that it belongs to.
        name: of the session.
        file: its path below the folder of files.
        learn: whether conversations are learned from.
        created, updated: seconds since 1970.
        tokens: read.
        documents: read or practised.
        size: bytes of the file; 0 while the first one is written.
        parent: the name of the session that it is a fork of; None without one.
    """

    owner: str
    name: str
    file: str
    learn: bool
    created: float
    updated: float
    tokens: int
    documents: int
    size: int
    parent: str | None = None


class Index:
    """The database. One thread at a time uses an object of this class.

    Args:
        path: of the database; it is made if it does not exist.

    Raises:
        sqlite3.DatabaseError: the file is damaged.

    Example:
        >>> index = Index(Path("index.sqlite"))
        >>> index.put(Entry("local", "a", "local/a.1", False, 0.0, 0.0, 12, 1, 400))
        >>> [entry.tokens for entry in index.page("local", None, 10)], index.used("local")
        ([12], (1, 400))
        >>> index.close()
    """

    def __init__(self, path: Path) -> None:
        self._db = connect(path, SCHEMA)
        try:
            self._select("LIMIT 0")  # a database of another version may lack a column
        except sqlite3.DatabaseError:
            self.close()
            raise

    def close(self) -> None:
        self._db.close()

    # -- sessions -----------------------------------------------------------------------------------------------

    def put(self, entry: Entry) -> None:
        """Add a session, or replace the entry of its name."""
        names = [field.name for field in fields(Entry)]
        marks = ", ".join("?" * len(names))
        self._db.execute(f"INSERT OR REPLACE INTO sessions ({', '.join(names)}) VALUES ({marks})", astuple(entry))

    def get(self, owner: str, name: str) -> Entry | None:
        """The entry of a session; None if it does not exist."""
        return next(self._select("WHERE owner = ? AND name = ?", owner, name), None)

    def page(self, owner: str, after: str | None, limit: int) -> list[Entry]:
        """Sessions of an owner by name, behind the name ``after``."""
        return list(self._select("WHERE owner = ? AND name > ? ORDER BY name LIMIT ?", owner, after or "", limit))

    def all(self) -> list[Entry]:
        """Sessions of all owners."""
        return list(self._select("ORDER BY owner, name"))

    def remove(self, owner: str, name: str) -> None:
        """Remove an entry. Forks of its session become forks of its parent."""
        self._db.execute(
            "UPDATE sessions SET parent = (SELECT parent FROM sessions WHERE owner = ?1 AND name = ?2) "
            "WHERE owner = ?1 AND parent = ?2", (owner, name),
        )  # fmt: skip
        self._db.execute("DELETE FROM sessions WHERE owner = ? AND name = ?", (owner, name))

    def used(self, owner: str) -> tuple[int, int]:
        """The number of sessions of an owner, and the bytes of their files."""
        [row] = self._db.execute("SELECT count(*), coalesce(sum(size), 0) FROM sessions WHERE owner = ?", (owner,))
        return row

    def _select(self, where: str, *values: object) -> Iterator[Entry]:
        columns = ", ".join(field.name for field in fields(Entry))
        rows = self._db.execute(f"SELECT {columns} FROM sessions {where}", values).fetchall()
        return (replace(Entry(*row), learn=bool(row[3])) for row in rows)
