"""Layers that own slow weights: one protocol, ``forward(x, state, mask, reset) -> (y, state)``."""

from nestlearn.nn.attention import AttentionState, CausalAttention
from nestlearn.nn.conv import ShortConv
from nestlearn.nn.ffn import FeedForward
from nestlearn.nn.self_modifying import SelfModifyingState, SelfModifyingTitans

__all__ = [
    "AttentionState",
    "CausalAttention",
    "FeedForward",
    "SelfModifyingState",
    "SelfModifyingTitans",
    "ShortConv",
]
