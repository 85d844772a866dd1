"""Line charts as inline SVG. Text has the colour of the page, so it is readable on light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Distinguishable with the common colour-vision deficiencies and on both backgrounds.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#2f7de1", "#e0762a", "#1f9d74", "#a463d6", "#8a8f98"
# A colour that no line uses. matplotlib draws text and axes in it; then it is replaced by the page's text colour.
_INK = "#010203"


@dataclass(frozen=True)
class Line:
    """One curve; ``y`` is None where there is no value, ``band`` is half the height of a shaded band."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: str
    style: str = "-"
    width: float = 2.0
    alpha: float = 1.0
    band: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes; ``marks`` are vertical lines as (x, text)."""

    lines: Sequence[Line]
    x_label: str
    y_label: str = ""
    x_log: bool = False
    y_log: bool = False
    y_range: tuple[float, float] | None = None
    marks: Sequence[tuple[float, str]] = field(default_factory=tuple)
    x_format: Callable[[float], str] | None = None
    y_format: Callable[[float], str] | None = None


def chart(panels: Sequence[Panel], *, height: float = 3.3, width: float = 9.0, legend: bool = True) -> str:
    """Panels side by side as one ``<svg>`` element; sizes in inches."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "nestlearn",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
    }
    with matplotlib.rc_context(settings):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(all_axes, panels, strict=True):
            _draw(axes, panel)
        if legend:
            _legend(figure, all_axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue())


def _draw(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter

    for line in panel.lines:
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(xs, ys, line.style, color=line.color, lw=line.width, alpha=line.alpha, label=line.label)
        if line.band is not None:
            errors = [e or 0.0 for e, y in zip(line.band, line.y, strict=True) if y is not None]
            low = [y - e for y, e in zip(ys, errors, strict=True)]
            high = [y + e for y, e in zip(ys, errors, strict=True)]
            axes.fill_between(xs, low, high, color=line.color, alpha=0.15, lw=0)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.x_log:
        axes.set_xscale("log", base=2)
    if panel.y_log:
        axes.set_yscale("log", base=2)
    if panel.y_range:
        axes.set_ylim(*panel.y_range)
    for axis, formatter in ((axes.xaxis, panel.x_format), (axes.yaxis, panel.y_format)):
        if formatter is not None:
            axis.set_major_formatter(FuncFormatter(lambda value, _position, f=formatter: f(value)))
    axes.grid(True, color=_INK, alpha=0.12, lw=0.8)
    # Each mark's text is one line lower than the one before, so that texts of close marks do not overlap.
    for row, (position, text) in enumerate(panel.marks):
        axes.axvline(position, color=_INK, alpha=0.45, lw=1, ls=(0, (2, 3)))
        axes.annotate(text, (position, 1), xycoords=("data", "axes fraction"), xytext=(4, -4 - 12 * row),
                      textcoords="offset points", va="top", fontsize=8.5, alpha=0.75)  # fmt: skip


def _legend(figure: Any, all_axes: Sequence[Axes]) -> None:
    handles: dict[str, Any] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    shown = {label: handle for label, handle in handles.items() if not label.startswith("_")}
    if shown:
        columns = min(len(shown), 3)
        figure.legend(shown.values(), shown.keys(), loc="outside upper left", ncols=columns, frameon=False)


def _inline(svg: str) -> str:
    """The ``<svg>`` element alone, without identifiers that would clash on a page with several charts."""
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = rf'<svg viewBox="\1" role="img" {namespaces}>'
    svg = re.sub(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', opening, svg, count=1, flags=re.S)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
