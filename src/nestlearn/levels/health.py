"""The level-health report: what was measured of each level, and which levels do nothing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from nestlearn.atomic import write_text
from nestlearn.evals.report.page import heading, paragraph, table

from .system import Component, NestedSystem, text_table

Fault = Literal["longer than the stream", "dead", "duplicate", "writes change nothing", "never matters"]

STILL = 1e-6
"""Relative size below which a change is none."""

SHARE = 1e-3
"""Share of a memory's answers below which its writes change nothing."""

SAME = 0.99
"""Cosine above which the changes of two levels are the same."""

COLUMNS = (
    "level", "component", "frequency", "updates", "gradient", "change", "rank", "share", "cosine", "loss, no writes",
    "loss, initial",
)  # fmt: skip


class Finding(NamedTuple):
    """A level that does nothing, or nothing of its own."""

    fault: Fault
    label: str
    text: str


@dataclass(frozen=True)
class Measured:
    """One component over the stream. None: not measured, or it has none.

    Args:
        component: as `nested_system` declares it.
        updates: inputs after which it had changed: tokens of a memory, batches of everything else.
        inputs: seen.
        gradient: norm of the gradient, the mean over batches.
        change: length of its way relative to its own norm; of a memory the change over a sequence.
        rank: effective rank of the change, the mean over its matrices.
        vector: the change.
        shapes: of its tensors.
        share: of a memory, the share of its answers that depends on its writes. Of a state of the optimizer, how far
            from their end the weights end with the state put back after each step, relative to their way.
        cosine: to the most similar neighbouring level, with its label.
        writes_off: what the mean loss rises by without its changes; each batch counts before it is learned.
        initial: what the loss at the end rises by with its weights back at the start.
    """

    component: Component
    updates: int | None
    inputs: int
    gradient: float | None
    change: float | None
    rank: float | None
    vector: Tensor | None = field(repr=False, compare=False)
    shapes: tuple[tuple[int, ...], ...] = ()
    share: float | None = None
    cosine: tuple[str, float] | None = None
    writes_off: float | None = None
    initial: float | None = None

    def cells(self) -> list[str]:
        """What the table shows."""
        c = self.component
        updates = "–" if self.updates is None else f"{self.updates} in {self.inputs}"
        cosine = "–" if self.cosine is None else f"{self.cosine[1]:.2f} {self.cosine[0]}"
        small = [_number(self.gradient), _number(self.change), _number(self.rank), _number(self.share)]
        losses = [_number(self.writes_off, "+"), _number(self.initial, "+")]
        return [str(c.level), c.label, str(c.frequency), updates, *small, cosine, *losses]

    def as_dict(self) -> dict[str, Any]:
        """All figures with the declared component, JSON-able; None for what is not finite."""
        names = ("updates", "inputs", "gradient", "change", "rank", "share", "writes_off", "initial")
        figures = {name: _finite(getattr(self, name)) for name in names}
        cosine = None if self.cosine is None else {"to": self.cosine[0], "value": self.cosine[1]}
        return {"component": self.component.as_dict(), **figures, "cosine": cosine}


@dataclass(frozen=True)
class LevelHealth:
    """What `measure` returns. ``str()`` is a table with the findings below it.

    Args:
        system: the system.
        measured: its components, the fastest first.
        findings: levels that do nothing, or nothing of their own.
        loss: the mean loss of the stream, each batch before it was learned.
        batches: of the stream.
        tokens: of the longest sequence.
        notes: what was not as asked for.
    """

    system: NestedSystem
    measured: tuple[Measured, ...]
    findings: tuple[Finding, ...]
    loss: float
    batches: int
    tokens: int
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Measured:
        """The figures of the component that ``system[name]`` gives."""
        label = self.system[name].label
        return next(m for m in self.measured if m.component.label == label)

    def __str__(self) -> str:
        title = f"{self.system.title}: {self.batches} batches, sequences of {self.tokens}, mean loss {self.loss:.4f}"
        lines = [title, text_table(COLUMNS, [m.cells() for m in self.measured], right=(4, 5, 6, 7, 9, 10))]
        lines += [f"Found: {f.label}: {f.text}" for f in self.findings] or [
            "Found: nothing. Every level does something."
        ]
        return "\n".join([*lines, *(f"Note: {note}" for note in (*self.notes, *self.system.notes))])

    def as_dict(self) -> dict[str, Any]:
        """The whole report, JSON-able."""
        findings = [finding._asdict() for finding in self.findings]
        figures = {"title": self.system.title, "loss": self.loss, "batches": self.batches, "tokens": self.tokens}
        rows = [measured.as_dict() for measured in self.measured]
        return figures | {"findings": findings, "measured": rows, "notes": [*self.notes, *self.system.notes]}

    def to_html(self) -> str:
        """The page of the system, with what was found marked red and the figures of each component."""
        from .draw import system_html

        details = {m.component.label: list(zip(COLUMNS[3:], m.cells()[3:], strict=True)) for m in self.measured}
        lead = (
            f"{self.batches} batches, sequences of {self.tokens}, mean loss {self.loss:.4f}. "
            + (f"{len(self.findings)} findings." if self.findings else "Every level does something.")
            + " Click a box for its figures; zoom with the buttons or with Ctrl and the wheel."
        )
        explained = "Share: of a memory's answers that depends on its writes; of a step that depends on a state. "
        explained += "Loss: what it rises by without the changes of a level, and with its weights back at the start."
        figures = [heading("Measured"), paragraph(explained), table(COLUMNS, [m.cells() for m in self.measured])]
        figures += [paragraph(note, "note") for note in self.notes]
        return system_html(self.system, [(f.label, f.text) for f in self.findings], details, figures, lead)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page (``.html``), the figures (``.json``) or the table (any other ending).

        Raises:
            OSError: the file cannot be written.
        """
        path = Path(path)
        texts = {".html": self.to_html, ".json": lambda: json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"}
        write_text(path, texts.get(path.suffix, lambda: f"{self}\n")())
        return path


def judge(health: LevelHealth) -> LevelHealth:
    """The report with cosines between neighbouring levels, and with findings."""
    rows = tuple(replace(m, cosine=_nearest(m, health.measured)) for m in health.measured)
    whole = replace(health, measured=rows)
    alone = [finding for m in rows if (finding := _fault(m, whole)) is not None]
    silent = {finding.label for finding in alone}
    return replace(whole, findings=(*alone, *_duplicates(rows, silent)))


def _fault(m: Measured, health: LevelHealth) -> Finding | None:
    """What one component does not do."""
    c, label = m.component, m.component.label
    period, clock = c.frequency
    fixed = period in (0, math.inf) and c.kind != "optimizer state"
    if m.updates is None or fixed:
        return None
    length = health.tokens if clock == "token" else health.batches
    still = m.updates == 0 or (m.change is not None and m.change < STILL)
    if still and period < math.inf and period >= length:
        unit = "tokens of the longest sequence" if clock == "token" else "batches of the stream"
        text = f"its period of {period:,.0f} is not shorter than the {length:,} {unit}, so nothing it writes is read."
        return Finding("longer than the stream", label, f"{text} Use a shorter period, or a longer stream.")
    learns = c.kind == "memory" and m.updates > 0
    if still and not learns:
        return Finding("dead", label, f"it moved by {m.change or 0:.1g} of its norm in {m.inputs} inputs: it is dead.")
    if learns and m.share is not None and m.share < SHARE:
        text = f"its writes change {m.share:.1g} of its answers: larger steps, or a weaker bound, would let it learn."
        return Finding("writes change nothing", label, text)
    seen = all(s.component.frequency.period < length for s in health.measured if s.component.kind == c.kind)
    if c.kind == "optimizer state" and seen and m.share is not None and m.share < STILL:
        text = f"put back after each of {length} steps, it leaves the weights where they were: it never matters."
        return Finding("never matters", label, text)
    return None


def _neighbours(m: Measured, rows: tuple[Measured, ...]) -> Iterator[tuple[Measured, float]]:
    """Components of the same kind and shapes on the same level or the next, with the cosine of the changes."""
    for other in rows:
        a, b = m.vector, other.vector
        if other is m or a is None or b is None or other.component.kind != m.component.kind:
            continue
        near = abs(other.component.level - m.component.level) <= 1
        if near and a.shape == b.shape and m.shapes == other.shapes and a.numel() > 1:
            norms = float(a.norm() * b.norm())
            if norms > 0:
                yield other, float((a @ b) / norms)


def _nearest(m: Measured, rows: tuple[Measured, ...]) -> tuple[str, float] | None:
    found = max(_neighbours(m, rows), key=lambda pair: pair[1], default=None)
    return None if found is None else (found[0].component.label, found[1])


def _duplicates(rows: tuple[Measured, ...], silent: set[str]) -> Iterator[Finding]:
    for i, m in enumerate(rows):
        for other, cosine in _neighbours(m, rows[i:]):
            if cosine > SAME and not {m.component.label, other.component.label} & silent:
                text = f"its changes and those of {other.component.label} have cosine {cosine:.4f}: they do the same."
                yield Finding("duplicate", m.component.label, text)


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.3g}"
