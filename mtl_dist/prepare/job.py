"""Cut faces out: find what there is, do what is missing, and write the tables at the end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from mtl_dist import storage
from mtl_dist.data.frames import Seen
from mtl_dist.data.videos import count_frames
from mtl_dist.errors import InputError
from mtl_dist.faces.detector import open_detector
from mtl_dist.joining import has_cluster
from mtl_dist.machine import num_cpus
from mtl_dist.predicting.cluster import TaskFailed, map_over_cluster
from mtl_dist.prepare.annotations import Annotations
from mtl_dist.prepare.options import PrepareCommand
from mtl_dist.prepare.part import PARTS, PLAN, UNFINISHED, Task, has_pictures, how_of, make_part, remove_pictures
from mtl_dist.prepare.rows import read_about
from mtl_dist.prepare.sheet import Sheet, counted
from mtl_dist.prepare.sources import Part, directory_part, find_parts
from mtl_dist.prepare.tables import FACES, FRAMES, write_tables
from mtl_dist.processes import as_done, process_pool, telling
from mtl_dist.progress import progress_bar
from mtl_dist.tasks import VIEWS
from mtl_dist.threads import DaemonThreads

FORMAT = 2  # of what is written: another one is another plan
LOCK, SHEET = ".being-prepared", "faces.png"
COUNTING_THREADS = 8
LISTED_DIRECTORIES = 64  # whose names are in memory
MAX_LISTED = 20

About = dict[str, Any]


def prepare(command: PrepareCommand) -> None:
    """Write faces, frames.parquet, faces.csv and a contact sheet to DEST. Raises `InputError`."""
    dest = Path(storage.absolute(command.dest))
    parts, passed_over = find_parts(command.source, one_person=command.one_person)
    detector = open_detector(command.detector, max_side=command.max_side)
    annotations = Annotations(storage.local_path(command.annotations)) if command.annotations else None
    others = (
        annotations.check_sources([name for part in parts for name in (*part.sources, part.video)])
        if annotations
        else []
    )
    plan = _plan(command, detector.name)
    begun = time.monotonic()
    with _alone(dest):
        _begin(dest, plan)
        done, gone = _find_done(dest, parts, plan, command)
        # All of them before any is made: the picture of one may be another's now.
        for name, part in [*gone.items(), *((part.name, part) for part in parts if part.name not in done)]:
            remove_pictures(dest, name, part, one_person=command.one_person)
        made = dict(done)
        todo = {part.name: Task(part, command, str(dest), plan) for part in parts if part.name not in done}
        for name, about in _make(todo, command):
            made[name] = about
        abouts = [made[part.name] for part in parts]
        sheet = Sheet()
        num_labelled = write_tables(
            dest, parts, abouts, annotations=annotations, within_s=command.within, show=sheet.add
        )
        storage.write_bytes(str(dest / SHEET), sheet.draw(dest, Path(command.source).name))
        shutil.rmtree(dest / UNFINISHED, ignore_errors=True)
    if passed_over:
        print(f"note: of {command.source} other files were left out: {', '.join(passed_over)}")
    _say(command, dest, parts, abouts, sheet, num_made=len(todo), seconds=time.monotonic() - begun)
    if annotations:
        _say_labels(annotations, others, num_labelled, sheet.num_faces)
    _say_next(command, dest, sheet, has_split=annotations is not None and "split" in annotations.labels)


def _plan(command: PrepareCommand, detector: str) -> str:
    source = storage.absolute(command.source).rstrip("/")
    about = {"format": FORMAT, "source": source, "detector": detector, **command.kept()}
    if Path(command.detector).is_file():
        about["detector_sha256"] = storage.sha256_of(Path(command.detector))
    return json.dumps(about, indent=1) + "\n"


@contextlib.contextmanager
def _alone(dest: Path) -> Iterator[None]:
    """Keep others from preparing at one place meanwhile."""
    dest.mkdir(parents=True, exist_ok=True)
    with (dest / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"faces are being written to {dest} by another command; wait for its end, or choose another DEST"
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            (dest / LOCK).unlink(missing_ok=True)


def _begin(dest: Path, plan: str) -> None:
    """Begin, or go on. Raises `InputError` where DEST holds anything else."""
    path = dest / PLAN
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = {}
        wanted = json.loads(plan)
        other = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        if other == ["source"]:
            raise InputError(
                f"{dest} holds faces of {found['source']}, and this command is of {wanted['source']}; choose another "
                f"DEST; or, if these are the same files at another place now, write it as source in {path}"
            )
        if other:
            has, gets = (", ".join(f"{key} {about.get(key)}" for key in other) for about in (found, wanted))
            raise InputError(
                f"{dest} holds faces that were made with {has}; this command has {gets}; choose another DEST, give the "
                "same options, or delete it"
            )
    elif there := sorted(entry.name for entry in dest.iterdir() if entry.name != LOCK):
        raise InputError(f"{dest} holds '{there[0]}', which is not of this command; choose an empty DEST")
    else:
        storage.write_bytes(str(path), plan.encode())
    shutil.rmtree(dest / UNFINISHED, ignore_errors=True)  # of a command that was killed


def _find_done(
    dest: Path, parts: list[Part], plan: str, command: PrepareCommand
) -> tuple[dict[str, About], dict[str, None]]:
    """Return what is said of the parts that are finished, and which there were when a directory had more photographs.

    Raises `InputError` for one of a source that is not there.
    """
    known = {part.name: part for part in parts}
    directories = {part.video for part in parts if not part.is_video}
    list_names = lru_cache(maxsize=LISTED_DIRECTORIES)(_list_names)
    done: dict[str, About] = {}
    gone: dict[str, None] = {}
    for name, _ in storage.list_objects(str(dest / PARTS)):
        if name not in known and directory_part(name) in directories:
            gone[name] = None
            continue
        if name not in known:
            video = directory_part(name) or name.removesuffix(".parquet")
            raise InputError(
                f"{dest} holds faces of {video}, and {command.source} no such video or photographs; choose another "
                f"DEST, or delete {dest}"
            )
        about = read_about(dest / PARTS / name)
        if about is None or about.get("how") != how_of(plan) or about["identity"] != known[name].identity:
            print(f"note: {known[name].sources[0]} is not what it was: its faces are cut out anew", flush=True)
        elif about["bad"] and not command.skip_bad_images:
            continue
        elif not has_pictures(dest, name, list_names):
            print(f"note: pictures of {known[name].sources[0]} are gone: its faces are cut out anew", flush=True)
        else:
            done[name] = about
    return done, gone


def _list_names(directory: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(directory))
    except OSError:
        return frozenset()


# ------------------------------------------------------------------------------------------------------------ the work


def _make(todo: dict[str, Task], command: PrepareCommand) -> Iterator[tuple[str, About]]:
    if not todo:
        return
    if has_cluster() and not command.local:
        yield from _over_cluster(todo, command)
        return
    with progress_bar("finding faces", _count(todo, command)) as advance:
        jobs = min(command.jobs or num_cpus(), len(todo))
        if jobs == 1:
            yield from ((name, make_part(task, advance)) for name, task in todo.items())
            return
        with telling(advance) as told, process_pool(jobs, begin=_begin_process, args=(told,)) as pool:
            yield from as_done(pool, _make_told, todo)


_told: Any = None  # in a process of the pool: the queue that it tells of frames


def _begin_process(told: Any) -> None:
    global _told
    _told = told
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # after Ctrl-C the one that started it speaks


def _make_told(task: Task) -> About:
    return make_part(task, _told.put)


def _make_untold(task: Task) -> About:
    return make_part(task, lambda count: None)


def _count(todo: dict[str, Task], command: PrepareCommand) -> int:
    """Count frames and photographs. Of videos on S3 nothing is known yet: they count 1,000 each."""
    videos = [task.part for task in todo.values() if task.part.is_video]
    total = sum(len(task.part.sources) for task in todo.values() if not task.part.is_video)
    if not videos:
        return total
    with progress_bar("looking at videos", len(videos)) as advance, DaemonThreads(COUNTING_THREADS, "count") as pool:
        for count in pool.map(_count_video, videos):
            total += -(-count // command.every_frames)
            advance(1)
    return total


def _count_video(part: Part) -> int:
    if storage.is_s3(part.root):
        return 1000
    try:
        return count_frames(storage.local_path(storage.join(part.root, part.sources[0])))
    except InputError:
        return 0  # said when its turn comes, or left out


def _over_cluster(todo: dict[str, Task], command: PrepareCommand) -> Iterator[tuple[str, About]]:
    print(f"finding faces in {len(todo)} video(s) or parts of photographs over the cluster", flush=True)
    names = {name.removesuffix(".parquet"): name for name in todo}
    with progress_bar("finding faces", len(todo)) as advance:
        try:
            tasks = {name: todo[own] for name, own in names.items()}
            made = map_over_cluster(
                _make_untold, tasks, cpus=command.cpus_per_video, gpus=0, retries=command.retries,
                autoscaling=command.autoscaling, what="finding faces", unit="video")  # fmt: skip
            for name, about in made:
                advance(1)
                yield names[name], about
        except TaskFailed as error:
            raise InputError(
                f"the faces of {error.name} could not be cut out ({error.reason}), tried {command.retries + 1} "
                "time(s); mend that: what is finished stays, and the same command continues"
            ) from error


# ------------------------------------------------------------------------------------------------------- what is said


def _say(
    command: PrepareCommand, dest: Path, parts: list[Part], abouts: list[About], sheet: Sheet, *, num_made: int,
    seconds: float,
) -> None:  # fmt: skip
    left_out = sum((Counter(about["left_out"]) for about in abouts), Counter())
    bad = [found for about in abouts for found in about["bad"]]
    seen = Seen()
    for about in abouts:
        told = about["seen"]
        seen.add(Seen(told["counts"], told["first"], {kind: set(names) for kind, names in told["videos"].items()}))
    for line in seen.lines():
        print(line)
    for _, why in bad[:MAX_LISTED]:
        print(f"left out: {why}")
    if len(bad) > MAX_LISTED:
        print(f"left out: {len(bad) - MAX_LISTED} more, which {FRAMES} or {PARTS}/ name")
    if len(bad) == sum(len(part.sources) for part in parts):
        raise InputError(f"nothing of {command.source} can be read; the first: {bad[0][1]}")
    count = sum(about["rows"] for about in abouts)
    videos = sum(part.is_video for part in parts)
    photos = sum(len(part.sources) for part in parts if not part.is_video)
    what = []
    if videos:
        of = f"{counted(sheet.num_of_videos, 'face')} of {counted(sheet.num_persons, 'person')}"
        what.append(f"{of} in {counted(videos, 'video')}")
    if photos:
        what.append(f"{counted(sheet.num_faces - sheet.num_of_videos, 'face')} in {counted(photos, 'photograph')}")
    print(f"{dest}: {', and '.join(what)}")
    for why, number in left_out.most_common():
        print(f"  {number:,} of {count:,} rows of {FRAMES} have no picture: {why}")
    if num_made:
        print(f"made in {seconds:.1f} s; {dest / SHEET} shows some of it")
    else:
        print("nothing was left to find: every face was cut out already")


def _say_labels(annotations: Annotations, others: list[str], num_labelled: int, num_faces: int) -> None:
    print(
        f"{annotations.path}: {num_labelled:,} of {num_faces:,} faces have a label, and {annotations.num_used:,} of "
        f"{annotations.count:,} rows a face"
    )
    if others:
        listed = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        print(f"note: it names {len(others)} that are not there: {listed}")
    if annotations.num_of_nobody:
        print(
            f"note: {annotations.num_of_nobody:,} faces have no label, since there are several persons and the labels "
            f"do not say whose they are: give them a column person (numbers as in {SHEET} and {FRAMES}), or say "
            "--one-person where the others are only passing"
        )
    if annotations.how == "seconds" and not num_labelled:
        print("note: no label is near enough in time to a frame; --within SECONDS lets it be further away")


def _say_next(command: PrepareCommand, dest: Path, sheet: Sheet, *, has_split: bool) -> None:
    if not sheet.num_faces:
        print("note: no face was kept; faces.png and frames.parquet tell why")
        return
    if sheet.num_faces == 1 and not has_split:
        print("note: this is one face; a set needs two or more, one of them for validation")
        return
    create = ["python", "-m", "mtl_dist.shards", "create"]
    shards = f"{dest}-shards"
    is_parted_anywhere = False
    print("next:")
    for view in VIEWS:
        if command.annotations:
            own = [str(dest / FACES), shards, "--views", view, "--images", str(dest / view)]
            tell_apart, is_parted_anywhere = _tell_apart(sheet, has_split)
            own += tell_apart if has_split else ["--val-fraction", "0.1", *tell_apart]
        else:
            inside = "" if len(sheet.directories) > 1 else sheet.directories[0]
            own = [str(dest / view / inside), shards, "--views", view, "--unlabelled"]
        print(f"  {shlex.join([*create, *own])}")
    if is_parted_anywhere:
        print(
            "note: all faces are of one video or photograph, so some of it is on both sides: a score counts what was "
            "learnt by heart; of several this command keeps each on one side"
        )


def _tell_apart(sheet: Sheet, has_split: bool) -> tuple[list[str], bool]:
    """Return what `shards create` needs to part the faces, and whether those of one source come on both sides."""
    by_source = ["--columns.video", "person", "--columns.person", ""]
    if has_split:  # the user parted them, and a directory of photographs is no video then
        return ([] if sheet.num_of_videos else by_source), False
    groups = {re.sub("_(left|right)$", "", video) for video in sheet.videos}  # halves of one, to `shards create`
    if len(groups) > 1:
        return [], False
    if len(sheet.sources) > 1:
        return by_source, False
    return ["--columns.video", "image", "--columns.person", ""], True
