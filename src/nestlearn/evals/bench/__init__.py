"""Benchmarks: mixers trained side by side on synthetic tasks, with equal parameters, tokens, seeds and data."""

from nestlearn.evals.bench.cells import Cell, plan
from nestlearn.evals.bench.mixers import mixer_fields, named_mixers
from nestlearn.evals.bench.pool import CellError
from nestlearn.evals.bench.run import BenchOptions, BenchOutcome, parse_duration, run_bench
from nestlearn.evals.bench.store import ResultStore
from nestlearn.evals.bench.suites import Recipe, Suite, Training, find_suite, register_suite, suite_names
from nestlearn.evals.bench.training import run_cell

__all__ = [
    "BenchOptions",
    "BenchOutcome",
    "Cell",
    "CellError",
    "Recipe",
    "ResultStore",
    "Suite",
    "Training",
    "find_suite",
    "mixer_fields",
    "named_mixers",
    "parse_duration",
    "plan",
    "register_suite",
    "run_bench",
    "run_cell",
    "suite_names",
]
