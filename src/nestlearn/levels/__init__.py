"""Any model with its optimizer as a system of nested problems: shown, measured, and built from parts."""

from nestlearn.levels.callback import LevelHealthCallback
from nestlearn.levels.health import Finding, LevelHealth, Measured
from nestlearn.levels.measuring import measure
from nestlearn.levels.nested import nested_system
from nestlearn.levels.system import Component, Frequency, NestedSystem

__all__ = [
    "Component",
    "Finding",
    "Frequency",
    "LevelHealth",
    "LevelHealthCallback",
    "Measured",
    "NestedSystem",
    "measure",
    "nested_system",
]
