"""Distributed training of multi-task facial affect models: valence/arousal, expressions and action units."""

import os

__version__ = "0.1.0"

# How torch's threads wait for each other: OpenMP reads it when torch is imported, which is after this. Spinning, its
# default, makes two threads beside one busy process ten times slower than sleeping (benchmarks/NOTES.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
