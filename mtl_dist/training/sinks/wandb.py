"""Weights & Biases, as WANDB_MODE, WANDB_PROJECT and its other variables say.

Online the server says where its history ends, and takes no earlier step. Offline every start writes a directory, and of
those of one run `wandb sync` lets the later replace the earlier: so each holds the run from its first step on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from mtl_dist.training.sinks.sending import PATIENCE_S
from mtl_dist.training.sinks.sink import About, Ending, Known, Row

PROJECT = "mtl_dist"
INIT_S = 30.0
UPLOAD_S = 600.0  # of the report: who attaches it waits until it is there


class WandB:
    """A run of W&B."""

    name = "wandb"

    def __init__(self, about: About):
        self._about, self._run = about, None

    def begin(self) -> Known:
        return self._open(resume="allow", finish_timeout=PATIENCE_S["finished"])

    def _open(self, *, resume: str, **waits: float) -> Known:
        import wandb

        about = self._about
        if self._run is None:
            # The console is the run's own, and nobody waits for long.
            how = wandb.Settings(console="off", silent=True, init_timeout=INIT_S, login_timeout=INIT_S, **waits)
            project = os.environ.get("WANDB_PROJECT") or PROJECT
            self._run = wandb.init(project=project, id=about.id, name=about.name, resume=resume, settings=how)
            where = self._run.dir if self._run.offline else self._run.url
            print(f"wandb   run {about.id} of {project}, {where}", flush=True)
            if resume == "allow" or self._run.offline:  # what is attached to a run on a server leaves its settings
                self._run.config.update(about.settings | {"run.uri": about.uri}, allow_val_change=True)
        return Known(all=max(self._run.starting_step - 1, 0) if self._run.resumed else 0)

    def send(self, rows: list[Row]) -> None:
        import wandb

        for row in rows:
            pictures = {name: wandb.Image(pixels) for name, pixels in row.pictures.items()}
            self._run.log(row.values | pictures, step=row.step)

    def finish(self, ending: Ending, files: Mapping[str, bytes]) -> None:
        self._keep("results", f"{self._about.name}-{self._about.id}", files)
        self._run.finish(exit_code=int(ending == "failed"))

    def attach(self, history: Iterable[Row], files: Mapping[str, bytes]) -> bool:
        """Keep files as the latest version of the run's report. Offline that is a directory with the whole run."""
        known = self._open(resume="must", finish_timeout=UPLOAD_S, finish_timeout_raises=True)
        self.send([row for row in map(known.lacks, history) if row.values])
        self._keep("report", f"{self._about.name}-{self._about.id}-report", files)
        self._run.finish()
        return True

    def _keep(self, kind: str, name: str, files: Mapping[str, bytes]) -> None:
        import wandb

        if files:
            kept = wandb.Artifact(name, type=kind)
            for path, content in files.items():
                with kept.new_file(path, mode="wb") as file:
                    file.write(content)
            self._run.log_artifact(kept)
