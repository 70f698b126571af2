"""Training: the loop and what it stands on; started alone, under torchrun and under Ray."""
