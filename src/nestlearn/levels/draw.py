"""Pictures and pages of nested systems: SVG and HTML that need nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape

from nestlearn.evals.report.page import document, heading, paragraph, table

from .system import COLUMNS, Component, NestedSystem

COLORS = {
    "attention": "#a463d6", "cache": "#d6639c", "memory": "#e0762a", "optimizer state": "#1f9d74",
    "weights": "#2f7de1", "initial weights": "#5aa7f0", "statistics": "#8a8f98",
}  # fmt: skip
"""Of each kind; distinguishable with the common colour-vision deficiencies, on light and dark."""

WIDTH, LEFT, GAP, ACROSS = 1000, 150, 12, 3
BOX_WIDTH, BOX_HEIGHT = (WIDTH - LEFT - GAP * (ACROSS + 1)) // ACROSS, 58


def system_svg(system: NestedSystem, marks: Mapping[str, str] | None = None) -> str:
    """Levels as bands, the fastest on top; components as boxes, coloured by kind.

    Args:
        system: what to draw.
        marks: findings by the label of a component; such a box has a red frame and the text as its tooltip.
    """
    y, parts = 46, []
    for number, level in enumerate(system.levels, start=1):
        rows = -(-len(level) // ACROSS)
        height = rows * (BOX_HEIGHT + GAP) + GAP
        parts.append(_band(number, level, y, height, marks or {}))
        y += height + GAP
    legend = _legend([kind for kind in COLORS if any(c.kind == kind for c in system.components)], y + 6)
    arrow = (
        f'<path d="M 18 50 V {y - 22}" stroke="currentColor" stroke-width="1.5" opacity=".45"/>'
        f'<path d="M 13 {y - 22} h 10 l -5 9 z" fill="currentColor" opacity=".45"/>'
    )
    style = (
        "<style>.box{cursor:pointer}.box:hover rect,.box:focus rect{fill-opacity:.26}"
        ".t{font:600 13px system-ui,sans-serif}.s{font:11.5px system-ui,sans-serif;opacity:.8}</style>"
    )
    title = f'<text x="32" y="24" font-size="17" font-weight="650">{escape(system.title)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 34}" role="img" fill="currentColor" '
        f'font-family="system-ui, sans-serif" aria-label="Levels of {escape(system.title)}">'
        + "".join([style, title, arrow, *parts, legend])
        + "</svg>"
    )


def _band(number: int, level: Sequence[Component], y: int, height: int, marks: Mapping[str, str]) -> str:
    boxes = []
    for i, component in enumerate(level):
        row, column = divmod(i, ACROSS)
        x, top = LEFT + GAP + column * (BOX_WIDTH + GAP), y + GAP + row * (BOX_HEIGHT + GAP)
        boxes.append(_box(component, x, top, marks.get(component.label)))
    return (
        f'<rect x="32" y="{y}" width="{WIDTH - 32}" height="{height}" rx="10" fill="currentColor" fill-opacity=".05"/>'
        f'<text class="t" x="46" y="{y + 32}">Level {number}</text>'
        f'<text class="s" x="46" y="{y + 51}">{escape(str(level[0].frequency))}</text>' + "".join(boxes)
    )


def _box(component: Component, x: int, y: int, mark: str | None) -> str:
    color = COLORS[component.kind]
    lines = [_cut(component.name, 30), _cut(component.rule, 44), _cut(", ".join(component.transfer), 44)]
    texts = "".join(
        f'<text class="{kind}" x="{x + 14}" y="{y + 18 + 16 * i}">{escape(line)}</text>'
        for i, (kind, line) in enumerate(zip(("t", "s", "s"), lines, strict=True))
    )
    frame = 'stroke="#d0312d" stroke-width="2.5"' if mark else f'stroke="{color}" stroke-opacity=".55"'
    tip = escape(mark or f"{component.label}: {component.context}; {component.objective}")
    return (
        f'<g class="box" tabindex="0" data-label="{escape(component.label)}"><title>{tip}</title>'
        f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7" fill="{color}" fill-opacity=".13" '
        f"{frame}/>"
        f'<rect x="{x}" y="{y}" width="5" height="{BOX_HEIGHT}" rx="2.5" fill="{color}"/>{texts}</g>'
    )


def _legend(kinds: Sequence[str], y: int) -> str:
    parts, x = [], 46
    for kind in kinds:
        parts.append(
            f'<rect x="{x}" y="{y}" width="11" height="11" rx="3" fill="{COLORS[kind]}"/>'
            f'<text class="s" x="{x + 17}" y="{y + 10}">{kind}</text>'
        )
        x += 36 + 7 * len(kind)
    return "".join(parts)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


# -- pages ----------------------------------------------------------------------------------------------------------

STYLE = """<style>
main { max-width: 76rem; }
.picture { border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; position: relative;
  margin: 1.25rem 0; }
.picture svg { width: 100%; height: auto; display: block; touch-action: pan-y; }
.zoom { position: absolute; right: .6rem; top: .6rem; display: flex; gap: .3rem; }
.zoom button { font: inherit; width: 2.2rem; height: 2.2rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--card); color: var(--ink); cursor: pointer; }
#details { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1rem; }
#details dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: .5rem 0 0; }
#details dt { color: var(--soft); font-weight: 400; }
#details dd { margin: 0; color: var(--ink); overflow-wrap: anywhere; }
th, td { text-align: left; font-size: .88rem; } td:nth-last-child(-n+2) { text-align: right; }
.found { border-left: 4px solid #d0312d; padding-left: .8rem; }
@media (max-width: 40rem) { .picture { overflow-x: auto; } .picture svg { width: 46rem; } }
</style>"""

SCRIPT = """<script>
const parts = JSON.parse(document.getElementById("parts").textContent);
const svg = document.querySelector(".picture svg"), home = svg.viewBox.baseVal;
const whole = [home.x, home.y, home.width, home.height];
let view = [...whole];
const show = () => svg.setAttribute("viewBox", view.join(" "));
const zoom = (k, cx = view[0] + view[2] / 2, cy = view[1] + view[3] / 2) => {
  const w = Math.min(whole[2], Math.max(whole[2] / 8, view[2] * k)), r = w / view[2];
  view = [cx - (cx - view[0]) * r, cy - (cy - view[1]) * r, w, view[3] * r]; show(); };
document.querySelectorAll(".zoom button").forEach(b => b.onclick = () =>
  b.value === "0" ? (view = [...whole], show()) : zoom(+b.value));
svg.addEventListener("wheel", e => { if (!e.ctrlKey) return; e.preventDefault();
  const p = new DOMPoint(e.clientX, e.clientY).matrixTransform(svg.getScreenCTM().inverse());
  zoom(e.deltaY > 0 ? 1.2 : 1 / 1.2, p.x, p.y); }, { passive: false });
let held = null;
svg.addEventListener("pointerdown", e => { held = [e.clientX, e.clientY, ...view]; });
window.addEventListener("pointerup", () => { held = null; });
window.addEventListener("pointermove", e => { if (!held || view[2] >= whole[2]) return;
  const s = view[2] / svg.clientWidth; view[0] = held[2] - (e.clientX - held[0]) * s;
  view[1] = held[3] - (e.clientY - held[1]) * s; show(); });
const open = label => { const box = document.getElementById("details"), list = document.createElement("dl");
  for (const [name, value] of parts[label]) { const t = document.createElement("dt"), d = document.createElement("dd");
    t.textContent = name; d.textContent = value; list.append(t, d); }
  const head = document.createElement("strong"); head.textContent = label; box.replaceChildren(head, list); };
document.querySelectorAll(".box").forEach(b => { b.onclick = () => open(b.dataset.label);
  b.onkeydown = e => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); open(b.dataset.label); } }; });
</script>"""


def system_html(
    system: NestedSystem,
    findings: Sequence[tuple[str, str]] = (),
    details: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    sections: Sequence[str] = (),
    lead: str = "",
) -> str:
    """A page with the picture, what was found, details on click, and tables.

    Args:
        system: what to show.
        findings: (label, text).
        details: more (name, value) pairs of components by label.
        sections: HTML after the table.
        lead: text of the first paragraph.
    """
    shown = {c.label: [*_details(c), *(details or {}).get(c.label, ())] for c in system.components}
    lead = lead or (
        f"{len(system.levels)} levels, the fastest on top. A level changes less often than the one above it. "
        "Click a box for details; zoom with the buttons or with Ctrl and the wheel."
    )
    buttons = "".join(
        f'<button value="{value}" aria-label="{name}">{sign}</button>'
        for value, name, sign in (("0.7", "closer", "+"), ("1.43", "farther", "−"), ("0", "all", "⤢"))
    )
    found = "".join(
        f'<p class="found"><strong>{escape(label)}</strong>: {escape(text)}</p>' for label, text in findings
    )
    body = [
        STYLE, f"<h1>{escape(system.title)}</h1>", paragraph(escape(lead), "lead"), found,
        f'<div class="picture">{system_svg(system, dict(findings))}<div class="zoom">{buttons}</div></div>',
        '<div id="details">Click a box of the picture.</div>',
        heading("Components"), table(COLUMNS, [c.cells() for c in system.components]),
        *(paragraph(escape(f"Note: {note}"), "note") for note in system.notes), *sections,
        f'<script type="application/json" id="parts">{_json(shown)}</script>', SCRIPT,
    ]  # fmt: skip
    return document(system.title, body)


def _details(component: Component) -> list[tuple[str, str]]:
    pairs = list(zip(COLUMNS, component.cells(), strict=True))
    names = ", ".join(component.members[:12])
    more = len(component.members) - 12
    return [*pairs, ("members", names + (f" and {more} more" if more > 0 else ""))]


def _json(content: object) -> str:
    """JSON that no name can end the script element with."""
    return json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
