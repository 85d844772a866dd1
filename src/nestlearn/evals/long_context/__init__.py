"""Long contexts: RULER's needles in a haystack and BABILong, made locally."""

from nestlearn.evals.long_context.answers import answer_prompts as answer_prompts
from nestlearn.evals.long_context.babilong import LABELS as LABELS
from nestlearn.evals.long_context.babilong import Question as Question
from nestlearn.evals.long_context.babilong import babilong_samples as babilong_samples
from nestlearn.evals.long_context.babilong import evaluate_babilong as evaluate_babilong
from nestlearn.evals.long_context.babilong import exact_label as exact_label
from nestlearn.evals.long_context.babilong import read_babi as read_babi
from nestlearn.evals.long_context.ruler import VARIANTS as VARIANTS
from nestlearn.evals.long_context.ruler import Needles as Needles
from nestlearn.evals.long_context.ruler import containment as containment
from nestlearn.evals.long_context.ruler import evaluate_ruler as evaluate_ruler
from nestlearn.evals.long_context.ruler import ruler_samples as ruler_samples
