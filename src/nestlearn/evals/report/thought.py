"""A page about a machine that thinks in ticks: attention on a maze, activity of neurons, accuracy by tick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from nestlearn.evals.report import page
from nestlearn.evals.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, Line, Panel, chart
from nestlearn.evals.tasks.maze import GOAL, MOVES, START, STAY, WALL

_COLORS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
_CELL = 10
_FRAMES = 8
_SECONDS_PER_TICK = 0.45


@dataclass(frozen=True)
class MazeThought:
    """What a machine thought about one maze.

    Attributes:
        cells: row by row, as `nestlearn.evals.tasks.Maze` has them.
        moves: the right ones.
        said: the moves that every tick answers.
        certainty: of every tick.
        attention: weights over the cells at every tick.
        activity: activations of the neurons at every tick.
    """

    cells: Sequence[int]
    moves: Sequence[int]
    said: Sequence[Sequence[int]]
    certainty: Sequence[float]
    attention: Sequence[Sequence[float]]
    activity: Sequence[Sequence[float]]

    @property
    def side(self) -> int:
        """Cells to a side."""
        return round(len(self.cells) ** 0.5)


@dataclass(frozen=True)
class TickCurve:
    """Right answers at every tick, in [0, 1]; one value where a model answers once. ``band`` is a standard error."""

    label: str
    right: Sequence[float]
    band: Sequence[float] | None = None


def write_thought_report(
    path: Path,
    title: str,
    lead: str,
    curves: Mapping[str, Sequence[TickCurve]],
    mazes: Sequence[MazeThought],
    *,
    tiles: Sequence[tuple[str, str]] = (),
    commands: Sequence[str] = (),
) -> Path:
    """Write the page, under a temporary name first, and return its path.

    Args:
        path: the file.
        title, lead: heading and first paragraph (HTML).
        curves: accuracy by tick, a panel per task.
        mazes: what to draw of single mazes.
        tiles: the most important numbers, as (value, label).
        commands: shell commands that repeat the page.
    """
    sections = [page.heading("Accuracy by tick"), _accuracy(curves)]
    if mazes:
        sections.append(page.heading("Attention moves over the maze"))
        sections += [_maze_figure(number, thought) for number, thought in enumerate(mazes, 1)]
        sections += [page.heading("Activity of neurons"), _activity_figure(mazes[0])]
    return page.write_page(path, title, lead, sections, tiles=tiles, commands=commands)


def _accuracy(curves: Mapping[str, Sequence[TickCurve]]) -> str:
    labels = list(dict.fromkeys(curve.label for panel in curves.values() for curve in panel))
    panels = []
    for name, found in curves.items():
        longest = max(len(curve.right) for curve in found)
        lines = []
        for curve in found:
            once = len(curve.right) == 1
            y = [100 * value for value in (list(curve.right) * longest if once else curve.right)]
            band = None if curve.band is None or once else [100 * value for value in curve.band]
            color = _COLORS[labels.index(curve.label) % len(_COLORS)]
            lines.append(Line(curve.label, range(1, len(y) + 1), y, color, style="--" if once else "-", band=band))
        panels.append(Panel(lines, f"tick, {name}", "right answers, %", y_range=(-3, 103)))
    caption = "Share of right answers of the test at every tick. Dashed: a model that reads once and answers once."
    return page.figure(chart(panels, width=9.0 if len(panels) > 1 else 6.0, height=3.4), caption)


# -- mazes ------------------------------------------------------------------------------------------------------------


def _maze_figure(number: int, thought: MazeThought) -> str:
    """A moving picture of all ticks, and some ticks side by side."""
    ticks = len(thought.attention)
    shown = sorted({round(i * (ticks - 1) / (_FRAMES - 1)) for i in range(_FRAMES)})
    frames = "".join(_frame(thought, tick) for tick in shown)
    sure = max(range(ticks), key=lambda tick: thought.certainty[tick])
    right = sum(a == b for a, b in zip(thought.said[sure], thought.moves, strict=True))
    caption = (
        f"Maze {number}. Left: all {ticks} ticks in turn. Orange is attention, the mean of all heads, as far as it is "
        "above that of an even look; the line is the path that the answers of the tick describe, from start (green) to "
        f"goal (purple). At its most certain tick ({sure + 1}) {right} of {len(thought.moves)} moves are right."
    )
    style = "display:flex;gap:1rem;align-items:flex-start;flex-wrap:wrap"
    strip = "display:grid;grid-template-columns:repeat(auto-fill,minmax(8rem,1fr));gap:.5rem;flex:1;min-width:15rem"
    moving = f'<div style="width:15rem;flex:none">{_svg(thought, _moving(thought))}</div>'
    return page.figure(f'<div style="{style}">{moving}<div style="{strip}">{frames}</div></div>', escape(caption))


def _frame(thought: MazeThought, tick: int) -> str:
    label = f"tick {tick + 1}, certainty {thought.certainty[tick]:.2f}"
    drawn = _svg(thought, _attention(thought, tick) + _path(thought, thought.said[tick]), label)
    return f'<div>{drawn}<div class="note" style="font-size:.75rem;text-align:center">{label}</div></div>'


def _svg(thought: MazeThought, inside: str, label: str = "attention at every tick") -> str:
    size = thought.side * _CELL
    walls = "".join(
        f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}"/>'
        for place, cell in enumerate(thought.cells)
        if cell == WALL
        for x, y in [_corner(thought, place)]
    )
    ends = "".join(
        f'<circle cx="{x + _CELL / 2}" cy="{y + _CELL / 2}" r="{0.3 * _CELL}" fill="{color}"/>'
        for kind, color in ((START, GREEN), (GOAL, PURPLE))
        for x, y in [_corner(thought, thought.cells.index(kind))]
    )
    return (
        f'<svg viewBox="0 0 {size} {size}" role="img" aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg">'
        f'<g fill="currentColor" fill-opacity=".55" shape-rendering="crispEdges">{walls}</g>{inside}{ends}</svg>'
    )


def _corner(thought: MazeThought, place: int) -> tuple[int, int]:
    row, column = divmod(place, thought.side)
    return column * _CELL, row * _CELL


def _shares(weights: Sequence[float]) -> list[float]:
    """Weights above the even one, relative to the largest: 0 to 1."""
    even = 1 / len(weights)
    above = max(max(weights) - even, 1e-9)
    return [max(0.0, weight - even) / above for weight in weights]


def _attention(thought: MazeThought, tick: int) -> str:
    return "".join(_spot(thought, place, f"{x:.2f}") for place, x in enumerate(_shares(thought.attention[tick])))


def _spot(thought: MazeThought, place: int, opacity: str, inside: str = "") -> str:
    if not inside and float(opacity) < 0.02:
        return ""
    x, y = _corner(thought, place)
    size = f'width="{_CELL}" height="{_CELL}" shape-rendering="crispEdges"'
    return f'<rect x="{x}" y="{y}" {size} fill="{ORANGE}" fill-opacity="{opacity}">{inside}</rect>'


def _path(thought: MazeThought, moves: Sequence[int], inside: str = "", visible: bool = True) -> str:
    """The line through the rooms that these moves reach."""
    row, column = divmod(thought.cells.index(START), thought.side)
    points = [(row, column)]
    for move in moves:
        if move == STAY:
            break
        row, column = row + 2 * MOVES[move][0], column + 2 * MOVES[move][1]
        points.append((row, column))
    places = " ".join(f"{(c + 0.5) * _CELL:g},{(r + 0.5) * _CELL:g}" for r, c in points)
    return (
        f'<polyline points="{places}" fill="none" stroke="{BLUE}" stroke-width="{0.25 * _CELL}" '
        f'stroke-linejoin="round" stroke-opacity="{int(visible)}">{inside}</polyline>'
    )


def _moving(thought: MazeThought) -> str:
    """Attention and path of every tick in turn, without a script."""
    ticks = len(thought.attention)

    def turn(name: str, values: Sequence[str]) -> str:
        return (
            f'<animate attributeName="{name}" calcMode="discrete" dur="{_SECONDS_PER_TICK * ticks:g}s" '
            f'repeatCount="indefinite" values="{";".join(values)}"/>'
        )

    spots = []
    for place, shares in enumerate(zip(*map(_shares, thought.attention), strict=True)):
        if max(shares) >= 0.02:
            values = [f"{share:.2f}" for share in shares]
            spots.append(_spot(thought, place, values[0], turn("fill-opacity", values)))
    paths = [
        _path(thought, moves, turn("stroke-opacity", [str(int(tick == now)) for now in range(ticks)]), tick == 0)
        for tick, moves in enumerate(thought.said)
    ]
    return "".join(spots + paths)


# -- neurons ----------------------------------------------------------------------------------------------------------


def _activity_figure(thought: MazeThought) -> str:
    """Activations by neuron and tick as colours, and of some neurons as lines."""
    ticks, neurons = len(thought.activity), len(thought.activity[0])
    spread = [max(z) - min(z) for z in zip(*thought.activity, strict=True)]
    order = sorted(range(neurons), key=lambda n: -spread[n])
    largest = max(abs(z) for tick in thought.activity for z in tick) or 1.0
    width, height = 12, 6
    squares = "".join(
        f'<rect x="{tick * width}" y="{place * height}" width="{width}" height="{height}" '
        f'fill="{BLUE if thought.activity[tick][n] > 0 else ORANGE}" '
        f'fill-opacity="{abs(thought.activity[tick][n]) / largest:.2f}"/>'
        for place, n in enumerate(order)
        for tick in range(ticks)
    )
    label = "activations by neuron (rows) and tick (columns)"
    heat = (
        f'<svg viewBox="0 0 {ticks * width} {neurons * height}" role="img" aria-label="{label}" '
        f'xmlns="http://www.w3.org/2000/svg">{squares}</svg>'
    )
    lines = [
        Line(f"neuron {n}", range(1, ticks + 1), [tick[n] for tick in thought.activity], color)
        for n, color in zip(order, _COLORS, strict=False)
    ]
    drawn = chart([Panel(lines, "tick", "activation z")], width=5.2, height=3.6)
    style = "display:flex;gap:1.5rem;flex-wrap:wrap;align-items:flex-start"
    parts = f'<div style="width:15rem">{heat}</div><div style="flex:1;min-width:18rem">{drawn}</div>'
    caption = (
        f"Maze 1. Left: all {neurons} neurons, a row each, by tick; blue is positive, orange negative, and those that "
        "move most come first. Right: the five that move most."
    )
    return page.figure(f'<div style="{style}">{parts}</div>', caption)
