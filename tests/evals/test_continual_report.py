"""benchmarks/continual_report.py: records, tables and charts of runs over a stream."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from nestlearn.continual import ContinualLearner, JointTraining
from nestlearn.data import permuted_digits
from nestlearn.evals.bench.store import ResultStore

SPEC = spec_from_file_location("continual_report", Path(__file__).parents[2] / "benchmarks" / "continual_report.py")
assert SPEC is not None and SPEC.loader is not None
report = module_from_spec(SPEC)
SPEC.loader.exec_module(report)

SETTINGS = {"width": 16}


def result(row: str, seed: int, method=None, score="accuracy"):
    torch.manual_seed(seed)
    model = torch.nn.Linear(64, 10)
    learner = ContinualLearner(model, partial(torch.optim.Adam, lr=1e-2), method=method, score=score, seed=seed)
    return report.to_eval_result(
        learner.fit(permuted_digits(2, train=100)), row=row, settings=SETTINGS, n=20, command="run me"
    )


def test_records_go_through_the_store_of_the_benchmarks(tmp_path):
    store, made = ResultStore(tmp_path), result("plain", 0)
    store.append(made)
    store.append(result("joint", 0, JointTraining()))
    (read, joint) = ResultStore(tmp_path).results()
    assert read.to_json() == made.to_json()
    assert report.continual_key("plain", 0, SETTINGS) in store.finished()
    for other in (("plain", 1, SETTINGS), ("other", 0, SETTINGS), ("plain", 0, {"width": 17})):
        assert report.continual_key(*other) not in store.finished()
    assert read.value == pytest.approx(sum(read.details["matrix"][-1]) / 2)
    assert joint.details["matrix"][0] == [None, None]
    assert set(joint.details["scores"]) == {"average_accuracy"}


def test_table_has_means_and_errors_over_seeds():
    runs = [result("plain", seed) for seed in (0, 1)] + [result("joint", 0, JointTraining())]
    lines = report.table(runs)
    assert len({line.count("|") for line in lines}) == 1
    values = [100 * run.value for run in runs[:2]]
    mean, error = report.mean_and_error(values)
    assert error == pytest.approx(abs(values[0] - values[1]) / 2)
    assert lines[2].startswith(f"| plain | 2 | {mean:.1f} ± {error:.1f} | ")
    assert lines[3].startswith(f"| joint | 1 | {100 * runs[2].value:.1f} |  |  |")
    assert report.table(runs, ["joint"])[2:] == lines[3:]
    assert report.mean_and_error([3.0]) == (3.0, None)


def test_bits_are_shown_as_bits():
    runs = [result("plain", seed, score="bits") for seed in (0, 1)]
    header, _, line = report.table(runs)
    assert header.startswith("| minus bits per target | seeds |") and header.count("|") == line.count("|")
    mean, error = report.mean_and_error([run.value for run in runs])
    assert mean < -0.5 and line.startswith(f"| plain | 2 | {mean:.2f} ± {error:.2f} | ")
    with pytest.raises(ValueError, match="no axis in percent"):
        report.accuracy_chart(runs, ["plain"])
    with pytest.raises(ValueError, match=r"'EWC' has the value -2\.5; .*use `table`"):
        report.matrix_chart({"EWC": [[-2.5]]})
    with pytest.raises(ValueError, match=r"different scores \(average accuracy, average bits\)"):
        report.table([*runs, result("plain", 0)])
    with pytest.raises(ValueError, match=r"No result is of the rows \['absent'\]; there are \['plain'\]"):
        report.accuracy_chart([result("plain", 0)], ["absent"])


def test_charts_are_svg_with_every_value():
    runs = [result("plain", seed) for seed in (0, 1)]
    assert ElementTree.fromstring(report.accuracy_chart(runs, ["plain", "absent"])).tag.endswith("svg")
    svg = ElementTree.fromstring(report.matrix_chart({"a < b": [[0.9, 0.25], [None, math.nan]], "c": [[1.0]]}))
    texts = [element.text for element in svg.iter() if element.tag.endswith("text")]
    assert {"a < b", "90", "25", "c", "100"} <= set(texts)
    assert len([e for e in svg.iter() if e.tag.endswith("rect")]) == 5
