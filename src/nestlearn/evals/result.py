"""The record of one evaluation: typed, versioned, saved as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nestlearn.atomic import write_text

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """One measured number, with what a reader needs to judge and to repeat it.

    Attributes:
        task: the name of the task, for example "bits_per_byte".
        version: of the task; a new one may give other numbers for the same model.
        metric: name and unit of ``value``.
        value: the number.
        stderr: its standard error over documents; None if there is none.
        n: number of documents.
        seed: seed of every random choice.
        seconds: wall time of the evaluation.
        command: the command that repeats it.
        config: settings of the task and a description of the model.
        details: further numbers, such as a curve.
    """

    task: str
    version: int
    metric: str
    value: float
    stderr: float | None
    n: int
    seed: int
    seconds: float
    command: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the record as JSON; the file is complete or absent."""
        write_text(Path(path), self.to_json(indent=1))

    def to_json(self, indent: int | None = None) -> str:
        """The record as JSON text, on one line without ``indent``; NaN and infinity are null."""
        content = {"schema": SCHEMA_VERSION, **dataclasses.asdict(self)}
        return json.dumps(_without_nan(content), indent=indent, allow_nan=False)

    @classmethod
    def load(cls, path: str | Path) -> EvalResult:
        """The record that `save` wrote.

        Raises:
            ValueError: the file is no result of this schema.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a saved evaluation result: {error}.") from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, place: str = "this text") -> EvalResult:
        """The record that `to_json` wrote; an error names ``place`` as the origin of the text.

        Raises:
            ValueError: the text is no result of this schema.
        """
        try:
            content = json.loads(text)
            schema = content.pop("schema")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{place} is not a saved evaluation result: {error!r}.") from error
        if schema != SCHEMA_VERSION:
            raise ValueError(
                f"{place} is an evaluation result of schema {schema}, this version reads {SCHEMA_VERSION}. "
                "Read it with the version that wrote it, or evaluate again into another folder."
            )
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"{place} is not a saved evaluation result: {error}.") from error


def _without_nan(value: Any) -> Any:
    """The value with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value
