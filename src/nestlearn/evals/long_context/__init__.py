"""Long contexts: RULER's needles in a haystack and BABILong, generated locally."""

from nestlearn.evals.long_context.answers import answer_prompts
from nestlearn.evals.long_context.babilong import (
    LABELS,
    Question,
    babilong_samples,
    evaluate_babilong,
    exact_label,
    read_babi,
)
from nestlearn.evals.long_context.ruler import VARIANTS, Needles, containment, evaluate_ruler, ruler_samples

__all__ = [
    "LABELS",
    "VARIANTS",
    "Needles",
    "Question",
    "answer_prompts",
    "babilong_samples",
    "containment",
    "evaluate_babilong",
    "evaluate_ruler",
    "exact_label",
    "read_babi",
    "ruler_samples",
]
