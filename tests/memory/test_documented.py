"""The examples in the docstrings of `nestlearn.memory` run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import nestlearn.memory

MODULES = sorted(
    info.name for info in pkgutil.walk_packages(nestlearn.memory.__path__, "nestlearn.memory.") if not info.ispkg
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str):
    if name == "nestlearn.memory.kernels.self_modifying":
        pytest.importorskip("triton", reason="pip install 'nestlearn[gpu]'")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples_of_the_public_functions():
    engine = importlib.import_module("nestlearn.memory.engine")
    examples = [test.name for test in doctest.DocTestFinder().find(engine) if test.examples]
    assert {f"nestlearn.memory.engine.{name}" for name in ("scan", "surprise", "absorb", "explain")} <= set(examples)
