"""Make, check and look at features of whole videos: what a trained network says of every picture of a shard set.

Models of sequences are trained on them. An extractor that was trained on the pictures it describes knows them by heart:
take one of other data, or --folds.

Examples:
    python -m mtl_dist.features create /data/features --data SHARDS/cropped/train SHARDS/cropped/val --runs runs/cropped
    python -m mtl_dist.features create s3://bucket/features --data s3://bucket/faces/cropped/train
        s3://bucket/faces/cropped/val --runs backbone.pth --backbone iresnet100 --pool embedding
    python -m mtl_dist.features verify /data/features/cropped/train
    python -m mtl_dist.features inspect /data/features/cropped/train
    python -m mtl_dist.features folds SHARDS/cropped/train 5 folds/
"""

from __future__ import annotations

import json
import shlex
from typing import Annotated, Any

import tyro

from mtl_dist import storage
from mtl_dist.errors import InputError, check_numbers, choose_command, program, run_command
from mtl_dist.features.options import BOUNDS, CreateOptions, check_options
from mtl_dist.machine import num_cpus
from mtl_dist.progress import progress_bar

NO_OPTIONS = CreateOptions()


def create(
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    *,
    options: Annotated[CreateOptions, tyro.conf.arg(name="")] = NO_OPTIONS,
) -> None:
    """Describe every picture of a shard set, and write what was said by video. Run again, it makes what is missing.

    DEST comes first: it is a directory or s3://bucket/prefix. Features are written to DEST/<view>/<split>/, those of
    several extractors to DEST/<name>/<view>/<split>/. Under `ray job submit`, or with RAY_ADDRESS, shards are made over
    the cluster.

    Args:
        dest: Directory or s3://bucket/prefix. It comes before --data, which takes all names behind it.
    """
    check_options(options)
    from mtl_dist.features.job import create_features  # torch and all, which --help does not wait for

    create_features(dest, options)


def verify(uri: Annotated[str, tyro.conf.Positional], *, jobs: int = num_cpus()) -> None:
    """Prove every byte of a set of features: index, checksums of every shard, and every video of every tar.

    Exit code 2 if anything is damaged; every damaged video is named.

    Args:
        uri: The directory or s3:// prefix that holds index.json.
        jobs: Processes.
    """
    from mtl_dist.features.verify import find_faults

    check_numbers(BOUNDS, jobs=jobs)
    index = _read(uri)
    with progress_bar("verifying", index.rows) as advance:
        faults = find_faults(uri, index, jobs=jobs, progress=advance)
    if faults:
        repair = "to repair: delete these, then run `python -m mtl_dist.features create` with the original arguments"
        raise InputError("\n  ".join([f"{len(faults)} faults in {uri}:", *faults, repair]))
    print(f"{uri}: {index.rows} rows of {len(index.video_rows)} videos in {len(index.shards)} shards are whole")


def inspect(uri: Annotated[str, tyro.conf.Positional], *, as_json: bool = False) -> None:
    """Print what a set of features holds: rows, videos, extractor, statistics, and a histogram of labels.

    Args:
        uri: The directory or s3:// prefix that holds index.json.
        as_json: Print one JSON object for programs.
    """
    index = _read(uri)
    lengths = index.video_rows
    about = {
        "view": index.view,
        "split": index.split,
        "rows": index.rows,
        "videos": len(lengths),
        "shortest_video": int(lengths.min()),
        "longest_video": int(lengths.max()),
        "shards": len(index.shards),
        "bytes": sum(shard.tar_bytes for shard in index.shards),
        "sha256": index.sha256,
        "source_index_sha256": index.source_index_sha256,
    }
    if as_json:
        extra = {"extractor": index.extractor.model_dump(), "labels": index.labels.model_dump()}
        print(json.dumps({**about, **extra, "mean": index.mean, "std": index.std}))
        return
    from mtl_dist.shards.summary import print_labels

    print(f"{uri}  " + "  ".join(f"{key} {value}" for key, value in about.items()))
    print("extractor  " + "  ".join(f"{key} {value}" for key, value in index.extractor.model_dump().items()))
    still = sum(deviation == 0 for deviation in index.std)
    print(
        f"of training rows: mean {min(index.mean):.4g} to {max(index.mean):.4g}, deviation {min(index.std):.4g} to "
        f"{max(index.std):.4g}, {still} of {len(index.std)} numbers always the same"
    )
    print_labels(index.labels, index.rows)


def folds(
    uri: Annotated[str, tyro.conf.Positional],
    num_folds: Annotated[int, tyro.conf.Positional],
    out: Annotated[str, tyro.conf.Positional],
) -> None:
    """Deal the videos of a training set into folds, for extractors that have not seen what they describe.

    Writes OUT/folds.csv (`video,fold`) and for every fold OUT/fold-<k>.csv, a table of which `shards create` makes a
    training set without the fold. `create --folds` then takes the runs that were trained on them, in order.

    Args:
        uri: The directory or s3:// prefix of a training set of pictures.
        num_folds: How many.
        out: Directory or s3:// prefix to write to.
    """
    from mtl_dist.data.cache import Cache
    from mtl_dist.data.index import index_dir, read_index
    from mtl_dist.data.reader import ShardReader
    from mtl_dist.data.video_rows import read_rows
    from mtl_dist.features.folds import FOLDS_NAME, write_folds

    check_numbers(BOUNDS, folds=num_folds)
    storage.check_writable(out, flag="OUT")
    index = read_index(uri)
    rows = read_rows(ShardReader(index_dir(uri), index, Cache()))
    tables = write_folds(rows, num_folds, out, source=index_dir(uri))
    print(f"wrote {storage.join(out, FOLDS_NAME)} and {len(tables)} tables of rows; of each, with your pictures:")
    for fold, table in enumerate(tables):
        made = f"SHARDS/fold-{fold}"
        command = [
            "python",
            "-m",
            "mtl_dist.shards",
            "create",
            table,
            made,
            "--views",
            index.view,
            "--images",
            "IMAGES",
        ]
        print(f"  {shlex.join(command)}")
    print(f"then train a run on each SHARDS/fold-<k>/{index.view}/train, and give them to `features create --folds`")


def _read(uri: str) -> Any:
    from mtl_dist.data.index import FEATURES, read_index

    return read_index(uri, formats=(FEATURES,))


COMMANDS = {"create": create, "verify": verify, "inspect": inspect, "folds": folds}


def main(args: list[str] | None = None) -> None:
    """Read the command line, then run its command. Raises `InputError` for what the user can mend."""
    choose_command(COMMANDS, args, prog=program("mtl_dist.features"), description=__doc__)()


def script() -> None:
    """Be `mtl-features`, or python -m mtl_dist.features."""
    run_command(main)


if __name__ == "__main__":
    script()
