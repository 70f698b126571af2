"""What `create` says at its end: what was written, what was not and why, and what to do next; and a table of labels."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from mtl_dist import storage
from mtl_dist.config import build_config
from mtl_dist.data.index import Index, Sets
from mtl_dist.label_counts import LabelCounts
from mtl_dist.presets import load_preset
from mtl_dist.shards.overlap import find_shared
from mtl_dist.shards.skipping import SKIPPED_NAME, Skipped, count_reasons
from mtl_dist.shards.sources import Source
from mtl_dist.tasks import AUS, EXPRESSIONS, SPLITS


def print_summary(
    dest: str, indexes: list[Index], source: Source, skipped: list[Skipped], *, num_written: int, seconds: float
) -> None:
    """Print counts of labels by split, a line a set, and what was left out. Views of a split have the same labels."""
    Console(highlight=False).print(_label_table({index.split: index for index in indexes}, source.num_videos))
    for index in indexes:
        size = sum(shard.tar_bytes for shard in index.shards)
        where = storage.join(dest, index.view, index.split)
        without = index.labels.missing_tasks()
        if "au" not in without:
            without += [f"AU{number}" for number, count in zip(AUS, index.labels.au) if not count]
        note = f"; no labels at all for {', '.join(without)}" if without else ""
        print(f"{where}: {index.rows:,} rows in {len(index.shards):,} shards, {size / 1e6:,.1f} MB{note}")
    print()
    for line in _shared_pictures(dest, indexes):
        print(line)
    for line in _left_out(dest, source, skipped):
        print(line)
    if num_written:
        print(f"wrote {num_written:,} images in {seconds:.1f} s, {num_written / max(seconds, 1e-9):,.0f} images/s")
    else:
        print("every shard was there already")
    print(f"next: {_next_command(dest, indexes)}")


def print_labels(counts: LabelCounts, num_rows: int) -> None:
    """Print a histogram of labels."""
    table = Table("label", "rows", "share of rows", "")
    rows = [("valence, arousal", counts.va), ("expression", counts.expr), ("any action unit", max(counts.au))]
    rows += [(f"  {name}", count) for name, count in zip(EXPRESSIONS, counts.expr_classes)]
    rows += [
        (f"  AU{number} on" + (f", of {of} labelled" if of else ", not labelled"), count)
        for number, count, of in zip(AUS, counts.au_positives, counts.au)
    ]
    for name, count in [*rows, ("no label at all", counts.unlabelled)]:
        share = count / num_rows
        table.add_row(name, str(count), f"{share:.1%}", "█" * round(30 * share))
    Console().print(table)


def _next_command(dest: str, indexes: list[Index]) -> str:
    """Return a command that trains the first view on this machine as it is, to copy."""
    view, rows = indexes[0].view, {index.split: index.rows for index in indexes}
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))  # to ask torch would take seconds
    is_labelled = any(index.labels.unlabelled < index.rows for index in indexes)
    preset = {(True, True): "a", (True, False): "mae", (False, True): "small"}.get((has_gpu, is_labelled), "small-mae")
    args = ["python", "-m", "mtl_dist.train", "--local", "--preset", preset, "--run.name", view]
    args += [part for split in SPLITS for part in (f"--data.{split}", storage.join(dest, view, split))]
    if rows["train"] < build_config(load_preset(preset)).train.global_batch:
        args += ["--train.global-batch", str(rows["train"])]
    return shlex.join(args)


def _label_table(by_split: dict[str, Index], num_videos: dict[str, int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for split in by_split:
        table.add_column(split, justify="right", no_wrap=True)
    labels = [index.labels for index in by_split.values()]
    rows: list[tuple[str, Sequence[int | str]]] = [("rows", [counts.rows for counts in labels])]
    rows += [("videos", [num_videos[split] for split in by_split])]
    if all(counts.unlabelled == counts.rows for counts in labels):
        return _filled(table, [("pictures without labels", rows[0][1]), ("directories", rows[1][1])])
    rows += [("valence, arousal", [counts.va for counts in labels])]
    rows += [("expression", [counts.expr for counts in labels])]
    if any(counts.expr for counts in labels):
        classes = zip(EXPRESSIONS, zip(*(counts.expr_classes for counts in labels)))
        rows += [(f"  {name}", counts) for name, counts in classes]
    rows += [("any action unit", [max(counts.au) for counts in labels])]
    if any(max(counts.au) for counts in labels):
        units = zip(AUS, zip(*(_on_of_labelled(counts) for counts in labels)))
        rows += [(f"  AU{number} on, of labelled", counts) for number, counts in units]
    return _filled(table, [*rows, ("no label at all", [counts.unlabelled for counts in labels])])


def _filled(table: Table, rows: list[tuple[str, Sequence[int | str]]]) -> Table:
    for name, counts in rows:
        table.add_row(name, *(count if isinstance(count, str) else f"{count:,}" for count in counts))
    return table


def _shared_pictures(dest: str, indexes: list[Index]) -> list[str]:
    """A line for every view some of whose validation pictures are training pictures under other names."""
    sets = {(index.view, index.split): index for index in indexes}
    lines = []
    for view in dict.fromkeys(index.view for index in indexes):
        train, val = (Sets((storage.join(dest, view, split),), (sets[view, split],)) for split in SPLITS)
        if note := find_shared(train, val).note():
            lines.append(f"note: {view}: {note}")
    return lines


def _on_of_labelled(counts: LabelCounts) -> list[str]:
    """A unit that is off in every row is another thing than one that nobody labelled."""
    return [f"{on:,} of {of:,}" if of else "not labelled" for on, of in zip(counts.au_positives, counts.au)]


def _left_out(dest: str, source: Source, skipped: list[Skipped]) -> list[str]:
    lines = [f"skipped: {count:,} rows of {why}" for why, count in source.left_out.items()]
    if skipped:
        num_rows = len({(entry.split, entry.row) for entry in skipped})
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in count_reasons(skipped).items())
        lines.append(f"skipped: {num_rows:,} rows for bad images ({reasons}), listed in {dest}/{SKIPPED_NAME}")
    lines = lines or ["skipped: nothing"]
    return lines + [f"no expression label: {count:,} rows of {why}" for why, count in source.unlabelled.items()]
