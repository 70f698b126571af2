"""Distributed training of multi-task facial affect models: valence/arousal, expressions and action units."""

__version__ = "0.1.0"
