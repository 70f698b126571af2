"""A run as its storage has it: checkpoints, starts, weights."""

CONFIG_NAME = "config.yaml"  # the resolved configuration
