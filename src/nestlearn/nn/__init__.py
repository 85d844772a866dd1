"""Layers that own slow weights: one protocol, ``forward(x, state, mask, reset) -> (y, state)``."""

from nestlearn.nn.attention import AttentionState, CausalAttention
from nestlearn.nn.cms import ContinuumMemory, ContinuumState, Level
from nestlearn.nn.conv import ShortConv
from nestlearn.nn.ffn import FeedForward
from nestlearn.nn.mixer import GATE_RULES, GateRule, MemoryMixer, MixerState
from nestlearn.nn.self_modifying import SelfModifyingState, SelfModifyingTitans
from nestlearn.nn.titans import HybridState, MemoryAsGate, MemoryAsLayer
from nestlearn.nn.titans_mac import ContextState, MemoryAsContext
from nestlearn.nn.tnt import HierarchicalMemory, HierarchicalState

__all__ = [
    "GATE_RULES",
    "AttentionState",
    "CausalAttention",
    "ContextState",
    "ContinuumMemory",
    "ContinuumState",
    "FeedForward",
    "GateRule",
    "HierarchicalMemory",
    "HierarchicalState",
    "HybridState",
    "Level",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "MemoryMixer",
    "MixerState",
    "SelfModifyingState",
    "SelfModifyingTitans",
    "ShortConv",
]
