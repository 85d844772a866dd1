"""Evaluations with typed, versioned results."""

from nestlearn.evals.language import bits_per_byte as bits_per_byte
from nestlearn.evals.language import loss_by_position as loss_by_position
from nestlearn.evals.language import state_bytes_by_context as state_bytes_by_context
from nestlearn.evals.result import EvalResult as EvalResult
