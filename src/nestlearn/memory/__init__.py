"""Associative memories: pure functions on tensors (design: four axes and a clock).

`scan` runs a memory over tokens; `catalog` names the memories of the literature.
"""

from .algorithms import Algorithm, Descent, Momentum, OrthogonalizedMomentum
from .architectures import MLP, Architecture, Matrix
from .associative import AssociativeMemory
from .catalog import catalog
from .engine import (
    Explanation,
    absorb,
    explain,
    has_write_sizes,
    scan,
    scan_with_sizes,
    surprise,
    use_engine,
)
from .kernels.newton_schulz import newton_schulz
from .objectives import L2, DotProduct, Huber, Lp, Objective, ThresholdObjective, ValueShiftRobust
from .retention import KL, Bregman, Decay, Delta, ElasticNet, Lq, LqDual, Oja, Retention
from .types import Factor, Gates, State, Tokens

__all__ = [
    "KL",
    "L2",
    "MLP",
    "Algorithm",
    "Architecture",
    "AssociativeMemory",
    "Bregman",
    "Decay",
    "Delta",
    "Descent",
    "DotProduct",
    "ElasticNet",
    "Explanation",
    "Factor",
    "Gates",
    "Huber",
    "Lp",
    "Lq",
    "LqDual",
    "Matrix",
    "Momentum",
    "Objective",
    "Oja",
    "OrthogonalizedMomentum",
    "Retention",
    "State",
    "ThresholdObjective",
    "Tokens",
    "ValueShiftRobust",
    "absorb",
    "catalog",
    "explain",
    "has_write_sizes",
    "newton_schulz",
    "scan",
    "scan_with_sizes",
    "surprise",
    "use_engine",
]
