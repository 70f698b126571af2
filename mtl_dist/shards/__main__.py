"""Make, check and look at shard sets.

Examples:
    python -m mtl_dist.shards synth /tmp/faces --num-train 1200 --num-val 300
    python -m mtl_dist.shards synth /tmp/videos --dynamics --num-train 9600 --num-val 4800
    python -m mtl_dist.shards create /data/s-Aff-Wild2 s3://bucket/faces --jobs 8
    python -m mtl_dist.shards create faces.csv s3://bucket/faces --views cropped --val-fraction 0.1
    python -m mtl_dist.shards verify s3://bucket/faces/cropped/train
    python -m mtl_dist.shards inspect s3://bucket/faces/cropped/train --sheet sheet.png
"""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mtl_dist import storage
from mtl_dist.data.decode import Exif
from mtl_dist.errors import OPTION_BOUNDS, InputError, check_numbers, choose_command, program, run_command
from mtl_dist.machine import num_cpus
from mtl_dist.progress import progress_bar
from mtl_dist.shards.columns import NO_OPTIONS, TableOptions
from mtl_dist.tasks import SPLITS, VIEWS

if TYPE_CHECKING:
    from mtl_dist.shards import skipping
    from mtl_dist.shards.annotations import Annotations

View = Literal["cropped", "cropped_aligned"]
Jobs = Annotated[int, tyro.conf.arg(help="Processes.")]
CORES = num_cpus()
FRAMES_PER_SHARD = 1000
ROWS = (1, 10**9)
BOUNDS = OPTION_BOUNDS | {
    "frames_per_shard": ROWS,
    "shard_bytes": (1, 10**12),
    "val_fraction": (0, 1),
    "num_images": (1, 10_000),
    "num_train": ROWS,
    "num_val": ROWS,
}


def create(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    *,
    views: tuple[View, ...] = VIEWS,
    frames_per_shard: int | None = None,
    shard_bytes: int | None = None,
    val_fraction: float | None = None,
    skip_bad_images: bool = False,
    exif: Exif = "apply",
    seed: int = 0,
    jobs: Jobs = CORES,
    table: Annotated[TableOptions, tyro.conf.arg(name="")] = NO_OPTIONS,
) -> None:
    """Write shards of a labelled data set. Run again, it makes only what is missing.

    Every listed image is decoded and every label checked; the first fault stops the run and names file and row.

    SOURCE is a directory in the s-Aff-Wild2 layout, a .csv or .parquet table with a row an image, the tars of a
    WebDataset, local or on S3 (its name in quotes, lest the shell takes the braces), or pictures without labels:

        create /data/s-Aff-Wild2 s3://bucket/faces
        create /data/mine /data/shards --val-fraction 0.1 --skip-bad-images
        create faces.parquet DEST --views cropped --columns.image path --columns.au AU{:02}_c --val-fraction 0.1
        create training.csv DEST --views cropped --table-format affectnet --val-table validation.csv
            --images /data/AffectNet --expressions Contempt=Other
        create 's3://bucket/wds/train-{000..099}.tar' DEST --views cropped --val-table 's3://bucket/wds/val-{0..9}.tar'
            --columns.expression cls
        create /data/faces s3://bucket/faces --views cropped --unlabelled

    Args:
        source: A directory that holds training_set_annotations.txt, validation_set_annotations.txt and a directory a
            view; or a table, of one view; or tars, of one view.
        dest: Directory or s3://bucket/prefix; the sets are written to <dest>/<view>/<split>/.
        views: Views to write. A table or WebDataset is of one.
        frames_per_shard: Rows of a shard; 1000 where no limit is given: of 112 x 112 pixels about 8 MB.
        shard_bytes: Bytes of a shard, about; 100000000 suits data over 10^6 rows. With both, what is reached first.
        val_fraction: Where the source has no validation part: share of its rows, taken as whole videos and persons.
        skip_bad_images: Look at every image first, and leave rows whose image is missing, empty or damaged in a view
            out of all views. They are listed in <dest>/skipped.csv. A rerun looks again where an image has changed.
        exif: Turn images that are not stored upright, as their EXIF says and as predict does (a JPEG is then stored
            anew), or ignore it.
        seed: Of the one shuffle of rows at writing, and of the choice for --val-fraction.
    """
    from mtl_dist.shards import adopt, skipping, sources, summary, writer

    if frames_per_shard is None and shard_bytes is None:
        frames_per_shard = FRAMES_PER_SHARD
    limits = {"frames_per_shard": frames_per_shard, "shard_bytes": shard_bytes}
    check_numbers(BOUNDS, **limits, val_fraction=val_fraction, seed=seed, jobs=jobs)
    storage.check_writable(dest, flag="DEST")
    lying: list[int] = []
    with contextlib.ExitStack() as held:
        path, table = held.enter_context(adopt.as_table(source, table, views=views, jobs=jobs))
        images_dirs = sources.find_images(path, views, table)
        found = sources.read_source(path, table, val_fraction=val_fraction, seed=seed)
        print("".join(f"{note}\n" for note in found.notes), end="", flush=True)
        kept = skipping.Kept(found.splits, [], {})
        if skip_bad_images:
            kept = _drop_bad_images(found.splits, images_dirs, dest, jobs)
        plans = writer.plan_sets(kept.splits, images_dirs, dest, seed=seed, exif=exif, claims=held, **limits)
        skipping.write_checked(kept)
        begun = time.monotonic()
        with progress_bar("writing shards", sum(plan.index.rows for plan in plans)) as advance:
            indexes = writer.write_sets(plans, jobs=jobs, progress=advance, lying=lying.append)
    if skip_bad_images:
        skipping.write_skipped(dest, [*skipping.read_skipped(dest, but=views), *kept.skipped])
    written = sum(plan.index.rows - sum(entry.rows for entry in plan.done.values()) for plan in plans)
    _say_lying(sum(lying), exif)
    summary.print_summary(dest, indexes, found, kept.skipped, num_written=written, seconds=time.monotonic() - begun)


def _drop_bad_images(
    splits: dict[str, Annotations], images_dirs: dict[str, Path], dest: str, jobs: int
) -> skipping.Kept:
    from mtl_dist.shards import skipping

    skipping.read_skipped(dest, but=tuple(images_dirs))  # refused before the work, where it is not ours
    with progress_bar("checking images", len(images_dirs) * skipping.count_images(splits)) as advance:
        return skipping.drop_bad_images(splits, images_dirs, dest=dest, jobs=jobs, progress=advance)


def _say_lying(count: int, exif: Exif) -> None:
    if count:
        what = "turned (--exif ignore: not)" if exif == "apply" else "taken as they are stored"
        print(f"{count:,} images are not stored upright, says their EXIF, and were {what}, as predict does")


def verify(uri: Annotated[str, tyro.conf.Positional], *, jobs: Jobs = CORES) -> None:
    """Prove every byte of a set: index, checksums of every shard, every member of every tar, every image decoded.

    Exit code 2 if anything is damaged; every damaged shard is named.

    Args:
        uri: The directory or s3:// prefix that holds index.json.
    """
    from mtl_dist.data.index import read_index
    from mtl_dist.shards.verify import find_faults

    check_numbers(BOUNDS, jobs=jobs)
    index = read_index(uri)
    with progress_bar("verifying", index.rows) as advance:
        faults = find_faults(uri, index, jobs=jobs, progress=advance)
    if faults:
        repair = "to repair: delete these, then run `python -m mtl_dist.shards create` with the original arguments"
        raise InputError("\n  ".join([f"{len(faults)} faults in {uri}:", *faults, repair]))
    print(f"{uri}: {index.rows} rows in {len(index.shards)} shards are whole")


def inspect(
    uri: Annotated[str, tyro.conf.Positional],
    *,
    as_json: bool = False,
    sheet: Path | None = None,
    num_images: int = 40,
    seed: int = 0,
) -> None:
    """Print what a set holds: rows, shards, bytes, and a histogram of its labels; or draw some of it.

    Args:
        uri: The directory or s3:// prefix that holds index.json.
        as_json: Print one JSON object for programs.
        sheet: Also write a contact sheet to this .png file: images with their labels below them.
        num_images: Of the sheet.
        seed: Of the choice of these images.
    """
    from mtl_dist.data.index import read_index
    from mtl_dist.shards.summary import print_labels

    check_numbers(BOUNDS, num_images=num_images, seed=seed)
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise InputError(f"--sheet is {sheet}; expected a file whose name ends with .png")
    index = read_index(uri)
    if sheet is not None:
        storage.check_lasting(str(sheet), flag="--sheet")
        from mtl_dist.shards.sheet import draw_sheet

        storage.write_bytes(str(sheet), draw_sheet(uri, index, num_images=num_images, seed=seed))
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
    print(f"{uri}  " + "  ".join(f"{key} {value}" for key, value in about.items()))
    print_labels(counts, index.rows)
    if sheet is not None:
        print(f"wrote {sheet}")


def synth(
    dest: Annotated[Path, tyro.conf.Positional],
    *,
    num_train: int = 1200,
    num_val: int = 300,
    dynamics: bool = False,
    seed: int = 0,
    jobs: Jobs = CORES,
) -> None:
    """Render a labelled data set of synthetic faces in the s-Aff-Wild2 layout, both views.

    The same arguments give the same bytes. `create` turns it into shards. For models of whole videos:

        synth /tmp/videos --dynamics --num-train 9600 --num-val 4800

    Args:
        dest: Directory to write to.
        num_train: Rows of the training split.
        num_val: Rows of the validation split, of other people.
        dynamics: Videos that have time in them, of about 96 rows instead of 24: what a single frame leaves open, the
            frames around it tell. Expressions come and go and at times show only in short bursts, the movement of the
            head tells arousal, and some frames are spoiled.
        seed: Of identities, expressions, light, and which labels are missing.
    """
    from mtl_dist.synthetic.render import write_synthetic

    check_numbers(BOUNDS, num_train=num_train, num_val=num_val, seed=seed, jobs=jobs)
    storage.check_writable(str(dest), flag="DEST")
    with progress_bar("rendering faces", 2 * (num_train + num_val)) as advance:
        summary = write_synthetic(
            dest, num_train=num_train, num_val=num_val, dynamics=dynamics, seed=seed, jobs=jobs, progress=advance
        )
    print(f"{dest}: {summary['num_images_written']:,} images written, of two views")
    for split in SPLITS:
        told = {name.removeprefix("num_"): count for name, count in summary[split].items() if name.startswith("num_")}
        print(f"  {split:6}" + ", ".join(f"{name} {count:,}" for name, count in told.items()))
    shards_dir = dest.with_name(f"{dest.name}-shards")
    print("next: " + shlex.join(["python", "-m", "mtl_dist.shards", "create", str(dest), str(shards_dir)]))


COMMANDS = {"create": create, "verify": verify, "inspect": inspect, "synth": synth}


def main(args: list[str] | None = None) -> None:
    """Read the command line, then run its command. Raises `InputError` for what the user can mend."""
    choose_command(COMMANDS, args, prog=program("mtl_dist.shards"), description=__doc__)()


def script() -> None:
    """Be `mtl-shards`, or python -m mtl_dist.shards."""
    run_command(main)


if __name__ == "__main__":
    script()
