"""Layers that own slow weights: one protocol, ``forward(x, state, mask, reset) -> (y, state)``."""

from nestlearn.nn.attention import AttentionState, CausalAttention
from nestlearn.nn.cms import ContinuumMemory, ContinuumState, Level
from nestlearn.nn.conv import ShortConv
from nestlearn.nn.ffn import FeedForward
from nestlearn.nn.mixer import GATE_RULES, GateRule, MemoryMixer, MixerState
from nestlearn.nn.self_modifying import SelfModifyingState, SelfModifyingTitans

__all__ = [
    "GATE_RULES",
    "AttentionState",
    "CausalAttention",
    "ContinuumMemory",
    "ContinuumState",
    "FeedForward",
    "GateRule",
    "Level",
    "MemoryMixer",
    "MixerState",
    "SelfModifyingState",
    "SelfModifyingTitans",
    "ShortConv",
]
