"""The Continuum Memory System: feed-forward networks that learn at different speeds (NL section 7)."""

from .level import Level as Level
from .memory import ContinuumMemory as ContinuumMemory
from .memory import ContinuumState as ContinuumState
from .memory import Meta as Meta
from .memory import Signal as Signal
from .memory import Variant as Variant
from .memory import WriteLevels as WriteLevels
from .nested import TransferBy as TransferBy
