"""What an import costs, and what it does: help without torch, names when they are used, models registered."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import nestlearn
from nestlearn import cli

COMMANDS = sorted(getattr(typer.main.get_command(cli.app), "commands"))  # noqa: B009 (a group; typed as a command)
MEASURED = """
import resource, sys
from nestlearn import cli
try:
    cli.main(sys.argv[1:])
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(used.ru_utime + used.ru_stime, *({"torch", "transformers", "numpy"} & set(sys.modules)), file=sys.stderr)
"""


# What transformers needs of others takes most of its import: it is imported once.
FORKED = """
import os, sys
import scipy.optimize, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor
for place, code in enumerate(sys.argv[1:]):
    child = os.fork()
    if not child:
        print(f"<{place}>", flush=True)
        exec(code, {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {code}")
"""


def fresh(*codes: str) -> list[list[str]]:
    """The words that each code prints in an interpreter of its own, which has imported no more than torch and scipy."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, *codes], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [part.split() for part in re.split(r"<\d+>\n", done.stdout)[1:]]


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that runs this code."""
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)], ids=" ".join
)
def test_help_and_version_come_at_once(words: list[str]) -> None:
    for _ in range(2):  # the first run may have to compile the modules
        done = python(MEASURED, *words)
        seconds, *heavy = done.stderr.splitlines()[-1].split()
        if float(seconds) < 1.0:
            break
    assert done.returncode == 0 and done.stdout.strip()
    assert not heavy
    assert float(seconds) < 1.0  # 0.4 on an idle machine, 6.7 with torch and transformers


ABSENT = {
    # transformers takes twice as long to import as torch: tests of these folders would wait longer than they run.
    "tests.conftest, nestlearn.memory, nestlearn.nn, nestlearn.optim": {"transformers", "datasets", "matplotlib"},
    "nestlearn.data, nestlearn.models, nestlearn.continual": {"datasets", "pandas", "peft", "matplotlib"},
    "nestlearn.train, nestlearn.evals, nestlearn.cli": {"datasets", "lm_eval", "peft", "matplotlib"},
}

# Asking where a package is does not import it, and many libraries ask.
FIRST = [
    "import importlib.util, nestlearn; importlib.util.find_spec('transformers'); import transformers",
    "import transformers.models.auto, nestlearn",
    "import nestlearn; from transformers.models.auto.modeling_auto import AutoModel",
    "from nestlearn.data import pack",
]
AUTO = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
config = AutoConfig.for_model("hope", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
print(type(config).__name__)
print(type(AutoModelForCausalLM.from_config(config)).__name__, type(AutoModel.from_config(config)).__name__)
"""
STAR = """
import nestlearn
print(nestlearn.optim.M3.__name__, hasattr(nestlearn, "Hope"))
from nestlearn import *
print(HopeConfig.__name__, flops.__name__, MemorySession.__name__)
"""


@pytest.fixture(scope="module")
def printed(repository: Path) -> dict[str, list[str]]:
    """The words that each code prints."""
    place = f"import sys; sys.path.insert(0, {str(repository)!r}); import"
    codes = {names: f"{place} {names}; print(*sys.modules)" for names in ABSENT}
    codes |= {first: first + AUTO for first in FIRST} | {STAR: STAR}
    return dict(zip(codes, fresh(*codes.values()), strict=True))


@pytest.mark.parametrize("names", ABSENT)
def test_a_package_imports_no_library_that_it_may_never_use(names: str, printed: dict[str, list[str]]) -> None:
    assert "torch" in printed[names] and not ABSENT[names] & set(printed[names])


@pytest.mark.parametrize("first", FIRST)
def test_models_are_registered_whatever_is_imported_first(first: str, printed: dict[str, list[str]]) -> None:
    assert printed[first] == ["HopeConfig", "HopeForCausalLM", "HopeModel"]


def test_star_import_packages_and_unknown_names(printed: dict[str, list[str]]) -> None:
    assert printed[STAR] == ["M3", "False", "HopeConfig", "flops", "MemorySession"]


def test_version_is_the_one_of_the_package() -> None:
    assert python(MEASURED, "--version").stdout == f"nestlearn {nestlearn.__version__}\n"


def test_public_names_are_those_a_type_checker_reads() -> None:
    tree = ast.parse(Path(nestlearn.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(typed) == set(nestlearn.__all__) <= set(dir(nestlearn))
    for name, module in typed.items():
        assert getattr(nestlearn, name) is getattr(importlib.import_module(str(module)), name)
