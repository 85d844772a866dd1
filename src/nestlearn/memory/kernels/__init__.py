"""Arithmetic of the memories: products with gradients written by hand, Newton-Schulz. Knows no memory."""
