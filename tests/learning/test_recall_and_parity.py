"""The layer learns: multi-query recall and parity, medians of three seeds. Slow: `make test-all`."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from nestlearn.data.synthetic import IGNORE, multi_query_recall, parity


@pytest.fixture(scope="module")
def comparison(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    """benchmarks/recall_and_parity.py, the command that repeats these figures."""
    return load_benchmark("recall_and_parity")


def medians(comparison: ModuleType, task: str) -> dict[str, float]:
    result = comparison.median([comparison.learn(task, "hope", seed) for seed in range(3)])
    print(f"{task}, hope, median of three seeds: {result}")  # noqa: T201 - the figures are the point
    return result


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_recall_is_learned(comparison: ModuleType) -> None:
    assert medians(comparison, "recall")["queries"] >= 0.95


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_parity_is_learned_and_extends_to_twice_the_length(comparison: ModuleType) -> None:
    scores = medians(comparison, "parity")
    assert scores["2-50"] == 1.0
    assert scores["51-100"] >= 0.90


def test_recall_asks_for_the_value_that_followed_the_key() -> None:
    batch = multi_query_recall(8, torch.Generator().manual_seed(0), vocabulary=32, length=40, pairs=6)
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        stored = dict(zip(inputs[0:12:2].tolist(), inputs[1:12:2].tolist(), strict=True))
        asked = (targets != IGNORE).nonzero().flatten()
        assert len(asked) == 6 and asked.min() >= 12
        assert {inputs[t].item(): targets[t].item() for t in asked} == stored
        assert len(set(stored.values())) == 6 and min(stored.values()) >= 16 > max(stored)


def test_parity_is_that_of_the_prefix() -> None:
    batch = parity(4, torch.Generator().manual_seed(0), shortest=5, longest=9)
    assert 5 <= batch.inputs.shape[1] <= 9
    for t in range(batch.inputs.shape[1]):
        assert torch.equal(batch.targets[:, t], batch.inputs[:, : t + 1].sum(1) % 2)


@pytest.mark.parametrize(("settings", "message"), [({"pairs": 40}, "keys"), ({"length": 30}, "length")])
def test_recall_refuses_what_does_not_fit(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multi_query_recall(1, torch.Generator(), **settings)


def test_parity_refuses_empty_lengths() -> None:
    with pytest.raises(ValueError, match="lengths"):
        parity(1, torch.Generator(), shortest=5, longest=4)
