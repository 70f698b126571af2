"""A run as its storage has it: checkpoints, starts, weights."""
