"""Harmonisation: per-reward gradients, their Gram matrix, and the weights that combine them."""
