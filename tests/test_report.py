"""The report's numbers against plain loops, what is one method, what is refused."""

from __future__ import annotations

import csv
import io
import itertools
import re
import shlex
from html import unescape
from types import SimpleNamespace

import numpy as np
import pytest
import tyro

from mtl_dist.config import build_config
from mtl_dist.ensemble.options import EnsembleCommand
from mtl_dist.errors import InputError
from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.bootstrap import CHUNK
from mtl_dist.objective.metrics import Predictions, Targets, metric_sums
from mtl_dist.objective.scores import SCORES, constant_scores, label_sums, main_scores, scores, single_scores
from mtl_dist.predicting.members import Member, unique_names
from mtl_dist.report.__main__ import main
from mtl_dist.report.affect import draw_affect
from mtl_dist.report.calibration import draw_reliability
from mtl_dist.report.chapters import lead
from mtl_dist.report.classes import draw_confusion, draw_f1
from mtl_dist.report.curves import draw_curves
from mtl_dist.report.drawing import method_styles
from mtl_dist.report.evidence import Evidence, _taken_for_one, _warnings
from mtl_dist.report.gains import gains_tables
from mtl_dist.report.intervals import bootstrap, number_videos, video_sums
from mtl_dist.report.likeness import correlations, likeness_table
from mtl_dist.report.mistakes import worst_mistakes
from mtl_dist.report.origin import ensemble_block
from mtl_dist.report.page import Part, html
from mtl_dist.report.pictures import choose_apart
from mtl_dist.report.results import (
    CALIBRATED,
    CONSTANT,
    ENSEMBLE,
    Method,
    Result,
    check_same_data,
    check_same_rows,
    constant_result,
    group_methods,
    label_ensembles,
    label_runs,
)
from mtl_dist.report.tables import (
    classes_tables,
    differences_tables,
    headline_table,
    more_table,
    paper_tables,
    runs_table,
    settings_table,
    steps_tables,
)
from mtl_dist.runs.checkpoint import Checkpoint
from mtl_dist.runs.weights import Weights
from mtl_dist.tasks import TASKS
from mtl_dist.timeline import video_names
from tests.conftest import assert_one_message, run_here

MAIN = [score.key for score in main_scores()]


def make_targets(size: int, seed: int, tasks=TASKS) -> Targets:
    rng = np.random.default_rng(seed)
    masks = [rng.random(shape) < share for shape, share in ((size, 0.7), (size, 0.6), ((size, 12), 0.8))]
    masks = [mask & (task in tasks) for task, mask in zip(TASKS, masks)]
    va = rng.uniform(-1, 1, (size, 2)).astype(np.float32) * masks[0][:, None]
    return Targets(va, rng.integers(0, 8, size) * masks[1], rng.integers(0, 2, (size, 12)) * masks[2], *masks)


def make_result(targets: Targets, seed: int, method: str, *, skill: float = 0.5, decided: bool = False) -> Result:
    rng, size = np.random.default_rng(seed), len(targets.expr)
    expr = rng.dirichlet(np.ones(8), size)
    expr[np.arange(size), targets.expr] += 0.4 * skill
    va = (skill * targets.va + rng.normal(0, 0.3, (size, 2))).clip(-1, 1)
    au = (skill * targets.au + (1 - skill) * rng.random((size, 12))).clip(0, 1)
    predictions = Predictions(va, expr / expr.sum(1, keepdims=True), au)
    result = Result(
        f"{method}-{seed}", f"runs/{method}-{seed}", method, PredictedRows(np.arange(size), predictions, targets), {}
    )
    result = result._replace(decided=rng.random((size, 12)) < 0.5) if decided else result
    return result._replace(scores=scores(result.sums()))


def count_labels(targets: Targets) -> LabelCounts:
    on = (targets.au * targets.au_mask).sum(0)
    return LabelCounts(
        rows=len(targets.expr), va=int(targets.va_mask.sum()), expr=int(targets.expr_mask.sum()),
        au=targets.au_mask.sum(0).tolist(), au_positives=on.tolist(), unlabelled=0,
        expr_classes=np.bincount(targets.expr[targets.expr_mask], minlength=8).tolist())  # fmt: skip


def make_methods(size: int = 60, tasks=TASKS) -> list[Method]:
    targets = make_targets(size, 0, tasks)
    runs = [make_result(targets, seed, "A cropped", skill=0.3) for seed in (1, 2, 3)]
    runs.append(make_result(targets, 4, "baseline", skill=0.1))
    ensembles = [make_result(targets, 5, ENSEMBLE), make_result(targets, 6, CALIBRATED, decided=True)]
    return group_methods(constant_result(runs[0].predicted, count_labels(targets)), runs, ensembles)


def test_methods_come_in_the_papers_order():
    assert [m.label for m in make_methods()] == [CONSTANT, "baseline", "A cropped", ENSEMBLE, CALIBRATED]


def test_the_constant_predictors_result_has_the_scores_of_its_counts():
    targets = make_targets(500, 1)
    found = constant_result(make_result(targets, 1, "x").predicted, count_labels(targets)).scores
    for key, value in constant_scores(label_sums(count_labels(targets))).items():
        assert found[key] == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else value)


@pytest.mark.whole
def test_intervals_equal_a_loop_over_draws_that_scores_the_drawn_videos_rows():
    methods, num_draws = make_methods(90), CHUNK + 20
    # Two videos without any EXPR label, and few videos: some draws have no EXPR at all.
    video = np.random.default_rng(3).integers(0, 4, 90)
    for part in (m.results[0].predicted.targets.expr_mask for m in methods[:1]):
        part[video < 2] = False  # all results share these targets
    methods = [
        m._replace(results=tuple(r._replace(scores=scores(r.sums())) for r in m.results)) for m in methods
    ]  # fmt: skip
    found = bootstrap(methods, video, num_draws=num_draws, seed=7)
    assert (found.num_videos, found.labelled) == (4, {"va": 4, "expr": 2, "au": 4})
    assert (found.videos("p"), found.videos("expr"), found.videos("ccc_v")) == (2, 2, 4)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(7)))
    counts = np.concatenate([rng.multinomial(4, [1 / 4] * 4, CHUNK), rng.multinomial(4, [1 / 4] * 4, 20)])
    lacking = 0
    for method in methods:
        for draw, times in enumerate(counts):
            rows = np.concatenate([np.repeat(np.flatnonzero(video == v), n) for v, n in enumerate(times)])
            each = []
            for result in method.results:
                predictions, targets = result.predicted.predictions, result.predicted.targets
                predictions = predictions._replace(au=np.where(result.au_on, 0.9, 0.1))
                part = Predictions(*(a[rows] for a in predictions)), Targets(*(a[rows] for a in targets))
                sums = metric_sums(*part)
                own = {s.key: constant_scores(sums)[s.key] for s in SCORES if s.floor and method.label == CONSTANT}
                each.append(scores(sums) | own)
            for key in (score.key for score in single_scores()):
                mine = found.draws[method.label][key][draw]
                if key in ("p", "expr") and each[0]["expr"] is None:
                    lacking += 1
                    assert np.isnan(mine)
                else:
                    assert mine == pytest.approx(np.mean([s[key] for s in each]), abs=1e-9)
    assert lacking
    kept = found.draws["baseline"]["p"][np.isfinite(found.draws["baseline"]["p"])]
    assert found.interval("baseline", "p") == pytest.approx(np.percentile(kept, [2.5, 97.5]))
    other = found.draws[ENSEMBLE]["va"]
    paired = found.difference("A cropped", ENSEMBLE, "va")
    assert paired == pytest.approx(np.percentile(found.draws["A cropped"]["va"] - other, [2.5, 97.5]))


@pytest.mark.parametrize("tasks", [TASKS, ("expr",), ("va", "au")])
def test_the_sums_of_all_videos_at_once_are_those_of_each(tasks):
    targets = make_targets(200, 0, tasks)
    video = np.random.default_rng(1).permutation(np.arange(200) % 70)
    for result in (make_result(targets, 1, "A"), make_result(targets, 2, CALIBRATED, decided=True)):
        each = np.stack([result.sums(np.flatnonzero(video == number)).flatten() for number in range(70)])
        np.testing.assert_allclose(video_sums(result, video), each, rtol=0, atol=1e-12)


def test_images_outside_of_videos_are_drawn_each_by_itself():
    images = ["v1/1.jpg", "v1/2.jpg", "face.jpg", "other.jpg", "v2_left/1.jpg", "v2_right/1.jpg"]
    assert number_videos(video_names(images)).tolist() == [0, 0, 1, 2, 3, 3]


def test_a_task_whose_labels_are_of_one_video_has_no_interval_and_no_difference():
    """Every draw that has them has the same score: 'from 0.0437 to 0.0437', however few pictures they are."""
    targets, video = make_targets(240, 0), np.arange(240) // 20
    targets.expr_mask[20:] = False
    targets.au_mask[60:] = False
    runs = [make_result(targets, seed, name) for seed, name in ((1, "A cropped"), (2, "baseline"))]
    methods = group_methods(constant_result(runs[0].predicted, count_labels(targets)), runs, [])
    drawn = bootstrap(methods, video, num_draws=50, seed=0)
    tables = dict(zip(("expr", "au", "ccc_v", "ccc_a", "p"), paper_tables(methods, drawn)))
    cells = {key: table.rows[1][2] for key, table in tables.items()}
    assert {key: cell.text for key, cell in cells.items() if key in ("expr", "p")} == {"expr": "–", "p": "–"}
    assert (cells["expr"].below, cells["au"].below, cells["ccc_v"].below) == (
        "labels of one video", "rough: 3 videos", "")  # fmt: skip
    difference = dict(zip(MAIN, differences_tables(methods, drawn)[0].rows[0][1:]))
    own, reference = (methods[place].results[0].scores["expr"] for place in (0, 1))
    assert (difference["expr"].text, difference["expr"].below) == (f"{own - reference:+.4f}", "no interval")
    assert not any(difference[key].is_apart for key in ("expr", "au", "p"))
    sentences = " ".join(lead(Evidence(methods, count_labels(targets), [""], video, drawn, []), num_draws=50))
    assert "rough: AU 3. All labels of EXPR are of one video: there is no interval for what needs them." in sentences
    assert "(95% interval" not in sentences


def test_the_lead_says_what_p_can_be_at_most_where_classes_or_units_do_not_occur():
    methods = make_methods()
    counts, images = count_labels(make_targets(60, 0)), [f"v{n}/1.jpg" for n in range(60)]
    few = counts.model_copy(update={"expr_classes": [9, 0, 0, 0, 9, 0, 0, 0], "au_positives": [3] * 6 + [0] * 6})
    drawn = bootstrap(methods, np.arange(60), num_draws=10, seed=0)
    for labels, words in ((counts, "at most 3."), (few, "at most 1.75: 2 of 8 expressions and 6 of 12 action units")):
        assert words in lead(Evidence(methods, labels, images, np.arange(60), drawn, []), num_draws=10)[0]


def test_one_video_gives_no_interval():
    methods = make_methods()
    drawn = bootstrap(methods, np.zeros(60, int), num_draws=10, seed=0)
    assert drawn.interval(ENSEMBLE, "p") is None
    assert differences_tables(methods, drawn) == []
    assert {row[-2].text for row in paper_tables(methods, drawn)[0].rows} == {"–"}


@pytest.mark.parametrize(("name", "is_said"), [("{}.jpg", True), ("v/{}.jpg", False)])
def test_a_page_says_where_images_are_of_no_videos(name, is_said):
    methods, images = make_methods(), [name.format(number // 2) for number in range(60)]  # two rows an image
    video = number_videos(video_names(images))
    drawn = bootstrap(methods, video, num_draws=10, seed=0)
    sentences = lead(Evidence(methods, count_labels(make_targets(60, 0)), images, video, drawn, []), num_draws=10)
    assert any("counts as a video of its own" in sentence for sentence in sentences) == is_said


def test_a_mark_is_for_what_is_above_the_constant_predictor():
    methods = make_methods()
    low = methods[2]._replace(results=tuple(r._replace(scores={**r.scores, "au": 0.01}) for r in methods[2].results))
    methods = [methods[0], low]
    drawn = bootstrap(methods, np.arange(60) // 6, num_draws=5, seed=0)
    row = dict(zip(headline_table(methods, drawn).columns, headline_table(methods, drawn).rows[1]))
    assert not row["AU F1"].is_best
    assert row["VA"].is_best
    assert list(row)[:3] == ["Method", "P", "P, 95% interval"]


def with_scores(method: Method, **values: float) -> Method:
    return method._replace(results=tuple(r._replace(scores=r.scores | values) for r in method.results))


def test_of_an_error_the_lowest_is_marked_and_less_of_it_is_better():
    methods = make_methods(600)
    drawn = bootstrap(methods, np.arange(600) // 10, num_draws=50, seed=0)
    table = more_table(methods, drawn)
    assert table.lower == ("RMSE V", "RMSE A")
    rows = {row[0].text: dict(zip(table.columns, row)) for row in table.rows}
    lowest = min(methods, key=lambda method: np.mean(method.values("rmse_v"))).label
    assert lowest != CONSTANT
    assert [label for label, row in rows.items() if row["RMSE V"].is_best] == [lowest]
    low, high = drawn.interval(lowest, "rmse_v")
    assert rows[lowest]["RMSE V"].below == f"{low:.4f} to {high:.4f}"
    worse = [methods[0], *(with_scores(method, rmse_v=methods[0].values("rmse_v")[0] + 0.1) for method in methods[1:])]
    assert not any(row[1].is_best for row in more_table(worse, drawn).rows), "the constant predictor is better"
    main, more = differences_tables(methods, drawn)
    error, f1 = (dict(zip(t.columns, t.rows[1]))[name] for t, name in ((more, "RMSE V"), (main, "AU F1")))
    assert (error.is_apart, error.sort > 0, error.below.endswith(", worse")) == (True, True, True)
    assert (f1.is_apart, f1.sort < 0, f1.below.endswith(", worse")) == (True, True, True)
    page = html.table(table)
    assert '<th scope="col" class="n" data-lower>RMSE V ↓</th>' in page
    assert '<th scope="col" class="n">PCC V</th>' in page


def test_a_score_that_an_ensemble_was_made_without_is_shown_as_not_known():
    methods = make_methods()
    old = methods[-1].results[0]
    old = old._replace(scores={key: value for key, value in old.scores.items() if not key.startswith("rmse")})
    methods[-1] = methods[-1]._replace(results=(old,))
    drawn = bootstrap(methods, np.arange(60) // 6, num_draws=5, seed=0)
    cells = dict(zip(more_table(methods, drawn).columns, more_table(methods, drawn).rows[-1]))
    assert (cells["RMSE V"].text, cells["PCC V"].text != "–") == ("–", True)
    _, more = differences_tables(methods, drawn)
    assert dict(zip(more.columns, more.rows[-1]))["RMSE V"].text == "–"


def test_tables_show_mean_and_deviation_over_seeds_and_mark_the_best():
    methods = make_methods()
    drawn = bootstrap(methods, np.arange(60) // 6, num_draws=50, seed=0)
    table = headline_table(methods, drawn)
    rows = {row[0].text: dict(zip(table.columns, row)) for row in table.rows}
    values = [result.scores["p"] for result in methods[2].results]
    assert rows["A cropped"]["P"].text == f"{np.mean(values):.4f}"
    assert rows["A cropped"]["P"].below == f"± {np.std(values, ddof=1):.4f}"
    assert rows["A cropped"]["seeds"].text == "3"
    assert rows["baseline"]["P"].below == ""
    best = max(methods[1:], key=lambda m: np.mean(m.values("p"))).label
    assert [name for name, row in rows.items() if row["P"].is_best] == [best]
    assert [table.caption for table in paper_tables(methods, drawn)] == [
        "Table 1. EXPR F1", "Table 2. AU F1", "Table 3. CCC valence", "Table 4. CCC arousal", "Table 5. P"
    ]  # fmt: skip
    assert [row[0].text for row in runs_table(methods).rows].count("A cropped-2") == 1
    written = list(csv.DictReader(io.StringIO(table.csv().decode())))
    assert written[2]["P"] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def test_runs_that_predict_alike_are_told_from_those_that_do_not():
    methods = make_methods()
    table = likeness_table(methods)
    rows = {row[0].text: [cell.sort for cell in row[1:]] for row in table.rows}
    assert list(rows) == ["A cropped, two seeds", "A cropped and baseline"] or set(rows) == {
        "A cropped, two seeds", "baseline and A cropped"
    }  # fmt: skip
    runs = next(m for m in methods if m.label == "A cropped").results
    pairs = [(a.predicted.predictions, b.predicted.predictions) for a, b in itertools.combinations(runs, 2)]
    found = rows["A cropped, two seeds"]
    assert found[0] == pytest.approx(np.mean([np.corrcoef(a.va[:, 0], b.va[:, 0])[0, 1] for a, b in pairs]))
    of_units = [np.corrcoef(a.au[:, n], b.au[:, n])[0, 1] for a, b in pairs for n in range(12)]
    assert found[3] == pytest.approx(np.mean(of_units))
    same = correlations(runs[0].predicted.predictions, runs[0].predicted.predictions)
    assert same == pytest.approx([1, 1, 1, 1])
    flat = runs[0].predicted.predictions._replace(va=np.zeros((60, 2)))
    assert np.isnan(correlations(flat, runs[0].predicted.predictions)[:2]).all()
    assert likeness_table([methods[0], methods[1]._replace(results=methods[1].results[:1])]) is None


@pytest.mark.whole
@pytest.mark.parametrize("tasks", [("expr",), ("va",), ("au",)])
def test_a_set_without_labels_of_a_task_is_reported_without_it(tasks):
    methods = make_methods(60, tasks)
    drawn = bootstrap(methods, np.arange(60) // 6, num_draws=20, seed=0)
    table = headline_table(methods, drawn)
    cells = dict(zip(table.columns, table.rows[-1]))
    names = {"va": "VA", "expr": "EXPR F1", "au": "AU F1"}
    assert {task for task in TASKS if cells[names[task]].text != "no labels"} == set(tasks)
    assert cells["P"].text.endswith(f"({tasks[0].upper()} only)")
    assert drawn.interval(ENSEMBLE, "p") is not None
    counts, styles = count_labels(methods[0].results[0].predicted.targets), method_styles(methods)
    assert bool(draw_affect(methods[-1], 1)) == ("va" in tasks)
    assert (draw_confusion(methods[-1], 1) is not None) == ("expr" in tasks)
    assert (
        len(draw_f1(methods, styles, counts)) == len(classes_tables(methods, counts)) == len({"expr", "au"} & {*tasks})
    )
    assert (draw_reliability(methods, styles)[0] is None) == (tasks == ("va",))
    faces = SimpleNamespace(pixels=lambda rows, side: np.zeros((len(rows), side, side, 3), np.uint8))
    images, video = [f"v{i // 6}/{i}.jpg" for i in range(60)], np.arange(60) // 6
    worst = worst_mistakes(methods[-1].shown, faces, images, video, count=3)
    assert [(m.task, len(m.worst)) for m in worst] == [(tasks[0], 3)]
    assert "no run has records" in " ".join(draw_curves(methods, styles)[1])


def test_the_worst_errors_are_the_worst_of_their_videos():
    result = make_result(make_targets(60, 0), 3, "x")
    images, video = [f"v{i // 6}/{i}.jpg" for i in range(60)], np.arange(60) // 6
    faces = SimpleNamespace(pixels=lambda rows, side: np.zeros((len(rows), side, side, 3), np.uint8))
    found = {m.task: m for m in worst_mistakes(result, faces, images, video, count=4)}
    predictions, targets = result.predicted.predictions, result.predicted.targets
    far = [
        (np.hypot(*(p - t)), i)
        for i, (p, t, known) in enumerate(zip(predictions.va, targets.va, targets.va_mask))
        if known
    ]
    assert found["va"].worst[0].image == images[max(far)[1]]
    assert len({mistake.image.split("/")[0] for mistake in found["va"].worst}) == 4
    sure = [
        (max(p), i)
        for i, (p, t, known) in enumerate(zip(predictions.expr, targets.expr, targets.expr_mask))
        if known and np.argmax(p) != t
    ]
    assert found["expr"].worst[0].image == images[max(sure)[1]]


def test_frames_are_chosen_of_different_videos_and_each_image_once():
    images = ["a/1", "a/1", "a/2", "b/1", "a/3"]
    assert choose_apart(np.arange(5), images, np.array([0, 0, 0, 1, 0]), count=2) == [0, 3]
    assert choose_apart(np.arange(5), images, np.array([0, 0, 0, 1, 0]), count=4) == [0, 2, 3, 4]
    assert choose_apart(np.arange(5), images, np.array([0, 0, 0, 1, 0]), count=9) == [0, 2, 3, 4]


def make_member(
    name: str, *, model: str = "a", view: str = "cropped", seed: int = 0, lr: float = 1e-3, **val
) -> Member:
    config = build_config(
        {"run": {"name": name, "seed": seed}, "model": {"name": model}, "optim": {"lr": lr}, "data": {"val": view}}
    )
    about = {"sha256": f"{view}-set", "source_sha256": "source", **val}
    index = SimpleNamespace(view=view, origin=about["sha256"], **about)
    weights = Weights(Checkpoint("", 1, {}, 0.0, {}), config, {}, view, 1)
    return Member(f"runs/{name}", weights, index)


def trained_on(member: Member, sha256: str) -> Member:
    return member._replace(weights=member.weights._replace(state={"identity": {"training set": sha256}}))


def test_runs_that_differ_in_their_seed_are_one_method_and_others_are_not():
    views = [make_member("c", view="cropped"), make_member("l", view="cropped_aligned"), make_member("b", model="b")]
    assert label_runs(views) == ["A cropped", "A cropped aligned", "B (SMM-EmotionNet)"]
    assert label_runs([make_member("one"), make_member("two", seed=1)]) == ["A cropped", "A cropped"]
    assert label_runs([make_member("one"), make_member("two")]) == ["A cropped, one", "A cropped, two"]
    copies = [make_member("one")._replace(run_uri=f"{storage}/one") for storage in ("here", "there")]
    assert label_runs(copies) == ["A cropped, one", "A cropped, one-2"]
    rates = [make_member(f"r{lr}s{seed}", seed=seed, lr=lr) for lr in (0.1, 0.2) for seed in (0, 1)]
    assert label_runs(rates) == ["A cropped, r0.1s0"] * 2 + ["A cropped, r0.2s0"] * 2
    both = [make_member("x", model="b"), make_member("y", model="b", view="cropped_aligned")]
    assert label_runs(both) == ["B (SMM-EmotionNet) cropped", "B (SMM-EmotionNet) cropped aligned"]
    assert unique_names(["runs/x", "s3://bucket/x/", "y"], taken=("y",)) == ["x", "x-2", "y-2"]


def test_runs_that_began_with_seeds_of_one_run_are_seeds_of_one_method(monkeypatch):
    began = {f"mae-{seed}": trained_on(make_member(f"mae-{seed}", seed=seed), "a") for seed in range(2)}
    began["other"] = trained_on(make_member("other", seed=2, lr=0.5), "a")
    began |= {f"export-{seed}": make_member("export", seed=seed) for seed in range(2)}
    began |= {f"mae-0/checkpoints/step_00000000{step}_0a0a0a0a": began["mae-0"] for step in range(2)}

    def open_weights(uri):
        if uri not in began:
            raise InputError("not there")
        return began[uri].weights

    monkeypatch.setattr("mtl_dist.report.results.open_weights", open_weights)

    def make(seed, start):
        member = make_member(f"tuned-{seed}", seed=seed)
        run = member.weights.config.run.model_copy(update={"start": start})
        return member._replace(
            weights=member.weights._replace(config=member.weights.config.model_copy(update={"run": run}))
        )

    same = label_runs([make(0, "mae-0"), make(1, "mae-1"), make(2, "other")])
    assert same == ["A cropped, tuned-0", "A cropped, tuned-0", "A cropped, tuned-2"]
    for others in (["gone-0", "gone-1"], ["export-0", "export-1"], [uri for uri in began if "checkpoints" in uri]):
        assert len(set(label_runs([make(seed, uri) for seed, uri in enumerate(others)]))) == 2


def test_runs_that_learnt_from_other_sets_are_no_seeds_of_one_method():
    members = [trained_on(make_member(f"r{seed}", seed=seed), sha) for seed, sha in enumerate("aab")]
    assert label_runs(members) == ["A cropped, r0", "A cropped, r0", "A cropped, r2"]
    results = [make_result(make_targets(20, 0), 0, "x")._replace(member=member) for member in members]
    table = settings_table(results)
    assert [dict(zip(table.columns, row))["training set"].text for row in table.rows] == list("aab")
    views = [trained_on(make_member(view, view=view), view) for view in ("cropped", "cropped_aligned")]
    assert settings_table([results[0]._replace(member=member) for member in views]) is None


def make_ensembles(*abouts: dict) -> list[list[Result]]:
    targets = make_targets(20, 0)
    return [
        [
            make_result(targets, n, ENSEMBLE)._replace(name=f"e{n}", score_file=about),
            make_result(targets, n, CALIBRATED)._replace(name=f"e{n}"),
        ]
        for n, about in enumerate(abouts)
    ]


def make_about(*runs: str, step: int = 9, view: str = "cropped", **options) -> dict:
    """What score.json says of an ensemble."""
    members = [{"view": view, "run": run, "checkpoint": f"{run}/checkpoints/step_{step}"} for run in runs]
    options = {"steps": ["weights"], "folds": 5, "half_windows": [0], "seed": 0} | options
    steps = {name: dict.fromkeys(MAIN, 1.0) for name in ("plain mean", *options["steps"])}
    return {"members": members, "options": options, "steps": steps}


def test_the_command_of_an_ensemble_on_the_page_is_one_that_its_command_line_takes():
    about = make_about("runs/a b", "runs/c", steps=[], test_list=None, val=[], skip_bad_images=False, exif="apply")
    for more in ({}, {"calibrate": "all"}, {"skip_bad_images": True, "test_list": "list.txt", "test_root": "data"}):
        about["options"] |= more
        ((plain, _),) = make_ensembles(about)
        page = ensemble_block(plain._replace(uri="runs/ensemble"))
        line = unescape(re.search("<code>python -m mtl_dist.ensemble (.*?)</code>", page)[1])
        command = tyro.cli(EnsembleCommand, args=shlex.split(line))
        assert (command.runs, command.out, command.seed) == (("runs/a b", "runs/c"), "runs/ensemble", 0)
        assert (command.steps, command.skip_bad_images) == ((), "test_list" in more)


def test_ensembles_of_other_members_or_options_are_methods_of_their_own():
    members = [make_member("one"), make_member("two", seed=1), make_member("b", model="b")]

    def methods(*abouts: dict) -> list[str]:
        found = label_ensembles(make_ensembles(*abouts), members, ["A", "A", "B"])
        constant = constant_result(found[0].predicted, count_labels(found[0].predicted.targets))
        grouped = group_methods(constant, [], found)
        kinds = [ENSEMBLE] * (len(grouped) // 2) + [CALIBRATED] * (len(grouped) // 2)
        assert [method.kind for method in grouped] == [CONSTANT, *kinds]
        assert len({method_styles(grouped)[method.label] for method in grouped}) == len(grouped)
        tables = steps_tables([result for method in grouped for result in method.results])
        assert len({table.caption for table in tables}) == len(tables) == len(grouped) // 2
        return [method.label for method in grouped[1:]]

    def named(*firsts: str) -> list[str]:
        return [f"{kind} {first}" for kind in (ENSEMBLE, CALIBRATED) for first in firsts]

    one = make_about("runs/one")
    assert methods(one, make_about("runs/two", calibrate="all")) == [ENSEMBLE, CALIBRATED]  # as before there was it
    assert methods(one) == [ENSEMBLE, CALIBRATED]
    moved = make_about("s3://old/runs/two/", seed=1, val=["there"], test_list="list.txt", test_root="data")
    assert methods(one, moved) == [ENSEMBLE, CALIBRATED]
    assert methods(make_about("runs/x"), make_about("runs/y")) == [ENSEMBLE, CALIBRATED]  # nothing is known of these
    for other in (
        make_about("runs/one", "runs/two"), make_about("runs/b"), make_about("runs/unknown"),
        make_about("runs/two", view="cropped_aligned"), make_about("runs/two", steps=[]),
        make_about("runs/two", calibrate="auto"),
        make_about("runs/two", folds=3), make_about("runs/two", half_windows=[0, 5]),
    ):  # fmt: skip
        assert methods(one, other) == named("e0", "e1")
        assert methods(one, other, moved) == named("e0", "e1")  # the third is another of the first


def test_ensembles_of_runs_that_nothing_is_known_of_are_said_to_be_taken_for_one():
    members = [make_member("one"), make_member("two", seed=1)]

    def said(*runs: str) -> list[str]:
        return _taken_for_one(label_ensembles(make_ensembles(*map(make_about, runs)), members, ["A", "A"]), members)

    assert said("runs/one", "runs/two") == said("runs/one", "runs/x") == said("runs/x") == []
    (sentence,) = said("runs/x", "runs/y")
    assert sentence.startswith("Ensembles runs/ensemble-0, runs/ensemble-1 are shown as one method")


def test_the_lead_is_about_the_best_ensemble_and_says_which():
    targets = make_targets(60, 0)
    runs = [make_result(targets, 1, "A", skill=0.2)]
    labelled = [
        make_result(targets, 5 + place, f"{kind} e{place}", skill=skill + more)
        for place, skill in enumerate((0.3, 0.6))
        for kind, more in ((ENSEMBLE, 0), (CALIBRATED, 0.4))
    ]
    methods = group_methods(constant_result(runs[0].predicted, count_labels(targets)), runs, labelled)
    video = np.arange(60) // 10
    drawn = bootstrap(methods, video, num_draws=10, seed=0)
    evidence = Evidence(methods, count_labels(targets), [f"v{n}/1.jpg" for n in video], video, drawn, [])
    assert evidence.best.label == "ensemble e1"
    sentences = lead(evidence, num_draws=10)
    assert sentences[0].startswith("Ensemble e1 scores P = ")
    assert "Ensemble, calibrated e1 has more: " in sentences[0]
    words = "Where labels are of fewer than 10 videos they are rough: VA 6, EXPR 6, AU 6."
    assert words in " ".join(sentences)
    assert differences_tables(methods, drawn)[0].caption.startswith("Difference to ensemble e1,")


def test_what_is_unfinished_or_stale_is_said():
    weights = make_member("one").weights
    checkpoint = weights.checkpoint._replace(uri="runs/one/checkpoints/step_18")
    weights = weights._replace(checkpoint=checkpoint, state={"total_steps": 720}, newest_step=18)
    member = make_member("one")._replace(weights=weights)
    run = make_result(make_targets(20, 0), 0, "A cropped")._replace(name="one", member=member)
    for where in ("runs/one", "s3://old/runs/one"):  # and where the storage was moved since
        (ensemble,) = make_ensembles(make_about(where, step=9))
        unfinished, stale = _warnings([run], [ensemble])
        assert "one (step 18 of 720)" in unfinished
        assert "was made of other checkpoints than are best now, of runs/one" in stale
    methods = group_methods(constant_result(run.predicted, count_labels(run.predicted.targets)), [run], ensemble)
    rows = [dict(zip(table.columns, row)) for table in [runs_table(methods)] for row in table.rows]
    assert "unfinished: step 18 of 720" in [row["step"].below for row in rows]
    done = run._replace(member=member._replace(weights=weights._replace(newest_step=720)))
    for where, step in (("runs/one", 18), ("s3://old/runs/one", 18), ("runs/other", 9)):
        assert _warnings([done], make_ensembles(make_about(where, step=step))) == []
    twin = done._replace(member=done.member._replace(run_uri="there/one"))
    assert _warnings([done, twin], make_ensembles(make_about("s3://old/runs/one"))) == []  # of which one, none can say


def test_runs_of_other_data_are_refused_by_name():
    check_same_data([make_member("one"), make_member("two", view="cropped_aligned")])
    with pytest.raises(InputError, match=r"runs/one .* and runs/two .* different sources"):
        check_same_data([make_member("one"), make_member("two", view="cropped_aligned", source_sha256="other")])
    with pytest.raises(InputError, match=r"runs/two .* and runs/three .* different checksums"):
        check_same_data(
            [make_member("one", view="cropped_aligned"), make_member("two"), make_member("three", sha256="other")]
        )
    results = [make_result(make_targets(20, seed), 1, f"method{seed}") for seed in (0, 1)]
    check_same_rows([results[0], results[0]])
    with pytest.raises(InputError, match=r"runs/method0-1 and runs/method1-1 .* labels differ"):
        check_same_rows(results)


def test_what_runs_are_called_is_text_in_the_page():
    name = "<script>alert(1)</script>\"'&"
    methods = make_methods()
    methods[1] = Method(name, (methods[1].results[0]._replace(name=name),))
    drawn = bootstrap(methods, np.arange(60) // 6, num_draws=5, seed=0)
    tables = [html.table(headline_table(methods, drawn)), html.table(runs_table(methods))]
    blocks = [*tables, html.definitions([(name, name)]), name]  # a block that no macro made is text too
    page = html.page(title=name, lead=[name], parts=[Part("a", name, blocks)], footer=[name])
    assert page.count("<script>") == 1  # the page's own
    assert "alert(1)" in page


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["RUN", "RUN/"], ["is named twice"]),
        (["RUN"], ["no committed checkpoint", "nothing"]),
        (["RUN", "--val", "a", "b"], ["--val names 2 sets for 1 runs"]),
        (["RUN", "--draws", "0"], ["--draws is 0", "expected 1 or more"]),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(args, words, tmp_path):
    run = str(tmp_path / "nothing")
    args = [arg.replace("RUN", run) for arg in args]
    with pytest.raises(InputError) as caught:
        main([*args, "--out", str(tmp_path / "out")])
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_command_line_without_runs_ends_with_exit_code_2(tmp_path):
    done = run_here("mtl_dist.report", "--out", str(tmp_path / "out"))
    assert_one_message(done, "no run is named")
    assert list(tmp_path.iterdir()) == []


def test_what_calibration_adds_is_the_mean_over_ensembles_of_the_same_steps():
    def ensemble(*p: float, steps=("plain mean", "+ weights")) -> Result:
        about = {"steps": {name: dict.fromkeys(MAIN, value) for name, value in zip(steps, p)}}
        return make_result(make_targets(20, 0), 0, ENSEMBLE)._replace(score_file=about)

    one, other = ensemble(2.0, 2.5), ensemble(2.2, 2.1)
    shorter = ensemble(1.5, steps=("plain mean",))._replace(method=f"{ENSEMBLE} short")
    both, alone = steps_tables([one, other, shorter, make_result(make_targets(20, 0), 0, "A")])
    (plain, weights), place = both.rows, both.columns.index("P")
    assert (plain[place].text, plain[place].below) == ("2.1000", "")
    assert (weights[place].text, weights[place].below) == ("2.3000", "+0.2000 ± 0.4243")
    assert "2 ensembles" in both.note
    assert [row[0].text for row in alone.rows] == ["plain mean"]
    assert "ensembles" not in alone.note


def test_gains_have_their_interval_or_the_deviation_over_ensembles_and_older_ensembles_have_none():
    def ensemble(gain: float, kept: list[str], **about) -> Result:
        of_p = {"gain": gain, "low": gain - 0.25, "high": gain + 0.25, "videos": 12}
        of_va = {"gain": gain, "low": None, "high": None, "videos": 1}
        folds = [{"kept": {"smoothing": kept}}, {"kept": {}}]
        calibration = {"kept": {"smoothing": kept}, "kept_by_folds": {"smoothing": {"va": len(kept)}}, "folds": folds}
        about = {"gains": {"+ smoothing": {"p": of_p, "va": of_va}}, "calibration": calibration} | about
        return make_result(make_targets(20, 0), 0, ENSEMBLE)._replace(score_file=about)

    old, one, other = ensemble(0.5, [], gains={}), ensemble(0.5, ["va"]), ensemble(0.3, [])
    missing = old._replace(score_file={"steps": {}})
    assert gains_tables([old, missing, make_result(make_targets(20, 0), 0, "A")]) == []
    (table,) = gains_tables([missing, one])
    assert table.columns == ("Step", "P", "VA", "EXPR F1", "AU F1", "kept")
    name, p, va, expr, _, kept = table.rows[0]
    assert (name.text, p.text, p.below, p.is_apart) == ("+ smoothing", "+0.5000", "+0.2500 to +0.7500", True)
    assert (va.text, va.below, va.is_apart, expr.text) == ("+0.5000", "no interval", False, "–")
    assert (kept.text, kept.below) == ("VA", "VA 1 of 2 folds")
    few = ensemble(0.5, ["va"])
    few.score_file["gains"]["+ smoothing"]["p"]["videos"] = 9
    assert not gains_tables([few])[0].rows[0][1].is_apart
    (both,) = gains_tables([one, other])
    assert (both.rows[0][1].text, both.rows[0][1].below) == ("+0.4000", "± 0.1414")
    assert both.rows[0][-1].text == "VA in 1 of 2"
    assert "2 ensembles" in both.note
    of_all = ensemble(0.1, [], calibration={"steps": ["+ smoothing"]})
    (table,) = gains_tables([of_all._replace(method=f"{ENSEMBLE} x")])
    assert (table.columns[-1], table.caption.endswith(": ensemble x")) == ("AU F1", True)
