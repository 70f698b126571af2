"""Which rows a window has, and what a batch has of windows and of whole videos."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtl_dist.data.augment import ImagePreparation
from mtl_dist.data.cache import Cache
from mtl_dist.data.features import FeatureReader, FeatureRows
from mtl_dist.data.index import FEATURES, check_pair, dump_index, read_index, read_sets
from mtl_dist.data.loader import eval_batches, train_batches
from mtl_dist.data.order import Order
from mtl_dist.data.samples import Mixture
from mtl_dist.data.sequences import Layout, WindowSamples, read_layout
from mtl_dist.data.windows import Windows, eval_videos
from mtl_dist.errors import InputError
from mtl_dist.sections import AugmentConfig
from tests.conftest import write_features

LENGTHS = [1, 5, 16, 17, 40, 3, 96, 7]


@pytest.mark.parametrize("length", [2, 3, 16, 64])
def test_every_row_is_in_exactly_one_window_of_an_epoch(length):
    windows = Windows(np.arange(1, 201), length, seed=3)
    for epoch in range(12):
        spans = windows.spans(np.arange(windows.starts[-1]), epoch=epoch)
        assert (spans[:, 1] < spans[:, 2]).all()
        assert (spans[:, 2] - spans[:, 1] <= length).all()
        for video, rows in enumerate(windows.video_rows):
            of_video = spans[spans[:, 0] == video]
            assert len(of_video) == rows // length + 1
            assert np.concatenate([np.arange(a, b) for _, a, b in of_video]).tolist() == list(range(rows))


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=12),
    st.integers(2, 80),
    st.integers(0, 2**31),
    st.integers(0, 99),
)
def test_windows_are_whole_but_the_first_and_the_last(rows, length, seed, epoch):
    windows = Windows(np.array(rows), length, seed)
    spans = windows.spans(np.arange(windows.starts[-1]), epoch=epoch)
    for video in range(len(rows)):
        sizes = np.diff(spans[spans[:, 0] == video][:, 1:]).ravel()
        assert (sizes[1:-1] == length).all()
        assert sizes.sum() == rows[video]


def test_boundaries_move_from_epoch_to_epoch_and_phases_are_even():
    windows = Windows(np.array([96, 100]), 16, seed=0)
    begins = {epoch: windows.spans(np.arange(7), epoch=epoch)[:, 1].tolist() for epoch in range(40)}
    assert len({tuple(begin) for begin in begins.values()}) > 5
    phases = [[windows.phase(video, epoch=epoch) for epoch in range(3000)] for video in (0, 1)]
    assert np.bincount(phases[0]).tolist()[0] == 0
    assert sorted(set(phases[0])) == list(range(1, 16))
    assert sorted(set(phases[1])) == list(range(13))
    assert np.bincount(phases[1]).min() > 150  # of 3000 in 13


def test_a_window_is_the_same_whoever_asks_for_it():
    windows = Windows(np.array([50, 60, 70]), 16, seed=1)
    every = windows.spans(np.arange(windows.starts[-1]), epoch=4)
    for number in (0, 5, 11):
        assert windows.spans(np.array([number]), epoch=4)[0].tolist() == every[number].tolist()


def open_windows(*uris, length=16, context=0, seed=0) -> WindowSamples:
    sets = read_sets([str(uri) for uri in uris])
    readers = [FeatureReader(uri, index, Cache(None)) for uri, index in sets.pairs()]
    return WindowSamples(FeatureRows(readers), sets.sha256, Windows(readers[0].index.video_rows, length, seed), context)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features") / "train", LENGTHS)


def all_features(width: int = 6, total: int = sum(LENGTHS)) -> np.ndarray:
    return np.random.default_rng([0, width]).normal(size=(total, width)).astype(np.float16)


def test_a_window_is_a_slice_of_what_was_stored(features):
    samples, stored = open_windows(features).at_epoch(2), all_features()
    batch = samples.read(np.arange(int(samples.group_sizes.sum())))
    rows = batch.rows[batch.valid]
    assert sorted(rows.tolist()) == list(range(sum(LENGTHS)))
    assert (batch.inputs[batch.valid].numpy() == stored[rows.numpy()]).all()
    assert not batch.inputs[~batch.valid].any()
    assert (batch.rows[~batch.valid] == -1).all()
    for mask in (batch.labels.va_mask, batch.labels.expr_mask, batch.labels.au_mask):
        assert not mask[~batch.valid].any()
    assert int(batch.labels.va_mask.sum()) == samples.counts.va
    assert samples.group_sizes.tolist() == [(1 // 16) + 1 + 1 + 2, 2 + 3 + 1, 7 + 1]


def test_context_is_seen_and_not_learnt_from(features):
    samples = open_windows(features, context=4)
    batch = samples.read(np.arange(int(samples.group_sizes.sum())))
    plain = open_windows(features).read(np.arange(int(samples.group_sizes.sum())))
    assert batch.valid_rows() == plain.valid_rows()
    assert sorted(batch.valid_rows()) == list(range(sum(LENGTHS)))
    assert batch.valid.sum() > plain.valid.sum()
    only_seen = batch.valid & (batch.rows < 0)
    assert not batch.labels.va_mask[only_seen].any()
    assert not batch.labels.au_mask[only_seen].any()
    stored = all_features()
    for sample in range(len(batch.rows)):
        counted = batch.rows[sample][batch.rows[sample] >= 0]
        first = int(only_seen[sample].sum())
        assert (batch.inputs[sample, :first].numpy() == stored[counted[0] - first : counted[0]]).all()


def test_sets_side_by_side_are_one_row(features, tmp_path):
    wide = write_features(tmp_path / "wide", LENGTHS, width=9, extractor="d" * 64, videos_per_shard=5)
    both = open_windows(features, wide)
    numbers = np.arange(int(both.group_sizes.sum()))
    batch = both.read(numbers)
    assert batch.inputs.shape[-1] == 15
    rows = batch.rows[batch.valid].numpy()
    assert (batch.inputs[batch.valid].numpy() == np.concatenate([all_features(), all_features(9)], 1)[rows]).all()
    sets = read_sets([str(features), str(wide)])
    assert sets.rows == sum(LENGTHS)
    assert sets.labels.rows == sum(LENGTHS)
    assert [extractor.width for extractor in sets.extractors] == [6, 9]
    both.warm(range(3))


def test_sets_of_several_sources_are_read_as_one(features, tmp_path):
    other = write_features(tmp_path / "other", [30, 2], source="e" * 64)
    mixture = Mixture([open_windows(features), open_windows(other)], "f" * 64).at_epoch(1)
    batch = mixture.read(np.arange(int(mixture.group_sizes.sum())))
    assert len(batch.valid_rows()) == sum(LENGTHS) + 32 == int(batch.valid.sum())
    assert (batch.rows[~batch.valid] == -1).all()
    assert len(set(batch.valid_rows())) == sum(LENGTHS) + 32
    whole = mixture.whole()
    assert whole.frames.tolist() == [*LENGTHS, 30, 2]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_ranks_together_read_every_window_of_an_epoch_once(features, num_ranks):
    samples = open_windows(features)
    total = int(samples.group_sizes.sum())
    order = Order(samples.group_sizes, global_batch=8, streams=8, block_shards=2, seed=0)
    for epoch in range(3):
        rows, numbers = [], []
        for rank in range(num_ranks):
            for batch in train_batches(
                samples, order, epoch=epoch, start_step=0, rank=rank, num_ranks=num_ranks, workers=1, prefetch=2
            ):
                rows += batch.valid_rows()
                numbers += batch.samples.tolist()
        assert len(set(numbers)) == len(numbers) == total - total % 8
        assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_every_row_is_evaluated_once_in_its_whole_video(features, num_ranks):
    samples, rows = open_windows(features), []
    for rank in range(num_ranks):
        for batch in eval_batches(samples, batch=2, rank=rank, num_ranks=num_ranks, workers=0, prefetch=1):
            assert batch.valid.sum(1).tolist() == [LENGTHS[video] for video in batch.samples.tolist()]
            rows += batch.valid_rows()
    assert sorted(rows) == list(range(sum(LENGTHS)))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=30), st.integers(1, 8), st.integers(1, 9))
def test_videos_are_shared_out_whole_each_once(frames, batch, num_ranks):
    frames = np.array(frames)
    of_ranks = [list(eval_videos(frames, batch=batch, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)]
    assert sorted(video for batches in of_ranks for videos in batches for video in videos) == list(range(len(frames)))
    for videos in (videos for batches in of_ranks for videos in batches):
        assert len(videos) == 1 or frames[videos].max() * len(videos) <= batch * np.median(frames)
    most = max(sum(frames[videos].sum() for videos in batches) for batches in of_ranks)
    assert most <= frames.sum() / num_ranks + frames.max()


def test_a_rank_without_videos_has_an_empty_batch(features):
    batch = read_layout(open_windows(features).source, Layout([], [], [], []), np.zeros(0, np.int64))
    assert batch.inputs.shape == (0, 1, 6)
    assert batch.labels.va.shape == (0, 1, 2)


def test_a_flipped_bit_is_found_and_named(features, tmp_path):
    import shutil

    shutil.copytree(features, tmp_path / "damaged")
    tar = tmp_path / "damaged" / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[512 + 200] ^= 1
    tar.write_bytes(data)
    samples = open_windows(tmp_path / "damaged")
    with pytest.raises(InputError, match=r"shard-000001\.tar, video 0: its bytes do not match"):
        samples.read(np.arange(int(samples.group_sizes.sum())))


def test_sets_of_other_rows_of_the_same_pictures_do_not_stand_side_by_side(features, tmp_path):
    other = write_features(tmp_path / "other", [*LENGTHS[:-1], 8], width=3, extractor="d" * 64)
    with pytest.raises(InputError, match="of the same pictures, but have other rows: 186 and 185"):
        read_sets([str(features), str(other)])


def test_train_and_val_are_of_the_same_extractors(features, tmp_path):
    val = write_features(tmp_path / "val", [9], split="val", extractor="d" * 64)
    with pytest.raises(InputError, match="expected the same of both"):
        check_pair(read_sets([str(features)]), read_sets([str(val)]))


def test_the_same_network_pooled_otherwise_is_another_extractor(features, tmp_path):
    val = write_features(tmp_path / "val", [9], split="val")
    index = read_index(str(val), formats=(FEATURES,))
    other = index.model_copy(update={"extractor": index.extractor.model_copy(update={"pool": "max"})})
    (val / "index.json").write_bytes(dump_index(other))
    with pytest.raises(InputError, match=r"random 6 \(mean, .*random 6 \(max, .*expected the same of both"):
        check_pair(read_sets([str(features)]), read_sets([str(val)]))


def test_pictures_and_features_are_not_one_set(features, shards):
    with pytest.raises(InputError, match="are sets of pictures and of features"):
        read_sets([str(features), str(shards / "cropped_aligned" / "train")])


def test_statistics_of_several_sources_are_those_of_all_rows(features, tmp_path):
    other = write_features(tmp_path / "other", [30, 2], source="e" * 64)
    index = read_index(str(other), formats=(FEATURES,))
    moved = index.model_copy(update={"mean": [2.0] * 6, "std": [3.0] * 6})
    (other / "index.json").write_bytes(dump_index(moved))
    mean, std = read_sets([str(features), str(other)]).statistics
    n, m = sum(LENGTHS), 32
    expected = 2 * m / (n + m)
    assert mean == pytest.approx(np.full(6, expected))
    assert std == pytest.approx(np.full(6, np.sqrt((n * 1 + m * (9 + 4)) / (n + m) - expected**2)))


def test_what_is_constant_in_all_sources_stays_exactly_that(features, tmp_path):
    other = write_features(tmp_path / "other", [31, 2], source="e" * 64)
    for place in (features, other):
        index = read_index(str(place), formats=(FEATURES,))
        copy = tmp_path / place.name
        copy.mkdir(exist_ok=True)
        still = index.model_copy(update={"mean": [0.1] * 6, "std": [0.0] * 5 + [1.0]})
        (copy / "index.json").write_bytes(dump_index(still))
    _, std = read_sets([str(tmp_path / features.name), str(tmp_path / "other")]).statistics
    assert std.tolist() == [0.0] * 5 + [1.0]


def test_frames_of_a_window_are_augmented_alike():
    rows = torch.tensor([[-1, -1, 5, 6], [7, 8, -1, -1]])
    alone, alike = (ImagePreparation(AugmentConfig(), 32, alike=alike) for alike in (False, True))
    draws = alike.draw(rows, seed=3, epoch=1)
    expected = alone.draw(torch.tensor([[5], [7]]), seed=3, epoch=1)
    assert torch.equal(draws, expected.expand_as(draws))
    assert alike.draw(rows[:0], seed=3, epoch=1).shape[:2] == (0, 4)


def test_a_batch_of_windows_moves_and_is_taken_from(features):
    samples = open_windows(features)
    batch = samples.read(np.arange(5))
    part = batch.take(torch.tensor([3, 1]))
    assert part.samples.tolist() == [3, 1]
    assert part.inputs.shape[:2] == batch.inputs[:2].shape[:2]
