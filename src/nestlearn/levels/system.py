"""What `nested_system` returns: the components of a model and its optimizer, ordered in levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

from torch import nn
from torch.optim import Optimizer

Clock = Literal["tick", "token", "batch"]
Kind = Literal["attention", "cache", "memory", "weights", "initial weights", "optimizer state", "statistics"]

COLUMNS = (
    "level", "component", "frequency", "context flow", "objective", "rule", "knowledge transfer", "parameters", "bytes",
)  # fmt: skip


class Frequency(NamedTuple):
    """Updates per unit of time: one per ``period`` of a clock.

    Args:
        period: tokens or batches between two updates. 0 is the infinite frequency of attention, whose answer is
            computed anew from the whole context for every token. ``math.inf`` is frequency 0: it never changes.
        clock: ``"tick"`` for what changes while a model thinks about one input, ``"token"`` for what changes while it
            reads, ``"batch"`` for what an optimizer changes: one forward and backward pass.

    Example:
        >>> str(Frequency(64, "token")), str(Frequency(0)), str(Frequency(math.inf))
        ('1 / 64 tokens', '∞', '0')
        >>> Frequency(8, "batch").updates(batches=20)
        2
    """

    period: float
    clock: Clock = "token"

    def __str__(self) -> str:
        if self.period in (0, math.inf):
            return "∞" if self.period == 0 else "0"
        if self.period == 1:
            return f"1 / {self.clock}"
        count = f"{self.period:,.4g}" if self.period % 1 else f"{self.period:,.0f}"
        return f"1 / {count} {'batches' if self.clock == 'batch' else f'{self.clock}s'}"

    @property
    def order(self) -> tuple[int, float]:
        """Smaller is faster. An input has at least one tick and a batch one token, so what counts ticks is fastest."""
        if self.period in (0, math.inf):
            return (-1, 0.0) if self.period == 0 else (3, 0.0)
        return get_args(Clock).index(self.clock), self.period

    def updates(self, *, tokens: int = 0, batches: int = 0, ticks: int = 0) -> int | None:
        """Updates that fit into a stream; None for an infinite frequency."""
        if self.period == 0:
            return None
        count = {"tick": ticks, "token": tokens, "batch": batches}[self.clock]
        return int(count // self.period) if self.period < math.inf else 0


@dataclass(frozen=True)
class Component:
    """One problem of the system, or several equal ones.

    Args:
        name: where it is; ``*`` stands for the numbers of repeated blocks.
        kind: what it is.
        frequency: how often it changes.
        context: what it learns from (its context flow).
        objective: what its updates minimize.
        rule: how it changes.
        transfer: how knowledge passes between it and other levels.
        parameters: numbers that the model stores for it.
        bytes: of these numbers, or of the state.
        members: full names of its tensors or modules.
        depth: of two components with one frequency the deeper one is faster, because the other needs its newest state.
        level: 1 is the fastest.
    """

    name: str
    kind: Kind
    frequency: Frequency
    context: str
    objective: str
    rule: str
    transfer: tuple[str, ...]
    parameters: int = 0
    bytes: int = 0
    members: tuple[str, ...] = ()
    depth: int = 0
    level: int = 0

    @property
    def label(self) -> str:
        """Name and kind, unique in a system."""
        return f"{self.name} · {self.kind}" if self.kind not in ("weights", "optimizer state") else self.name

    def cells(self) -> list[str]:
        """What the table shows."""
        numbers = [f"{value:,}" if value else "–" for value in (self.parameters, self.bytes)]
        transfer = ", ".join(self.transfer) or "–"
        first = [str(self.level), self.label, str(self.frequency)]
        return [*first, self.context, self.objective, self.rule, transfer, *numbers]

    def as_dict(self) -> dict[str, Any]:
        """All fields, JSON-able; a frequency as updates per tokens or batches, None for infinite."""
        period, clock = self.frequency
        rate = None if period == 0 else 1 / period
        names = ("level", "name", "kind", "context", "objective", "rule", "parameters", "bytes")
        fields = {name: getattr(self, name) for name in names}
        lists = {"transfer": list(self.transfer), "members": list(self.members)}
        return fields | {"frequency": {"per": clock, "updates": rate}} | lists


@dataclass(frozen=True)
class NestedSystem:
    """A model and its optimizer as nested problems.

    ``str()`` is a table. A notebook shows the page of `to_html`.

    Args:
        title: of tables and pages.
        components: the fastest first.
        notes: what was not seen, and what is unusual.
        model: the model, for `nestlearn.levels.measure` (None: a system of `nestlearn.levels.algebra`).
        optimizers: its optimizers.
        accumulation: batches whose gradients are summed before a step.
    """

    title: str
    components: tuple[Component, ...]
    notes: tuple[str, ...] = ()
    model: nn.Module | None = field(default=None, repr=False, compare=False)
    optimizers: tuple[Optimizer, ...] = field(default=(), repr=False, compare=False)
    accumulation: int = 1

    def __getitem__(self, name: str) -> Component:
        """The component with this label or name, or whose name ends so.

        Raises:
            KeyError: no component, or several, have it.
        """
        for matches in (
            [c for c in self.components if c.label == name],
            [c for c in self.components if c.name == name],
            [c for c in self.components if c.label.endswith(name)],
            [c for c in self.components if c.name.endswith(name)],
        ):
            if len(matches) == 1:
                return matches[0]
        raise KeyError(f"{name!r} is not the name of one component; there are {[c.label for c in self.components]}")

    @property
    def levels(self) -> list[tuple[Component, ...]]:
        """The components of each level, the fastest first."""
        numbers = dict.fromkeys(component.level for component in self.components)
        return [tuple(c for c in self.components if c.level == number) for number in numbers]

    def __str__(self) -> str:
        table = text_table(COLUMNS, [component.cells() for component in self.components], right=(7, 8))
        return "\n".join([self.title, table, *(f"Note: {note}" for note in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """The whole system, JSON-able."""
        components = [component.as_dict() for component in self.components]
        return {"title": self.title, "components": components, "notes": list(self.notes)}

    def to_latex(self) -> str:
        r"""The table for a paper, with ``\usepackage{booktabs}``; without knowledge transfer and bytes."""
        names = ("level", "component", "frequency", "context flow", "rule", "parameters")
        columns = [COLUMNS.index(name) for name in names]
        rows = [COLUMNS, *(component.cells() for component in self.components)]
        head, *body = [" & ".join(_latex(row[i]) for i in columns) + r" \\" for row in rows]
        opening = [r"\begin{tabular}{rllllr}", r"\toprule", head, r"\midrule"]
        return "\n".join([*opening, *body, r"\bottomrule", r"\end{tabular}"])

    def to_svg(self) -> str:
        """A picture: levels from the fastest to the slowest, and the components of each."""
        from .draw import system_svg

        return system_svg(self)

    def to_html(self) -> str:
        """One self-contained page: the picture, which can be zoomed and answers clicks, and the table."""
        from .draw import system_html

        return system_html(self)

    def _repr_html_(self) -> str:
        return self.to_svg()


def numbered(components: Sequence[Component]) -> tuple[Component, ...]:
    """Components in the order of their levels, with numbers."""

    def place(component: Component) -> tuple[tuple[int, float], int]:
        return component.frequency.order, -component.depth

    places = sorted({place(component) for component in components})
    found = [replace(component, level=places.index(place(component)) + 1) for component in components]
    return tuple(sorted(found, key=lambda component: component.level))


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns; those named in ``right`` to the right.

    Example:
        >>> print(text_table(["name", "count"], [["a", "1"], ["bc", "20"]], right=[1]))
        name  count
        ----  -----
        a         1
        bc       20
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


_SIGNS = {
    "_": r"\_", "%": r"\%", "&": r"\&", "{": r"\{", "}": r"\}", "∞": r"$\infty$", "·": r"$\cdot$", "←": r"$\leftarrow$",
    "–": "--", "−": "$-$", "½": r"$\frac12$", "θ": r"$\theta$", "₀": "$_0$", "²": "$^2$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_SIGNS.get(sign, sign) for sign in text)
