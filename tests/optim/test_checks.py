"""Settings of optimizers and of the continual methods: values of any kind are refused by the setting's name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nestlearn.continual import EWC, ContinualLearner, ExperienceReplay, FineTuningReader, InContextReader
from nestlearn.optim import (
    DGD,
    M3,
    DeepMemory,
    DeltaRule,
    InputProjection,
    LeastSquares,
    MultiTimescale,
    NestedTransfer,
    Whitening,
)

LAYER = nn.Linear(2, 2)


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD(LAYER.parameters(), lr=0.1)


NUMBERS: dict[str, Callable[[Any], object]] = {
    "rho": lambda x: DeltaRule(rho=x),
    "eps": lambda x: DeltaRule(eps=x),
    "damping": lambda x: Whitening(damping=x),
    "alpha": lambda x: LeastSquares(alpha=x),
    "alpha ": lambda x: InputProjection(sgd(), LAYER, alpha=x),
    "alpha  ": lambda x: M3(LAYER.parameters(), alpha=x),
    "step": lambda x: DeepMemory(step=x),
    "gain": lambda x: DeepMemory(gain=x),
    "momentum": lambda x: NestedTransfer(sgd(), period=1, momentum=x),
    "momentum ": lambda x: DGD(LAYER.parameters(), LAYER, momentum=x),
    "damping ": lambda x: DGD(LAYER.parameters(), LAYER, damping=x),
    "rate": lambda x: NestedTransfer(sgd(), rate=x, period=1),
    "strength": lambda x: EWC(x),
    "max_grad_norm": lambda x: ContinualLearner(LAYER, sgd(), max_grad_norm=x),
}
COUNTS: dict[str, Callable[[Any], object]] = {
    "expansion": lambda x: DeepMemory(expansion=x),
    "period": lambda x: Whitening(period=x),
    "refresh": lambda x: DGD(LAYER.parameters(), LAYER, refresh=x),
    "slow_from": lambda x: M3(LAYER.parameters(), slow_from=x),
    "period ": lambda x: NestedTransfer(sgd(), period=x),
    "the period of group 0": lambda x: MultiTimescale(sgd(), [x]),
    "samples": lambda x: EWC(1.0, samples=x),
    "capacity": lambda x: ExperienceReplay(x),
    "batch_size": lambda x: ExperienceReplay(3, batch_size=x),
    "batch_size ": lambda x: ContinualLearner(LAYER, sgd(), batch_size=x),
    "epochs": lambda x: ContinualLearner(LAYER, sgd(), epochs=x),
    "context_length": lambda x: InContextReader(LAYER, None, x),
    "context_length ": lambda x: FineTuningReader(LAYER, None, torch.optim.SGD, x),
    "passes": lambda x: FineTuningReader(LAYER, None, torch.optim.SGD, passes=x),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["0.5", [1.0], math.nan, -1.0])
def test_what_is_no_number_in_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name.strip()} is .*must be"):
        NUMBERS[name](value)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", ["3", 2.5, math.nan, 0, True])
def test_what_is_no_whole_number_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name.strip()}( is |=).*must be a whole number"):
        COUNTS[name](value)


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    assert COUNTS["capacity"](np.int64(3)).capacity == 3  # pyright: ignore[reportAttributeAccessIssue]
