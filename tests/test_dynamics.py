"""The drawn videos that have time in them: what their plan tells by time, and that the static plan is as it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from mtl_dist.errors import InputError
from mtl_dist.shards.annotations import FILES
from mtl_dist.synthetic.dynamics import BURST_ROWS, DYNAMICS_VERSION, plan_dynamic_video, plan_moments
from mtl_dist.synthetic.episodes import AU_THRESHOLD, place
from mtl_dist.synthetic.faces import render_views
from mtl_dist.synthetic.person import Look, Spoil, make_identity
from mtl_dist.synthetic.plan import EXPRESSION_SHARES, Quota, annotation_text, count_labels, plan_splits
from mtl_dist.synthetic.render import PARAMETERS_FILE, write_synthetic
from mtl_dist.synthetic.spoiling import KINDS, plan_spoil
from mtl_dist.tasks import AUS, EXPRESSIONS
from tests.conftest import run_here

NUM_ROWS = 96
EVERY_LABEL = (True, True, True)
# Of `plan_splits(num_train=300, num_val=100, seed=0, frames_per_video=24)` before there were videos with time in them.
STATIC_PLAN = {
    "train": "e786227fe5214387c8433a79ad89d93279b0c505756cad5218369db051dae947",
    "val": "dca276f16e553cd9bf62b04c1ec2a60b804783046ee04aeae44b025a4f43a48c",
}
SIZES = {"num_train": 9, "num_val": 4, "frames_per_video": 5, "seed": 3, "dynamics": True}


def plan_one(index: int):
    """A video with every label, and its moments."""
    key = (0, 0, index)
    video = plan_dynamic_video(
        "video", key, length=NUM_ROWS, pattern=EVERY_LABEL, expressions=Quota(EXPRESSION_SHARES), is_train=False
    )
    return video, plan_moments(key, NUM_ROWS, Quota(EXPRESSION_SHARES))


@pytest.fixture(scope="module")
def planned():
    return [plan_one(index) for index in range(60)]


@pytest.fixture(scope="module")
def dynamic_plan():
    return plan_splits(num_train=4800, num_val=1920, seed=0, frames_per_video=96, plan_video=plan_dynamic_video)


def split_episodes(moments) -> list[list]:
    begins = [row for row, moment in enumerate(moments) if row == 0 or moment.episode is not moments[row - 1].episode]
    return [moments[begin:end] for begin, end in zip(begins, [*begins[1:], len(moments)], strict=True)]


def told(value) -> str:
    """A look's value as text, numbers to 6 places."""
    if isinstance(value, float):
        return f"{value:.6f}"
    if isinstance(value, dict):
        return str({name: told(item) for name, item in value.items()})
    return str([told(item) for item in value]) if isinstance(value, tuple) else str(value)


def test_the_static_plan_is_what_it_was():
    plan = plan_splits(num_train=300, num_val=100, seed=0, frames_per_video=24)
    for split, videos in plan.items():
        looks = [frame.look for video in videos for frame in video.frames]
        assert all(look.spoil == Spoil() for look in looks)
        names = [field.name for field in dataclasses.fields(Look) if field.name != "spoil"]
        text = annotation_text(videos) + "\n".join(told(getattr(look, name)) for look in looks for name in names)
        assert hashlib.sha256(text.encode()).hexdigest() == STATIC_PLAN[split]


def test_valence_and_arousal_change_slowly_within_a_video(planned):
    """By the sample autocorrelation c_1 / c_0 about each video's mean (Box and Jenkins 1976), pooled over videos."""
    centred = [va - va.mean(axis=0) for va in (np.array([f.row.va for f in video.frames]) for video, _ in planned)]
    c_1 = np.concatenate([va[1:] * va[:-1] for va in centred]).sum(axis=0)
    correlation = c_1 / np.concatenate([va**2 for va in centred]).sum(axis=0)
    assert np.all((correlation > 0.9) & (correlation < 0.98))


def test_episodes_are_of_12_to_30_rows_and_come_and_go_over_three(planned):
    for video, moments in planned:
        episodes = split_episodes(moments)
        assert all(12 <= len(episode) <= 30 for episode in episodes)
        for episode in episodes:
            levels = [moment.level for moment in episode]
            assert levels[:4] == levels[:-5:-1] == [0.15, 0.35, 0.75, 1.0]
            assert set(levels[3:-3]) == {1.0}
        labelled = [EXPRESSIONS[frame.row.expr] for frame in video.frames]
        assert labelled == [moment.episode.expression for moment in moments]


def test_valence_follows_the_ramp(planned):
    strong = [
        [(video.frames[row].row.va[0], moment) for row, moment in enumerate(moments)]
        for video, moments in planned
        if moments[0].episode.expression == "Happiness"
    ]
    assert strong
    for rows in strong:
        rising = [va for va, _ in rows[:4]]
        assert rising[0] < 0.4 * rising[3]


def test_a_third_of_the_expressions_shows_in_bursts_of_a_quarter_of_its_rows(planned):
    episodes = [episode for _, moments in planned for episode in split_episodes(moments)]
    expressive = [episode for episode in episodes if episode[0].episode.expression != "Neutral"]
    subtle = [episode for episode in expressive if episode[0].is_subtle]
    assert 0.25 < len(subtle) / len(expressive) < 0.45
    assert 0.22 < np.mean([moment.is_burst for episode in subtle for moment in episode]) < 0.28
    for episode in subtle:
        text = "".join("x" if moment.is_burst else " " for moment in episode)
        assert {len(burst) for burst in text.split()} == {BURST_ROWS}
    neutral = [episode for episode in episodes if episode[0].episode.expression == "Neutral"]
    assert neutral
    assert not any(moment.is_subtle for episode in neutral for moment in episode)


def test_action_units_are_what_shows_and_valence_is_the_episodes(planned):
    shown, between = [], []
    for video, moments in planned:
        for frame, moment in zip(video.frames, moments, strict=True):
            assert frame.row.aus == tuple(int(frame.look.aus[au] > AU_THRESHOLD) for au in AUS)
            if moment.is_subtle and moment.level == 1 and moment.episode.expression == "Happiness":
                (shown if moment.is_burst else between).append((*frame.row.va, sum(frame.row.aus)))
    shown, between = np.array(shown), np.array(between)
    assert shown[:, 2].mean() > 1.5
    assert between[:, 2].mean() < 0.1
    np.testing.assert_allclose(shown[:, :2].mean(axis=0), between[:, :2].mean(axis=0), atol=0.1)


def test_movement_tells_energy_and_no_single_picture_does(planned):
    energy = [np.array([moment.level * moment.episode.energy for moment in moments]) for _, moments in planned]
    looks = [[frame.look for frame in video.frames] for video, _ in planned]
    poses = [
        np.array([(look.yaw, look.pitch, *look.gaze) for look in video]) / (0.14, 0.075, 0.3, 0.15) for video in looks
    ]
    steps = np.concatenate([np.linalg.norm(np.diff(pose, axis=0), axis=1) for pose in poses])
    assert np.corrcoef(np.concatenate([e[1:] for e in energy]), steps)[0, 1] > 0.5
    single = [(look.shoulders, look.lean, look.tint) for video in looks for look in video]
    for values in np.array(single).T:
        assert abs(np.corrcoef(np.concatenate(energy), values)[0, 1]) < 0.15


def test_three_rows_in_ten_are_spoiled_each_by_itself(planned):
    spoiled = np.array([[frame.look.spoil != Spoil() for frame in video.frames] for video, _ in planned])
    assert 0.27 < spoiled.mean() < 0.33
    assert abs(np.corrcoef(spoiled[:, 1:].ravel(), spoiled[:, :-1].ravel())[0, 1]) < 0.05


def test_every_kind_of_fault_changes_both_pictures_and_no_label():
    video, _ = plan_one(0)
    rng = np.random.default_rng(0)
    spoils = [plan_spoil(rng) for _ in range(12 * len(KINDS))]
    kinds = {
        "motion": next(spoil for spoil in spoils if spoil.motion_px),
        "blink": next(spoil for spoil in spoils if spoil.lids),
        "hand": next(spoil for spoil in spoils if spoil.hand),
        "exposure": next(spoil for spoil in spoils if spoil.exposure != 1),
    }
    assert set(kinds) == set(KINDS)
    clear = dataclasses.replace(video.frames[0].look, spoil=Spoil())
    before = [np.asarray(image, dtype=int) for image in render_views(video.identity, clear, np.random.default_rng(1))]
    for kind, spoil in kinds.items():
        look = dataclasses.replace(clear, spoil=spoil)
        after = [np.asarray(image, dtype=int) for image in render_views(video.identity, look, np.random.default_rng(1))]
        for one, other in zip(before, after, strict=True):
            assert one.shape == other.shape
            assert np.abs(one - other).max() > 40, kind


def test_labels_of_spoiled_rows_are_as_good_as_of_others(planned):
    errors = {True: [], False: []}
    for video, moments in planned:
        for frame, moment in zip(video.frames, moments, strict=True):
            error = np.subtract(frame.row.va, moment.level * place(moment.episode))
            errors[frame.look.spoil != Spoil()].extend(error.tolist())
    for is_spoiled in errors:
        assert np.std(errors[is_spoiled]) == pytest.approx(0.04, abs=0.003)


def test_blinking_lids_do_not_move_the_rest_of_the_face():
    identity = make_identity(np.random.default_rng(4))
    looks = (Look(aus={}), Look(aus={}, spoil=Spoil(lids=0.8)))
    pictures = [np.asarray(render_views(identity, look, np.random.default_rng(0))[1], dtype=int) for look in looks]
    change = np.abs(pictures[0] - pictures[1]).max(axis=2)
    assert change[28:52].max() > 60
    assert change[56:].max() == 0


def test_every_class_has_a_share_and_missing_labels_are_as_in_the_static_set(dynamic_plan):
    for split, videos in dynamic_plan.items():
        counts = count_labels(videos)
        assert counts["num_frames"] == {"train": 4800, "val": 1920}[split]
        assert min(counts["expressions"].values()) > 0.05 * counts["num_expr"]
        assert min(counts["au_positives"].values()) > 0.02 * counts["num_au"]
    assert count_labels(dynamic_plan["train"])["num_va"] / 4800 == pytest.approx(0.73, abs=0.06)
    assert 65 < np.mean([len(video.frames) for video in dynamic_plan["train"]]) < 130


def test_sets_of_one_seed_share_no_person(dynamic_plan):
    static = plan_splits(num_train=480, num_val=96, seed=0, frames_per_video=24)
    people = [{video.identity for videos in plan.values() for video in videos} for plan in (static, dynamic_plan)]
    assert not people[0] & people[1]
    assert len(people[1]) == sum(map(len, dynamic_plan.values()))


@pytest.mark.parametrize("length", [1, 2, 5, 11, 12, 31, 41, 42])
def test_a_video_of_any_length_is_filled(length):
    moments = plan_moments((0, 0, 0), length, Quota(EXPRESSION_SHARES))
    assert len(moments) == length
    assert all(len(episode) >= min(12, length) for episode in split_episodes(moments))


def read_tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_an_interrupted_set_is_completed_to_the_same_bytes(tmp_path):
    write_synthetic(tmp_path, **SIZES)
    whole = read_tree(tmp_path)
    (tmp_path / FILES["train"]).unlink()
    lost = sorted(tmp_path.rglob("*.jpg"))[::7]
    for path in lost:
        path.unlink()
    assert write_synthetic(tmp_path, **SIZES)["num_images_written"] >= len(lost)
    assert read_tree(tmp_path) == whole
    assert write_synthetic(tmp_path, **SIZES)["num_images_written"] == 0


def test_a_set_says_which_kind_it_is_and_is_not_taken_for_the_other(tmp_path):
    done = run_here("mtl_dist.shards", "synth", tmp_path / "a", "--dynamics", "--num-train", "3", "--num-val", "1")
    assert done.returncode == 0, done.stderr
    static = {"renderer": 3, "seed": 0, "num_train": 3, "num_val": 1, "frames_per_video": 24}
    parameters = json.loads((tmp_path / "a" / PARAMETERS_FILE).read_text())
    assert parameters == static | {"frames_per_video": 96, "dynamics": DYNAMICS_VERSION}
    with pytest.raises(InputError, match="delete it or choose another directory"):
        write_synthetic(tmp_path / "a", num_train=3, num_val=1, frames_per_video=96)
    write_synthetic(tmp_path / "b", num_train=3, num_val=1)
    assert json.loads((tmp_path / "b" / PARAMETERS_FILE).read_text()) == static
