"""Level stacking: MLPs of pretrained language models become levels that learn while they read (NL section 7.3)."""

from .build import freeze_backbone, level_parameters, stack_levels, unstack_levels
from .classes import StackedModel, load_stacked, register_families, register_family
from .families import MapNames, find_networks
from .learn import KeyValues, Segment, read_segment, stacked_model
from .plan import StackPlan
from .state import LevelFast, LevelState, reading

__all__ = [
    "KeyValues",
    "LevelFast",
    "LevelState",
    "MapNames",
    "Segment",
    "StackPlan",
    "StackedModel",
    "find_networks",
    "freeze_backbone",
    "level_parameters",
    "load_stacked",
    "read_segment",
    "reading",
    "register_families",
    "register_family",
    "stack_levels",
    "stacked_model",
    "unstack_levels",
]
