"""Level stacking: MLPs of pretrained language models become levels that learn while they read (NL section 7.3)."""

from .families import MapNames, find_networks
from .general import estimate_general
from .learn import KeyValues, SegmentRead, SegmentRow, read_segment, read_segments
from .model import (
    StackedModel,
    freeze_backbone,
    level_parameters,
    load_stacked,
    register_families,
    register_family,
    stack_levels,
    stacked_classes,
    stacked_model,
    unstack_levels,
)
from .network import LevelFast, LevelState, reading
from .plan import StackPlan
from .practice import PracticeRows, practise

__all__ = [
    "KeyValues",
    "LevelFast",
    "LevelState",
    "MapNames",
    "PracticeRows",
    "SegmentRead",
    "SegmentRow",
    "StackPlan",
    "StackedModel",
    "estimate_general",
    "find_networks",
    "freeze_backbone",
    "level_parameters",
    "load_stacked",
    "practise",
    "read_segment",
    "read_segments",
    "reading",
    "register_families",
    "register_family",
    "stack_levels",
    "stacked_classes",
    "stacked_model",
    "unstack_levels",
]
