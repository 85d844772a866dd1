"""Nested Learning for PyTorch: models that keep learning from what they read.

Importing this package registers its models with `transformers.AutoConfig`, `AutoModel` and `AutoModelForCausalLM`.
"""

from nestlearn.models import HopeCache, HopeConfig, HopeForCausalLM, HopeModel, flops, presets

__version__ = "0.1.0"

__all__ = [
    # models
    "HopeConfig",
    "HopeModel",
    "HopeForCausalLM",
    "HopeCache",
    "presets",
    "flops",
]
