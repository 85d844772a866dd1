"""Benchmarks: mixers trained side by side on synthetic tasks, with equal parameters, tokens, seeds and data."""

from nestlearn.evals.bench.cells import Cell as Cell
from nestlearn.evals.bench.cells import plan as plan
from nestlearn.evals.bench.mixers import mixer_fields as mixer_fields
from nestlearn.evals.bench.mixers import named_mixers as named_mixers
from nestlearn.evals.bench.pool import CellError as CellError
from nestlearn.evals.bench.run import BenchOptions as BenchOptions
from nestlearn.evals.bench.run import BenchOutcome as BenchOutcome
from nestlearn.evals.bench.run import parse_duration as parse_duration
from nestlearn.evals.bench.run import run_bench as run_bench
from nestlearn.evals.bench.store import ResultStore as ResultStore
from nestlearn.evals.bench.suites import Recipe as Recipe
from nestlearn.evals.bench.suites import Suite as Suite
from nestlearn.evals.bench.suites import Training as Training
from nestlearn.evals.bench.suites import find_suite as find_suite
from nestlearn.evals.bench.suites import register_suite as register_suite
from nestlearn.evals.bench.suites import suite_names as suite_names
from nestlearn.evals.bench.training import run_cell as run_cell
