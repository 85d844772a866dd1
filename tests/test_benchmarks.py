"""The scripts of benchmarks/: each imports and shows its help; what they share keeps records and makes tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

Load = Callable[[str], ModuleType]
FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_shows_its_docstring_as_help(
    load_benchmark: Load, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    module = load_benchmark(name)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0 and str(module.__doc__).splitlines()[0] in capsys.readouterr().out


def test_finished_runs_are_not_repeated(load_benchmark: Load, tmp_path: Path) -> None:
    common, path = load_benchmark("common"), tmp_path / "runs" / "results.jsonl"
    first = common.Records(path).get({"row": "a", "seed": 0}, lambda: {"value": 1.5})
    again = common.Records(path)
    assert again.get({"row": "a", "seed": 0}, lambda: pytest.fail("repeated")) == first
    again.get({"row": "a", "seed": 1}, lambda: {"value": 2.5})
    assert [record["value"] for record in common.Records(path).where(row="a")] == [1.5, 2.5]
    assert common.Records(path, fresh=True).all == [] and not path.exists()


def test_tables(load_benchmark: Load) -> None:
    common = load_benchmark("common")
    assert common.table(["row", "value"], [["a", "1"]]) == "| row | value |\n| --- | --: |\n| a | 1 |\n"
    assert common.plus_minus([1.0, 2.0, 3.0], digits=2) == "2.00 ± 0.58"


@pytest.mark.slow
def test_the_gpu_benchmark_runs_without_a_device(load_benchmark: Load, tmp_path: Path) -> None:
    """At tiny sizes: the gate, the speed, the operations of a layer, and both files."""
    gpu = load_benchmark("gpu")
    gpu.main(["--cpu-smoke", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "gpu_cpu-smoke.json").read_text())
    assert [record["family"] for record in report["records"]] == ["hope", "transformer"]
    for record in report["records"]:
        assert record["tokens_per_second"]["median"] > 0 and record["gate"]["gradients_error"] < 1e-3
        assert 0 < record["operations_per_layer"]["forward"] and record["last_loss"] < record["first_loss"]
    assert report["hardware"]["packages"]["torch"] and "hope-tiny" in (tmp_path / "gpu_cpu-smoke.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_the_gpu_benchmark_says_what_it_needs(load_benchmark: Load) -> None:
    with pytest.raises(SystemExit, match=r"a CUDA device, and there is none.*--cpu-smoke"):
        load_benchmark("gpu").main([])
