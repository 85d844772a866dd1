"""The record of one evaluation: typed, versioned, saved as JSON beside what it was measured on."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """One measured number, with what is needed to judge and to repeat it.

    Attributes:
        task: what was measured, for example "bits_per_byte".
        version: raised whenever the task would give other numbers for the same model.
        metric: name and unit of `value`.
        value: the number.
        stderr: its standard error over documents, None where there is none.
        n: how many documents the number rests on.
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
        """Write the record as JSON, under a temporary name first."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".writing-{target.name}")
        content = {"schema": SCHEMA_VERSION, **dataclasses.asdict(self)}
        temporary.write_text(json.dumps(_without_nan(content), indent=1, allow_nan=False), encoding="utf-8")
        temporary.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> EvalResult:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is no result of this schema.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            schema = content.pop("schema")
            if schema != SCHEMA_VERSION:
                raise ValueError(f"schema {schema}, this version reads {SCHEMA_VERSION}")
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a saved evaluation result: {error}.") from error


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: a number that does not exist is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value
