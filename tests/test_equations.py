"""docs/equations.md says truly where each equation of the paper is: in which symbol, proved by which test."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "equations.md"
NUMBERS = r"\d+(?:-\d+)?(?:, \d+(?:-\d+)?)*"
PAPERS = "NL|Titans|TNT"
CITATION = re.compile(rf"({PAPERS}) Eqs?\.\s+({NUMBERS})")


class Row(NamedTuple):
    paper: str
    equations: frozenset[int]
    symbols: tuple[str, ...]
    tests: tuple[str, ...]


def numbers(text: str) -> frozenset[int]:
    """`"29-31, 57"` is {29, 30, 31, 57}."""
    found: set[int] = set()
    for part in text.split(", "):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def rows() -> list[Row]:
    """Lines `| 29-31 | meaning | symbols in backticks | tests in backticks |`; other papers are named, `Titans 19`."""
    found = []
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        named = re.fullmatch(rf"(?:({PAPERS}) )?({NUMBERS})", cells[0])
        if len(cells) == 4 and named:
            symbols, tests = (tuple(re.findall(r"`([^`]+)`", cell)) for cell in cells[2:])
            found.append(Row(named.group(1) or "NL", numbers(named.group(2)), symbols, tests))
    return found


def cited() -> dict[tuple[str, int], set[str]]:
    """Equations named in docstrings and comments of the package, each with the files that name it."""
    found: dict[tuple[str, int], set[str]] = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for match in CITATION.finditer(path.read_text()):
            for number in numbers(match.group(2)):
                found.setdefault((match.group(1), number), set()).add(path.name)
    return found


def test_every_equation_cited_is_in_the_table() -> None:
    listed = {(row.paper, number) for row in rows() for number in row.equations}
    missing = {equation: files for equation, files in cited().items() if equation not in listed}
    assert not missing, f"add rows to {TABLE.name}"


@pytest.mark.parametrize("symbol", sorted({symbol for row in rows() for symbol in row.symbols}))
def test_symbol_exists(symbol: str) -> None:
    """`nestlearn.memory.scan` or `nestlearn.memory.Matrix.f`: the longest importable part, then attributes."""
    parts = symbol.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            value = getattr(value, attribute)
        return
    pytest.fail(f"nothing importable in {symbol}")


@pytest.mark.parametrize("test", sorted({test for row in rows() for test in row.tests}))
def test_test_exists(test: str) -> None:
    """`tests/memory/test_x.py::test_y`: the file defines the function."""
    file, _, function = test.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_names_a_symbol_and_a_test() -> None:
    assert rows()
    assert not [row for row in rows() if not row.symbols or not row.tests]
