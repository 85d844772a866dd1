"""Optimizers of Nested Learning: drop-in rules for matrices, and wrappers around any torch optimizer.

optimizer = M3(param_groups(model), lr=1e-3)
optimizer = DGD(param_groups(model, lr=0.1, adamw_lr=1e-3), model)
optimizer = MultiTimescale(M3(timescale_groups(model, [(model.fast, 1), (model.slow, 16)])))
"""

from nestlearn.optim.deep_memory import DeepMemory
from nestlearn.optim.dgd import DGD
from nestlearn.optim.m3 import M3
from nestlearn.optim.matrix_optimizer import MatrixOptimizer
from nestlearn.optim.momentum import (
    AssociativeMomentum,
    DeepMomentum,
    DeltaMomentum,
    DeltaRule,
    GeneratedValues,
    HigherOrderMomentum,
    Polynomial,
)
from nestlearn.optim.multi_timescale import MultiTimescale, timescale_groups
from nestlearn.optim.outputs import NewtonSchulz, OrthogonalDescent, Sign
from nestlearn.optim.param_groups import param_groups
from nestlearn.optim.preconditioners import Diagonal, LeastSquares, Whitening
from nestlearn.optim.projection import InputProjection
from nestlearn.optim.transfer import NestedTransfer
from nestlearn.optim.wrapper import OptimizerWrapper

__all__ = [
    "DGD",
    "M3",
    "AssociativeMomentum",
    "DeepMemory",
    "DeepMomentum",
    "DeltaMomentum",
    "DeltaRule",
    "Diagonal",
    "GeneratedValues",
    "HigherOrderMomentum",
    "InputProjection",
    "LeastSquares",
    "MatrixOptimizer",
    "MultiTimescale",
    "NestedTransfer",
    "NewtonSchulz",
    "OptimizerWrapper",
    "OrthogonalDescent",
    "Polynomial",
    "Sign",
    "Whitening",
    "param_groups",
    "timescale_groups",
]
