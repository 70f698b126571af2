"""What the report's figures show and where: labels and predictions against the arrays that they are drawn from."""

from __future__ import annotations

import csv
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from sklearn.metrics import confusion_matrix

from mtl_dist.data.unlabelled import unlabelled
from mtl_dist.objective.scores import scores
from mtl_dist.report import affect, attention, calibration, classes, curves, gradients
from mtl_dist.report.affect import FEW, draw_affect
from mtl_dist.report.calibration import draw_reliability, reliability, task_reliability
from mtl_dist.report.classes import draw_confusion, draw_f1
from mtl_dist.report.curves import draw_curves, mean_losses
from mtl_dist.report.drawing import method_styles, save_png
from mtl_dist.report.results import Method
from mtl_dist.tasks import AUS, EXPRESSIONS
from tests.test_report import count_labels, make_member, make_methods, make_result, make_targets

# Points of the smallest letters: of charts, of those that scroll on a phone, of attention maps.
SMALLEST_POINTS, SMALLEST_DENSE, SMALLEST_PHOTO = 9, 8, 7


@pytest.fixture
def canvases(monkeypatch) -> list:
    """The figures that are drawn from now on, as matplotlib has them."""
    kept = []
    for module in (affect, attention, calibration, classes, curves, gradients):
        monkeypatch.setattr(module, "save_png", lambda figure, **how: kept.append(figure) or save_png(figure, **how))
    return kept


def make_lopsided(size: int) -> Method:
    """A method whose labels and predictions, valence and arousal, rows and columns cannot be taken for each other."""
    targets = make_targets(size, 5)
    targets = targets._replace(va=np.abs(targets.va) * [0.9, -0.5])
    result = make_result(targets, 6, "x", skill=0.2)
    drawn = result.predicted.predictions
    predictions = drawn._replace(va=drawn.va * [0.2, 0.4] + [-0.3, 0.5], expr=np.roll(drawn.expr, 1, axis=1))
    result = result._replace(predicted=result.predicted._replace(predictions=predictions))
    return Method("x", (result._replace(scores=scores(result.sums())),))


def test_confusion_has_labels_down_and_predictions_across(canvases):
    method = make_lopsided(400)
    predictions, targets = method.shown.predicted.predictions, method.shown.predicted.targets
    known = targets.expr_mask
    expected = confusion_matrix(targets.expr[known], predictions.expr[known].argmax(-1), labels=range(8))
    assert not np.array_equal(expected, expected.T)
    rows = list(csv.reader(io.StringIO(draw_confusion(method, 1).csv.decode())))
    assert [row[0] for row in rows] == ["labelled", *EXPRESSIONS]
    assert rows[0][1:] == list(EXPRESSIONS)
    assert np.array([row[1:] for row in rows[1:]], int).tolist() == expected.tolist()
    (axes,) = canvases[0].axes
    np.testing.assert_allclose(axes.images[0].get_array(), expected / expected.sum(1, keepdims=True))
    assert axes.images[0].origin == "upper"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "labelled")
    written = {text.get_position()[::-1]: int(text.get_text().split("\n")[1]) for text in axes.texts}
    assert written == {place: count for place, count in np.ndenumerate(expected) if count}


@pytest.mark.parametrize("size", [400, 2000])  # drawn as points, and as densities
def test_valence_and_arousal_stand_where_they_are_labelled_and_predicted(canvases, size):
    method = make_lopsided(size)
    targets = method.shown.predicted.targets
    labelled, predicted = targets.va[targets.va_mask], method.shown.predicted.predictions.va[targets.va_mask]
    figures = draw_affect(method, 1)
    assert (len(labelled) > FEW) == (size == 2000)
    for figure in figures:
        rows = list(csv.DictReader(io.StringIO(figure.csv.decode())))
        assert [int(row["row"]) for row in rows] == np.flatnonzero(targets.va_mask).tolist()
        for who, values in (("labelled", labelled), ("predicted", predicted)):
            found = [[float(row[f"{who} {what}"]) for what in ("valence", "arousal")] for row in rows]
            np.testing.assert_allclose(found, values, atol=5e-5)
    scatter, circle = ([find_points(axes) for axes in canvas.axes] for canvas in canvases)
    expected = np.stack([labelled, predicted]).transpose(2, 1, 0)
    for found, points in zip((*scatter, *circle), (*expected, labelled, predicted)):
        np.testing.assert_allclose(found.mean(0), points.mean(0), atol=0.03)
        if size == 400:
            np.testing.assert_array_equal(found, points)
    titles = [axes.get_title() for canvas in canvases for axes in canvas.axes]
    assert [title.split(",")[0] for title in titles] == ["valence", "arousal", "labelled", "predicted: x"]
    assert {(axes.get_xlabel(), axes.get_ylabel()) for axes in canvases[0].axes} == {("labelled", "predicted")}


def find_points(axes) -> np.ndarray:
    """The points (n, 2) of a panel, of densities the cells' middles as often as they were counted."""
    if not axes.collections:
        return next(line.get_xydata() for line in axes.lines if line.get_marker() == "o")
    (cells,) = axes.collections
    counts = np.ma.filled(cells.get_array(), 0)
    if hasattr(cells, "get_coordinates"):  # a mesh, which holds roots of counts
        corners = cells.get_coordinates()
        middles, counts = (corners[:-1, :-1] + corners[1:, 1:]).reshape(-1, 2) / 2, counts**2
    else:
        middles = cells.get_offsets()
    return np.repeat(middles, np.round(counts).astype(int).ravel(), axis=0)


@pytest.mark.whole
def test_attention_maps_lie_upright_over_their_faces_each_with_its_unit(canvases, monkeypatch):
    """A model that looks at one cell of 4 x 4, another for each unit and face: on a black face what is bright."""
    rng, faces, images = np.random.default_rng(0), [30, 7], [f"v/{i}.jpg" for i in range(60)]
    cells = np.stack([rng.permutation(16)[: len(AUS)] for _ in faces])
    maps = torch.full((len(faces), len(AUS) + 1, 16), 0.01)
    for (face, unit), cell in np.ndenumerate(cells):
        maps[face, unit, cell] = 0.2 + 0.05 * unit + 0.02 * face
    model = torch.nn.Identity()
    model.attention_maps = lambda images: maps.reshape(len(images), -1, 4, 4)
    monkeypatch.setattr(attention, "load_weights", lambda *_: SimpleNamespace(to=lambda device: model))
    black = SimpleNamespace(
        read=lambda rows, side: unlabelled(np.zeros((len(rows), side, side, 3), np.uint8), rows),
        pixels=lambda rows, side: np.zeros((len(rows), side, side, 3), np.uint8))  # fmt: skip
    monkeypatch.setattr(attention, "Pictures", lambda *_: black)
    result = make_result(make_targets(60, 0), 1, "A")._replace(member=make_member("one"))
    probabilities, targets = result.predicted.predictions.au, result.predicted.targets
    figure = attention.draw_attention(
        Method("A", (result,)), 1, faces, images=images, device=torch.device("cpu"), cache_dir=None
    )
    rows = list(csv.DictReader(io.StringIO(figure.csv.decode())))
    drawn, pixels = iter(canvases[0].axes), render(canvases[0])
    for number, face in enumerate(faces):
        assert next(drawn).get_title() == f"row {face}"
        for unit, au in enumerate(AUS):
            axes, row, own = next(drawn), rows.pop(0), maps[number, unit]
            assert (row["row"], row["image"], row["AU"]) == (str(face), f"v/{face}.jpg", f"AU{au}")
            found = [float(row[name]) for name in ("probability", "least attention", "most", "mean")]
            wanted = [probabilities[face, unit], *map(float, (own.min(), own.max(), own.mean()))]
            assert found == pytest.approx(wanted, abs=1e-4)
            label = "–" if not targets.au_mask[face, unit] else ("off", "on")[int(targets.au[face, unit])]
            assert row["label"] == label
            assert re.split(r"[ ,\n]+", axes.get_title()) == [
                f"AU{au}", label, "p", f"{probabilities[face, unit]:.2f}", "0.01", "to", f"{own.max():.2f}"
            ]  # fmt: skip
            box = axes.get_window_extent()
            part = pixels[len(pixels) - round(box.y1) : len(pixels) - round(box.y0), round(box.x0) : round(box.x1)]
            brightest = np.unravel_index(part[..., :3].sum(-1, dtype=int).argmax(), part.shape[:2])
            cell = [4 * place // side for place, side in zip(brightest, part.shape)]
            assert 4 * cell[0] + cell[1] == cells[number, unit]
    assert rows == []
    assert smallest_letters(canvases[0]) >= SMALLEST_PHOTO


def render(canvas) -> np.ndarray:
    """(H, W, 4) uint8, from the top."""
    agg = FigureCanvasAgg(canvas)
    agg.draw()
    return np.asarray(agg.buffer_rgba())


def smallest_letters(canvas) -> float:
    """Points."""
    return min(text.get_fontsize() for text in canvas.findobj(Text) if text.get_text() and text.get_visible())


@pytest.mark.whole
def test_no_letters_are_smaller_than_a_phone_shows_well(canvases, tmp_path):
    methods = make_methods(200)
    evaluated = {"kind": "eval", "step": 5, "scores": {"expr": 0.5}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(evaluated) + "\n")
    run = methods[1].results[0]._replace(uri=str(tmp_path), member=make_member("one"))
    methods[1] = methods[1]._replace(results=(run,))
    styles = method_styles(methods)
    draw_affect(methods[1], 1)
    assert min(map(smallest_letters, canvases)) >= SMALLEST_DENSE
    canvases.clear()
    draw_confusion(methods[1], 1)
    draw_f1(methods, styles, count_labels(run.predicted.targets))
    draw_reliability(methods, styles)
    draw_curves(methods, styles)
    assert len(canvases) == 5
    assert min(map(smallest_letters, canvases)) >= SMALLEST_POINTS


def test_the_loss_is_the_plain_sum_of_the_tasks_over_the_steps_that_have_them():
    loss = {"va": 0.5, "expr": 2.0, "au": 0.25, "total": -9.0}
    steps = [{"kind": "step", "step": step, "loss": loss} for step in range(1, 4)]
    assert mean_losses([*steps, {"kind": "eval", "step": 3, "scores": {}}]) == [(1, 2.75), (2, 2.75), (3, 2.75)]
    sparse = [{"kind": "step", "step": n, "loss": {"va": 1.0} | ({"expr": 3.0} if n % 2 else {})} for n in range(400)]
    assert {value for _, value in mean_losses(sparse)} == {4.0}
    assert mean_losses([]) == []


def test_reliability_equals_a_loop_over_predictions():
    rng = np.random.default_rng(0)
    confidence = np.r_[rng.random(300), 0.0, 0.3, 1.0]
    is_right = rng.random(303) < confidence
    found, error = reliability(confidence, is_right), 0.0
    for number in range(10):
        inside = [
            i for i, c in enumerate(confidence) if number / 10 < c <= (number + 1) / 10 or (c == 0 and number == 0)
        ]
        assert found.count[number] == len(inside)
        assert found.confidence[number] == pytest.approx(confidence[inside].mean())
        assert found.observed[number] == pytest.approx(is_right[inside].mean())
        error += len(inside) / 303 * abs(confidence[inside].mean() - is_right[inside].mean())
    assert found.error == pytest.approx(error)


def test_reliability_leaves_out_what_is_not_labelled():
    result = make_result(make_targets(200, 2), 1, "x")
    targets = result.predicted.targets
    assert task_reliability(result, "expr").count.sum() == targets.expr_mask.sum()
    assert task_reliability(result, "au").count.sum() == targets.au_mask.sum()


def test_names_with_dollars_are_drawn_as_they_are():
    methods = make_methods()
    methods[1] = methods[1]._replace(label="A cropped, $x^$")
    assert draw_affect(methods[1], 1)


def test_from_the_eighth_method_on_lines_look_other_too():
    methods = make_methods()
    many = [methods[1]._replace(label=f"m{number}") for number in range(40)]
    assert len({style for label, style in method_styles(many).items() if label.startswith("m")}) == 40


@pytest.mark.whole
def test_from_the_eighth_method_on_bars_look_other_too(canvases):
    methods = make_methods()
    many = [methods[1]._replace(label=f"m{number}") for number in range(12)]
    draw_f1(many, method_styles(many), count_labels(methods[1].results[0].predicted.targets))
    for canvas in canvases:
        (legend,) = canvas.legends
        handles = legend.legend_handles
        assert [text.get_text() for text in legend.get_texts()] == [method.label for method in many]
        assert len({(handle.get_facecolor(), handle.get_hatch()) for handle in handles}) == 12


@pytest.mark.filterwarnings("error")  # matplotlib's about a legend of nothing
@pytest.mark.parametrize(("cosines", "panels"), [({"va expr": 0.25}, 2), ({}, 1)])
def test_a_single_task_has_norms_and_no_cosines(cosines, panels, canvases, monkeypatch):
    records = [{"step": step, "gradients": {"norm": {"va": 1.0 + step}, "cosine": cosines}} for step in range(1, 4)]
    monkeypatch.setattr(gradients, "read_records", lambda uri: records)
    shown = SimpleNamespace(uri="a run", name="run")
    figure = gradients.draw_gradients(SimpleNamespace(shown=shown, label="A"), 1)
    assert len(canvases[0].axes) == panels
    assert f"mean cosines: {'va and expr +0.25' if cosines else 'none'}." in figure.alt
