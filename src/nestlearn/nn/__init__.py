"""Layers that own slow weights: one protocol, ``forward(x, state, mask, reset) -> (y, state)``."""

from nestlearn.nn.attention import AttentionConfig, AttentionState, CausalAttention
from nestlearn.nn.cms import ContinuumMemory, ContinuumState, Level
from nestlearn.nn.common import Mixer
from nestlearn.nn.config import MixerConfig, mixer_types, register_mixer
from nestlearn.nn.conv import ShortConv
from nestlearn.nn.ffn import FeedForward
from nestlearn.nn.long_term_memory import LongTermMemory
from nestlearn.nn.mixer import GATE_RULES, GateRule, MemoryMixer, MemoryMixerConfig, MixerState
from nestlearn.nn.pmi import PMI, PMIConfig, PMIState, TwoSourceRead
from nestlearn.nn.self_modifying import (
    SelfModifyingConfig,
    SelfModifyingMatrix,
    SelfModifyingMLP,
    SelfModifyingState,
    SelfModifyingTitans,
)
from nestlearn.nn.thought import (
    Answer,
    ContinuousThought,
    ContinuousThoughtConfig,
    Thoughts,
    ThoughtState,
    certainty_of,
    ticks_loss,
)
from nestlearn.nn.titans import HybridState, MemoryAsGate, MemoryAsLayer, TitansMAGConfig, TitansMALConfig
from nestlearn.nn.titans_mac import ContextState, MemoryAsContext, TitansMACConfig
from nestlearn.nn.tnt import HierarchicalMemory, HierarchicalState, TNTConfig
from nestlearn.nn.working_memory import WorkingMemory

__all__ = [
    "GATE_RULES",
    "PMI",
    "Answer",
    "AttentionConfig",
    "AttentionState",
    "CausalAttention",
    "ContextState",
    "ContinuousThought",
    "ContinuousThoughtConfig",
    "ContinuumMemory",
    "ContinuumState",
    "FeedForward",
    "GateRule",
    "HierarchicalMemory",
    "HierarchicalState",
    "HybridState",
    "Level",
    "LongTermMemory",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "MemoryMixer",
    "MemoryMixerConfig",
    "Mixer",
    "MixerConfig",
    "MixerState",
    "PMIConfig",
    "PMIState",
    "SelfModifyingConfig",
    "SelfModifyingMLP",
    "SelfModifyingMatrix",
    "SelfModifyingState",
    "SelfModifyingTitans",
    "ShortConv",
    "TNTConfig",
    "ThoughtState",
    "Thoughts",
    "TitansMACConfig",
    "TitansMAGConfig",
    "TitansMALConfig",
    "TwoSourceRead",
    "WorkingMemory",
    "certainty_of",
    "mixer_types",
    "register_mixer",
    "ticks_loss",
]
