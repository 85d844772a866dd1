"""The shape of the source tree: imports go down only, modules and functions stay small, state stays explicit."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "nestlearn"
MODULES = sorted(SOURCE.rglob("*.py"))

# A package may import itself and packages of a lower layer. `evals` compares what `train` made, hence above it.
LAYERS = {
    "allocator": -1,
    "atomic": -1,
    "fields": -1,
    "registration": 2.5,
    "plugins": -1,
    "memory": 0,
    "optim": 1,
    "nn": 1,
    "data": 1,
    "models": 2,
    "peft": 2.4,
    "continual": 3,
    "train": 3,
    "evals": 3.5,
    "levels": 3.6,  # its pages are made as the reports of `evals`
    "serve": 3.8,
    "cli": 4,
    "__main__": 5,
    "__init__": 3.7,  # the public names; the packages below import each other, never these
}
MEMORY_MAY_IMPORT = {"torch", "jaxtyping", "triton", "fla", *sys.stdlib_module_names}
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 500, 60


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(tree: ast.AST, path: Path) -> Iterator[str]:
    """Absolute dotted names of all modules imported, at whatever depth of the file."""
    package = ["nestlearn", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from nestlearn import cli` imports a module, `from nestlearn.data import pack` a name.
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "nestlearn" else [module]


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in MODULES}


def test_every_package_has_a_layer() -> None:
    assert {package_of(path) for path in MODULES} <= set(LAYERS)


def test_imports_go_down_only(trees: dict[Path, ast.Module]) -> None:
    wrong = []
    for path, tree in trees.items():
        own = package_of(path)
        for module in imported(tree, path):
            parts = module.split(".")
            target = parts[1] if len(parts) > 1 and parts[1] in LAYERS else "__init__"
            if parts[0] == "nestlearn" and target != own and not LAYERS[target] < LAYERS[own]:
                wrong.append(f"{name_of(path)} imports {module}")
    assert not wrong


def test_the_core_imports_torch_and_nothing_else(trees: dict[Path, ast.Module]) -> None:
    wrong = [
        f"{name_of(path)} imports {module}"
        for path, tree in trees.items()
        if package_of(path) == "memory"
        for module in imported(tree, path)
        if module.split(".")[0] not in MEMORY_MAY_IMPORT and not module.startswith("nestlearn.memory")
    ]
    assert not wrong


def test_what_models_are_built_from_does_not_import_transformers(trees: dict[Path, ast.Module]) -> None:
    """The models are imported as soon as `transformers` is; a module that had imported it would be half loaded."""
    below = {
        module.split(".")[1]
        for path, tree in trees.items()
        if package_of(path) == "models"
        for module in imported(tree, path)
        if module.startswith("nestlearn.")
    } - {"models"}
    wrong = [
        f"{name_of(path)} imports {module}"
        for path, tree in trees.items()
        if package_of(path) in below
        for module in imported(tree, path)
        if module.split(".")[0] == "transformers"
    ]
    assert below and not wrong


def test_modules_and_functions_are_small(trees: dict[Path, ast.Module]) -> None:
    wrong = []
    for path, tree in trees.items():
        lines = len(path.read_text().splitlines())
        if lines > MAX_MODULE_LINES:
            wrong.append(f"{name_of(path)} has {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "kernels" not in path.parts:
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{name_of(path)}: {node.name} has {length} lines")
    assert not wrong


# What would hide state or wait for the device, where it is not allowed, and the reason.
FORBIDDEN = [
    # The memory of general inputs is estimated once, and a constant of the model from then on.
    (r"\.register_buffer\((?!\"general_)", SOURCE, "fast weights are arguments and results, never buffers"),
    (r"\.data\b(?!\.|_)(?=\s*[=.\[)])", SOURCE, "writing through .data goes around autograd"),
    (r"except\s*:", SOURCE, "a bare except hides errors"),
    (r"\b(TODO|FIXME|XXX)\b|NotImplementedError", SOURCE, "nothing is left half done"),
    *(
        (r"\.(item|tolist|cpu)\(\)", SOURCE / package, "the host must not wait for the device")
        for package in ("memory", "nn", "optim")
    ),
]


@pytest.mark.parametrize(("pattern", "folder", "reason"), FORBIDDEN, ids=lambda value: str(value)[-24:])
def test_forbidden_patterns(pattern: str, folder: Path, reason: str) -> None:
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in sorted(folder.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(pattern, line) and not line.strip().startswith((">>>", "...", "#"))
    ]
    assert not found, reason


def test_reference_engine_is_independent_of_the_fast_one(trees: dict[Path, ast.Module]) -> None:
    """An oracle that shares code with what it checks is no second witness."""
    path = SOURCE / "memory" / "reference.py"
    assert len(path.read_text().splitlines()) <= 250
    assert not [module for module in imported(trees[path], path) if re.search(r"chunked|engine|span|kernels", module)]
