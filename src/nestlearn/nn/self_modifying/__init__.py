"""Self-modifying Titans: keys, values and gates come from memories that learn in context (NL Eq. 83-91)."""

from .config import SelfModifyingConfig
from .deep import SelfModifyingMLP
from .layer import SelfModifyingState, SelfModifyingTitans
from .matrix import SelfModifyingMatrix

__all__ = [
    "SelfModifyingConfig",
    "SelfModifyingMLP",
    "SelfModifyingMatrix",
    "SelfModifyingState",
    "SelfModifyingTitans",
]
