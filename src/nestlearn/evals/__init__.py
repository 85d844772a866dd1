"""Evaluations with typed, versioned results."""

from nestlearn.evals.language import bits_per_byte, loss_by_position, state_bytes_by_context
from nestlearn.evals.result import EvalResult

__all__ = [
    "EvalResult",
    "bits_per_byte",
    "loss_by_position",
    "state_bytes_by_context",
]
