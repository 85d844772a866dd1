"""Hook of the site: the start page and the pages of *Learn* run like notebooks when the site is built.

What a block prints, the value of its last line and its figures follow it in the page. Each page is also a notebook
(`.ipynb`, without outputs). So nothing that a page shows is stored, and nothing can be out of date.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RELATIVE_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+://)[^)\s]*\)")


def executed(uri: str) -> bool:
    """Whether the page is run: the start page and the pages of the folder ``learn``."""
    return uri == "index.md" or (uri.startswith("learn/") and uri.endswith(".md"))


def on_files(files: Any, config: Any) -> Any:
    """Adds the notebook of every executed page that has code."""
    from mkdocs.structure.files import File

    for file in [file for file in files if executed(file.src_uri) and BLOCK.search(file.content_string)]:
        name = "start.ipynb" if file.src_uri == "index.md" else file.src_uri.replace(".md", ".ipynb")
        files.append(File.generated(config, name, content=notebook(file.content_string)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with its outputs, and the link to its notebook below the title."""
    if not executed(page.file.src_uri) or not BLOCK.search(markdown):
        return markdown
    name = "start.ipynb" if page.file.src_uri == "index.md" else Path(page.file.src_uri).with_suffix(".ipynb").name
    title, _, rest = markdown.partition("\n")
    link = f"*The code of this page ran when the site was built: [download it as a notebook]({name}).*"
    return run_blocks(f"{title}\n{rest.rstrip()}\n\n---\n\n{link}\n", page.file.src_uri)


def run_blocks(markdown: str, name: str) -> str:
    """Every block of Python, followed by its output, all in one namespace and in an empty folder."""
    import matplotlib

    matplotlib.use("Agg")
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "savefig.transparent": True, "font.family": "sans-serif"}
    namespace: dict[str, Any] = {"__name__": "__main__"}
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(settings):
        os.chdir(folder)
        try:
            return BLOCK.sub(lambda block: block.group() + output_of(block.group(1), namespace, name), markdown)
        finally:
            os.chdir(here)


def output_of(code: str, namespace: dict[str, Any], name: str) -> str:
    """What a notebook shows below the cell: printed text, the value of the last line, figures."""
    import matplotlib.pyplot as plt

    tree, printed, pictures = ast.parse(code), io.StringIO(), []
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        value = eval(compile(last, name, "eval"), namespace) if last else None
        if hasattr(value, "_repr_html_"):
            pictures.append(value._repr_html_())
        elif value is not None and not plt.get_fignums():
            printed.write(f"{value!r}\n")
    for number in plt.get_fignums():
        drawn = io.StringIO()
        plt.figure(number).savefig(drawn, format="svg", bbox_inches="tight")
        pictures.append(inline(drawn.getvalue()))
    plt.close("all")
    text = printed.getvalue().rstrip()
    parts = [f"``` {{ .text .output }}\n{text}\n```"] if text else []
    parts += [f'<div class="picture" tabindex="0" data-search-exclude>{picture}</div>' for picture in pictures]
    return "".join(f"\n\n{part}\n" for part in parts)


def inline(svg: str) -> str:
    """A figure of matplotlib as a part of the page: black becomes the colour of its text, on light and on dark."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg xmlns:xlink="http://www.w3.org/1999/xlink" \1>', svg, count=1
    )
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg).replace("#000000", "currentColor")
    svg = re.sub(r"<text ", '<text fill="currentColor" ', svg)
    return re.sub(r"\n\s*", " ", svg)


def notebook(markdown: str) -> str:
    """The page as a notebook of format 4.5. Links to other pages become plain text."""
    cells, end = [], 0
    for block in BLOCK.finditer(markdown):
        cells += [("markdown", markdown[end : block.start()]), ("code", block.group(1))]
        end = block.end()
    cells.append(("markdown", markdown[end:]))
    made = []
    for kind, text in cells:
        text = RELATIVE_LINK.sub(r"\1", text).strip() if kind == "markdown" else text.strip()
        if text:
            code = {"outputs": [], "execution_count": None} if kind == "code" else {}
            cell = {"cell_type": kind, "id": f"cell-{len(made)}", "metadata": {}, "source": text}
            made.append(cell | code)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1)
