"""Arithmetic of the memories: products with gradients written by hand, Newton-Schulz. It knows nothing of memories."""
