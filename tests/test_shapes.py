"""The shapes and types written in signatures hold, checked by jaxtyping and beartype while the package runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_annotations_hold(repository: Path) -> None:
    command = [sys.executable, "-W", "ignore", "tests/shape_checks.py"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
