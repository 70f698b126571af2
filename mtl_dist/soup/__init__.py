"""Means of the weights of checkpoints."""
