"""Short names: the parts of repeated blocks are one component, ``layers.*.mlp``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from .system import Component


class Units:
    """The units of a model, by the structure of its modules.

    Numbers of siblings with parts of their own, of one class and equal settings, become ``*``. Weights belong to the
    unit that is one name below the last ``*``, or to the module that holds them.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> units = Units(nn.Sequential(block(), block(), nn.Linear(2, 2)))
        >>> units.short("1.0"), units.unit("1.0.weight"), units.unit("2.weight")
        ('*.0', '*.0', '2')
    """

    def __init__(self, model: nn.Module) -> None:
        self._repeated: set[str] = set()
        for name, module in model.named_modules():
            kinds = {k: (type(m), m.extra_repr()) for k, m in module.named_children() if next(m.children(), None)}
            count = Counter(kinds.values())
            numbers = [k for k, kind in kinds.items() if k.isdigit() and count[kind] > 1]
            self._repeated |= {f"{name}.{k}" if name else k for k in numbers}

    def short(self, path: str) -> str:
        """The path with ``*`` for the numbers of repeated blocks."""
        parts = path.split(".")
        stars = ["*" if ".".join(parts[: i + 1]) in self._repeated else part for i, part in enumerate(parts)]
        return ".".join(part for part in stars if part != "_orig_mod")

    def unit(self, parameter: str) -> str:
        """The unit of a parameter."""
        parts = self.short(parameter.rpartition(".")[0]).split(".")
        last = max((i for i, part in enumerate(parts) if part == "*"), default=len(parts))
        return ".".join(parts[: last + 2]) or "parameters"

    def merge(self, components: Sequence[Component]) -> list[Component]:
        """Equal components of one unit as one."""
        found: dict[Component, Component] = {}
        for c in components:
            weights = c.kind in ("weights", "initial weights")
            name = self.unit(c.name) if weights else c.name if c.kind == "optimizer state" else self.short(c.name)
            key = replace(c, name=name or "model", parameters=0, bytes=0, members=())
            old = found.get(key, key)
            found[key] = replace(
                old,
                parameters=old.parameters + c.parameters,
                bytes=old.bytes + c.bytes,
                members=(*old.members, *c.members),
            )
        labels = Counter(c.label for c in found.values())
        return [replace(c, name=f"{c.name} ({_chosen(c.rule)})") if labels[c.label] > 1 else c for c in found.values()]


def _chosen(rule: str) -> str:
    """The rule that a parameter group chooses, ``matrix`` of ``M3 [matrix], lr 0.01``; else the whole rule."""
    found = re.search(r"\[(\w+)\]", rule)
    return found[1] if found else rule
