"""MLflow's tracking server, or its local store: found by MLFLOW_TRACKING_URI, as its users expect.

The run is found by a tag. A second point of a step would be kept beside the first, so the server is asked for the last
step of every metric. A parameter keeps its first value: MLflow refuses another.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from mtl_dist.training.sinks.sending import milliseconds
from mtl_dist.training.sinks.sink import About, Ending, Known, Row

EXPERIMENT, TAG = "mtl_dist", "mtl_dist.run"
STATUS: dict[Ending, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
METRICS_AT_ONCE, PARAMETERS_AT_ONCE, MAX_VALUE = 1000, 100, 6000  # MLflow's limits: of a request, and characters
# MLflow's own: 120 s an answer, and 7 more tries.
DEFAULTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


class MLflow:
    """A run of MLflow."""

    name = "mlflow"

    def __init__(self, about: About):
        self._about, self._run_id = about, None

    def begin(self) -> Known:
        from mlflow.entities import Param

        about, self._client = self._about, _client()
        experiment = _find_experiment(self._client) or self._client.create_experiment(_experiment_name())
        tags = {TAG: about.id, "mtl_dist.uri": about.uri}
        found = _find_run(self._client, experiment, about.id)
        run = found or self._client.create_run(experiment, run_name=about.name, tags=tags)
        if self._run_id is None:
            print(f"mlflow  run {run.info.run_id} of experiment {experiment}", flush=True)
        self._run_id = run.info.run_id
        self._client.update_run(self._run_id, status="RUNNING")
        lacking = [(name, value) for name, value in about.settings.items() if name not in run.data.params]
        for begin in range(0, len(lacking), PARAMETERS_AT_ONCE):
            part = [Param(name, str(value)[:MAX_VALUE]) for name, value in lacking[begin : begin + PARAMETERS_AT_ONCE]]
            self._client.log_batch(self._run_id, params=part)
        return Known({metric.key: metric.step for metric in run.data.to_proto().metrics})

    def send(self, rows: list[Row]) -> None:
        from mlflow.entities import Metric

        now = milliseconds()
        metrics = [Metric(name, value, now, row.step) for row in rows for name, value in row.values.items()]
        for begin in range(0, len(metrics), METRICS_AT_ONCE):
            self._client.log_batch(self._run_id, metrics=metrics[begin : begin + METRICS_AT_ONCE])
        for row in rows:
            for name, pixels in row.pictures.items():
                self._client.log_image(self._run_id, pixels, f"{name}/step_{row.step:09d}.png")

    def finish(self, ending: Ending, files: Mapping[str, bytes]) -> None:
        try:
            for name, content in files.items():
                self._client.log_text(self._run_id, content.decode(), name)
        finally:
            self._client.set_terminated(self._run_id, STATUS[ending])

    def attach(self, history: Iterable[Row], files: Mapping[str, bytes]) -> bool:
        client = _client()
        experiment = _find_experiment(client)
        run = experiment and _find_run(client, experiment, self._about.id)
        if run:
            for name, content in files.items():
                client.log_text(run.info.run_id, content.decode(), name)
        return bool(run)


def _client():
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient()


def _experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def _find_experiment(client) -> str | None:
    """Return the id of the experiment that MLflow's variables name, or of ours; None where there is none."""
    if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return number
    found = client.get_experiment_by_name(_experiment_name())
    return found.experiment_id if found else None


def _find_run(client, experiment: str, run_id: str):
    """Return the run of MLflow that has our id as its tag, or None."""
    mine = f"tags.`{TAG}` = '{run_id}'"
    found = client.search_runs([experiment], mine, order_by=["attributes.start_time ASC"], max_results=1)
    return found[0] if found else None
