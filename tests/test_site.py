"""The built site: links and anchors lead somewhere, pages show what they ran, search finds, phones show all pages."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from .test_docs import packages_with_public_names

ROOT = Path(__file__).parents[1]
PHONE = {"width": 390, "height": 844}
RUN = ["index.md", *(f"learn/{page.name}" for page in sorted((ROOT / "docs/learn").glob("*.md")))]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder SITE, where `make docs` has built it, or a site built here."""
    if "SITE" in os.environ:
        return Path(os.environ["SITE"]).resolve()
    pytest.importorskip("mkdocs", reason="pip install 'nestlearn[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_links_and_anchors_lead_somewhere(site: Path) -> None:
    pages = {page: page.read_text() for page in site.rglob("*.html") if page.name != "404.html"}
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    broken = []
    for page, text in pages.items():
        for link in map(unescape, re.findall(r'\b(?:href|src)="([^"]+)"', text)):
            path, _, anchor = link.partition("#")
            if re.match(r"\w+:", link):
                continue
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (anchor and target in anchors and anchor not in anchors[target]):
                broken.append((str(page.relative_to(site)), link))
    assert len(pages) > 40
    assert not broken


@pytest.mark.parametrize("source", RUN)
def test_a_page_shows_what_it_ran(site: Path, source: str) -> None:
    """Text that was printed, pictures, and a notebook with the same code."""
    folder = Path(source).with_suffix("")
    html = (site / (folder.parent if folder.name == "index" else folder) / "index.html").read_text()
    text = (ROOT / "docs" / source).read_text()
    assert html.count('<div class="output highlight"') >= 1
    assert html.count('<div class="picture"') == text.count("plt.subplots(") + len(
        re.findall(r"^system$", text, re.MULTILINE)
    )
    file = "start.ipynb" if source == "index.md" else folder.with_suffix(".ipynb")
    made = json.loads((site / file).read_text())
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    code = [cell["source"] for cell in made["cells"] if cell["cell_type"] == "code"]
    assert code == [block.strip() for block in blocks]
    assert f'href="{"" if source == "index.md" else "../" if folder.name != "index" else ""}{Path(file).name}"' in html


def test_every_public_name_has_a_heading(site: Path) -> None:
    """Headings, signatures and highlighted examples of the reference."""
    pages = {page.parent.name: page.read_text() for page in (site / "reference").rglob("index.html")}
    headings = set(re.findall(r'<h\d id="([^"]+)"', "".join(pages.values())))
    for package in packages_with_public_names():
        for name in importlib.import_module(package).__all__:
            found = {f"{package}.{name}", f"{package}.{name}.{name}"} & headings
            found |= {heading for heading in headings if package == "nestlearn" and heading.endswith(f".{name}")}
            assert found, f"{package}.{name} has no heading: does it have a docstring?"
    for name, page in pages.items():
        assert "<blockquote" not in page, f"an example of {name} is no code"
    assert 'class="gp">&gt;&gt;&gt; ' in pages["memory"]  # an example, highlighted
    assert re.search(r'doc-signature highlight.*?<span class="nf">scan</span>', pages["memory"], re.DOTALL)
    assert '"location":"reference/memory/#nestlearn.memory.scan"' in (site / "search/search_index.json").read_text()


@pytest.fixture(scope="module")
def url(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            """No line for each request."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_no_page_is_wider_than_a_phone(site: Path, browser: Any, url: str) -> None:
    """Wide tables, code and pictures scroll inside their frames. A page asks no other server for anything."""
    context = browser.new_context(viewport=PHONE)
    tab, wrong = context.new_page(), []
    tab.on("request", lambda asked: None if asked.url.startswith((url, "blob:", "data:")) else wrong.append(asked.url))
    for page in sorted(site.rglob("index.html")):
        address = url + str(page.parent.relative_to(site)).removeprefix(".") + "/"
        tab.goto(address, wait_until="load")
        width = tab.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
        if width > PHONE["width"]:
            wrong.append(f"{address}: {width} pixels wide")
    context.close()
    assert not wrong


@pytest.mark.parametrize(
    ("words", "found"), [("overwritten key", "learn/memories/"), ("MemorySession", "reference/continual/")]
)
def test_search_finds(browser: Any, url: str, words: str, found: str) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    tab = context.new_page()
    tab.goto(url)
    tab.locator("input.md-search__input").fill(words)
    tab.locator(f'.md-search-result__link[href*="{found}"]').first.wait_for(state="attached", timeout=20_000)
    context.close()
