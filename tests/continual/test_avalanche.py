"""Avalanche: its interface by stand-ins, the library itself where it is installed."""

from __future__ import annotations

import importlib.util
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nestlearn.continual import ContinualLearner
from nestlearn.continual.avalanche import LabelledTensors, from_avalanche, refresh_plugin, to_avalanche
from nestlearn.data import permuted_digits, split_digits
from nestlearn.optim import InputProjection

INSTALLED = importlib.util.find_spec("avalanche") is not None


def stand_in(stream, extra=()):
    """What of a benchmark is read: streams of experiences whose data sets yield (x, y, task label)."""

    def experiences(part):
        sets = (LabelledTensors(getattr(task, part)) for task in stream.tasks)
        return [SimpleNamespace(dataset=[(x, y, *extra) for x, y in (s[i] for i in range(len(s)))]) for s in sets]

    return SimpleNamespace(train_stream=experiences("train"), test_stream=experiences("test"))


@pytest.mark.parametrize("extra", [(), (0,)])
def test_reads_the_interface(extra):
    stream = split_digits(5, train=300)
    read = from_avalanche(stand_in(stream, extra), "digits")
    assert read.num_classes == 10 and len(read) == 5
    for task, own in zip(read.tasks, stream.tasks, strict=True):
        assert task.classes == own.classes
        assert torch.equal(task.train.inputs, own.train.inputs) and torch.equal(task.test.targets, own.test.targets)
    learner = ContinualLearner(torch.nn.Linear(64, 10), partial(torch.optim.Adam, lr=1e-3))
    assert len(learner.fit(read).matrix) == 5


def test_what_is_no_benchmark_is_refused():
    with pytest.raises(TypeError, match="A list is no Avalanche benchmark: .*train_stream"):
        from_avalanche([])
    uneven = stand_in(permuted_digits(2, train=50))
    uneven.test_stream.pop()
    with pytest.raises(ValueError, match="2 training and 1 test experiences"):
        from_avalanche(uneven)
    wrong = SimpleNamespace(train_stream=[SimpleNamespace(dataset=[1])], test_stream=[SimpleNamespace(dataset=[1])])
    with pytest.raises(TypeError, match="An item of the benchmark is a int"):
        from_avalanche(wrong)


@pytest.mark.skipif(INSTALLED, reason="Avalanche is installed")
def test_a_missing_library_is_named():
    layer = torch.nn.Linear(1, 1)
    projection = InputProjection(torch.optim.SGD(layer.parameters(), lr=0.1), layer)
    for call in (lambda: to_avalanche(permuted_digits(1)), lambda: refresh_plugin(projection)):
        with pytest.raises(ImportError, match="pip install avalanche-lib"):
            call()


@pytest.mark.skipif(not INSTALLED, reason="Avalanche is not installed")
def test_a_strategy_of_avalanche_learns_with_the_projection():
    from avalanche.training.supervised import Naive  # pyright: ignore

    stream = permuted_digits(2, train=200)
    model = torch.nn.Linear(64, 10)
    optimizer = InputProjection(torch.optim.Adam(model.parameters(), lr=1e-2), model, alpha=10.0)
    plugins = [refresh_plugin(optimizer)]
    strategy = Naive(
        model=model, optimizer=optimizer, criterion=torch.nn.CrossEntropyLoss(), train_mb_size=32, plugins=plugins
    )
    benchmark = to_avalanche(stream)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    assert all(item["applied"] is not None for item in optimizer.state_dict()["param_groups"][0]["wrappers"][0]["maps"])
    assert len(from_avalanche(benchmark)) == 2
