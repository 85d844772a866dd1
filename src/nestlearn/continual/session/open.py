"""Sessions by the name of a model and of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nestlearn.continual.pretrained import pretrained
from nestlearn.models import HopeForCausalLM
from nestlearn.models.stacking import stacked_model

from .session import MemorySession


def open_session(
    name: str | Path, file: Path | None, *, dtype: Any = None, device: str | None = None, **options: Any
) -> MemorySession:
    """A session over a model: the one saved in ``file`` if it exists, otherwise a new one.

    Args:
        name, dtype, device: of the model; see `nestlearn.pretrained`.
        file: of the session; None for a new one.
        options: of a new `MemorySession`.

    Raises:
        ValueError: the model cannot be loaded or has no memory, or the file is of another model.
    """
    if file is not None and file.exists() and options:
        raise ValueError(f"{file} has settings of its own; leave out {', '.join(options)}, or begin a new session.")
    model, tokenizer = pretrained(name, dtype=dtype, device=device)
    if not isinstance(model, HopeForCausalLM):
        _require_levels(model, name)
    if file is not None and file.exists():
        return MemorySession.load(file, model, tokenizer)
    return MemorySession(model, tokenizer, **options)


def _require_levels(model: Any, name: str | Path) -> None:
    try:
        stacked_model(model)
    except ValueError as error:
        raise ValueError(
            f"{name} is a {type(model).__name__} without levels, so it cannot learn from what it reads. Put levels on "
            f"it first: nestlearn stack {name} --levels 64,512 --out FOLDER, and give FOLDER (in Python: stack_levels)."
        ) from error
