"""Sets of features: every row once, in the order of its video, the same bytes however they are made."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from safetensors.numpy import load, save
from safetensors.torch import save_file

from mtl_dist import storage
from mtl_dist.data.augment import normalise
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import FEATURES, INDEX_NAME, FeatureIndex, dump_index, read_index, read_sets
from mtl_dist.data.reader import ShardReader
from mtl_dist.data.sidecar import FeatureSidecar, dump_sidecar, parse_feature_sidecar, parse_sidecar, read_about
from mtl_dist.data.video_rows import read_rows
from mtl_dist.errors import InputError
from mtl_dist.features.layout import Video, cut
from mtl_dist.features.moments import Moments, moments_of
from mtl_dist.models.backbones import build_backbone
from mtl_dist.models.face_nets import Embedding
from mtl_dist.shards.folds import deal_folds
from mtl_dist.tasks import VIEWS
from tests.conftest import REPO, assert_one_message, run_here, write_dataset
from tests.starving import starving_networks
from tests.test_shards import flip_bit, read_tree

SIZE, WIDTH = 48, 96  # of the pictures of `dataset`, and of vgg_small


def save_backbone(path: Path, name: str = "vgg_small", *, seed: int = 0, size: int = SIZE) -> Path:
    """Write random weights of a backbone."""
    torch.manual_seed(seed)
    network = settled(build_backbone(name, size), size)
    save_file({f"backbone.{key}": tensor for key, tensor in network.state_dict().items()}, path)
    return path


def settled(network: torch.nn.Module, size: int) -> torch.nn.Module:
    """Give a network of random weights the statistics of a few images: without, a deep one's features are huge."""
    for child in network.modules():
        if isinstance(child, torch.nn.BatchNorm2d):
            child.momentum = None  # the mean of all batches
    with torch.no_grad():
        network.train()(torch.randn(8, 3, size, size))
    return network


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("weights") / "vgg.safetensors")


def create(dest: Path | str, data: list[Path | str], *runs: Path | str, **options) -> subprocess.CompletedProcess[str]:
    """Run `create` on this machine with one process, unless `options` say otherwise."""
    options = {"backbone": "vgg_small", "image_size": SIZE, "batch": 4, "jobs": 1} | options
    flags = [
        word
        for name, value in options.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else [value]))
    ]
    args = ["create", dest, "--data", *data, "--runs", *runs, "--local", *flags]
    return run_here("mtl_dist.features", *args)


def created(dest: Path, *args, **options) -> Path:
    done = create(dest, *args, **options)
    assert done.returncode == 0, done.stderr
    return dest


def sets_of(shards: Path, *splits: str, view: str = "cropped") -> list[Path]:
    return [shards / view / split for split in splits or ("train", "val")]


@pytest.fixture(scope="session")
def features(shards, weights, tmp_path_factory) -> Path:
    """Features of both splits of the session's cropped pictures: read only."""
    return created(tmp_path_factory.mktemp("features"), sets_of(shards), weights) / "cropped"


@pytest.fixture(scope="session")
def other_shards(tmp_path_factory) -> Path:
    """Shards of 30 training rows: several batches, the last of which is not full."""
    root = tmp_path_factory.mktemp("other")
    from mtl_dist.shards.__main__ import create as create_shards

    create_shards(str(write_dataset(root / "source", num_train=30, num_val=9)), str(root / "shards"), jobs=1)
    return root / "shards"


@pytest.fixture
def small_shards(monkeypatch) -> None:
    """Shards of 8 KiB, not MiB: several of few rows, in this process alone."""
    monkeypatch.setattr("mtl_dist.features.plan.MIB", 8 << 10)


def read_set(directory: Path) -> tuple[FeatureIndex, list[FeatureSidecar], list[np.ndarray]]:
    """Return index, sidecars and the features of every video, read by the places that the sidecars name."""
    index = read_index(str(directory), formats=(FEATURES,))
    sidecars, features = [], []
    for shard in index.shards:
        sidecar = parse_feature_sidecar((directory / f"{shard.name}.safetensors").read_bytes())
        tar = (directory / f"{shard.name}.tar").read_bytes()
        for begin, rows in zip(sidecar.begin.tolist(), sidecar.num_rows.tolist()):
            flat = np.frombuffer(tar, "<f2", rows * index.extractor.width, begin)
            features.append(flat.reshape(rows, -1))
        sidecars.append(sidecar)
    return index, sidecars, features


def pictures_by_row(directory: Path, size: int = SIZE) -> dict[int, torch.Tensor]:
    """Every picture (3, S, S) uint8 of a set by its row, one at a time."""
    reader = ShardReader(str(directory), read_index(str(directory)), Cache())
    found = {}
    for number in range(reader.index.rows):
        batch = reader.read_batch(np.array([number]), size)
        found[int(batch.rows)] = batch.inputs[0, 0].clone()
    return found


def features_by_row(directory: Path) -> dict[int, np.ndarray]:
    _, sidecars, features = read_set(directory)
    rows = np.concatenate([sidecar.row for sidecar in sidecars])
    return dict(zip(rows.tolist(), np.concatenate(features)))


def own_features(network: torch.nn.Module, picture: torch.Tensor) -> np.ndarray:
    """What a network says of one picture by itself: the mean of its cells."""
    with torch.inference_mode():
        cells = network.eval()(normalise(picture[None, None], picture.shape[-1])[:, 0])
    return cells.mean((2, 3))[0].numpy()


def loaded(weights: Path, name: str = "vgg_small", size: int = SIZE) -> torch.nn.Module:
    network = build_backbone(name, size)
    state = load(weights.read_bytes()).items()
    network.load_state_dict({key.removeprefix("backbone."): torch.from_numpy(value) for key, value in state})
    return network


# -------------------------------------------------------------------------------------------------------- what is made


def test_features_are_what_the_network_says_of_each_picture_alone(shards, weights, features):
    network, found = loaded(weights), features_by_row(features / "train")
    pictures = pictures_by_row(shards / "cropped" / "train")
    assert found.keys() == pictures.keys() == set(range(40))
    for row, picture in pictures.items():
        np.testing.assert_allclose(found[row], own_features(network, picture), rtol=1e-3, atol=1e-4)


def test_rows_of_a_video_are_in_the_order_of_its_frames_and_duplicates_side_by_side(shards, features):
    index, sidecars, arrays = read_set(features / "train")
    assert [name for sidecar in sidecars for name in sidecar.video_names()] == ["t0", "t1", "t2", "t3", "t4"]
    assert [len(array) for array in arrays] == index.video_rows.tolist() == [8] * 5
    rows = np.concatenate([sidecar.row for sidecar in sidecars])
    frames = np.concatenate([sidecar.frame for sidecar in sidecars])
    assert rows.tolist() == list(range(40))  # as the annotations have them, not as the shards of pictures
    # Names count on over videos, and every tenth row has the name before it: a video's first frame is 0.
    assert frames.tolist() == [number - 8 * (number // 8) - (number % 10 == 9) for number in range(40)]
    images = [name for sidecar in sidecars for name in sidecar.image_names()]
    twice = [place for place in range(39) if images[place] == images[place + 1]]
    assert len(twice) == 4 - sum(number % 8 == 0 for number in (9, 19, 29, 39))
    for place in twice:
        assert frames[place] == frames[place + 1]
        np.testing.assert_array_equal(np.concatenate(arrays)[place], np.concatenate(arrays)[place + 1])


def test_frames_are_sorted_by_their_number_whatever_the_order_of_rows(tmp_path, weights):
    from mtl_dist.shards.__main__ import create as create_shards

    source = write_dataset(tmp_path / "source", num_train=16, num_val=8)
    path = source / "training_set_annotations.txt"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *lines[::-1]]) + "\n")
    create_shards(str(source), str(tmp_path / "shards"), views=("cropped",), jobs=1)
    created(tmp_path / "features", sets_of(tmp_path / "shards", "train"), weights)
    _, (sidecar,), _ = read_set(tmp_path / "features" / "cropped" / "train")
    assert sidecar.video_names() == ["t1", "t0"]  # in the order of their first rows
    # Row 15 is the first picture. Row 6, the tenth from the end, has that of row 7.
    assert sidecar.row.tolist() == [6, 7, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8]
    assert sidecar.frame[8:].tolist() == list(range(8))


def test_pictures_of_persons_are_videos_of_one_row_each(dataset, tmp_path, weights):
    from mtl_dist.shards.__main__ import create as create_shards
    from mtl_dist.shards.columns import TableOptions

    names = [f"t0/{number:05d}.jpg" for number in range(6)] + [f"v0/{number:05d}.jpg" for number in range(3)]
    people = ["ann", "bob", "ann", "bob", "ann", "", "eve", "eve", "eve"]  # t0 is no film: it has two persons
    lines = [f"{name},{person},{'val' if name[0] == 'v' else 'train'}" for name, person in zip(names, people)]
    (tmp_path / "t.csv").write_text(
        "\n".join(["image,person,split,expression", *(f"{line},1" for line in lines)]) + "\n"
    )
    table = TableOptions(images=dataset / "cropped")
    create_shards(str(tmp_path / "t.csv"), str(tmp_path / "shards"), views=("cropped",), jobs=1, table=table)
    created(tmp_path / "out", sets_of(tmp_path / "shards"), weights)
    index, (sidecar,), _ = read_set(tmp_path / "out" / "cropped" / "train")
    assert (sidecar.video_names(), index.video_rows.tolist()) == (names[:6], [1] * 6)
    assert sidecar.frame.tolist() == [0] * 6
    index, (sidecar,), _ = read_set(tmp_path / "out" / "cropped" / "val")
    assert (sidecar.video_names(), index.video_rows.tolist()) == (["v0"], [3])


def test_labels_and_names_are_those_of_the_pictures(shards, features):
    for split in ("train", "val"):
        _, sidecars, _ = read_set(features / split)
        own = [
            parse_sidecar(path.read_bytes()) for path in sorted((shards / "cropped" / split).glob("*.safetensors"))
        ]  # fmt: skip
        by_row = np.argsort(np.concatenate([sidecar.row for sidecar in own]))
        mine = np.argsort(np.concatenate([sidecar.row for sidecar in sidecars]))
        for name in ("row", "length", "crc32", "image", "va", "expr", "au", "va_mask", "expr_mask", "au_mask"):
            theirs = np.concatenate([getattr(sidecar, name) for sidecar in own])[by_row]
            np.testing.assert_array_equal(
                np.concatenate([getattr(sidecar, name) for sidecar in sidecars])[mine], theirs
            )


def test_statistics_are_those_of_the_training_rows_in_both_indexes(features):
    train, _, arrays = read_set(features / "train")
    val = read_index(str(features / "val"), formats=(FEATURES,))
    rows = np.concatenate(arrays).astype(np.float64)
    np.testing.assert_allclose(train.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(train.std, rows.std(0), rtol=1e-6, atol=1e-9)
    assert (val.mean, val.std) == (train.mean, train.std)
    assert train.source_index_sha256 != val.source_index_sha256
    assert train.extractor == val.extractor
    assert train.extractor.name == "vgg_small of vgg.safetensors"
    read_sets([str(features / "train")])


def test_moments_of_a_number_that_never_changes_have_no_deviation():
    mean, std = moments_of(np.full((5000, 1), 1000.5, np.float16)).statistics()
    assert (mean, std) == ([1000.5], [0.0])
    parts = [Moments(1, np.array([x]), np.array([x * x])) for x in (1.0, 3.0)]
    assert parts[0].plus(parts[1]).statistics() == ([2.0], [1.0])


def test_made_twice_every_byte_is_the_same(shards, weights, features, tmp_path):
    created(tmp_path / "again", sets_of(shards), weights)
    assert read_tree(tmp_path / "again" / "cropped") == read_tree(features)


@pytest.mark.whole
def test_the_number_of_processes_and_threads_changes_no_byte(other_shards, tmp_path, monkeypatch):
    wide = save_backbone(tmp_path / "iresnet.safetensors", "iresnet18")
    options = {"backbone": "iresnet18", "batch": 8}
    created(tmp_path / "one", sets_of(other_shards), wide, **options)
    created(tmp_path / "threads", sets_of(other_shards), wide, jobs=3, workers=2, **options)
    monkeypatch.setattr("mtl_dist.features.job.CPUS_OF_A_PROCESS", 1)
    created(tmp_path / "processes", sets_of(other_shards), wide, jobs=2, **options)  # one for each set's one shard
    for name in ("threads", "processes"):
        assert read_tree(tmp_path / name) == read_tree(tmp_path / "one")


def test_a_picture_has_the_same_features_in_any_batch(shards, weights, features, tmp_path):
    created(tmp_path, sets_of(shards), weights, batch=64)
    mine, other = (features_by_row(directory / "train") for directory in (features, tmp_path / "cropped"))
    for row in mine:
        np.testing.assert_allclose(mine[row], other[row], rtol=2e-3, atol=1e-4)


def test_shards_end_where_a_video_does(shards, weights, features, small_shards, tmp_path):
    created(tmp_path, sets_of(shards), weights, shard_mib=1)
    index, _, arrays = read_set(tmp_path / "cropped" / "train")
    assert [shard.videos for shard in index.shards] == [[8, 8], [8, 8], [8]]
    assert [shard.name for shard in index.shards] == [f"shard-{number:06d}" for number in range(3)]
    one = read_set(features / "train")
    for mine, whole in zip(arrays, one[2]):
        np.testing.assert_allclose(mine, whole, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(index.mean, one[0].mean, rtol=1e-3, atol=1e-5)
    with tarfile.open(tmp_path / "cropped" / "train" / "shard-000001.tar") as tar:
        assert tar.getnames()[0] == "000000002.safetensors"  # numbers go on over shards


def test_cutting_leaves_no_video_out_and_gives_a_long_one_a_shard_of_its_own():
    videos = [Video(number, "v", rows, 100) for number, rows in enumerate([1, 1, 500, 1, 1])]
    assert cut(videos, shard_bytes=10_000) == [(0, 2), (2, 3), (3, 5)]
    assert cut(videos[:1], shard_bytes=1) == [(0, 1)]


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (7, 342), (1000, 2)])
def test_a_videos_file_is_byte_for_byte_that_of_safetensors(rows, width):
    rng = np.random.default_rng(0)
    arrays = {
        "feature": rng.normal(size=(rows, width)).astype(np.float16),
        "row": rng.integers(0, 9, rows),
        "frame": rng.integers(0, 9, rows),
    }
    expected, video = save(arrays), Video(0, "v", rows, width)
    mine = video.header + b"".join(arrays[name].tobytes() for name in ("frame", "row", "feature"))
    assert mine == expected
    assert video.member_bytes == len(expected)


def test_a_video_that_a_tar_cannot_hold_is_refused():
    with pytest.raises(InputError, match=r"video v has 5000000 rows.*cut the video"):
        Video(0, "v", 5_000_000, 1024).tar_bytes  # noqa: B018


# ------------------------------------------------------------------------------------------------------------- readers


def test_stock_tools_read_every_video(features):
    index, sidecars, arrays = read_set(features / "train")
    (sidecar,) = sidecars
    path = features / "train" / "shard-000000.tar"
    samples = list(wds.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["json"] for sample in samples] == [{"video": f"t{number}", "rows": 8} for number in range(5)]
    for sample, expected in zip(samples, arrays):
        found = load(sample["safetensors"])
        np.testing.assert_array_equal(found["feature"], expected)
        assert (found["feature"].dtype, found["row"].dtype, found["frame"].dtype) == (np.float16, np.int64, np.int64)
    rows = np.concatenate([load(sample["safetensors"])["row"] for sample in samples])
    np.testing.assert_array_equal(rows, sidecar.row)
    again = io.BytesIO()
    with tarfile.open(path) as tar, tarfile.open(fileobj=again, mode="w", format=tarfile.USTAR_FORMAT) as copy:
        for member in tar:
            copied = tarfile.TarInfo(member.name)
            copied.size, copied.mode = member.size, 0o444
            copy.addfile(copied, tar.extractfile(member))
    assert again.getvalue() == path.read_bytes()
    assert index.extractor.width == WIDTH


def test_inspect_tells_people_and_programs(features):
    told = json.loads(run_here("mtl_dist.features", "inspect", features / "val", "--as-json").stdout)
    assert (told["rows"], told["videos"], told["longest_video"]) == (20, 3, 8)
    assert told["extractor"]["width"] == len(told["mean"]) == WIDTH
    printed = run_here("mtl_dist.features", "inspect", features / "val").stdout
    for word in ("vgg_small of vgg.safetensors", "videos 3", "longest_video 8", "Happiness", "deviation"):
        assert word in printed


# --------------------------------------------------------------------------------------------------------- made of what


def test_several_extractors_have_a_directory_each(shards, weights, tmp_path):
    other = save_backbone(tmp_path / "other.safetensors", seed=1)
    created(tmp_path / "out", sets_of(shards, "train"), weights, other)
    sets = [str(tmp_path / "out" / name / "cropped" / "train") for name in ("vgg", "other")]
    assert len(read_sets(sets).extractors) == 2
    created(tmp_path / "named", sets_of(shards, "train"), weights, other, names=("a", "b"))
    assert read_tree(tmp_path / "named" / "a") == read_tree(tmp_path / "out" / "vgg")


@pytest.mark.parametrize(("pool", "width"), [("max", 96), ("mean_max", 192)])
def test_cells_are_pooled_as_asked(shards, weights, tmp_path, pool, width):
    created(tmp_path, sets_of(shards), weights, pool=pool)
    found = features_by_row(tmp_path / "cropped" / "val")
    picture = pictures_by_row(shards / "cropped" / "val")[3]
    with torch.inference_mode():
        cells = loaded(weights).eval()(normalise(picture[None, None], SIZE)[:, 0])[0].flatten(1)
    expected = torch.cat([cells.mean(1), cells.amax(1)]) if pool == "mean_max" else cells.amax(1)
    np.testing.assert_allclose(found[3], expected.numpy(), rtol=1e-3, atol=1e-4)
    assert len(found[3]) == width


def test_a_vit_gives_its_class_token(shards, tmp_path):
    vit = save_backbone(tmp_path / "vit.safetensors", "vit_small")
    created(tmp_path / "out", sets_of(shards), vit, backbone="vit_small", pool="cls")
    picture = pictures_by_row(shards / "cropped" / "val")[5]
    with torch.inference_mode():
        images = normalise(picture[None, None], SIZE)[:, 0]
        expected = loaded(vit, "vit_small").eval().net.model.forward_features(images)[0, 0].numpy()
    found = features_by_row(tmp_path / "out" / "cropped" / "val")[5]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.whole
@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "torchvision:vit_b_16"])
def test_a_library_s_vit_gives_the_class_token_that_its_own_forward_ends_with(name):
    torch.manual_seed(0)
    backbone = build_backbone(name, 64).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        token = backbone.class_token(images)
        cells = backbone(images)
    assert token.shape == (2, backbone.num_channels) == cells.shape[:2]
    with torch.inference_mode():
        x = backbone.renormalise(images) if "renormalise" in dict(backbone.named_children()) else images
        model = backbone.net.model
        own = model.forward_features(x) if name.startswith("timm") else backbone.net.tokens(x)
    torch.testing.assert_close(token, own[:, 0])


@pytest.mark.whole
def test_an_iresnet_of_insightface_gives_the_embedding_of_its_file(shards, tmp_path):
    torch.manual_seed(0)
    backbone, embedding = settled(build_backbone("iresnet18"), 112), Embedding()
    embedding.features.running_mean.uniform_(-1, 1)
    state = {f"module.{name}": tensor for part in (backbone, embedding) for name, tensor in part.state_dict().items()}
    torch.save(state, tmp_path / "backbone.pth")
    options = {"backbone": "iresnet18", "image_size": 112, "pool": "embedding"}
    created(tmp_path / "out", sets_of(shards), tmp_path / "backbone.pth", **options)
    picture = pictures_by_row(shards / "cropped" / "val", 112)[2]
    with torch.inference_mode():
        expected = embedding.eval()(backbone.eval()(normalise(picture[None, None], 112)[:, 0]))[0].numpy()
    found = features_by_row(tmp_path / "out" / "cropped" / "val")[2]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3)


def test_a_run_describes_with_its_backbone_at_its_own_size_and_says_what_it_has_seen(runs, run, tmp_path):
    shards = runs / "shards"
    done = create(tmp_path, sets_of(shards), run, backbone=None, image_size=None)
    assert done.returncode == 0, done.stderr
    assert "it knows these rows by heart" in done.stdout
    from mtl_dist.runs.weights import load_weights, open_weights

    weights = open_weights(str(run))
    index = read_index(str(tmp_path / "cropped" / "train"), formats=(FEATURES,))
    assert index.extractor.name == f"{weights.config.model.backbone} of run cropped, step {weights.checkpoint.step}"
    assert index.extractor.sha256 == weights.checkpoint.files["model.safetensors"]["sha256"]
    size = weights.config.data.image_size
    picture = pictures_by_row(shards / "cropped" / "val", size)[7]
    with torch.inference_mode():
        images = normalise(picture[None, None], weights.config.input_size)[:, 0]
        expected = load_weights(weights).backbone(images).mean((2, 3))[0].numpy()
    found = features_by_row(tmp_path / "cropped" / "val")[7]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    again = created(tmp_path / "again", sets_of(shards), Path(weights.uri), backbone=None, image_size=None)
    assert read_tree(again) == {
        name: data for name, data in read_tree(tmp_path).items() if not name.startswith("again/")
    }  # the checkpoint by its own name


# ------------------------------------------------------------------------------------------------------------ again


def test_a_second_run_has_nothing_to_do(shards, weights, features, tmp_path):
    shutil.copytree(features, tmp_path / "cropped")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*")}
    done = create(tmp_path, sets_of(shards), weights)
    assert "nothing is left to do" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*")} == before
    assert read_tree(tmp_path / "cropped") == read_tree(features)


@pytest.mark.parametrize("lost", ["tar", "sidecar", "tar cut short", "sidecar changed", "index and sidecar changed"])
def test_a_rerun_repairs_what_is_lost_or_torn(shards, weights, features, tmp_path, lost):
    shutil.copytree(features, tmp_path / "cropped")
    tar, sidecar = (tmp_path / f"cropped/train/shard-000000.{suffix}" for suffix in ("tar", "safetensors"))
    match lost:
        case "tar":
            tar.unlink()
        case "sidecar":
            sidecar.unlink()
        case "tar cut short":
            os.truncate(tar, 512)
        case _:
            flip_bit(sidecar, sidecar.stat().st_size - 1)
            if "index" in lost:
                (sidecar.parent / INDEX_NAME).unlink()
    created(tmp_path, sets_of(shards), weights)
    assert read_tree(tmp_path / "cropped") == read_tree(features)


@pytest.mark.whole
def test_a_run_killed_in_the_middle_continues_and_ends_like_an_undisturbed_one(tmp_path):
    from mtl_dist.shards.__main__ import create as create_shards

    source = write_dataset(tmp_path / "source", num_train=1200, num_val=8, size=32)
    create_shards(str(source), str(tmp_path / "shards"), views=("cropped",), jobs=1)
    net = save_backbone(tmp_path / "net.safetensors", size=32)
    driver = tmp_path / "driver.py"  # shards of some KiB, so that there are many
    driver.write_text(
        "import sys\nfrom mtl_dist.features import plan\nfrom mtl_dist.features.__main__ import main\n"
        "plan.MIB = 8 << 10\nmain(sys.argv[1:])\n"
    )

    def command(name: str) -> list[str]:
        return [
            sys.executable, str(driver), "create", str(tmp_path / name), "--data",
            *map(str, sets_of(tmp_path / "shards")), "--runs", str(net), "--backbone", "vgg_small", "--image-size",
            "32", "--shard-mib", "1", "--local", "--jobs", "1",
        ]  # fmt: skip

    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    process = subprocess.Popen(command("killed"), cwd=REPO, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").rglob("*.safetensors"))) < 4:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.safetensors")}
    assert not list((tmp_path / "killed").rglob(INDEX_NAME)), "an index before its shards"
    for name in ("killed", "whole"):
        done = subprocess.run(command(name), cwd=REPO, env=environment, capture_output=True, text=True, check=True)
    assert "described" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "what was finished was made again"
    assert len(finished) < len(list((tmp_path / "whole").rglob("*.safetensors")))
    assert read_tree(tmp_path / "killed") == read_tree(tmp_path / "whole")


@pytest.mark.parametrize("what", ["extractor", "pool", "batch", "source"])
def test_another_set_at_the_place_is_refused_and_left_alone(shards, weights, features, tmp_path, what):
    shutil.copytree(features, tmp_path / "out" / "cropped")
    options = {"pool": {"pool": "max"}, "batch": {"batch": 5}}.get(what, {})
    other = save_backbone(tmp_path / "b.safetensors", seed=1) if what == "extractor" else weights
    data = sets_of(shards)
    if what == "source":
        data = [shutil.copytree(data[0], tmp_path / "pictures")]
        index = read_index(str(data[0]))
        (data[0] / INDEX_NAME).write_bytes(dump_index(index.model_copy(update={"source_sha256": "0" * 64})))
    done = create(tmp_path / "out", data, other, **options)
    words = {
        "extractor": ("vgg_small of vgg.safetensors", "vgg_small of b.safetensors"),
        "pool": ("extractor_pool mean", "extractor_pool max"),
        "batch": ("batch 4", "batch 5"),
        "source": (read_index(str(sets_of(shards)[0])).sha256, read_index(str(data[0])).sha256),
    }[what]
    assert_one_message(done, "holds other features", *words)
    assert read_tree(tmp_path / "out" / "cropped") == read_tree(features)


def test_a_validation_set_made_alone_has_the_statistics_that_are_named_or_lie_beside_it(
    shards, weights, features, tmp_path
):
    named = created(
        tmp_path / "named", sets_of(shards, "val"), weights, statistics=(features / "train",)
    )  # fmt: skip
    assert read_tree(named / "cropped" / "val") == read_tree(features / "val")
    created(tmp_path / "beside", sets_of(shards, "train"), weights)
    created(tmp_path / "beside", sets_of(shards, "val"), weights)
    assert read_tree(tmp_path / "beside" / "cropped") == read_tree(features)
    done = create(tmp_path / "alone", sets_of(shards, "val"), weights)
    assert_one_message(done, "no mean and deviation", "--statistics")
    other = save_backbone(tmp_path / "other.safetensors", seed=1)
    done = create(tmp_path / "other", sets_of(shards, "val"), other, statistics=(features / "train",))
    assert_one_message(done, "vgg_small of vgg.safetensors", "vgg_small of other.safetensors")
    done = create(tmp_path / "other", sets_of(shards, "val"), weights, statistics=(features / "val",))
    assert_one_message(done, "split 'val'", "expected those of 'train'")


# ----------------------------------------------------------------------------------------------------------- verify


def test_verify_says_that_whole_sets_are_whole(features):
    for split in ("train", "val"):
        done = run_here("mtl_dist.features", "verify", features / split, "--jobs", "1")
        assert done.returncode == 0, done.stderr
        assert "are whole" in done.stdout


def test_verify_names_the_video_of_a_flipped_bit(features, tmp_path):
    directory = shutil.copytree(features / "train", tmp_path / "train")
    _, (sidecar,), _ = read_set(directory)
    flip_bit(directory / "shard-000000.tar", int(sidecar.begin[3]) + 11)
    done = run_here("mtl_dist.features", "verify", directory, "--jobs", "1")
    assert_one_message(done, "sha256 is not the index's", "video t3: its features do not match their checksum")
    assert "video t2" not in done.stderr


def sealed_again(directory: Path, tar: bytes, sidecar: FeatureSidecar | None = None, **changes) -> None:
    """Write a shard whose checksums are all right, whatever it holds."""
    import hashlib

    index = read_index(str(directory), formats=(FEATURES,))
    path = directory / "shard-000000.safetensors"
    sidecar = sidecar or parse_feature_sidecar(path.read_bytes())
    data = dump_sidecar(sidecar, read_about(path.read_bytes()))
    path.write_bytes(data)
    (directory / "shard-000000.tar").write_bytes(tar)
    entry = index.shards[0].model_copy(
        update={
            "tar_bytes": len(tar),
            "tar_sha256": hashlib.sha256(tar).hexdigest(),
            "sidecar_bytes": len(data),
            "sidecar_sha256": hashlib.sha256(data).hexdigest(),
        }
    )
    (directory / INDEX_NAME).write_bytes(dump_index(index.model_copy(update={"shards": [entry], **changes})))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("a row", "its array 'row' is not the sidecar's"),
        ("a name", "t9"),
        ("a header", "tar holds"),
        ("behind", "bytes behind the last member"),
        ("a label", "counts other labels"),
        ("statistics", "mean is not that of its rows"),
    ],
)
def test_verify_finds_a_set_whose_checksums_are_right_and_whose_content_is_wrong(features, tmp_path, what, words):
    directory = shutil.copytree(features / "train", tmp_path / "train")
    index, (sidecar,), _ = read_set(directory)
    tar, changes = bytearray((directory / "shard-000000.tar").read_bytes()), {}
    match what:
        case "a row":
            tar[int(sidecar.begin[2]) - 8] ^= 1
        case "a name":
            packed = sidecar.video.copy()
            packed[1] = np.frombuffer(b"t9", np.uint8)
            sidecar = sidecar._replace(video=packed)
        case "a header":
            with tarfile.open(fileobj=io.BytesIO(bytes(tar))) as opened:
                member = opened.getmembers()[2]
            changed = tarfile.TarInfo("../evil")
            changed.size = member.size
            tar[member.offset : member.offset + 512] = changed.tobuf(tarfile.USTAR_FORMAT)
        case "behind":
            tar += b"x" * 10240
        case "a label":
            masks = sidecar.va_mask.copy()
            masks[:] = 1 - masks
            sidecar = sidecar._replace(va_mask=masks)
        case "statistics":
            changes = {"mean": [value + 0.01 for value in index.mean]}
    sealed_again(directory, bytes(tar), sidecar, **changes)
    done = run_here("mtl_dist.features", "verify", directory, "--jobs", "1")
    assert_one_message(done, words)


def test_sets_on_s3_are_those_on_disk_and_can_be_verified_and_repaired(shards, weights, features, s3, tmp_path):
    for name, data in read_tree(shards / "cropped").items():
        storage.write_bytes(f"s3://mtl/pictures/{name}", data)
    storage.upload(weights, "s3://mtl/weights/vgg.safetensors")
    data = [f"s3://mtl/pictures/{split}" for split in ("train", "val")]
    net = "s3://mtl/weights/vgg.safetensors"
    created("s3://mtl/features", data, net, cache_dir=tmp_path)
    stored = {
        name: storage.read_bytes(f"s3://mtl/features/{name}") for name, _ in storage.list_objects("s3://mtl/features")
    }
    assert stored == {f"cropped/{name}": content for name, content in read_tree(features).items()}
    storage.delete("s3://mtl/features/cropped/train/shard-000000.tar")
    done = run_here("mtl_dist.features", "verify", "s3://mtl/features/cropped/train", "--jobs", "1")
    assert_one_message(done, "shard-000000.tar is gone")
    created("s3://mtl/features", data, net, cache_dir=tmp_path)
    done = run_here("mtl_dist.features", "verify", "s3://mtl/features/cropped/train", "--jobs", "1")
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------- folds


def test_a_training_row_has_the_features_of_the_network_that_has_not_seen_its_video(shards, weights, tmp_path):
    nets = [weights, *(save_backbone(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2))]
    created(tmp_path / "folds", sets_of(shards), *nets, folds=3)
    own = [created(tmp_path / f"own-{place}", sets_of(shards), net) for place, net in enumerate(nets)]
    rows = read_rows(ShardReader(str(sets_of(shards)[0]), read_index(str(sets_of(shards)[0])), Cache()))
    folds = deal_folds(rows.videos, rows.num_rows, 3, source="")
    assert sorted(set(folds.tolist())) == [0, 1, 2]
    index, _, arrays = read_set(tmp_path / "folds" / "cropped" / "train")
    for video, (fold, array) in enumerate(zip(folds.tolist(), arrays)):
        expected = [read_set(directory / "cropped" / "train")[2][video] for directory in own]
        np.testing.assert_allclose(array, expected[fold], rtol=2e-3, atol=1e-4)
        assert not np.allclose(array, expected[(fold + 1) % 3], rtol=1e-2, atol=1e-2)
    mean = np.mean([read_set(directory / "cropped" / "val")[2][0].astype(np.float64) for directory in own], axis=0)
    np.testing.assert_allclose(read_set(tmp_path / "folds" / "cropped" / "val")[2][0], mean, rtol=3e-3, atol=1e-3)
    assert index.extractor.folds == 3
    assert index.extractor == read_index(str(tmp_path / "folds" / "cropped" / "val"), formats=(FEATURES,)).extractor


def test_halves_of_a_video_are_in_one_fold_and_folds_have_about_as_many_rows():
    videos = ["a_left", "a_right", "b", "c_right", "c_left", "d"]
    num_rows = np.array([5, 5, 10, 5, 5, 10])
    folds = deal_folds(videos, num_rows, 2, source="")
    assert folds[0] == folds[1]
    assert folds[3] == folds[4]
    assert [num_rows[folds == fold].sum() for fold in (0, 1)] == [20, 20]
    with pytest.raises(InputError, match=r"has 4 video\(s\), too few for 5 folds"):
        deal_folds(videos, num_rows, 5, source="")


def test_a_table_of_folds_decides_who_describes_which_video(shards, weights, tmp_path):
    other = save_backbone(tmp_path / "other.safetensors", seed=1)
    table = tmp_path / "folds.csv"
    table.write_text("video,fold\n" + "".join(f"t{number},{int(number == 2)}\n" for number in range(5)))
    created(tmp_path / "out", sets_of(shards), weights, other, folds=2, folds_by=table)
    second = created(tmp_path / "second", sets_of(shards), other)
    arrays, own = (read_set(root / "cropped" / "train")[2] for root in (tmp_path / "out", second))
    same = [np.allclose(mine, theirs, rtol=2e-3, atol=1e-4) for mine, theirs in zip(arrays, own)]
    assert same == [False, False, True, False, False]
    done = create(tmp_path / "out", sets_of(shards), weights, other, folds=2)  # dealt otherwise
    assert_one_message(done, "folds_sha256")
    table.write_text("video,fold\nt0,0\n")
    done = create(tmp_path / "out", sets_of(shards), weights, other, folds=2, folds_by=table)
    assert_one_message(done, "names no fold of 4 video(s)", "t1, t2, t3, t4")
    table.write_text("video,fold\nt0,2\n")
    assert_one_message(
        create(tmp_path / "out", sets_of(shards), weights, other, folds=2, folds_by=table), "line 2", "0 to 1"
    )


def test_folds_are_written_as_tables_that_become_shards_without_a_fold(dataset, shards, tmp_path):
    from mtl_dist.shards.__main__ import create as create_shards
    from mtl_dist.shards.columns import TableOptions

    done = run_here("mtl_dist.features", "folds", sets_of(shards)[0], "2", tmp_path / "folds")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "folds" / "folds.csv").read_text().splitlines()[1:]
    fold_of = dict(line.split(",") for line in lines)
    assert set(fold_of) == {f"t{number}" for number in range(5)}
    table = tmp_path / "folds" / "fold-1.csv"
    create_shards(
        str(table), str(tmp_path / "shards"), views=("cropped",), jobs=1, table=TableOptions(images=dataset / "cropped")
    )
    whole = read_rows(ShardReader(str(sets_of(shards)[0]), read_index(str(sets_of(shards)[0])), Cache()))
    for split in ("train", "val"):
        directory = str(tmp_path / "shards" / "cropped" / split)
        rows = read_rows(ShardReader(directory, read_index(directory), Cache()))
        assert {fold_of[video] for video in rows.videos} == ({"0"} if split == "train" else {"1"})
        places = [place for place, row in enumerate(whole.kept["row"].tolist()) if row in rows.kept["row"]]
        for name in ("row", "crc32", "va", "expr", "au", "va_mask", "expr_mask", "au_mask"):
            np.testing.assert_array_equal(rows.kept[name], whole.kept[name][places])
    assert "--images IMAGES" in done.stdout


def test_a_run_that_has_seen_its_fold_is_refused(runs, run, tmp_path):
    data = sets_of(runs / "shards")
    other = run.parent / "cropped_aligned"
    done = create(tmp_path, data, run, other, backbone=None, image_size=None, folds=2)
    assert_one_message(done, "was trained on all of", "features folds")


def test_runs_that_are_not_in_the_order_of_their_folds_are_refused(runs, run, dataset, tmp_path):
    """Their training set is another one than the described, and has the videos of the fold in it."""
    from mtl_dist.shards.__main__ import create as create_shards

    data = tmp_path / "source"
    data.mkdir()
    (data / "cropped").symlink_to(dataset / "cropped")
    for name in ("training_set_annotations.txt", "validation_set_annotations.txt"):
        lines = (dataset / name).read_text().splitlines()
        (data / name).write_text("\n".join(line for line in lines if not line.startswith("t4/")) + "\n")
    create_shards(str(data), str(tmp_path / "part"), views=("cropped",), jobs=1)
    sets, other = sets_of(tmp_path / "part"), run.parent / "cropped_aligned"
    done = create(tmp_path / "out", sets, run, other, backbone=None, image_size=None, folds=2)
    assert_one_message(done, "is in the place of fold 0", "videos, such as t", "in the order of their folds")


def test_weights_under_another_name_leave_a_set_what_it_is(shards, weights, tmp_path):
    made = created(tmp_path / "out", sets_of(shards), weights)
    before = (made / "cropped" / "train" / "index.json").read_bytes()
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(Path(weights).read_bytes())
    created(tmp_path / "out", sets_of(shards), renamed)
    assert (made / "cropped" / "train" / "index.json").read_bytes() == before


# --------------------------------------------------------------------------------------------------------- bad input


def test_each_fault_of_the_command_line_has_its_message(shards, weights, features, tmp_path):
    train, val = sets_of(shards)
    iresnet = tmp_path / "iresnet.safetensors"
    save_file({"conv1.weight": torch.zeros(64, 3, 3, 3)}, iresnet)
    cases = [
        (create(tmp_path / "o", [features / "train"], weights), ("is a set of features", "pictures")),
        (create(tmp_path / "o", [train], tmp_path / "missing"), ("missing does not exist", "a run")),
        (create(tmp_path / "o", [train], shards), ("no committed checkpoint",)),
        (create(tmp_path / "o", [train], weights, backbone=None), ("--backbone", "file of weights")),
        (create(tmp_path / "o", [train], weights, backbone="resnet"), ("unknown backbone",)),
        (create(tmp_path / "o", [train], iresnet, backbone="vgg_small"), ("has no tensor", "--backbone")),
        (create(tmp_path / "o", [train], weights, pool="cls"), ("--pool cls", "no class token")),
        (create(tmp_path / "o", [train], weights, pool="embedding"), ("--pool embedding", "IResNet")),
        (create(tmp_path / "o", [train], weights, folds=2), ("--folds is 2", "names 1")),
        (create(tmp_path / "o", [train, train], weights), ("--data has", "twice")),
        (create(tmp_path / "o", [val, shards / VIEWS[0] / "val" / ".."/ "val"], weights), ("would lie at one place",)),
        (create(tmp_path / "o", [train], weights, names=("../x",)), ("--names has '../x'",)),
        (create(tmp_path / "o", [train, val], weights, statistics=(features / "train",)), ("made alone",)),
        (create(tmp_path / "o", [train], weights, shard_mib=0), ("--shard-mib is 0",)),
        (create(tmp_path / "o", [train], weights, backbone="vit_small", image_size=50), ("multiple of 8",)),
        (create(tmp_path / "o", [train]), ("--runs names nothing",)),
        (create(tmp_path / "o", []), ("--data names no set",)),
    ]  # fmt: skip
    for done, words in cases:
        assert_one_message(done, *words)
    assert not list((tmp_path / "o").rglob("*"))


@pytest.mark.parametrize(
    ("scale", "words"), [(1e6, ("float16 holds up to 60000", "of row")), (np.nan, ("not finite",))]
)
def test_what_float16_does_not_hold_is_refused_with_its_row(shards, tmp_path, scale, words):
    torch.manual_seed(0)
    state = build_backbone("vgg_small").state_dict()
    last = [name for name in state if name.endswith("weight") and state[name].ndim == 1][-1]
    state[last] = state[last] * scale
    save_file(state, tmp_path / "large.safetensors")
    done = create(tmp_path / "out", sets_of(shards), tmp_path / "large.safetensors")
    assert_one_message(done, *words)
    assert not list((tmp_path / "out").rglob("shard-*")), "half a shard is left"


def test_batches_that_memory_does_not_hold_are_one_message(shards, weights, tmp_path):
    """Smaller ones by itself would make another set on a machine with less memory."""
    with starving_networks(3):
        done = create(tmp_path / "out", sets_of(shards), weights)
        assert_one_message(done, "out of memory with 4 pictures in a batch", "give a smaller --batch")
        assert not list((tmp_path / "out").rglob("shard-*"))
        created(tmp_path / "out", sets_of(shards), weights, batch=3)


def test_numbers_that_float16_rounds_to_nothing_are_counted(shards, tmp_path):
    torch.manual_seed(0)
    state = build_backbone("vgg_small").state_dict()
    last = [name for name in state if name.endswith("weight") and state[name].ndim == 1][-1]
    state[last] = state[last] * 1e-9
    save_file(state, tmp_path / "small.safetensors")
    done = create(tmp_path / "out", sets_of(shards), tmp_path / "small.safetensors")
    share = float(done.stdout.split("; ")[1].split("%")[0])
    found = np.concatenate(read_set(tmp_path / "out" / "cropped" / "train")[2])
    assert 50 < share <= 100
    assert not found.any()
