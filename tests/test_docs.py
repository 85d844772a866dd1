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


def public_names() -> dict[str, object]:
    """What the reader of an example has imported: torch, the public names of the package and of its parts."""
    names: dict[str, object] = {"torch": torch}
    for part in ("memory", "optim", "nn", "data", "train", "evals", "models", "continual", ""):
        module = importlib.import_module(f"nestlearn.{part}".rstrip("."))
        public = (name for name in getattr(module, "__all__", vars(module)) if not name.startswith("_"))
        names |= {name: getattr(module, name) for name in public if not isinstance(getattr(module, name), ModuleType)}
    return names


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_docstring_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`>>>` examples of a module, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name.removesuffix(".__init__"))
    others = {key: value for key, value in public_names().items() if key not in vars(module)}
    result = doctest.testmod(module, optionflags=OPTIONS, extraglobs=others)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed; see the captured output"
