"""Running: the loop, the engine, checkpoints, evaluation, tracking, and the launch under Ray."""
