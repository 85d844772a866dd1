"""`make quick` runs the tests of what has changed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ("src/nestlearn/nn/cms/level.py", {"tests/nn", "tests/contracts/test_layers.py"}),
        ("src/nestlearn/optim/m3.py", {"tests/optim", "tests/contracts/test_optimizers.py"}),
        ("src/nestlearn/cli/chat.py", {"tests/test_cli.py"}),
        ("src/nestlearn/fields.py", {"tests/test_startup.py"}),
        ("tests/models/stacking/test_learning.py", {"tests/models"}),
        ("tests/test_docs.py", {"tests/test_docs.py"}),
        ("docs/index.md", set()),
    ],
)
def test_quick_selects_the_tests_of_a_changed_file(changed: str, tests: set[str], repository: Path) -> None:
    command = ["make", "--dry-run", "quick", f"CHANGED=echo {changed}"]
    # `make test` runs this test: the inner make must not take itself for a part of it.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True, env=env)
    plan = run.stdout.splitlines()[-1]
    (select,) = re.findall(r"(\$\(ls .*\))$", plan)
    words = subprocess.run(
        ["sh", "-c", f"echo {select}"], cwd=repository, capture_output=True, text=True
    ).stdout.split()
    assert tests | {"tests/test_layering.py"} <= set(words)
    assert tests or words == ["tests/test_layering.py"]
