"""What a response says of a session, of its levels and of its edits."""

from __future__ import annotations

import math
from typing import Any

from nestlearn.continual.session import MemorySession
from nestlearn.continual.session.levels import LevelRow

from .index import Entry


def view(entry: Entry) -> dict[str, Any]:
    """An entry as JSON."""
    return {"id": entry.name, "object": "session", "created": int(entry.created), "updated": int(entry.updated),
            "parent": entry.parent, "learn": entry.learn, "tokens": entry.tokens, "documents_read": entry.documents,
            "file_bytes": entry.size}  # fmt: skip


def levels_of(rows: list[LevelRow]) -> list[dict[str, Any]]:
    """The rows of each level together; ``change`` is the mean over its networks, None where it has no measure."""
    grouped: dict[Any, list[LevelRow]] = {}
    for row in rows:
        grouped.setdefault(row.path if row.level is None else row.level, []).append(row)
    found = []
    for name, group in grouped.items():
        change = sum(row.change for row in group) / len(group)
        found.append({
            "level": name, "period": group[0].period, "rule": group[0].rule, "networks": len(group),
            "tokens": max(row.tokens for row in group), "change": change if math.isfinite(change) else None,
            "bytes": sum(row.bytes for row in group),
        })  # fmt: skip
    return found


def edits_of(session: MemorySession) -> list[dict[str, Any]]:
    """The edits in force, the oldest first."""
    names = ("prompt", "subject", "target")
    return [
        {"number": number, "method": edit.method, "alpha": edit.alpha,
         "facts": [dict(zip(names, fact, strict=True)) for fact in edit.facts]}
        for number, edit in enumerate(session.edits)
    ]  # fmt: skip
