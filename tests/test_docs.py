"""Every Python example in the README, the documentation and the docstrings runs; relative links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nestlearn.memory import catalog, scan

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


SOURCE = ROOT / "src"
MODULES = [".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in sorted(SOURCE.rglob("*.py"))]
TRITON = "nestlearn.memory.kernels.self_modifying"  # the one module that cannot be imported without an extra
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def pages_with_examples() -> list[Path]:
    return [page for page in PAGES if BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", pages_with_examples(), ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order in one namespace, as a reader would paste them, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": "__main__"}
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(1))
        # Blank lines in front make a traceback point at the line of the page.
        exec(compile("\n" * line + match.group(1), str(page), "exec"), namespace)


@pytest.mark.parametrize("name", catalog)
def test_the_first_example_works_for_every_memory(name: str) -> None:
    """The README invites any name of the catalog: results are finite and reads move toward the values."""
    block = next(match.group(1) for match in BLOCK.finditer((ROOT / "README.md").read_text()))
    assert 'catalog["deltanet"]' in block
    namespace: dict[str, Any] = {}
    exec(block.replace('catalog["deltanet"]', f'catalog["{name}"]'), namespace)
    memory, y, k, v, gates = (namespace[key] for key in ("memory", "y", "k", "v", "gates"))
    torch.manual_seed(0)
    torch.randn(2, *k.shape, dtype=k.dtype)  # what the example draws before the initial weights
    start = memory.init_state((1,), 32, 32, dtype=k.dtype)
    unwritten, _ = scan(memory, start, k, k, v, gates._replace(lr=0 * gates.lr), initial=start.params)
    assert y.isfinite().all() and y.abs().max() < 10
    assert (y * v).sum(-1).mean() > (unwritten * v).sum(-1).mean()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = (link.split("#")[0] for link in LINK.findall(page.read_text()) if "://" not in link)
    reached = [(page.parent / target).resolve() for target in targets if target]
    assert not [target for target in reached if not target.exists()]
    # The site has the pages of docs/ only: mkdocs refuses links to anything else.
    assert page.parent == ROOT or not [target for target in reached if not target.is_relative_to(ROOT / "docs")]


RESULTS = [page for page in sorted((ROOT / "docs/results").glob("*.md")) if page.name != "index.md"]


@pytest.mark.parametrize("page", RESULTS, ids=lambda page: page.stem)
def test_a_result_opens_with_its_claim(page: Path) -> None:
    """The first screen of a result: title, then claim, figure, control, seeds and command, in this order."""
    rows = re.findall(r"^\| (\w+) \| \S", "\n".join(page.read_text().splitlines()[1:9]), re.MULTILINE)
    assert rows == ["Claim", "Figure", "Control", "Seeds", "Command"]
    (claim,) = re.findall(r"^\| Claim \| (.*) \|$", page.read_text(), re.MULTILINE)
    title = page.read_text().splitlines()[0].removeprefix("# ")
    assert f"| [{title}]({page.name}) | {claim} |" in (ROOT / "docs/results/index.md").read_text()


def public_names() -> dict[str, object]:
    """What the reader of an example has imported: torch, the public names of the package and of its parts."""
    names: dict[str, object] = {"torch": torch}
    for part in ("memory", "optim", "nn", "data", "train", "evals", "models", "continual", "levels", ""):
        module = importlib.import_module(f"nestlearn.{part}".rstrip("."))
        public = (name for name in getattr(module, "__all__", vars(module)) if not name.startswith("_"))
        names |= {name: getattr(module, name) for name in public if not isinstance(getattr(module, name), ModuleType)}
    return names


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_docstring_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`>>>` examples of a module, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    if name == TRITON:
        pytest.importorskip("triton", reason="pip install 'nestlearn[gpu]'")
    module = importlib.import_module(name.removesuffix(".__init__"))
    others = {key: value for key, value in public_names().items() if key not in vars(module)}
    result = doctest.testmod(module, optionflags=OPTIONS, extraglobs=others)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed; see the captured output"


def packages_with_public_names() -> list[str]:
    names = [name.removesuffix(".__init__") for name in MODULES if name.endswith("__init__")]
    return [name for name in names if hasattr(importlib.import_module(name), "__all__")]


def test_every_package_has_a_page_of_the_reference() -> None:
    """A package's page lists its `__all__`. A name that a submodule hides needs a line of its own."""
    pages = {page.name: page.read_text() for page in (ROOT / "docs/reference").glob("*.md")}
    for package in packages_with_public_names():
        if package == "nestlearn":  # its names are those of other packages
            continue
        page = package.removeprefix("nestlearn.") + ".md"
        assert f"::: {package}\n" in pages.get(page, ""), f"docs/reference/{page} does not document {package}"
        assert f"{package}: reference/{page}" in (ROOT / "mkdocs.yml").read_text()
        hidden = [name for name in importlib.import_module(package).__all__ if f"{package}.{name}" in MODULES]
        missing = [name for name in hidden if f"::: {package}.{name}.{name}\n" not in pages[page]]
        assert not missing, f"docs/reference/{page} needs the lines ::: {package}.NAME.NAME for {missing}"
    for name in importlib.import_module("nestlearn").__all__:
        assert f"`{name}`" in pages["index.md"]
