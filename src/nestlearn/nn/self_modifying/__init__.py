"""Self-modifying Titans: keys, values and gates come from memories that learn in context (NL Eq. 83-91)."""

from .config import SelfModifyingConfig as SelfModifyingConfig
from .deep import SelfModifyingMLP as SelfModifyingMLP
from .layer import SelfModifyingState as SelfModifyingState
from .layer import SelfModifyingTitans as SelfModifyingTitans
from .matrix import SelfModifyingMatrix as SelfModifyingMatrix
