"""Layers that own slow weights: one protocol, ``forward(x, state, mask, reset) -> (y, state)``."""

from nestlearn.nn.attention import AttentionState, CausalAttention
from nestlearn.nn.cms import ContinuumMemory, ContinuumState, Level
from nestlearn.nn.conv import ShortConv
from nestlearn.nn.ffn import FeedForward
from nestlearn.nn.hierarchical import HierarchicalMemory, HierarchicalState
from nestlearn.nn.mixer import GATE_RULES, GateRule, MemoryMixer, MixerState
from nestlearn.nn.self_modifying import SelfModifyingState, SelfModifyingTitans
from nestlearn.nn.titans import HybridState, MemoryAsGate, MemoryAsLayer
from nestlearn.nn.titans_context import ContextState, MemoryAsContext

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
