"""NL Eq. 53: delta momentum reaches the optimum in fewer steps than momentum, each at its best of one grid."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nestlearn.optim import AssociativeMomentum, DeltaMomentum


@pytest.fixture(scope="module")
def benchmark_module(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    """benchmarks/delta_momentum_toy.py, the command that repeats the figures."""
    return load_benchmark("delta_momentum_toy")


def delta(groups: Any) -> DeltaMomentum:
    return DeltaMomentum(groups, eps=1.0)


def test_the_function_and_its_optimum(benchmark_module: ModuleType) -> None:
    constants = torch.tensor([3.0, 0.5, 2.0], dtype=torch.float64)
    r, angle = benchmark_module.START
    expected = r**2 + 3.0 * (r - angle + 0.5 * torch.sin(torch.tensor(2.0 * r, dtype=torch.float64))) ** 2
    start = torch.tensor([[r, angle]], dtype=torch.float64)
    torch.testing.assert_close(benchmark_module.toy(start, constants), expected)
    assert benchmark_module.toy(torch.zeros(1, 2, dtype=torch.float64), constants) == 0


def test_delta_momentum_needs_fewer_steps(benchmark_module: ModuleType) -> None:
    """At several constants, also with the momentum fixed at 0.9 and only the rate tuned."""
    constants = [benchmark_module.SHOWN, (2.0, 0.5, 5.0), (10.0, 0.5, 3.0), (5.0, 1.0, 2.0), (20.0, 0.25, 3.0)]
    settings = list(product((0.5, 0.8, 0.9, 0.98), [10 ** (-3 + place / 6) for place in range(15)]))
    needed = {
        make: benchmark_module.steps_needed(make, constants, settings, 250) for make in (AssociativeMomentum, delta)
    }
    assert (needed[delta].amin(0) < needed[AssociativeMomentum].amin(0)).all(), needed
    usual = [place for place, (a, _) in enumerate(settings) if a == 0.9]
    assert (needed[delta][usual].amin(0) < needed[AssociativeMomentum][usual].amin(0)).all(), needed


def test_the_record_is_what_the_rules_do(benchmark_module: ModuleType, repository: Path) -> None:
    lines = (repository / "docs/results/delta-momentum.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == len(benchmark_module.RULES) * len(benchmark_module.CONSTANTS)
    for row in rows:
        if (row["k"], row["a"], row["omega"]) == benchmark_module.SHOWN:
            make, best = benchmark_module.RULES[row["rule"]][0], row["best"]
            settings = [(best["momentum"], best["lr"])]
            needed = benchmark_module.steps_needed(make, [benchmark_module.SHOWN], settings, 400)
            assert abs(int(needed) - best["steps"]) <= 0.1 * best["steps"]  # rounding may differ elsewhere
