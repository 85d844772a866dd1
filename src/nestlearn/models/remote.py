"""Saved folders that a process can load without importing this package first.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs a file of the folder that its configuration
names (``auto_map``). Ours holds imports from the installed package only, so that a model saved today is read by the
code of the package, not by a copy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nestlearn.models.files import whole_file

MODULE = "nestlearn_model"
_SOURCE = '''"""Loads this folder with the installed package (pip install nestlearn)."""

from nestlearn import HopeConfig, HopeForCausalLM, HopeModel  # noqa: F401
'''


def auto_map() -> dict[str, str]:
    """Which class of the file each of the library's auto classes takes.

    Example:
        >>> auto_map()["AutoConfig"]
        'nestlearn_model.HopeConfig'
    """
    classes = {"AutoConfig": "HopeConfig", "AutoModel": "HopeModel", "AutoModelForCausalLM": "HopeForCausalLM"}
    return {auto: f"{MODULE}.{name}" for auto, name in classes.items()}


def write_loader(folder: str | os.PathLike[str]) -> None:
    """Write the file that `auto_map` names into a folder of a saved model.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(Path(folder) / f"{MODULE}.py", "the file that loads the model") as temporary:
        temporary.write_text(_SOURCE, encoding="utf-8")


class NotCopied:
    """A class whose source the library must not copy into saved folders, also after it was loaded from one."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: saving writes a file that imports the class."""
