"""Batches hold what the plan says, whatever the threads; images and labels are right; the cache believes nothing."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from mtl_dist import storage
from mtl_dist.data.augment import NUM_DRAWS, augment, make_draws, normalise, turn_hue
from mtl_dist.data.cache import Cache
from mtl_dist.data.decode import DecodeError, decode, decode_into
from mtl_dist.data.index import Index, read_index
from mtl_dist.data.loader import eval_batches, lend, train_batches
from mtl_dist.data.order import EpochPlan, Order
from mtl_dist.data.reader import ShardReader
from mtl_dist.data.samples import ImageSamples
from mtl_dist.data.sidecar import parse_sidecar
from mtl_dist.data.unlabelled import unlabelled
from mtl_dist.errors import InputError
from mtl_dist.sections import AugmentConfig
from mtl_dist.shards.__main__ import create
from mtl_dist.shards.annotations import FILES, read_annotations
from tests.conftest import REPO, write_dataset

SIZE = 48  # of the images in `dataset`: they are not resized
GOLDEN_DRAWS = [[16478517, 630654, 15324590], [9602216, 372584, 8831955], [12401988, 182857, 15487400]]
PLAIN = AugmentConfig(crop_scale=(1, 1), flip=False, rotation=0, brightness=0, contrast=0, saturation=0, erase=0)


@pytest.fixture(scope="module")
def train(shards) -> ShardReader:
    return open_reader(shards / "cropped" / "train")


def open_reader(uri: Path | str, cache: Cache | None = None) -> ShardReader:
    return ShardReader(str(uri), read_index(str(uri)), cache or Cache())


def images(reader: ShardReader) -> ImageSamples:
    return ImageSamples(reader, SIZE)


def rows_in_order(directory: Path, index: Index) -> np.ndarray:
    """The row number of every sample of a set."""
    sidecars = [parse_sidecar((directory / f"{entry.name}.safetensors").read_bytes()) for entry in index.shards]
    return np.concatenate([sidecar.row for sidecar in sidecars])


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("loader", "fetch"))]


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("start_step", [0, 1, 4])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_training_batches_hold_the_rows_of_the_plan_in_its_order(shards, train, workers, start_step, num_ranks):
    order = Order(train.index.shard_rows, 8, 4, 2, seed=5)
    rows = rows_in_order(shards / "cropped" / "train", train.index)
    for rank in range(num_ranks):
        plan = EpochPlan(order, epoch=3, rank=rank, num_ranks=num_ranks)
        batches = train_batches(
            images(train), order, epoch=3, start_step=start_step, rank=rank, num_ranks=num_ranks,
            workers=workers, prefetch=2,
        )  # fmt: skip
        found = [batch.rows[:, 0].tolist() for batch in batches]
        assert found == [rows[plan.samples(step)].tolist() for step in range(start_step, order.num_steps)]
    assert loader_threads() == []


@pytest.mark.parametrize("num_ranks", [1, 3, 7, 25])
def test_evaluation_reads_each_row_once_over_all_ranks(shards, num_ranks):
    samples, found = images(open_reader(shards / "cropped" / "val")), []
    for rank in range(num_ranks):
        for batch in eval_batches(samples, batch=4, rank=rank, num_ranks=num_ranks, workers=rank % 2, prefetch=2):
            assert 1 <= len(batch.rows) <= 4
            found += batch.rows[:, 0].tolist()
    assert sorted(found) == list(range(20))


def test_a_batch_has_the_shapes_the_images_and_the_labels_of_its_rows(dataset, train):
    annotations = read_annotations(dataset / FILES["train"])
    batch = train.read_batch(np.array([3, 39, 0, 17, 3]), SIZE)
    assert batch.inputs.shape == (5, 1, 3, SIZE, SIZE)
    assert batch.inputs.dtype == torch.uint8
    assert batch.valid.tolist() == [[True]] * 5
    assert batch.samples.tolist() == [3, 39, 0, 17, 3]
    assert batch.rows[0, 0] == batch.rows[4, 0], "a sample may be asked for twice"
    for i, row in enumerate(batch.rows[:, 0].tolist()):
        with Image.open(dataset / "cropped" / annotations.images[row]) as image:
            expected = np.asarray(image.convert("RGB")).astype(int)
        difference = np.abs(batch.inputs[i, 0].permute(1, 2, 0).numpy() - expected)
        assert difference.max() <= 4, "two decoders agree within the rounding of the inverse DCT"
        assert difference.mean() < 0.2
        np.testing.assert_array_equal(batch.labels.va[i, 0], annotations.va[row])
        assert batch.labels.expr[i, 0] == annotations.expr[row]
        np.testing.assert_array_equal(batch.labels.au[i, 0], annotations.au[row])
        for name in ("va_mask", "expr_mask", "au_mask"):
            np.testing.assert_array_equal(getattr(batch.labels, name)[i, 0], getattr(annotations, name)[row])
    labels = batch.labels
    assert [t.dtype for t in labels] == [torch.float32, torch.int64, torch.float32] + [torch.bool] * 3
    assert [tuple(t.shape) for t in labels] == [(5, 1, 2), (5, 1), (5, 1, 12), (5, 1), (5, 1), (5, 1, 12)]


def test_a_batch_of_nothing_keeps_its_shapes(train):
    batch = train.read_batch(np.array([], np.int64), SIZE)
    assert batch.inputs.shape == (0, 1, 3, SIZE, SIZE)
    assert batch.labels.au.shape == (0, 1, 12)


def test_names_and_rows_are_those_of_the_annotations(dataset, train):
    rows, names, _ = train.names()
    assert sorted(rows.tolist()) == list(range(40))
    images = read_annotations(dataset / FILES["train"]).images
    assert names == [images[row] for row in rows]


def test_images_of_mixed_sizes_are_resized_to_one(tmp_path):
    source = write_dataset(tmp_path / "source", num_train=12, num_val=2, size=32)
    ramp = np.linspace(0, 255, 97)
    for number, path in enumerate(sorted((source / "cropped").rglob("t*/*.jpg"))):
        height, width = [(97, 97), (160, 97), (40, 200), (20, 20)][number % 4]
        image = np.stack([np.resize(ramp, width)[None].repeat(height, 0)] * 3, 2).astype(np.uint8)
        path.write_bytes(simplejpeg.encode_jpeg(image, quality=95))
    create(str(source), str(tmp_path / "shards"), views=("cropped",), frames_per_shard=5, jobs=1)
    reader = open_reader(tmp_path / "shards" / "cropped" / "train")
    names = reader.names().images
    batch = reader.read_batch(np.arange(12), 64)
    assert batch.inputs.shape == (12, 1, 3, 64, 64)
    for i, name in enumerate(names):
        with Image.open(source / "cropped" / name) as image:
            expected = np.asarray(image.convert("RGB").resize((64, 64), Image.BILINEAR)).astype(int)
        assert np.abs(batch.inputs[i, 0].permute(1, 2, 0).numpy() - expected).mean() < 6, name


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_loader_closed_early_leaves_no_thread(train, workers):
    order = Order(train.index.shard_rows, 4, 4, 2, seed=0)
    batches = train_batches(
        images(train), order, epoch=0, start_step=0, rank=0, num_ranks=1, workers=workers, prefetch=3
    )
    next(batches)
    batches.close()
    assert loader_threads() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_in_a_loader_thread_reaches_the_caller_and_leaves_no_thread(shards, tmp_path, workers):
    directory = copy_set(shards / "cropped" / "train", tmp_path / "train")
    for tar in directory.glob("*.tar"):
        damage_image(tar)
    reader = open_reader(directory)
    order = Order(reader.index.shard_rows, 8, 4, 2, seed=0)
    with pytest.raises(InputError, match=r"row .* do not match their checksum"):
        list(
            train_batches(
                images(reader), order, epoch=0, start_step=0, rank=0, num_ranks=1, workers=workers, prefetch=2
            )
        )
    assert loader_threads() == []


def copy_set(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def damage_image(tar: Path, *, place: int = 0) -> None:
    """Change one byte of an image; the size stays."""
    sidecar = parse_sidecar(tar.with_suffix(".safetensors").read_bytes())
    data = bytearray(tar.read_bytes())
    data[sidecar.offset[place] + sidecar.length[place] // 2] ^= 1
    tar.write_bytes(data)


# ----------------------------------------------------------------------------------------------------------- decoding


def test_decoding_into_a_buffer_is_decoding():
    rng = np.random.default_rng(0)
    for side, size in ((48, 48), (60, 48), (200, 48), (30, 48)):
        data = simplejpeg.encode_jpeg(rng.integers(0, 255, (side, side, 3), np.uint8))
        out = np.empty((size, size, 3), np.uint8)
        decode_into(memoryview(data), out)
        np.testing.assert_array_equal(out, decode(data, size))
    assert decode(data).shape == (30, 30, 3)


def test_a_grey_jpeg_is_decoded_to_three_equal_channels():
    grey = np.random.default_rng(0).integers(0, 255, (48, 48, 1), np.uint8)
    pixels = decode(simplejpeg.encode_jpeg(grey, colorspace="GRAY"))
    assert pixels.shape == (48, 48, 3)
    assert (pixels[..., 0] == pixels[..., 1]).all()


@pytest.mark.parametrize("cut", [0, 1, 2, 20, 300, -300, -40])
def test_a_truncated_jpeg_is_an_error(cut):
    data = simplejpeg.encode_jpeg(np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8))
    with pytest.raises(DecodeError):
        decode(data[:cut])


# ------------------------------------------------------------------------------------------------------- augmentation


def some_images(size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randint(0, 256, (6, 1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return inputs, torch.tensor([[4], [0], [17], [2], [999_999], [5]])


def test_augmentation_depends_on_seed_epoch_and_row_and_nothing_else():
    inputs, rows = some_images()
    config = AugmentConfig(erase=0.5)
    whole = augment(inputs, make_draws(rows, seed=1, epoch=2), config, 40)
    for i in range(6):  # alone, in another place of another batch
        alone = augment(inputs[i : i + 1], make_draws(rows[i : i + 1], seed=1, epoch=2), config, 40)
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-5)
    backwards = augment(inputs.flip(0), make_draws(rows.flip(0), seed=1, epoch=2), config, 40)
    torch.testing.assert_close(backwards.flip(0), whole, rtol=0, atol=1e-5)
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        other = augment(inputs, make_draws(rows, seed=seed, epoch=epoch), config, 40)
        assert ((other - whole).abs().flatten(1).mean(1) > 0.01).all()


def test_draws_are_uniform_and_independent():
    rows = torch.arange(2000)[:, None]
    draws = torch.cat([make_draws(rows, seed=0, epoch=epoch) for epoch in (0, 1)])
    flat = draws.flatten(0, 1).numpy()
    assert flat.min() >= 0
    assert flat.max() < 1
    np.testing.assert_allclose(flat.mean(0), 0.5, atol=0.03)
    np.testing.assert_allclose(flat.var(0), 1 / 12, atol=0.005)
    # No two columns, neighbouring rows or epochs go together.
    assert np.abs(np.corrcoef(flat.T) - np.eye(NUM_DRAWS)).max() < 0.08
    assert np.abs(np.mean((flat[1:2000] - 0.5) * (flat[:1999] - 0.5), 0)).max() < 0.01
    assert np.abs(np.mean((flat[2000:] - 0.5) * (flat[:2000] - 0.5), 0)).max() < 0.01


def test_the_first_draws_are_those_of_the_first_version():
    """Golden: runs continue from checkpoints of versions that drew fewer numbers."""
    draws = make_draws(torch.tensor([[0], [7], [999_999]]), seed=3, epoch=2)
    assert (draws[:, 0, :12] * (1 << 24)).long()[:, [0, 5, 11]].tolist() == GOLDEN_DRAWS


def test_hue_is_turned_as_torchvision_turns_it():
    from torchvision.transforms.functional import adjust_hue

    images = torch.rand(5, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    images[0, :, :5] = images[0, :1, :5]  # grey: no hue
    images[1] = images[1].round()  # black, white and pure colours
    turns = torch.tensor([0.5, -0.3, 0.1, -0.5, 0.0])
    expected = torch.stack([adjust_hue(image, float(turn)) for image, turn in zip(images, turns)])
    torch.testing.assert_close(turn_hue(images, turns), expected, rtol=0, atol=2e-6)


def test_colours_are_changed_as_torchvision_changes_them_where_nothing_is_cut_off():
    from torchvision.transforms import functional

    inputs = 100 + some_images()[0] // 8  # mid grey: no operation leaves the range
    config = PLAIN.model_copy(update={"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1})
    draws = make_draws(some_images()[1], seed=0, epoch=0)
    found = augment(inputs, draws, config, SIZE)
    for image, u, mine in zip(inputs[:, 0], draws[:, 0].tolist(), found[:, 0]):
        expected = functional.adjust_brightness(image / 255, 1 + 0.4 * (2 * u[5] - 1))
        expected = functional.adjust_contrast(expected, 1 + 0.4 * (2 * u[6] - 1))
        expected = functional.adjust_saturation(expected, 1 + 0.4 * (2 * u[7] - 1))
        expected = functional.adjust_hue(expected, 0.1 * (2 * u[12] - 1))
        mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        # torchvision's grey has a weight of blue that is 0.0001 off the others' complement.
        torch.testing.assert_close(mine, functional.normalize(expected, mean, std), rtol=0, atol=2e-3)


def test_colours_of_as_many_images_as_asked_are_left_alone():
    inputs = some_images()[0][:1].expand(400, -1, -1, -1, -1)
    config = PLAIN.model_copy(update={"hue": 0.5, "brightness": 0.5, "jitter_p": 0.8})
    found = augment(inputs, make_draws(torch.arange(400)[:, None], seed=0, epoch=0), config, SIZE)
    same = (found - normalise(inputs[:1], SIZE)[0]).abs().flatten(1).amax(1) < 1e-4
    assert 50 < int(same.sum()) < 115


@pytest.mark.parametrize("size", [SIZE, 60, 17])
def test_a_crop_of_the_resized_image_is_cut_at_whole_pixels(size):
    """Resizing, then cutting out, by plain torch; at the side of the input, a larger and a smaller one."""
    inputs, rows = some_images()
    inputs, rows = inputs[:1].expand(40, -1, -1, -1, -1), torch.arange(40)[:, None]
    side = 64
    config = PLAIN.model_copy(update={"resize": side, "crop_scale": (0.3, 0.4)})
    draws = make_draws(rows, seed=0, epoch=0)
    found = augment(inputs, draws, config, size)
    resized = torch.nn.functional.interpolate(inputs[:1, 0] / 255, size=(side, side), mode="bilinear")
    whole = normalise((resized * 255)[:, None], side)[0, 0]
    places = set()
    for u, mine in zip(draws[:, 0], found[:, 0]):
        left, top = ((u[i] * (side - size + 1)).long() for i in (2, 3))
        torch.testing.assert_close(mine, whole[:, top : top + size, left : left + size], rtol=0, atol=2e-4)
        places.add(int(left))
    assert {0, side - size} & places or side - size > 10
    assert len(places) > min(side - size, 10) // 2


@pytest.mark.parametrize("size", [SIZE, 17, SIZE - 1, SIZE + 1, 3 * SIZE])
def test_augmentation_that_changes_nothing_is_what_evaluation_sees_at_any_size(size):
    inputs, rows = some_images()
    draws = make_draws(rows, seed=0, epoch=0)
    torch.testing.assert_close(augment(inputs, draws, PLAIN, size), normalise(inputs, size), rtol=0, atol=5e-5)


def test_training_makes_an_image_smaller_with_the_detail_that_evaluation_leaves_it():
    """299 -> 112: without antialiasing the energy between neighbouring pixels of noise is several times as much."""
    inputs = some_images(299)[0][:2]
    draws = make_draws(torch.arange(2)[:, None], seed=0, epoch=0)
    both = augment(inputs, draws, PLAIN, 112), normalise(inputs, 112)
    energies = [float(images.diff(dim=-1).square().mean()) for images in both]
    assert energies[0] == pytest.approx(energies[1], rel=1e-3)


def test_a_crop_of_an_image_made_smaller_first_is_cut_at_whole_pixels_of_it():
    inputs, rows = some_images()
    config = PLAIN.model_copy(update={"resize": 30})
    draws = make_draws(rows, seed=0, epoch=0)
    whole = normalise(inputs, 30)
    for image, u, mine in zip(whole[:, 0], draws[:, 0], augment(inputs, draws, config, 24)[:, 0]):
        left, top = ((u[i] * 7).long() for i in (2, 3))
        torch.testing.assert_close(mine, image[:, top : top + 24, left : left + 24], rtol=0, atol=5e-5)


def test_normalisation_is_that_of_imagenet():
    inputs, _ = some_images()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (inputs.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(normalise(inputs, SIZE).numpy(), expected, atol=1e-5)


def test_half_of_the_images_are_mirrored_and_nothing_else_happens_to_them():
    inputs = some_images()[0][:1].expand(200, -1, -1, -1, -1)
    config = PLAIN.model_copy(update={"flip": True})
    found = augment(inputs, make_draws(torch.arange(200)[:, None], seed=0, epoch=0), config, SIZE)
    plain = normalise(inputs[:1], SIZE)[0]
    same = (found - plain).abs().flatten(1).amax(1) < 1e-4
    mirrored = (found - plain.flip(-1)).abs().flatten(1).amax(1) < 1e-4
    assert (same ^ mirrored).all()
    assert 70 < int(mirrored.sum()) < 130


def test_a_crop_shows_a_part_of_the_image_and_rotation_keeps_its_middle():
    ramp = torch.arange(SIZE, dtype=torch.uint8).expand(3, SIZE, SIZE)[None, None].expand(100, -1, -1, -1, -1)
    draws = make_draws(torch.arange(100)[:, None], seed=0, epoch=0)
    config = PLAIN.model_copy(update={"crop_scale": (0.5, 0.5)})
    cropped = augment(ramp, draws, config, SIZE)[:, 0, 0] * 0.229 * 255 + 0.485 * 255
    width = cropped[:, 0, -1] - cropped[:, 0, 0]
    np.testing.assert_allclose(width, 0.5 * (SIZE - 1), atol=1.0)
    assert cropped.min() >= -0.1
    assert cropped.max() <= SIZE - 0.9
    left = cropped[:, 0, 0]
    assert left.min() < 3
    assert left.max() > SIZE / 2 - 4

    disc = torch.zeros(1, 1, 3, SIZE, SIZE, dtype=torch.uint8)
    disc[..., 20:28, 20:28] = 255
    rotated = augment(disc, draws[:1], PLAIN.model_copy(update={"rotation": 90.0}), SIZE)
    torch.testing.assert_close(rotated[..., 22:26, 22:26], normalise(disc, SIZE)[..., 22:26, 22:26])


# -------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def remote(s3, shards, tmp_path, request) -> str:
    """A set on the S3 server, under a prefix of this test's own; a cache in `tmp_path`."""
    uri = f"s3://mtl/{request.node.name}/val"
    for path in sorted((shards / "cropped" / "val").iterdir()):
        storage.upload(path, f"{uri}/{path.name}")
    return uri


def cached_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if not path.suffix)


READ_ALL = """
import hashlib, sys
from pathlib import Path
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import read_index
uri, directory = sys.argv[1:]
index, cache = read_index(uri), Cache(Path(directory))
print("ready", flush=True)
sys.stdin.readline()
for entry in index.shards:
    for name, sha256, size in (("tar", entry.tar_sha256, entry.tar_bytes),
                               ("safetensors", entry.sidecar_sha256, entry.sidecar_bytes)):
        with cache.open(f"{uri}/{entry.name}.{name}", sha256=sha256, size=size) as file:
            assert hashlib.sha256(file.read()).hexdigest() == sha256
print("whole")
"""


def test_processes_share_one_download_of_each_shard(s3, remote, tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READ_ALL, remote, str(tmp_path / "cache")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPO,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    counted = s3.count_gets()
    for process in processes:  # both at once
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0] for process in processes] == ["whole\n"] * 2
    gets = {name: number - counted.get(name, 0) for name, number in s3.count_gets().items()}
    of_shards = {name: number for name, number in gets.items() if "shard-" in name and remote[11:] in name}
    assert len(of_shards) == 6
    assert set(of_shards.values()) == {1}
    assert len(cached_files(tmp_path / "cache")) == 6


def test_a_cached_set_is_read_without_the_store(remote, tmp_path):
    index = read_index(remote)
    first = ShardReader(remote, index, Cache(tmp_path / "cache")).read_batch(np.arange(20), SIZE)
    storage.delete_all(remote)
    again = ShardReader(remote, index, Cache(tmp_path / "cache")).read_batch(np.arange(20), SIZE)
    assert torch.equal(first.inputs, again.inputs)


@pytest.mark.parametrize("suffix", ["tar", "safetensors"])
def test_a_flipped_bit_in_a_cached_file_is_found_and_the_next_run_fetches_it_anew(remote, tmp_path, suffix):
    index, cache = read_index(remote), Cache(tmp_path / "cache")
    ShardReader(remote, index, cache).read_batch(np.arange(20), SIZE)
    entry = index.shards[1]
    path = cache.path(f"{remote}/{entry.name}.{suffix}", entry.tar_sha256 if suffix == "tar" else entry.sidecar_sha256)
    data = bytearray(path.read_bytes())
    place = 512 + 400 if suffix == "tar" else len(data) - 1
    data[place] ^= 16
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"shard-000001.*in this node's cache"):
        ShardReader(remote, index, cache).read_batch(np.arange(20), SIZE)
    ShardReader(remote, index, cache).read_batch(np.arange(20), SIZE)


@pytest.mark.parametrize("size", [0, 1000])
def test_a_cached_file_cut_short_by_a_crash_is_fetched_anew(remote, tmp_path, size):
    index, cache = read_index(remote), Cache(tmp_path / "cache")
    ShardReader(remote, index, cache).read_batch(np.arange(20), SIZE)
    for path in cached_files(tmp_path / "cache"):
        os.truncate(path, size)
    assert len(ShardReader(remote, index, cache).read_batch(np.arange(20), SIZE).rows) == 20
    assert all(path.stat().st_size > 1000 for path in cached_files(tmp_path / "cache"))


def test_a_torn_download_is_not_believed_and_does_not_stay(remote, tmp_path):
    index, cache = read_index(remote), Cache(tmp_path / "cache")
    entry = index.shards[0]
    path = cache.path(f"{remote}/{entry.name}.tar", entry.tar_sha256)
    leftovers = [path.with_suffix(".part"), (path.parent / ("0" * 40)).with_suffix(".part")]
    for scratch in leftovers:  # as two killed processes leave them: one of this shard, one of a set never read again
        scratch.mkdir(parents=True)
        (scratch / "object").write_bytes(b"torn")
        (scratch / ".part-abc.7Ce0").write_bytes(b"torn")
    assert len(ShardReader(remote, index, cache).read_batch(np.arange(20), SIZE).rows) == 20
    assert not any(scratch.exists() for scratch in leftovers)
    assert storage.sha256_of(path) == entry.tar_sha256


def test_a_download_under_way_is_left_alone(tmp_path, remote):
    index, cache = read_index(remote), Cache(tmp_path / "cache", max_bytes=1)
    other = tmp_path / "cache" / ("1" * 40)
    other.with_suffix(".part").mkdir(parents=True)
    (other.with_suffix(".part") / "object").write_bytes(b"half")
    with other.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the process that downloads it holds it
        ShardReader(remote, index, cache).read_batch(np.arange(20), SIZE)
        assert (other.with_suffix(".part") / "object").read_bytes() == b"half"


def test_what_the_store_sends_is_checked_on_arrival(s3, remote, tmp_path):
    index = read_index(remote)
    stored = s3.stored(remote.removeprefix("s3://mtl/") + "/shard-000001.tar")
    data = bytearray(stored.read_bytes())
    data[700] ^= 1
    storage.write_bytes(f"{remote}/shard-000001.tar", bytes(data))
    with pytest.raises(InputError, match=r"shard-000001\.tar is not what the index says"):
        ShardReader(remote, index, Cache(tmp_path / "cache")).read_batch(np.arange(20), SIZE)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".part"]


def put(name: str, content: bytes) -> dict:
    """Store an object; return what the cache needs to open it."""
    storage.write_bytes(name, content)
    return {"uri": name, "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def test_eviction_keeps_the_bound_and_takes_what_was_used_longest_ago(s3, tmp_path):
    cache = Cache(tmp_path / "cache", max_bytes=3500)
    objects = [put(f"s3://mtl/evict/{number}", bytes([number]) * 1000) for number in range(6)]
    for number in (0, 1, 2, 0, 3):
        cache.open(**objects[number]).close()
        assert sum(path.stat().st_size for path in cached_files(tmp_path / "cache")) <= 3500
    kept = [number for number, about in enumerate(objects) if cache.path(about["uri"], about["sha256"]).exists()]
    assert kept == [0, 2, 3]


def test_eviction_takes_nothing_that_the_cache_did_not_make(s3, tmp_path):
    names = ["thesis.pdf", "thesis", "a" * 39, "a" * 41, "A" * 40, "a" * 40 + ".pdf", "notes.part", "notes.lock"]
    for name in names:
        (tmp_path / name).write_bytes(b"of somebody" * 1000)
    (tmp_path / "film.part").mkdir()
    (tmp_path / "film.part" / "object").write_bytes(b"of somebody" * 1000)
    cache, first, second = Cache(tmp_path, max_bytes=1000), *(put(f"s3://mtl/own/{n}", n.encode() * 1000) for n in "12")
    cache.open(**first).close()
    cache.open(**second).close()
    assert not cache.path(first["uri"], first["sha256"]).exists()
    assert cache.path(second["uri"], second["sha256"]).exists(), "what is somebody else's does not count"
    assert {path.name for path in tmp_path.iterdir() if path.stat().st_size != 1000} == {*names, "film.part"}
    assert (tmp_path / "film.part" / "object").exists()


def test_eviction_never_removes_what_is_open(s3, tmp_path):
    cache = Cache(tmp_path / "cache", max_bytes=2000)
    objects = [put(f"s3://mtl/open/{number}", bytes([number]) * 1000) for number in range(4)]
    with cache.open(**objects[0]) as held:
        for about in objects[1:]:
            cache.open(**about).close()
            assert cache.path(objects[0]["uri"], objects[0]["sha256"]).exists()
        assert held.read() == bytes(1000)
    for about in objects[1:3]:  # closed, it is taken like any other
        cache.open(**about).close()
    assert not cache.path(objects[0]["uri"], objects[0]["sha256"]).exists()


def test_a_mapped_shard_holds_its_file_against_eviction(remote, tmp_path):
    index, cache = read_index(remote), Cache(tmp_path / "cache", max_bytes=1)
    reader = ShardReader(remote, index, cache)
    reader.read_batch(np.arange(20), SIZE)
    tars = [cache.path(f"{remote}/{entry.name}.tar", entry.tar_sha256) for entry in index.shards]
    assert all(path.exists() for path in tars), "open: kept although over the bound"
    reader.read_batch(np.arange(20), SIZE)
    del reader
    about = put("s3://mtl/another", b"x" * 10)
    cache.open(**about).close()
    assert not any(path.exists() for path in tars)


def test_equal_names_and_sets_made_anew_do_not_collide(s3, tmp_path):
    cache = Cache(tmp_path / "cache")
    here, there = put("s3://mtl/one/shard-000000.tar", b"a" * 50), put("s3://mtl/two/shard-000000.tar", b"b" * 50)
    anew = put("s3://mtl/one/shard-000000.tar", b"c" * 50)
    for about, content in ((anew, b"c"), (there, b"b")):
        with cache.open(**about) as file:
            assert file.read() == content * 50
    with pytest.raises(InputError, match="not what the index says"):
        cache.open(**here)
    assert len(cached_files(tmp_path / "cache")) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a directory to another user")
def test_in_a_cache_of_another_user_one_has_a_directory_of_ones_own(s3, tmp_path):
    about, theirs = put("s3://mtl/shared", b"x" * 1000), Cache(tmp_path / "cache")
    planted = theirs.path(about["uri"], about["sha256"])
    planted.parent.mkdir()
    planted.write_bytes(b"y" * 1000)  # of the right size: what is already there is believed
    planted.with_suffix(".lock").write_bytes(b"a dead lock")
    os.chown(tmp_path / "cache", 65534, 65534)
    ours = Cache(tmp_path / "cache", max_bytes=1)
    with ours.open(**about) as file:
        assert file.read() == b"x" * 1000
    assert planted.read_bytes() == b"y" * 1000
    os.chown(tmp_path / "cache", 0, 0)  # and its owner's eviction leaves it alone
    Cache(tmp_path / "cache", max_bytes=1).open(**put("s3://mtl/shared-2", b"z")).close()
    assert ours.path(about["uri"], about["sha256"]).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a directory to another user")
@pytest.mark.parametrize("planted", ["directory", "link"])
def test_what_another_user_put_at_the_place_of_ones_own_cache_is_refused(s3, tmp_path, planted):
    shared, about = tmp_path / "shared", put("s3://mtl/planted", b"x" * 1000)
    shared.mkdir()
    shared.chmod(0o1777)
    os.chown(shared, 65534, 65534)
    own = shared / f"user-{os.geteuid()}"
    Cache(shared).open(**about).close()
    assert own.stat().st_mode & 0o777 == 0o700, "nobody else may write there"
    own.rename(tmp_path / "moved")
    (tmp_path / "theirs").mkdir()
    own.mkdir() if planted == "directory" else own.symlink_to(tmp_path / "theirs")
    os.chown(own, 65534, 65534, follow_symlinks=False)
    with pytest.raises(InputError, match=rf"cache directory {own} is of user 65534, who .* set data\.cache_dir to"):
        Cache(shared).open(**about)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to another user")
def test_a_cached_file_of_another_user_is_fetched_anew(s3, tmp_path):
    cache, about = Cache(tmp_path), put("s3://mtl/cached-replaced", b"x" * 1000)
    path = cache.path(about["uri"], about["sha256"])
    path.write_bytes(b"y" * 1000)  # where all may write, as in /tmp
    os.chown(path, 65534, 65534)
    with cache.open(**about) as file:
        assert file.read() == b"x" * 1000
    assert path.stat().st_uid == os.geteuid()


def test_a_cache_that_cannot_be_written_is_named(s3, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    about = put("s3://mtl/unwritable", b"x")
    with pytest.raises(InputError, match=r"cache directory .* cannot be used.*data\.cache_dir"):
        Cache(tmp_path / "file" / "cache").open(**about)


def test_memory_of_pixels_is_used_again_once_a_batch_is_given_back_and_never_before(shards):
    index = read_index(f"{shards}/cropped/train")
    reader = ShardReader(f"{shards}/cropped/train", index, Cache())
    kept = [reader.read_batch(np.arange(begin, begin + 8), 80) for begin in range(0, 32, 8)]
    expected = [batch.inputs.clone() for batch in kept]
    addresses = [batch.inputs.data_ptr() for batch in kept]
    assert len(set(addresses)) == 4
    reader.give_back(kept.pop())
    assert reader.read_batch(np.arange(8), 80).inputs.data_ptr() == addresses[3]
    assert all(torch.equal(batch.inputs, pixels) for batch, pixels in zip(kept, expected))
    reader.give_back(kept[0])
    reader.give_back(kept[0])  # once counts
    again = [reader.read_batch(np.arange(8), 80) for _ in range(3)]
    assert [batch.inputs.data_ptr() for batch in again].count(addresses[0]) == 1
    reader.give_back(unlabelled(np.zeros((8, 80, 80, 3), np.uint8), range(8)))  # none of its own


def test_a_lent_batch_is_the_callers_until_the_next_and_memory_goes_round(shards, train):
    order = Order(train.index.shard_rows, 4, 4, 2, seed=0)
    samples, which = images(train), {"start_step": 0, "rank": 0, "num_ranks": 1, "workers": 2, "prefetch": 1}
    alone = [batch.inputs.clone() for batch in train_batches(samples, order, epoch=0, **which)]
    addresses = set()
    for batch, pixels in zip(lend(samples, train_batches(samples, order, epoch=0, **which)), alone, strict=True):
        assert torch.equal(batch.inputs, pixels)
        addresses.add(batch.inputs.data_ptr())
    assert len(addresses) < len(alone)
    batches = lend(samples, train_batches(samples, order, epoch=0, **which))
    next(batches)
    batches.close()
    assert loader_threads() == []
