"""What `prepare` costs beside the detector and the decoder alone, two jobs beside one, its memory, and who is who.

    python -m benchmarks.preparing throughput jobs memory persons --out FILE
    python -m benchmarks.preparing --picture FILE.png

Clips are rendered: people who walk before clutter, photographs of the Face Research Lab London Set where they are
there. By turns in one run, medians of rounds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.loader import write_results
from mtl_dist.data.videos import whole_frames
from mtl_dist.faces.detector import open_detector
from mtl_dist.faces.finding import find_in_video
from mtl_dist.faces.tracking import Tracker
from mtl_dist.prepare.__main__ import main as prepare
from tests.clips import Place, Walk, draw_frames, londoner, person, write_clip
from tests.conftest import LONDON

ROUNDS = 5
SCENES = ((640, 360), (1280, 720))
FRAMES = 25
FILM_FPS, FILM_S = 1, 7200
CLIPS, CLIP_FRAMES = 20, 130
JOB_FRAMES = 500  # of a clip of `jobs`: long beside the seconds that a process takes to start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*MEASURES, []])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--frames", type=int, default=JOB_FRAMES, help="of each clip of jobs")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)  # what a process of `jobs` does
    parser.add_argument("--picture", type=Path, help="also draw a clip of two people and what comes out of it (.png)")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    if args.bare:
        search(args.bare)
        return
    figures = {}
    for what in args.what:
        with tempfile.TemporaryDirectory(prefix="mtl_dist-bench-") as scratch:
            figures[what] = MEASURES[what](Path(scratch), args)
        print(what, figures[what], flush=True)
    if args.picture:
        with tempfile.TemporaryDirectory(prefix="mtl_dist-bench-") as scratch:
            draw_clip(Path(scratch)).save(args.picture)
    if args.out:
        write_results(args.out, figures)


def search(clip: Path) -> int:
    """Decode and search a video, and do nothing with what is found."""
    detector = open_detector()
    return sum(len(detector(frame.pixels)) for frame in whole_frames(clip))


def measure_throughput(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Frames a second of `prepare`, in this process, beside those of detector and decoder alone; and of its CPU time.

    Two people are in every frame. On a busy machine the processor's time tells more than the clock.
    """
    figures: dict[str, Any] = {}
    for width, height in SCENES:
        clip = write_scene(scratch / f"{width}.mp4", seed=0, size=(width, height))
        took: dict[str, list[tuple[float, float]]] = {"alone": [], "prepare": []}
        for number in range(args.rounds + 1):
            out = scratch / f"out{width}-{number}"
            calls = {
                "alone": lambda clip=clip: search(clip),
                "prepare": lambda clip=clip, out=out: prepare([str(clip), str(out), "--jobs", "1"]),
            }
            for name, call in calls.items():
                wall, cpu = timed(call)
                if number:  # the first is to warm up
                    took[name].append((wall, cpu))
        ratios = np.array(took["alone"]) / np.array(took["prepare"])
        figures[f"{width}x{height}"] = {
            "alone_frames_per_s": round(FRAMES / statistics.median(wall for wall, _ in took["alone"]), 1),
            "prepare_frames_per_s": round(FRAMES / statistics.median(wall for wall, _ in took["prepare"]), 1),
            "of_alone": round(float(np.median(ratios[:, 0])), 3),
            "of_alone_by_cpu_time": round(float(np.median(ratios[:, 1])), 3),
            "each": ratios[:, 0].round(3).tolist(),
        }
    return figures


def measure_jobs(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """How much quicker two videos are in two processes: of `prepare`, and of detector and decoder alone."""
    clips = [write_scene(scratch / f"in/{number}.mp4", seed=number, num_frames=args.frames) for number in range(2)]
    bare = [[sys.executable, "-m", "benchmarks.preparing", "--bare", str(clip)] for clip in clips]
    found: dict[str, list[float]] = {"prepare": [], "alone": []}
    for number in range(args.rounds):
        one, two = (
            [sys.executable, "-m", "mtl_dist.prepare", str(scratch / "in"), str(scratch / f"out{number}-{jobs}"),
             "--jobs", str(jobs)] for jobs in (1, 2)
        )  # fmt: skip
        found["prepare"].append(timed(lambda one=one: run(one))[0] / timed(lambda two=two: run(two))[0])
        found["alone"].append(timed(lambda: [run(command) for command in bare])[0] / timed(lambda: run(*bare))[0])
    return {name: round(statistics.median(values), 2) for name, values in found.items()} | {
        f"{name}_each": [round(value, 2) for value in values] for name, values in found.items()
    }


def measure_memory(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Anonymous memory of a process that cuts the faces out of a film of two hours, by the share that is done."""
    frames = [pixels for pixels, _ in draw_frames([person(3)], [lambda n: Place(40 + n, 60, 80)], 60, size=(120, 96))]
    film = write_film(scratch / "film.mp4", frames)
    process = subprocess.Popen(
        [sys.executable, "-m", "mtl_dist.prepare", str(film), str(scratch / "out"), "--jobs", "1"],
        stdout=subprocess.DEVNULL,
    )
    samples: list[tuple[int, int]] = []
    while process.poll() is None:
        done = sum(1 for _ in (scratch / "out/unfinished").glob("*/cropped_aligned/*/*.jpg"))
        with_memory = memory_of(process.pid)
        if with_memory:
            samples.append((done, with_memory))
        time.sleep(2)
    assert process.returncode == 0
    most = max(done for done, _ in samples)
    quarters = [
        max((memory for done, memory in samples if low <= done / most <= low + 0.25), default=0)
        for low in (0.05, 0.25, 0.5, 0.75)
    ]
    return {"frames": FILM_FPS * FILM_S, "peak_mb_by_quarter": quarters}


def measure_persons(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """How many random clips of two people who cross, leave and come back have two persons, and whose are swapped."""
    swapped = split = 0
    detector = open_detector()
    for seed in range(args.clips):
        rng = np.random.default_rng(seed)
        walks = [random_walk(rng) for _ in range(2)]
        frames, places = zip(*draw_frames(two_people(rng), walks, CLIP_FRAMES, seed=seed))
        clip = write_clip(scratch / "clip.mp4", frames)
        tracker, tracks = Tracker(), ({}, {})
        for frame, there in zip(find_in_video(clip, detector, tracker), places, strict=True):
            for one in frame.faces:
                x = float(one.face.box[0] + one.face.box[2]) / 2
                near = [who for who, place in enumerate(there) if place and abs(x - place.x) < place.side / 4]
                if len(near) == 1:
                    tracks[near[0]][one.track] = tracks[near[0]].get(one.track, 0) + 1
        persons = tracker.persons()
        who = [{persons[track] for track, count in own.items() if track in persons and count > 2} for own in tracks]
        swapped += bool(who[0] & who[1])
        split += not who[0] & who[1] and max(map(len, who)) > 1
    return {"clips": args.clips, "with_a_swap": swapped, "with_a_person_twice": split}


MEASURES: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "throughput": measure_throughput,
    "jobs": measure_jobs,
    "memory": measure_memory,
    "persons": measure_persons,
}


def draw_clip(scratch: Path) -> Image.Image:
    """Draw four frames of a clip of two people who cross, leave and come back, above the sheet of what is cut out."""
    rng = np.random.default_rng(4)
    walks = [random_walk(rng) for _ in range(2)]
    frames = [pixels for pixels, _ in draw_frames(two_people(rng), walks, CLIP_FRAMES, seed=4)]
    prepare([str(write_clip(scratch / "party.mp4", frames)), str(scratch / "out"), "--jobs", "1"])
    with Image.open(scratch / "out/faces.png") as sheet:
        picture = Image.new("RGB", (sheet.width, sheet.height + 250), "white")
        picture.paste(sheet, (0, 250))
    for place, number in enumerate((8, 22, 30, CLIP_FRAMES - 15)):
        picture.paste(Image.fromarray(frames[number]).resize((300, 225)), (20 + 306 * place, 20))
    return picture


def two_people(rng: np.random.Generator) -> list[Sequence[Image.Image]]:
    """Draw two people, of the photographs where they are there."""
    if not LONDON.exists():
        return [person(int(number)) for number in rng.choice(1000, 2, replace=False)]
    return [londoner(int(number)) for number in rng.choice(102, 2, replace=False)]


def random_walk(rng: np.random.Generator) -> Walk:
    """Walk out of the picture on the other side, stay away for some frames, and come back."""
    away, y, side = int(rng.integers(5, 60)), rng.uniform(90, 140), rng.uniform(80, 130)
    speed, is_mirrored, sway, phase = rng.uniform(4, 9), rng.random() < 0.5, rng.uniform(0, 10), rng.uniform(0, 6)
    out = int(340 / speed)

    def place(number: int) -> Place | None:
        if out <= number < out + away:
            return None
        x = -10 + speed * number if number < out else 330 - speed * (number - out - away)
        x = 320 - x if is_mirrored else x
        return Place(x, y + sway * np.sin(number / 6 + phase), side) if -side / 2 < x < 320 + side / 2 else None

    return place


def write_scene(path: Path, *, seed: int, size: tuple[int, int] = SCENES[0], num_frames: int = FRAMES) -> Path:
    """Write a clip of two people in a larger scene; `FRAMES` of it, over and over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    wide, high = size
    walks = [
        lambda n: Place(wide * (0.25 + 0.004 * n), high * 0.5, high * 0.45),
        lambda n: Place(wide * (0.7 - 0.003 * n), high * 0.55, high * 0.55),
    ]
    frames = [pixels for pixels, _ in draw_frames(two_people(rng), walks, FRAMES, seed=seed, size=size)]
    return write_clip(path, Repeated(frames, num_frames))


class Repeated(Sequence):
    """Frames over and over, to a number of them."""

    def __init__(self, frames: Sequence[np.ndarray], number: int):
        self.frames, self.number = frames, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, number: int) -> np.ndarray:
        if number >= self.number:
            raise IndexError
        return self.frames[number % len(self.frames)]


def write_film(path: Path, frames: Sequence[np.ndarray]) -> Path:
    """Write two hours, the frames over and over."""
    return write_clip(path, Repeated(frames, FILM_FPS * FILM_S), times=range(0, 25 * FILM_S, 25 // FILM_FPS))


def memory_of(pid: int) -> int:
    """Return the anonymous memory of a process in MB, 0 where it has ended."""
    try:
        lines: Iterator[str] = iter(Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1000 for line in lines if line.startswith("RssAnon:")), 0)


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds that a call takes, by the clock and of this process's CPU time."""
    begun, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - begun, time.process_time() - used


def run(*commands: list[str]) -> None:
    """Run commands side by side."""
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    assert [process.wait() for process in processes] == [0] * len(processes)


if __name__ == "__main__":
    main()
