"""The dashboard of Grafana: it asks for what runs serve, and is what Grafana imports."""

from __future__ import annotations

import json
import re

from mtl_dist.training.measurements import MEASUREMENTS
from tests.conftest import REPO

DASHBOARD = json.loads((REPO / "cluster/grafana/dashboard.json").read_text())
PREFIX = "ray_mtl_dist_"  # Ray's, and ours
OF_QUERIES = {
    "max",
    "sum",
    "avg",
    "by",
    "topk",
    "quantile",
    "label_values",
    "run",
    "rank",
    "task",
    "part",
    "score",
    "p",
}
OF_RAY = {"NodeAddress"}


def queries() -> list[str]:
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return asked + [variable["definition"] for variable in DASHBOARD["templating"]["list"] if "definition" in variable]


def metrics_of(query: str) -> set[str]:
    return set(re.findall(r"[a-zA-Z_][a-zA-Z0-9_]*", re.sub(r'"[^"]*"', "", query))) - OF_QUERIES


def test_every_metric_that_is_asked_for_is_one_that_a_run_serves_with_the_labels_that_it_has():
    served = {f"{PREFIX}{name}": about for name, about in MEASUREMENTS.items()}
    for query in queries():
        assert metrics_of(query), query
        assert metrics_of(query) <= served.keys(), query
        labels = {"run", "rank", *(served[metric].of for metric in metrics_of(query))}
        grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(",")}
        assert grouped <= labels, query
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert shown <= {"run", "rank", *OF_RAY, *(served[m].of for m in metrics_of(target["expr"]))}, panel[
                "title"
            ]


def test_what_a_run_is_watched_for_is_asked_for():
    asked = set().union(*map(metrics_of, queries()))
    wanted = ("loss", "score", "images_per_s", "data_wait_s", "part_s", "own_s", "gpu_memory_bytes", "restarts")
    assert {f"{PREFIX}{name}" for name in wanted} <= asked


def test_a_name_is_read_out_of_a_query():
    assert metrics_of('max by (run) (a_b{run=~"$run", score="p"}) / avg by (run) (c)') == {"a_b", "c"}


def test_it_has_what_grafana_wants_of_a_dashboard_of_the_classic_model():
    assert DASHBOARD["id"] is None, "Grafana gives it"
    assert DASHBOARD["uid"]
    assert DASHBOARD["title"]
    assert isinstance(DASHBOARD["schemaVersion"], int)
    assert DASHBOARD["schemaVersion"] >= 36, "from there on a data source is named by type and uid"
    places = set()
    for panel in DASHBOARD["panels"]:
        assert panel["type"] in ("timeseries", "stat")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & places, f"{panel['title']} lies upon another panel"
        places |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["run"]["type"] == "query"
