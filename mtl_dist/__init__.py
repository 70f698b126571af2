"""Distributed training of multi-task facial affect models: valence/arousal, expressions and action units."""

import os

__version__ = "0.1.0"

# How torch's threads wait for each other: OpenMP reads it when torch is imported, which is after this. Sleeping
# costs 5 to 13% on an idle machine, and is 1.4 times as fast beside one busy process (`python -m benchmarks.threads`).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
