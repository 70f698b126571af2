"""Which faces are found in scenes of clutter, how well they are aligned, and how long it takes: detectors side by side.

    python -m benchmarks.faces [--photographs DIR] [--scenes 200] [--seed 2026] [--peers NAME ...] [--out FILE]

The photographs are those of `cropped` of a set in the s-Aff-Wild2 layout, without one rendered faces. They are pasted
into scenes (`benchmarks.scenes`); as many scenes have no face. Detectors take turns at every scene, one thread each.

found       pasted faces: the middle of a box within the face, of half to twice its size
false       boxes beside faces, and in scenes without one
aligned     mean distance of the five points of the photograph, in pixels of a face aligned to 112: once aligned in the
            scene, once in the upright photograph, both by the same detector; of faces that both find
eyes        how far the eyes found lie from their usual place in the set's own aligned pictures, root of the mean
            square, in pixels at 112: where the set aligned by eyes, that is how wrong they are
ms          median of a scene with faces, and with it of its faces; less is told of scenes without

Where a face is, is told by our detector on the upright photograph. Thresholds were chosen on scenes of other seeds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.detectors import OURS, PEERS, Peer, open_peers
from benchmarks.loader import write_results
from benchmarks.scenes import ALL, Pasted, Photograph, Scene, box_in, make_scene, moved
from mtl_dist.errors import InputError, run_command
from mtl_dist.faces.align import TEMPLATE, similarity
from mtl_dist.faces.detector import Face

SIZES = (ALL.size[0], 60, 100, 200, ALL.size[1])  # of faces, by which the table is split
AGREE = 3.0  # pixels at 112
WANTED = {"found": 0.98, "false in scenes without a face": 1, "aligned": AGREE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, help="a set in the s-Aff-Wild2 layout; none: rendered faces")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="only these detectors")
    parser.add_argument("--look", type=Path, help="write the first scenes there, with what is true of them")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    peers = open_peers(args.peers)
    with tempfile.TemporaryDirectory() as scratch:
        root = args.photographs or render(Path(scratch) / "rendered")
        photographs = read_photographs(root)
        results = measure(peers, photographs, scenes=args.scenes, seed=args.seed)
        for peer in peers:
            results[peer.name]["eyes"] = spread_of_eyes(peer, root)
    if args.look:
        draw_scenes(args.look, photographs, args.seed)
    print_table(results)
    if args.out:
        about = {"photographs": len(photographs), "scenes": [args.scenes, args.scenes], "seed": args.seed}
        write_results(args.out, {**about, "wanted": WANTED, "detectors": results})


def render(root: Path) -> Path:
    """Write a set of rendered faces."""
    from mtl_dist.synthetic.render import write_synthetic

    write_synthetic(root, num_train=200, num_val=20, jobs=2)
    return root


def read_photographs(root: Path) -> list[Photograph]:
    """Read the photographs of a set, and find where the face of each is."""
    (ours,) = open_peers([OURS])
    photographs = []
    for path in sorted((root / "cropped").glob("*/*.jpg")):
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
        if found := ours.find(pixels):
            photographs.append(Photograph("/".join(path.parts[-2:]), pixels, found[0].box, found[0].points))
        else:
            print(f"no face is found in {path.name} itself; it is left out")
    if not photographs:
        raise InputError(f"{root} holds no pictures with faces, cropped/VIDEO/FRAME.jpg; is it a set?")
    return photographs


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(peers: list[Peer], photographs: list[Photograph], *, scenes: int, seed: int) -> dict[str, Any]:
    """Show every detector every scene, in turns; return its figures."""
    upright = {peer.name: {each.name: _upright(peer, each) for each in photographs} for peer in peers}
    rows: dict[str, list[tuple[Pasted, float | None]]] = defaultdict(list)  # found: NaN where not aligned upright
    false: dict[str, list[int]] = {peer.name: [0, 0] for peer in peers}  # beside faces, in scenes without one
    seconds: dict[str, tuple[list[float], list[float]]] = {peer.name: ([], []) for peer in peers}
    for number in range(2 * scenes):
        has_faces = number < scenes
        scene = make_scene(photographs, seed=seed, number=number, num_faces=None if has_faces else 0)
        for place in range(len(peers)):
            peer = peers[(place + number) % len(peers)]
            begun = time.perf_counter()
            found = peer.find(scene.pixels)
            seconds[peer.name][not has_faces].append(time.perf_counter() - begun)
            matched, others = match(found, scene)
            false[peer.name][not has_faces] += others
            for index, pasted in enumerate(scene.faces):
                face = matched.get(index)
                error = None if face is None else misaligned(peer, face, pasted, upright[peer.name])
                rows[peer.name].append((pasted, error))
        if (number + 1) % 20 == 0:
            print(f"{number + 1} of {2 * scenes} scenes", flush=True)
    return {name: _figures(rows[name], false[name], seconds[name]) for name in false}


def match(found: list[Face], scene: Scene) -> tuple[dict[int, Face], int]:
    """Return which face was found for each pasted one, the surest first, and how many are of none."""
    matched: dict[int, Face] = {}
    others = 0
    for face in sorted(found, key=lambda face: -face.confidence):
        for index, pasted in enumerate(scene.faces):
            if index not in matched and is_same(face.box, box_in(pasted)):
                matched[index] = face
                break
        else:
            others += 1
    return matched, others


def is_same(found: np.ndarray, true: np.ndarray) -> bool:
    """Return whether a box that was found is of a face: its middle within the true box, and half to twice its size."""
    middle, size, wanted = (found[:2] + found[2:]) / 2, max(found[2:] - found[:2]), max(true[2:] - true[:2])
    return bool((true[:2] <= middle).all() and (middle <= true[2:]).all() and wanted / 2 < size < wanted * 2)


def misaligned(peer: Peer, face: Face, pasted: Pasted, upright: dict[str, np.ndarray | None]) -> float:
    """Return how far the photograph's points are apart, aligned in the scene and in the photograph, in px at 112."""
    reference = upright[pasted.photograph.name]
    if reference is None:
        return float("nan")
    points = pasted.photograph.points
    in_scene = moved(similarity(face.points, peer.template), moved(pasted.matrix, points))
    return float(np.hypot(*(in_scene - moved(reference, points)).T).mean())


def _upright(peer: Peer, photograph: Photograph) -> np.ndarray | None:
    found = peer.find(photograph.pixels)
    return similarity(found[0].points, peer.template) if found else None


def spread_of_eyes(peer: Peer, root: Path) -> float | None:
    """Return the root mean square distance of the eyes from their median place in aligned pictures, in px at 112."""
    eyes = []
    for path in sorted((root / "cropped_aligned").glob("*/*.jpg")):
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
        edge = len(pixels) // 4  # detectors want to see more than a face
        if found := peer.find(np.pad(pixels, ((edge, edge), (edge, edge), (0, 0)), mode="edge")):
            eyes.append(found[0].points[:2])
    if not eyes:
        return None
    middle = np.median(eyes, 0)
    to_112 = np.hypot(*(TEMPLATE[1] - TEMPLATE[0])) / np.hypot(*(middle[1] - middle[0]))
    return float(np.sqrt((np.square(eyes - middle).sum(-1)).mean()) * to_112)


def _figures(
    rows: list[tuple[Pasted, float | None]], false: list[int], seconds: tuple[list[float], list[float]]
) -> dict[str, Any]:
    def of(some: list[tuple[Pasted, float | None]]) -> dict[str, Any]:
        errors = [error for _, error in some if error is not None]
        aligned = [error for error in errors if error == error]
        return {
            "faces": len(some),
            "found": len(errors) / max(len(some), 1),
            "aligned": float(np.mean(aligned)) if aligned else None,
            "aligned_95": float(np.percentile(aligned, 95)) if aligned else None,
            "within_3": float(np.mean(np.array(aligned) <= AGREE)) if aligned else None,
        }

    by_size = {
        f"{low} to {high}": of([row for row in rows if low <= row[0].size < high]) for low, high in pairwise(SIZES)
    }
    return {
        **of(rows),
        "by_size": by_size,
        "false_beside_faces": false[0],
        "false_without_faces": false[1],
        "ms": float(np.median(seconds[0]) * 1e3),
        "ms_without_faces": float(np.median(seconds[1]) * 1e3),
    }


# ------------------------------------------------------------------------------------------------------------- showing


def print_table(results: dict[str, Any]) -> None:
    """Print a row a detector, then one a detector and size."""
    print("\n| detector | found | false without faces | beside | aligned, mean / 95% | within 3 px | eyes | ms |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in results.items():
        eyes = "" if row["eyes"] is None else f"{row['eyes']:.1f}"
        print(
            f"| {name} | {row['found']:.1%} | {row['false_without_faces']} | {row['false_beside_faces']} "
            f"| {_px(row['aligned'])} / {_px(row['aligned_95'])} | {_percent(row['within_3'])} | {eyes} "
            f"| {row['ms']:.0f} |"
        )
    sizes = list(next(iter(results.values()))["by_size"])
    print(f"\n| found; aligned, mean | {' | '.join(f'{size} px' for size in sizes)} |")
    print("|---" * (len(sizes) + 1) + "|")
    for name, row in results.items():
        cells = [f"{row['by_size'][size]['found']:.1%}; {_px(row['by_size'][size]['aligned'])}" for size in sizes]
        print(f"| {name} | {' | '.join(cells)} |")


def _px(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def draw_scenes(dest: Path, photographs: list[Photograph], seed: int) -> None:
    """Write the first four scenes, with boxes and points that are true."""
    from PIL import ImageDraw

    dest.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        scene = make_scene(photographs, seed=seed, number=number)
        image = Image.fromarray(scene.pixels)
        draw = ImageDraw.Draw(image)
        for pasted in scene.faces:
            draw.rectangle(box_in(pasted).tolist(), outline="lime")
            for x, y in moved(pasted.matrix, pasted.photograph.points):
                draw.ellipse([x - 1.5, y - 1.5, x + 1.5, y + 1.5], fill="red")
        image.save(dest / f"scene-{number}.png")


if __name__ == "__main__":
    run_command(main, interrupted="nothing is kept; the same command begins again")
