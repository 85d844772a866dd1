"""The contract of every memory: it accepts those of the package and of users, and notices what is wrong."""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nestlearn.memory import (
    KL,
    L2,
    MLP,
    AssociativeMemory,
    Decay,
    DotProduct,
    ElasticNet,
    Matrix,
    OrthogonalizedMomentum,
    Retention,
    catalog,
)
from nestlearn.memory.contract import check_contract


@pytest.mark.parametrize("name", catalog)
def test_the_catalog_keeps_the_contract(name: str):
    check_contract(catalog[name])


def test_memories_outside_the_catalog_keep_the_contract():
    check_contract(AssociativeMemory(MLP(2), L2(), Decay(per_channel=True)))
    check_contract(AssociativeMemory(Matrix(), L2(), algorithm=OrthogonalizedMomentum()))
    check_contract(AssociativeMemory(MLP(2), L2(), ElasticNet(0.01), retain_to="initial"))
    check_contract(AssociativeMemory(MLP(2), L2(), KL(), read="chunk"))


@dataclass(frozen=True)
class WrongError(L2):
    def error(self, predict, v: Tensor) -> Tensor:
        return 1.01 * (predict() - v)


@dataclass(frozen=True)
class AcrossRows(Retention):
    """Normalizes by the norm of the whole batch."""

    def weights(self, accumulator: Tensor, anchor: Tensor) -> Tensor:
        return accumulator / (1 + anchor.norm())


@dataclass(frozen=True)
class Structural:
    """A retention by its methods alone, without the base class."""

    def weights(self, accumulator: Tensor, anchor: Tensor) -> Tensor:
        return torch.tanh(accumulator)

    def anchored(self, accumulator: Tensor) -> Tensor:
        return torch.tanh(accumulator)

    def close(self, accumulator: Tensor) -> Tensor:
        return 0.9 * accumulator

    def keep(self, weights: Tensor, alpha: Tensor, eta: Tensor, x: Tensor) -> Tensor:
        return alpha * weights - 0.1 * eta * (weights @ x.unsqueeze(-1)) * x.unsqueeze(-2)

    def start(self, weights: Tensor) -> Tensor:
        return weights


def test_a_retention_needs_no_base_class():
    check_contract(AssociativeMemory(MLP(2), L2(), Structural()))


def test_broken_rules_are_named():
    with pytest.raises(AssertionError, match="the engines differ in"):
        check_contract(AssociativeMemory(Matrix(), WrongError()))
    with pytest.raises(AssertionError, match="the engines differ in|a row depends"):
        check_contract(AssociativeMemory(Matrix(), DotProduct(), AcrossRows()))


def test_the_example_of_a_new_rule_runs(repository: Path, capsys: pytest.CaptureFixture[str]):
    script = repository / "examples" / "new_update_rule.py"
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "the contract holds" in printed and "UnitRows makes weights from accumulators" in printed
    lines = script.read_text().split("@dataclass")[1:]
    assert all(
        len([line for line in part.splitlines() if line.strip()]) <= 12
        for part in (lines[0], lines[1].split("def main")[0])
    )
