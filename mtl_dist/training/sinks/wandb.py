"""Weights & Biases, as WANDB_MODE, WANDB_PROJECT and its other variables say.

Online the server says where its history ends, and takes no earlier step. Offline every start writes a directory, and of
those of one run `wandb sync` lets the later replace the earlier: so each holds the run from its first step on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from mtl_dist.training.sinks.sending import PATIENCE_S
from mtl_dist.training.sinks.sink import About, Ending, Known, Row

PROJECT = "mtl_dist"
INIT_S = 30.0


class WandB:
    """A run of W&B."""

    name = "wandb"

    def __init__(self, about: About):
        self._about, self._run = about, None

    def begin(self) -> Known:
        import wandb

        about = self._about
        if self._run is None:
            # The console is the run's own, and nobody waits for long.
            waits = {"init_timeout": INIT_S, "login_timeout": INIT_S, "finish_timeout": PATIENCE_S["finished"]}
            how = wandb.Settings(console="off", silent=True, **waits)
            project = os.environ.get("WANDB_PROJECT") or PROJECT
            self._run = wandb.init(project=project, id=about.id, name=about.name, resume="allow", settings=how)
            where = self._run.dir if self._run.offline else self._run.url
            print(f"wandb   run {about.id} of {project}, {where}", flush=True)
            self._run.config.update(about.settings | {"run.uri": about.uri}, allow_val_change=True)
        return Known(all=max(self._run.starting_step - 1, 0) if self._run.resumed else 0)

    def send(self, rows: list[Row]) -> None:
        import wandb

        for row in rows:
            pictures = {name: wandb.Image(pixels) for name, pixels in row.pictures.items()}
            self._run.log(row.values | pictures, step=row.step)

    def finish(self, ending: Ending, files: Mapping[str, bytes]) -> None:
        import wandb

        if files:
            kept = wandb.Artifact(f"{self._about.name}-{self._about.id}", type="results")
            for name, content in files.items():
                with kept.new_file(name, mode="wb") as file:
                    file.write(content)
            self._run.log_artifact(kept)
        self._run.finish(exit_code=int(ending == "failed"))
