"""Nested Learning for PyTorch: models that keep learning from what they read."""

__version__ = "0.1.0"
