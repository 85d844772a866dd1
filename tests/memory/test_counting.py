"""What a memory with one fixed key can count: the rule behind the counting languages (docs/results)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nestlearn.memory import Gates, catalog, scan

N = 100


def read_back(memory: str, step: float, values: list[float]) -> Tensor:
    """What is read at the key after each of the values was written there with the same step size."""
    tokens = len(values)
    key = torch.eye(2, dtype=torch.float64)[0].expand(1, tokens, 2)
    written = key * torch.tensor(values, dtype=torch.float64)[None, :, None]
    start = catalog[memory].init_state((1,), 2, 2, dtype=torch.float64)
    gates = Gates(torch.full((1, tokens), step, dtype=torch.float64), torch.ones(1, tokens, dtype=torch.float64), None)
    return scan(catalog[memory], start, key, key, written, gates)[0][0, :, 0]


def test_the_dot_product_without_erasing_adds_up_exactly() -> None:
    read = read_back("linear_attention", 1.0, [1.0] * N + [-1.0] * N)
    expected = torch.tensor([*range(1, N + 1), *range(N - 1, -1, -1)], dtype=torch.float64)
    torch.testing.assert_close(read, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("step", [1e-3, 1e-4])
def test_a_delta_counter_is_empty_early_by_the_step_times_the_square_of_the_count(step: float) -> None:
    read = read_back("deltanet", step, [1.0] * N + [-1.0] * N)
    rate = -math.log1p(-step)
    empty = math.log(2 - math.exp(-rate * N)) / rate
    assert int((read[N:] <= 0).nonzero()[0]) + 1 == math.ceil(empty)
    assert N - empty == pytest.approx(step * N**2, rel=0.1)


def test_steps_of_two_count_exactly_where_the_values_alternate() -> None:
    """Two reflections make a translation: the values need not know the count."""
    signs = torch.tensor([(-1.0) ** t for t in range(1, 2 * N + 1)], dtype=torch.float64)
    up = torch.tensor([1.0] * N + [-1.0] * N, dtype=torch.float64)
    read = read_back("deltanet", 2.0, (0.5 * signs * up).tolist())
    torch.testing.assert_close(read * signs, up.cumsum(0), atol=1e-9, rtol=0)
