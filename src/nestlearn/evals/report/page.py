"""A self-contained HTML page: text, tables and inline charts, readable in light and dark, no network needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from nestlearn.atomic import write_text

STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #5b6470; --page: #ffffff; --card: #f4f6f8; --line: #dde2e7;
  --blue: #1b66c9; --orange: #b85a14; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a3acb7; --page: #14171b; --card: #1e2329;
  --line: #343b44; --blue: #6aa9ff; --orange: #ff9d57; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .5rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; }
.lead { font-size: 1.1rem; color: var(--soft); }
.note { font-size: .9rem; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .9rem; margin: 1.5rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1rem; }
.tile .value { font-size: 1.35rem; font-weight: 650; line-height: 1.2; }
.tile .label { font-size: .88rem; color: var(--soft); margin-top: .2rem; }
figure { margin: 1.25rem 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; color: var(--soft); max-width: 46rem; margin-top: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .45rem .6rem; white-space: nowrap; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; font-size: .88rem; color: var(--soft); }
th:first-child, td:first-child { text-align: left; }
.best { font-weight: 650; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1rem;
  overflow-x: auto; font: .86rem/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
pre .given { font-weight: 700; color: var(--blue); }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
dt { font-weight: 600; } dd { margin: 0 0 .6rem; color: var(--soft); }
"""


def write_page(
    path: Path,
    title: str,
    lead: str,
    sections: Iterable[str],
    *,
    tiles: Sequence[tuple[str, str]] = (),
    commands: Sequence[str] = (),
) -> Path:
    """Write a report, under a temporary name first, and return its path.

    Args:
        path: the file.
        title: heading of the page.
        lead: HTML of the first paragraph.
        sections: HTML of the rest.
        tiles: the most important numbers, as (value, label).
        commands: shell commands that repeat what the page shows.
    """
    opening = [f"<h1>{escape(title)}</h1>", paragraph(lead, "lead"), *([_tiles(tiles)] if tiles else [])]
    ending = [heading("Repeat it"), _preformatted("\n".join(commands))] if commands else []
    write_text(path, document(title, [*opening, *sections, *ending]))
    return path


def document(title: str, body: Sequence[str]) -> str:
    """A whole page of these parts (HTML)."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """A section heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(html: str, kind: str = "") -> str:
    """A paragraph of HTML. Escape text that comes from outside."""
    return f'<p class="{kind}">{html}</p>' if kind else f"<p>{html}</p>"


def _tiles(items: Sequence[tuple[str, str]]) -> str:
    inner = "".join(
        f'<div class="tile"><div class="value">{escape(value)}</div><div class="label">{escape(label)}</div></div>'
        for value, label in items
    )
    return f'<div class="tiles">{inner}</div>'


def figure(svg: str, caption: str) -> str:
    """A chart with its caption (HTML)."""
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], best: Sequence[int | None] | None = None) -> str:
    """A table of text cells; ``best[i]`` is the column of row i to emphasise."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = []
    for number, row in enumerate(rows):
        strong = best[number] if best else None
        cells = "".join(
            f'<td class="best">{escape(cell)}</td>' if column == strong else f"<td>{escape(cell)}</td>"
            for column, cell in enumerate(row)
        )
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def sample(prompt: str, continuation: str) -> str:
    """Generated text, with the prompt marked."""
    return f'<pre class="wrap"><span class="given">{escape(prompt)}</span>{escape(continuation)}</pre>'


def _preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def definitions(items: Sequence[tuple[str, str]]) -> str:
    """Terms with their meaning (HTML)."""
    return "<dl>" + "".join(f"<dt>{escape(term)}</dt><dd>{meaning}</dd>" for term, meaning in items) + "</dl>"
