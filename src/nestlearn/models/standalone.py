"""The code of a model as plain files, with which a folder is loaded where this package is not installed.

`transformers` copies the modules that a folder's configuration names, and those that they import from the same folder:
``from .name import ...``, without folders in between. So each module of this package that a model needs becomes one
file, ``nestlearn.memory.clock`` the file ``nestlearn_memory_clock.py``, and its imports name those files.
"""

from __future__ import annotations

import ast
import functools
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

from nestlearn.models.remote import MODULE

_PACKAGE = "nestlearn"
_NEEDED = {"torch", "transformers", "safetensors", "jaxtyping", "numpy"}
# Modules of the standard library that only some systems have.
_OF_A_SYSTEM = {"fcntl", "msvcrt"}


def hope_code() -> dict[str, str]:
    """Name and text of every file that `HopeForCausalLM` needs.

    Example:
        >>> code = hope_code()
        >>> "nestlearn_model.py" in code, "nestlearn_memory_reference.py" in code
        (True, True)
    """
    roots = {
        "nestlearn.nn": "MixerConfig as MixerConfig",  # makes the types of mixers known
        "nestlearn.models.config": "HopeConfig",
        "nestlearn.models.modeling": "HopeForCausalLM, HopeModel",
        "nestlearn.models.heads": "HopeForSequenceClassification, HopeForTokenClassification",
    }
    return _with_entry(roots)


def stacked_code(family: str, classes: Iterable[str]) -> dict[str, str]:
    """Name and text of every file that stacked models over a family of transformers need.

    Args:
        family: its ``model_type``, such as ``"llama"``.
        classes: names of the configuration and of the model in the file that is loaded first.
    """
    made = f"{', '.join(classes)} = stacked_classes({family!r})\n"
    return _with_entry({"nestlearn.models.stacking": "stacked_classes"}, made)


def _with_entry(roots: Mapping[str, str], made: str = "") -> dict[str, str]:
    modules = collect_modules(roots)
    imports = "".join(f"from .{_flat(name)} import {names}\n" for name, names in roots.items())
    # transformers copies the files that lines of the form `from .name import` name.
    listed = "".join(f"    from .{_flat(name)} import __name__\n" for name in sorted(modules))
    entry = (
        '"""Loads this model without the package nestlearn, from the files in this folder."""\n\n'
        f"from typing import TYPE_CHECKING\n\n{imports}\n{made}\n"
        f"if TYPE_CHECKING:  # every file that has to be copied\n{listed}"
    )
    return {f"{MODULE}.py": entry, **{f"{_flat(name)}.py": text for name, text in modules.items()}}


def collect_modules(roots: Iterable[str]) -> dict[str, str]:
    """The modules of this package that the ``roots`` import, directly or not, with their imports rewritten.

    Raises:
        ValueError: a root is no module of this package.
    """
    found: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        source = _source(name)
        if source is None:
            raise ValueError(f"{name} is no module of {_PACKAGE}.")
        found[name], needed = _rewrite(name, source)
        waiting += sorted(needed)
    return found


def _source(name: str) -> Path | None:
    """The file of a module, None if there is no such module."""
    package, *parts = name.split(".")
    if package != _PACKAGE or not parts:
        return None
    place = Path(__file__).parents[1].joinpath(*parts[:-1])
    candidates = (place / f"{parts[-1]}.py", place / parts[-1] / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _rewrite(name: str, source: Path) -> tuple[str, set[str]]:
    """The text of a module with its imports rewritten, and the modules of this package that it imports."""
    text = source.read_text(encoding="utf-8")
    package = name if source.name == "__init__.py" else name.rpartition(".")[0]
    tree, lines, needed = ast.parse(text), text.splitlines(), set()
    guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in sorted(nodes, key=lambda node: -node.lineno):
        new = _new_import(node, package, needed)
        if new is None and id(node) not in guarded and _is_optional(node):
            # The library refuses a file that imports what is not installed, unless a `try` stands around it.
            new = f"try:\n    {ast.unparse(node)}\nexcept ImportError:\n    raise"
        if new is not None:
            lines[node.lineno - 1 : node.end_lineno] = textwrap.indent(new, node.col_offset * " ").splitlines()
    return "\n".join(lines) + "\n", needed


def _new_import(node: ast.Import | ast.ImportFrom, package: str, needed: set[str]) -> str | None:
    """An import of this package as imports of the files; None for other imports."""
    if isinstance(node, ast.Import):
        ours = [alias.name for alias in node.names if alias.name.split(".")[0] == _PACKAGE]
        if ours:
            raise ValueError(f"`import {ours[0]}` cannot become an import of a file; write `from ... import`.")
        return None
    module = node.module or ""
    if node.level:
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        module = ".".join([*parents, *([module] if module else [])])
    if module.split(".")[0] != _PACKAGE:
        return None
    written = []
    for alias in node.names:
        inner = f"{module}.{alias.name}"
        if _source(inner) is not None and alias.name not in _names_of(module):
            needed.add(inner)
            written.append(f"from . import {_flat(inner)} as {alias.asname or alias.name}")
        else:
            needed.add(module)
            named = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
            written.append(f"from .{_flat(module)} import {named}")
    return "\n".join(written)


@functools.cache
def _names_of(module: str) -> frozenset[str]:
    """Names that the imports of a module bind: `nestlearn.memory.catalog` is a mapping there, not the module."""
    source = _source(module)
    tree = ast.parse(source.read_text(encoding="utf-8") if source else "")
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    return frozenset(alias.asname or alias.name for node in nodes for alias in node.names)


def _is_optional(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether an import may fail on a machine that can run the model."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    tops = {name.split(".")[0] for name in names}
    return bool(tops & _OF_A_SYSTEM or tops - _NEEDED - sys.stdlib_module_names)
