"""Levels of a Continuum Memory System as an adapter of the `peft` library.

Importing this package registers the method ``CONTINUUM`` with peft: ``get_peft_model(model, ContinuumConfig())`` makes
an adapter, ``PeftModel.from_pretrained(model, folder)`` loads one. It needs ``pip install 'nestlearn[peft]'``.

The adapter is the levels' *initial weights*: those with which every level starts to read a text. Training moves them by
the loss of the whole model, level l once in every ``period_l / period_1`` steps (`continuum_optimizer`). Inside of peft
a forward pass reads these weights and writes nothing. `stack_adapter` gives the trained levels to
`nestlearn.MemorySession`, in which they go on learning from what they read.
"""

try:
    import peft as _peft  # noqa: F401
except ImportError as error:
    raise ImportError("nestlearn.peft needs peft, which is not installed: pip install 'nestlearn[peft]'.") from error

from .config import ContinuumConfig
from .layer import AdapterLevel, ContinuumLayer
from .model import ContinuumModel
from .optimizer import continuum_optimizer
from .register import register
from .stack import stack_adapter

register()

__all__ = [
    "AdapterLevel",
    "ContinuumConfig",
    "ContinuumLayer",
    "ContinuumModel",
    "continuum_optimizer",
    "stack_adapter",
]
