"""The shapes and types written in signatures hold, checked by jaxtyping and beartype while the package runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_annotations_hold(repository: Path) -> None:
    command = [sys.executable, "-W", "ignore", "tests/shape_checks.py"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_wrong_argument_is_noticed(repository: Path) -> None:
    """The checks are really on."""
    code = "nestlearn.data.pack(3, None, 8)"
    script = (repository / "tests" / "shape_checks.py").read_text()
    script = script[: script.index("    check_memories()\n")] + f"    {code}\n"
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert "TypeCheckError" in done.stderr
    assert "nestlearn.data.packing.pack" in done.stderr
