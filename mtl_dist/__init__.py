"""Distributed training of multi-task facial affect models: valence/arousal, expressions and action units."""

import os

__version__ = "0.1.0"

# How torch's threads wait for each other: OpenMP reads it when torch is imported, which is after this. Spinning is some
# percent faster on an idle machine, and several times slower on a shared one (`python -m benchmarks.threads`).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
