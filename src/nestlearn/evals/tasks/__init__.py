"""Synthetic tasks with deterministic generators, after the protocols of the literature."""

from nestlearn.evals.tasks.base import Published as Published
from nestlearn.evals.tasks.base import Score as Score
from nestlearn.evals.tasks.base import Split as Split
from nestlearn.evals.tasks.base import Task as Task
from nestlearn.evals.tasks.recall import Mqar as Mqar
