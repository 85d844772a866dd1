"""Saved folders that a process can load without importing this package first.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs a file of the folder that its configuration
names (``auto_map``). Ours holds imports from the installed package only, so that a model saved today is read by the
code of the package, not by a copy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nestlearn.atomic import write_text

MODULE = "nestlearn_model"
HOPE = {
    "AutoConfig": "HopeConfig",
    "AutoModel": "HopeModel",
    "AutoModelForCausalLM": "HopeForCausalLM",
    "AutoModelForSequenceClassification": "HopeForSequenceClassification",
    "AutoModelForTokenClassification": "HopeForTokenClassification",
}
"""Classes of Hope, by the auto class of the library that loads them."""


def auto_map(classes: Mapping[str, str] = HOPE) -> dict[str, str]:
    """The class in the file for each of the library's auto classes.

    Example:
        >>> auto_map()["AutoConfig"]
        'nestlearn_model.HopeConfig'
    """
    return {auto: f"{MODULE}.{name}" for auto, name in classes.items()}


def write_loader(
    folder: str | os.PathLike[str], code: str = f"from nestlearn import {', '.join(HOPE.values())}  # noqa: F401\n"
) -> None:
    """Write the file that `auto_map` names into a folder of a saved model.

    A model that was loaded without this package (`nestlearn publish`) is saved with the files that loaded it.

    Args:
        folder: of the model.
        code: that defines the classes.

    Raises:
        OSError: it cannot be written.
    """
    if not __name__.startswith("nestlearn."):  # a copy in the folder of a model: all its files go along
        for file in Path(__file__).parent.glob("nestlearn_*.py"):
            write_text(Path(folder) / file.name, file.read_text(encoding="utf-8"))
        return
    text = f'"""Loads this folder with the installed package (pip install nestlearn)."""\n\n{code}'
    write_text(Path(folder) / f"{MODULE}.py", text)


class NotCopied:
    """A class whose source the library must not copy into saved folders, also after it was loaded from one."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: saving writes a file that imports the class."""
