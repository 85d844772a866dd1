"""Synthetic tasks with deterministic generators, after the protocols of the literature."""

from nestlearn.evals.tasks.base import Published as Published
from nestlearn.evals.tasks.base import Score as Score
from nestlearn.evals.tasks.base import Split as Split
from nestlearn.evals.tasks.base import Task as Task
from nestlearn.evals.tasks.formal import Counter2 as Counter2
from nestlearn.evals.tasks.formal import Counter3 as Counter3
from nestlearn.evals.tasks.formal import EvenA as EvenA
from nestlearn.evals.tasks.formal import FormalLanguage as FormalLanguage
from nestlearn.evals.tasks.formal import Parity as Parity
from nestlearn.evals.tasks.formal import RepeatedAbab as RepeatedAbab
from nestlearn.evals.tasks.formal import Shuffle2 as Shuffle2
from nestlearn.evals.tasks.mad import Compression as Compression
from nestlearn.evals.tasks.mad import FuzzyRecall as FuzzyRecall
from nestlearn.evals.tasks.mad import InContextRecall as InContextRecall
from nestlearn.evals.tasks.mad import MadTask as MadTask
from nestlearn.evals.tasks.mad import Memorization as Memorization
from nestlearn.evals.tasks.mad import NoisyRecall as NoisyRecall
from nestlearn.evals.tasks.mad import SelectiveCopying as SelectiveCopying
from nestlearn.evals.tasks.needle import NeedleInNoise as NeedleInNoise
from nestlearn.evals.tasks.needle import WhereIs as WhereIs
from nestlearn.evals.tasks.recall import Mqar as Mqar
from nestlearn.evals.tasks.recall import RewrittenMqar as RewrittenMqar
from nestlearn.evals.tasks.tracking import S3 as S3
from nestlearn.evals.tasks.tracking import S5 as S5
from nestlearn.evals.tasks.tracking import GroupProduct as GroupProduct
from nestlearn.evals.tasks.tracking import ModularSum as ModularSum
