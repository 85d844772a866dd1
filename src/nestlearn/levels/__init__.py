"""Any model with its optimizer as a system of nested problems: shown, measured, and built from parts."""

from nestlearn.levels.nested import nested_system
from nestlearn.levels.system import Component, Frequency, NestedSystem

__all__ = ["Component", "Frequency", "NestedSystem", "nested_system"]
