"""Hugging Face models built from nested levels."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from nestlearn.models.cache import HopeCache, LayerState
from nestlearn.models.config import HopeConfig
from nestlearn.models.flops import RowBytes, flops, row_bytes
from nestlearn.models.generation import generate_texts
from nestlearn.models.heads import HopeForSequenceClassification, HopeForTokenClassification
from nestlearn.models.modeling import HopeForCausalLM, HopeModel, HopePreTrainedModel
from nestlearn.models.presets import presets
from nestlearn.models.stacking import (
    LevelState,
    freeze_backbone,
    level_parameters,
    load_stacked,
    register_families,
    stack_levels,
    unstack_levels,
)

AutoConfig.register(HopeConfig.model_type, HopeConfig, exist_ok=True)
AutoModel.register(HopeConfig, HopeModel, exist_ok=True)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(HopeConfig, HopeForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(HopeConfig, HopeForTokenClassification, exist_ok=True)
register_families()

__all__ = [
    "HopeCache",
    "HopeConfig",
    "HopeForCausalLM",
    "HopeForSequenceClassification",
    "HopeForTokenClassification",
    "HopeModel",
    "HopePreTrainedModel",
    "LayerState",
    "LevelState",
    "RowBytes",
    "flops",
    "freeze_backbone",
    "generate_texts",
    "level_parameters",
    "load_stacked",
    "presets",
    "row_bytes",
    "stack_levels",
    "unstack_levels",
]
