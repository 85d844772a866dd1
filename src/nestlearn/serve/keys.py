"""The keys of a server: who may ask, and whose sessions a request sees.

They are in a database of their own, so that it and the index survive each other.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from .index import connect

KEYS_FILE = "keys.sqlite"
SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    name TEXT NOT NULL, digest TEXT PRIMARY KEY, shown TEXT NOT NULL, created REAL NOT NULL, revoked REAL
);
"""


@dataclass(frozen=True)
class Key:
    """A key as the index shows it: its owner, its first letters, and when it began and ended."""

    name: str
    shown: str
    created: float
    revoked: float | None


class Keys:
    """The keys in a folder of sessions. One thread at a time uses an object of this class.

    Args:
        folder: of the sessions.

    Raises:
        ValueError: the database is damaged.

    Example:
        >>> keys = Keys(Path("sessions"))
        >>> secret = keys.add("alice")
        >>> keys.owner_of(secret), keys.owner_of("nl-guess"), [key.name for key in keys.all()]
        ('alice', None, ['alice'])
        >>> keys.close()
    """

    def __init__(self, folder: Path) -> None:
        path = folder / KEYS_FILE
        try:
            self._db = connect(path, SCHEMA)
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"the database of keys, {path}, is damaged ({error}). Restore it, or remove it and add keys by the "
                "same names: the sessions stay."
            ) from error

    def close(self) -> None:
        self._db.close()

    def add(self, name: str) -> str:
        """A new key; its owner is called ``name``. The database holds a digest of it only.

        Raises:
            ValueError: a name that is no word of letters, digits, ``-`` and ``_``, or one with a key in force.
        """
        if not 1 <= len(name) <= 32 or not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"the name {name!r} must be 1 to 32 letters, digits, - and _.")
        if any(key.name == name and key.revoked is None for key in self.all()):
            raise ValueError(f"{name!r} has a key already. Revoke it first; its sessions stay for the next one.")
        secret = f"nl-{secrets.token_urlsafe(32)}"
        self._db.execute("INSERT INTO keys VALUES (?, ?, ?, ?, NULL)", (name, digest(secret), secret[:7], time.time()))
        return secret

    def revoke(self, name: str) -> None:
        """End the key of an owner.

        Raises:
            ValueError: there is none in force.
        """
        changed = self._db.execute(
            "UPDATE keys SET revoked = ? WHERE name = ? AND revoked IS NULL", (time.time(), name)
        ).rowcount
        if not changed:
            raise ValueError(f"{name!r} has no key in force.")

    def all(self) -> list[Key]:
        """All keys, the oldest first."""
        rows = self._db.execute("SELECT name, shown, created, revoked FROM keys ORDER BY created")
        return [Key(*row) for row in rows]

    def owner_of(self, secret: str) -> str | None:
        """The owner of a key in force."""
        found = self._db.execute("SELECT name FROM keys WHERE digest = ? AND revoked IS NULL", (digest(secret),))
        row = found.fetchone()
        return None if row is None else row[0]

    @property
    def needed(self) -> bool:
        """Whether requests need a key: there is one, or there was. When the last has ended, nobody is let in."""
        return self._db.execute("SELECT 1 FROM keys LIMIT 1").fetchone() is not None


def digest(secret: str) -> str:
    """SHA-256 of a key. Keys are 256 random bits, so a slow hash would protect no better."""
    return hashlib.sha256(secret.encode()).hexdigest()
