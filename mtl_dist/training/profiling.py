"""A profile of three steps, as `run.profile` says: every operation of host and GPU, with our names for a step's parts.

It is a trace of Chrome's format, which ui.perfetto.dev and chrome://tracing open.
"""

from __future__ import annotations

import torch

from mtl_dist import storage
from mtl_dist.training.times import Times

NUM_STEPS = 3
DIRECTORY = "profile"


class Profile:
    """Records steps from `first` on (None: none), by the steps that it is told of."""

    def __init__(self, run_uri: str, times: Times, first: int | None, device: torch.device):
        self._run_uri, self._times, self._first, self._device = run_uri, times, first, device
        self._profiler: torch.profiler.profile | None = None

    def passed(self, step: int) -> None:
        """Take note of the last completed step: the profile begins after the one before its first."""
        if self._first is None:
            return
        if step == self._first - 1:
            self._begin()
        elif self._profiler and step >= self._first + NUM_STEPS - 1:
            self.end()

    def end(self) -> None:
        """Write what was recorded, where something was."""
        profiler, self._profiler, self._times.in_profile = self._profiler, None, False
        if profiler is None:
            return
        profiler.stop()
        name = f"step-{self._first:06d}.json.gz"
        where = storage.join(self._run_uri, DIRECTORY, name)
        try:
            with storage.scratch_directory(DIRECTORY) as scratch:
                profiler.export_chrome_trace(str(scratch / name))
                storage.upload(scratch / name, where)
        except OSError as error:  # the run is worth more
            print(f"profile {where} was not written: {error}", flush=True)
            return
        print(f"profile {where} (opens in ui.perfetto.dev)", flush=True)

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._times.in_profile = True
