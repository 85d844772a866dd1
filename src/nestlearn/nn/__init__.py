"""Layers that own slow weights: one protocol, ``forward(x, state, mask, reset) -> (y, state)``."""

from nestlearn.nn.attention import AttentionState, CausalAttention
from nestlearn.nn.ffn import FeedForward

__all__ = ["AttentionState", "CausalAttention", "FeedForward"]
