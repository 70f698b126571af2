"""Make, check and look at shard sets.

Examples:
    python -m mtl_dist.shards synth /tmp/faces --num-train 1200 --num-val 300
    python -m mtl_dist.shards create /data/s-Aff-Wild2 s3://bucket/faces --jobs 8
    python -m mtl_dist.shards verify s3://bucket/faces/cropped/train
    python -m mtl_dist.shards inspect s3://bucket/faces/cropped/train
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tarfile
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mtl_dist import storage
from mtl_dist.errors import InputError, run_command
from mtl_dist.progress import progress_bar
from mtl_dist.tasks import AUS, EXPRESSIONS, SPLITS, VIEWS

View = Literal["cropped", "cropped_aligned"]
Jobs = Annotated[int, tyro.conf.arg(help="Processes.")]
CORES = os.cpu_count() or 1
FRAMES_PER_SHARD = 1000


def create(
    source: Annotated[Path, tyro.conf.Positional],
    dest: Annotated[str, tyro.conf.Positional],
    *,
    views: tuple[View, ...] = VIEWS,
    frames_per_shard: int | None = None,
    shard_bytes: int | None = None,
    seed: int = 0,
    jobs: Jobs = CORES,
) -> None:
    """Write shards of a data set in the s-Aff-Wild2 layout. Run again, it makes only what is missing.

    Every listed image is decoded and every label checked; the first fault stops the run and names file and row.

    Args:
        source: Holds training_set_annotations.txt, validation_set_annotations.txt and a directory a view.
        dest: Directory or s3://bucket/prefix; the sets are written to <dest>/<view>/<split>/.
        views: Views to write.
        frames_per_shard: Rows of a shard; 1000 where no limit is given: of 112 x 112 pixels about 8 MB.
        shard_bytes: Bytes of a shard, about; 100000000 suits data over 10^6 rows. With both, what is reached first.
        seed: Of the one shuffle of rows at writing.
    """
    from mtl_dist.data.annotations import FILES, read_annotations
    from mtl_dist.data.writer import plan_set, write_sets

    if frames_per_shard is None and shard_bytes is None:
        frames_per_shard = FRAMES_PER_SHARD
    _check_positive(frames_per_shard=frames_per_shard, shard_bytes=shard_bytes, jobs=jobs)
    if not source.is_dir():
        raise InputError(f"source {source} is not a directory; expected the annotation files and a directory a view")
    storage.check_writable(dest)
    plans = []
    for split in SPLITS:
        annotations = read_annotations(source / FILES[split])
        for view in views:
            where = storage.join(dest, view, split)
            plans.append(
                plan_set(
                    annotations,
                    source / view,
                    where,
                    view=view,
                    split=split,
                    seed=seed,
                    frames_per_shard=frames_per_shard,
                    shard_bytes=shard_bytes,
                )
            )
    with progress_bar("writing shards", sum(plan.index.rows for plan in plans)) as advance:
        indexes = write_sets(plans, jobs=jobs, progress=advance)
    for index in indexes:
        where = storage.join(dest, index.view, index.split)
        size = sum(shard.tar_bytes for shard in index.shards)
        print(f"{where}: {index.rows} rows in {len(index.shards)} shards, {size / 1e6:.1f} MB; {_coverage(index)}")


def verify(uri: Annotated[str, tyro.conf.Positional], *, jobs: Jobs = CORES) -> None:
    """Prove every byte of a set: index, checksums of every shard, every member of every tar, every image decoded.

    Exit code 2 if anything is damaged; every damaged shard is named.

    Args:
        uri: The directory or s3:// prefix that holds index.json.
    """
    from mtl_dist.data.index import index_dir, read_index

    _check_positive(jobs=jobs)
    index, faults = read_index(uri), []
    with progress_bar("verifying", index.rows) as advance, _pool(jobs) as pool:
        tasks = [(index_dir(uri), shard.model_dump()) for shard in index.shards]
        for shard, found in zip(index.shards, pool.map(_verify_shard, tasks)):
            faults += found
            advance(shard.rows)
    if faults:
        repair = "to repair: delete these, then run `python -m mtl_dist.shards create` with the original arguments"
        raise InputError("\n  ".join([f"{len(faults)} faults in {uri}:", *faults, repair]))
    print(f"{uri}: {index.rows} rows in {len(index.shards)} shards are whole")


def inspect(uri: Annotated[str, tyro.conf.Positional], *, as_json: bool = False) -> None:
    """Print what a set holds: rows, shards, bytes, and a histogram of its labels.

    Args:
        uri: The directory or s3:// prefix that holds index.json.
        as_json: Print one JSON object for programs.
    """
    from rich.console import Console
    from rich.table import Table

    from mtl_dist.data.index import read_index

    index = read_index(uri)
    counts = index.labels
    about = {
        "view": index.view,
        "split": index.split,
        "rows": index.rows,
        "shards": len(index.shards),
        "bytes": sum(shard.tar_bytes for shard in index.shards),
        "sha256": index.sha256,
    }
    if as_json:
        print(json.dumps({**about, "labels": counts.model_dump()}))
        return
    console = Console()
    console.print(
        f"[bold]{uri}[/bold]  " + "  ".join(f"{key} {value}" for key, value in about.items()), highlight=False
    )
    table = Table("label", "rows", "share of rows", "")
    rows = [("valence, arousal", counts.va), ("expression", counts.expr), ("any action unit", max(counts.au))]
    rows += [(f"  {name}", count) for name, count in zip(EXPRESSIONS, counts.expr_classes)]
    rows += [(f"  AU{number} on", count) for number, count in zip(AUS, counts.au_positives)]
    for name, count in [*rows, ("no label at all", counts.unlabelled)]:
        share = count / index.rows
        table.add_row(name, str(count), f"{share:.1%}", "█" * round(30 * share))
    console.print(table)


def synth(
    dest: Annotated[Path, tyro.conf.Positional],
    *,
    num_train: int = 1200,
    num_val: int = 300,
    seed: int = 0,
    jobs: Jobs = CORES,
) -> None:
    """Render a labelled data set of synthetic faces in the s-Aff-Wild2 layout, both views.

    The same arguments give the same bytes. `create` turns it into shards.

    Args:
        dest: Directory to write to.
        num_train: Rows of the training split.
        num_val: Rows of the validation split, of other people.
        seed: Of identities, expressions, light, and which labels are missing.
    """
    from mtl_dist.data.synthetic import write_synthetic

    _check_positive(num_train=num_train, num_val=num_val, jobs=jobs)
    storage.check_writable(str(dest))
    with progress_bar("rendering faces", 2 * (num_train + num_val)) as advance:
        summary = write_synthetic(dest, num_train=num_train, num_val=num_val, seed=seed, jobs=jobs, progress=advance)
    print(f"{dest}: " + ", ".join(f"{key} {value}" for key, value in summary.items()))


def _verify_shard(task: tuple[str, dict]) -> list[str]:
    """Return what is wrong with one shard, in words; empty where nothing is."""
    import zlib

    from mtl_dist.data.decode import DecodeError, decode
    from mtl_dist.data.index import ShardEntry
    from mtl_dist.data.sidecar import parse_sidecar

    uri, entry = task[0], ShardEntry.model_validate(task[1])
    tar_uri, sidecar_uri = (storage.join(uri, f"{entry.name}.{suffix}") for suffix in ("tar", "safetensors"))
    with tempfile.TemporaryDirectory(prefix="mtl_dist-") as scratch:
        paths = {tar_uri: Path(scratch) / "tar", sidecar_uri: Path(scratch) / "sidecar"}
        for name, path in paths.items():
            try:
                storage.download(name, path)
            except FileNotFoundError:
                return [f"{name} is gone"]
        faults = [
            f"{name}: its sha256 is not the index's"
            for name, sha256 in ((tar_uri, entry.tar_sha256), (sidecar_uri, entry.sidecar_sha256))
            if storage.sha256_of(paths[name]) != sha256
        ]
        if faults:
            return faults
        sidecar = parse_sidecar(paths[sidecar_uri].read_bytes())
        if len(sidecar.row) != entry.rows:
            return [f"{sidecar_uri}: {len(sidecar.row)} rows; the index says {entry.rows}"]
        with tarfile.open(paths[tar_uri]) as tar:
            images = [member for member in tar if member.name.endswith(".jpg")]
            found = [(member.name, member.offset_data, member.size) for member in images]
        expected = [(f"{row:09d}.jpg", begin, n) for row, begin, n in zip(sidecar.row, sidecar.offset, sidecar.length)]
        if found != expected:
            return [f"{tar_uri}: its members are not those of the sidecar"]
        data = paths[tar_uri].read_bytes()
        for row, begin, length, crc32 in zip(sidecar.row, sidecar.offset, sidecar.length, sidecar.crc32):
            image = data[begin : begin + length]
            try:
                decode(image)
            except DecodeError as error:
                faults.append(f"{tar_uri}, row {row}: {error}")
            if zlib.crc32(image) != crc32:
                faults.append(f"{tar_uri}, row {row}: its bytes do not match their checksum")
    return faults


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def _coverage(index) -> str:
    counts = index.labels
    missing = counts.missing_tasks()
    text = f"labelled: VA {counts.va}, EXPR {counts.expr}, AU {max(counts.au)}, none {counts.unlabelled}"
    return text + (f"; no labels at all for {', '.join(missing)}" if missing else "")


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; expected at least 1")


def main(args: list[str] | None = None) -> None:
    commands = {"create": create, "verify": verify, "inspect": inspect, "synth": synth}
    tyro.extras.subcommand_cli_from_dict(commands, args=args, prog="python -m mtl_dist.shards", description=__doc__)


if __name__ == "__main__":
    run_command(main)
