"""The whole report of real runs: what it writes, what it keeps, and its page in a real browser."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mtl_dist import storage
from mtl_dist.data.augment import normalise
from mtl_dist.ensemble.__main__ import main as ensemble
from mtl_dist.errors import InputError
from mtl_dist.predicting.members import open_member
from mtl_dist.report import results
from mtl_dist.report.__main__ import main as report
from mtl_dist.report.drawing import DPI
from mtl_dist.report.pictures import Pictures
from mtl_dist.runs.checkpoint import best, committed
from mtl_dist.runs.weights import load_weights
from mtl_dist.sealed import seal, unseal
from mtl_dist.shards.__main__ import main as make_shards
from mtl_dist.tasks import AUS, EXPRESSIONS, VIEWS
from tests.conftest import write_dataset
from tests.test_report_figures import SMALLEST_DENSE, SMALLEST_PHOTO, SMALLEST_POINTS

# Points of the smallest letters of figures (tests/test_report_figures.py), and how many to an inch they have.
SMALLEST = {
    ".grid figure:not(.dense)": (SMALLEST_POINTS, DPI), ".wide:not(.photo)": (SMALLEST_POINTS, DPI),
    ".dense": (SMALLEST_DENSE, DPI), ".photo": (SMALLEST_PHOTO, 130),
}  # fmt: skip
OPTIONS = ["--draws", "50", "--faces", "2", "--errors", "3", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def ensembled(runs, tmp_path_factory) -> Path:
    """The ensemble of both runs."""
    out = tmp_path_factory.mktemp("ensembles") / "ensemble"
    ensemble(["--runs", *named(runs), "--out", str(out), "--local", "--folds", "3", "--workers", "0"])
    return out


@pytest.fixture(scope="module")
def written(runs, ensembled, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    report([*named(runs), "--ensemble", str(ensembled), "--out", str(out), "--title", "Faces & <angles>", *OPTIONS])
    return out


def named(runs: Path) -> list[str]:
    return [f"{runs}/{view}" for view in VIEWS]


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_the_report_says_what_training_and_the_ensemble_scored(runs, ensembled, written):
    rows = {(row["Run"], row["Method"]): row for row in read_csv(written / "tables/runs.csv")}
    for name in VIEWS:
        label = "A cropped aligned" if "aligned" in name else "A cropped"
        assert float(rows[name, label]["P"]) == pytest.approx(best(committed(f"{runs}/{name}")[0]).score, abs=2e-4)
    score = json.loads((ensembled / "score.json").read_text())
    assert float(rows["ensemble", "ensemble"]["P"]) == pytest.approx(score["p"], abs=5e-5)
    assert float(rows["ensemble", "ensemble, calibrated"]["P"]) == pytest.approx(score["p_calibrated"], abs=5e-5)
    constant = score["scores"]["constant predictor"]["p"]
    assert float(rows["constant predictor", "constant predictor"]["P"]) == pytest.approx(constant, abs=5e-5)
    headline = {row["Method"]: row for row in read_csv(written / "tables/scores.csv")}
    assert list(headline) == [
        "constant predictor",
        "A cropped",
        "A cropped aligned",
        "ensemble",
        "ensemble, calibrated",
    ]
    assert [row["Step"] for row in read_csv(written / "tables/gains_1.csv")] == list(score["gains"])
    for row, gains in zip(read_csv(written / "tables/gains_1.csv"), score["gains"].values()):
        gain = gains["p"]
        assert row["P"] == f"{gain['gain']:+.4f} {gain['low']:+.4f} to {gain['high']:+.4f}"
        assert row["P"].split(" ", 1)[1] in (written / "report.html").read_text()
    assert len(list((written / "tables").glob("table?_*.csv"))) == 5
    assert "checkpoints with the highest P on this very set" in (written / "report.html").read_text()


def test_every_figure_has_its_picture_and_its_numbers(runs, written):
    figures = written / "figures"
    names = {path.stem for path in figures.glob("*.png")}
    curves = {"fig2_au_accuracy", "fig3_expr_f1", "fig4_ccc_arousal", "fig5_ccc_valence", "fig6_loss"}
    assert names >= curves | {"f1_expressions", "f1_action_units", "reliability", "confusion_1", "va_scatter_1"}
    assert names >= {
        "circumplex_1",
        "gradients_1",
        "attention_1",
        "attention_2",
        "error_expr_1",
        "error_va_1",
        "error_au_1",
    }
    assert all((figures / f"{name}.csv").is_file() for name in names if not name.startswith("error_"))
    page = (written / "report.html").read_text()
    assert all(f'href="figures/{name}.csv"' in page for name in curves)
    records = [json.loads(line) for line in (runs / "cropped/metrics.jsonl").read_text().splitlines()]
    scored = [record["scores"]["au_accuracy"] for record in records if record["kind"] == "eval"]
    drawn = [row for row in read_csv(figures / "fig2_au_accuracy.csv") if row["run"] == "cropped"]
    assert [float(row["AU accuracy"]) for row in drawn] == pytest.approx(scored, abs=1e-6)
    confusion = read_csv(figures / "confusion_1.csv")
    assert [row["labelled"] for row in confusion] == list(EXPRESSIONS)
    # Both views show the same faces.
    faces = [[row["image"] for row in read_csv(figures / f"attention_{place}.csv")] for place in (1, 2)]
    assert faces[0] == faces[1]
    assert len(faces[0]) == 2 * len(AUS)


def test_attention_maps_are_those_of_their_action_units(runs, written):
    member = open_member(f"{runs}/cropped")
    rows = read_csv(written / "figures/attention_1.csv")
    assert [row["AU"] for row in rows] == [f"AU{au}" for au in AUS] * 2
    model, config = load_weights(member.weights), member.weights.config
    batch = Pictures(member, None).read(
        np.array([int(row["row"]) for row in rows[:: len(AUS)]]), config.data.image_size
    )
    with torch.no_grad():
        maps = model.attention_maps(normalise(batch.inputs, config.input_size)[:, 0]).flatten(2)[:, : len(AUS)]
    expected = torch.stack([maps.amin(-1), maps.amax(-1), maps.mean(-1)], -1).flatten(0, 1).numpy()
    found = np.array([[float(row[name]) for name in ("least attention", "most", "mean")] for row in rows])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert len(np.unique(found.round(4), axis=0)) > len(AUS)  # else any order would do


def test_a_report_among_the_files_of_a_run_is_refused(runs, tmp_path):
    for out in (runs / "cropped", runs / "cropped/report"):
        with pytest.raises(InputError, match=r"keeps its own files; name another directory"):
            report([*named(runs), "--out", str(out), *OPTIONS])
    assert not list((runs / "cropped").glob("report*"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--out is .*file, which is a file; expected a directory"):
        report([*named(runs), "--out", str(tmp_path / "file"), *OPTIONS])


def test_a_second_report_reads_the_predictions_of_the_first(runs, written, tmp_path, monkeypatch):
    shutil.copytree(written, tmp_path / "out")
    (tmp_path / "out/figures/mine.png").write_bytes(b"put there by hand")
    damaged = tmp_path / "out/data/cropped.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    predicted = []
    real = results.predict_member
    monkeypatch.setattr(results, "predict_member", lambda m, **o: predicted.append(m.run_uri) or real(m, **o))
    report([*named(runs), "--out", str(tmp_path / "out"), *OPTIONS, "--faces", "0"])
    assert predicted == [f"{runs}/cropped"]  # damaged; those of the other runs serve
    table = pq.read_table(damaged)
    assert table.equals(pq.read_table(written / "data/cropped.parquet"))
    again = (tmp_path / "out/tables/scores.csv").read_text().splitlines()
    assert again == (written / "tables/scores.csv").read_text().splitlines()[: len(again)]
    # Nothing of the first is left among what the second wrote: its ensemble, its attention maps.
    listed = unseal((tmp_path / "out/data/written.json").read_bytes())["files"]
    left = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").glob("[ft]*s/*")}
    assert left == {*listed, "figures/mine.png"}
    assert not [name for name in left if "attention" in name or "steps_" in name or "gains_" in name]


def test_a_run_from_before_au_accuracy_and_one_without_records_are_reported_to_s3(runs, tmp_path, s3):
    for name in VIEWS:
        shutil.copytree(runs / name, tmp_path / name)
    metrics = tmp_path / "cropped/metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    for record in records:
        record.get("scores", {}).pop("au_accuracy", None)
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "cropped_aligned/metrics.jsonl").unlink()
    (tmp_path / "cropped_aligned/lives.json").unlink()
    report([f"{tmp_path}/cropped", f"{tmp_path}/cropped_aligned", "--out", "s3://mtl/report", *OPTIONS, "--faces", "0"])
    page = storage.read_bytes("s3://mtl/report/report.html").decode()
    assert "AU accuracy is not recorded in: cropped, cropped_aligned" in page
    assert "EXPR F1 is not recorded in: cropped_aligned" in page
    assert "Its starts were not recorded." in page


def test_runs_and_ensembles_of_other_data_are_refused_and_nothing_is_written(runs, ensembled, tmp_path):
    other = write_dataset(tmp_path / "other", seed=1)
    make_shards(["create", str(other), str(tmp_path / "shards"), "--views", "cropped", "--jobs", "1"])
    index = json.loads((tmp_path / "shards/cropped/val/index.json").read_text())["sha256"]
    # The run believes that it was scored on the other set.
    shutil.copytree(runs / "cropped", tmp_path / "strange")
    found = best(committed(str(tmp_path / "strange"))[0])
    state_path, commit_path = (Path(found.uri) / name for name in ("state.json", "COMMIT.json"))
    state = json.loads(state_path.read_text())
    state["identity"]["validation set"] = index
    state_path.write_text(json.dumps(state))
    commit = unseal(commit_path.read_bytes())
    data = state_path.read_bytes()
    commit["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    commit_path.write_bytes(seal(commit))
    strange, here = str(tmp_path / "strange"), f"{runs}/cropped"
    sets = [state["config"]["data.val"], f"{tmp_path}/shards/cropped/val"]
    with pytest.raises(InputError) as caught:
        report([here, strange, "--val", *sets, "--out", str(tmp_path / "out")])
    assert all(word in str(caught.value) for word in (here, strange, "cannot be compared", "different sources"))
    with pytest.raises(InputError, match=r"ensemble .* another cropped validation set .* than run"):
        report([strange, "--val", sets[1], "--ensemble", str(ensembled), "--out", str(tmp_path / "out")])
    shutil.copytree(ensembled, tmp_path / "ensemble")
    table = pq.read_table(tmp_path / "ensemble/predictions.parquet")
    pq.write_table(table.slice(0, 15).replace_schema_metadata(), tmp_path / "ensemble/predictions.parquet")
    with pytest.raises(InputError, match=r"predictions.parquet scores P|other rows"):
        report([here, "--ensemble", f"{tmp_path}/ensemble", "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="no ensemble at"):
        report([here, "--ensemble", f"{tmp_path}/none", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as started:
        found = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def tab(browser, written, tmp_path):
    """A tab with the page alone: without the files beside it, and without a network."""
    page_path = Path(shutil.copy(written / "report.html", tmp_path))
    tab = browser.new_page(viewport={"width": 1280, "height": 900}, offline=True)
    tab.faults, tab.requests = [], []
    tab.on("console", lambda message: tab.faults.append(message.text))
    tab.on("pageerror", lambda error: tab.faults.append(str(error)))
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.goto(page_path.as_uri())
    yield tab
    tab.close()


def test_the_page_loads_by_itself_without_a_fault(tab):
    assert tab.title() == "Faces & <angles>"
    assert tab.faults == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [tab.url]
    assert len(tab.query_selector_all("h1")) == 1
    chapters = [heading.inner_text() for heading in tab.query_selector_all("h2")]
    assert chapters == [
        "Scores", "Tables 1–5", "Training", "Expressions and action units", "Calibration", "Valence and arousal",
        "Attention", "Worst errors", "Runs and commands"
    ]  # fmt: skip
    anchors = tab.eval_on_selector_all("nav a", "links => links.map(link => link.getAttribute('href'))")
    assert len(anchors) == len(chapters)
    assert all(tab.query_selector(anchor) for anchor in anchors)
    headings = tab.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(h => [Number(h.tagName[1]), h.innerText])")
    levels = [level for level, _ in headings]
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    figures = tab.eval_on_selector_all("#affect figure h3", "all => all.map(h => h.innerText)")
    assert len(set(figures)) == len(figures) == 2 * 4  # of two runs, and the ensemble plain and calibrated


def test_every_picture_is_there_and_has_words(tab):
    images = tab.eval_on_selector_all(
        "img", "all => all.map(i => [i.alt, i.naturalWidth, i.src.slice(0, 11), !!i.closest('figure')])"
    )
    assert len(images) > 25
    assert all(
        len(alt) > 20 and width > 100 and source == "data:image/" and inside for alt, width, source, inside in images
    )
    assert len({alt for alt, *_ in images}) > 20


def test_tables_sort_by_value(tab):
    assert tab.eval_on_selector_all("table", "all => all.every(t => t.caption && t.tHead)")

    def column(number: int) -> list[str]:
        rows = "[...document.querySelector('#runs table').tBodies[0].rows]"
        return tab.evaluate(f"() => {rows}.map(row => row.cells[{number}].innerText)")

    heading = "#runs table >> nth=0 >> th:nth-of-type({}) button"
    step = 3
    before = column(step)
    assert "–" in before  # the constant predictor has no step
    tab.click(heading.format(5))
    values = [float(text.replace("−", "-")) for text in column(4)[: len(before)]]
    assert values == sorted(values, reverse=True)
    tab.click(heading.format(5))
    assert tab.get_attribute("#runs table >> nth=0 >> th:nth-of-type(5)", "aria-sort") == "ascending"
    values = [float(text.replace("−", "-")) for text in column(4)]
    assert values == sorted(values)
    tab.click(heading.format(4))
    steps = column(step)
    known = [int(text) for text in steps if text != "–"]
    assert known == sorted(known, reverse=True)
    assert steps[len(known) :] == ["–"] * (len(steps) - len(known))  # missing last
    tab.click(heading.format(1))
    assert column(0) == sorted(column(0))
    first = "document.querySelector('#runs table').tBodies[0].rows[{}].cells[0].textContent = 'run-{}'"
    for row, number in enumerate((10, 9, 2)):
        tab.evaluate(first.format(row, number))
    tab.click(heading.format(1))
    named = [name for name in column(0) if name.startswith("run-")]
    assert named in (["run-2", "run-9", "run-10"], ["run-10", "run-9", "run-2"])  # by number, up or down
    assert tab.faults == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_readable_on_a_phone(tab, scheme):
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size({"width": 375, "height": 800})
    for opened in tab.query_selector_all("details"):
        opened.evaluate("details => details.open = true")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375
    sizes = tab.eval_on_selector_all(
        "p, td, th, figcaption", "all => all.map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12
    # Letters of figures, where words are 16 pixels high; 8 pixels of an image's width are its frame.
    for figures, (points, dpi) in SMALLEST.items():
        shares = tab.eval_on_selector_all(f"{figures} img", "all => all.map(i => (i.clientWidth - 8) / i.naturalWidth)")
        assert len(shares) >= 1
        assert min(shares) * points / 72 * dpi >= 8.8
    contrast = tab.evaluate(
        "() => [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    ink, paper = (np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]) for colour in contrast)
    assert (ink > 200 and paper < 50) if scheme == "dark" else (ink < 60 and paper > 200)
