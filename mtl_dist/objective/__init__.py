"""What is optimised and what is reported: losses over all ranks, their balancing, and additive metrics."""
