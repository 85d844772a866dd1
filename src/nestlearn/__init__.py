"""Nested Learning for PyTorch: models that keep learning from what they read.

Importing this package registers its models with `transformers.AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and the
two classes for labels, `AutoModelForSequenceClassification` and `AutoModelForTokenClassification`.
Its names are loaded when they are first used, so the import alone is quick.
"""

import importlib
from typing import TYPE_CHECKING

from nestlearn.registration import register_models

if TYPE_CHECKING:
    from nestlearn.continual import Fact, MemorySession
    from nestlearn.continual.pretrained import pretrained
    from nestlearn.models import (
        HopeCache,
        HopeConfig,
        HopeForCausalLM,
        HopeForSequenceClassification,
        HopeForTokenClassification,
        HopeModel,
        LevelState,
        flops,
        freeze_backbone,
        presets,
        stack_levels,
        unstack_levels,
    )
    from nestlearn.nn import Level

__version__ = "0.1.0"

__all__ = [
    # models
    "HopeConfig",
    "HopeModel",
    "HopeForCausalLM",
    "HopeForSequenceClassification",
    "HopeForTokenClassification",
    "HopeCache",
    "presets",
    "flops",
    # pretrained models that go on learning
    "Fact",
    "Level",
    "LevelState",
    "MemorySession",
    "freeze_backbone",
    "pretrained",
    "stack_levels",
    "unstack_levels",
]

_PACKAGES = {"continual", "data", "evals", "levels", "memory", "models", "nn", "optim", "peft", "train"}
# The other public names are of `models`.
_ELSEWHERE = {"Fact": "continual", "Level": "nn", "MemorySession": "continual", "pretrained": "continual.pretrained"}

if not TYPE_CHECKING:  # a type checker reads the imports above and reports unknown names

    def __getattr__(name: str) -> object:
        """A public name or a package, imported when it is first asked for."""
        if name in _PACKAGES:
            return importlib.import_module(f"nestlearn.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        package = importlib.import_module(f"nestlearn.{_ELSEWHERE.get(name, 'models')}")
        globals()[name] = getattr(package, name)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})


register_models()
