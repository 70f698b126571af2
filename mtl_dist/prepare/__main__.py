"""Cut the faces out of videos and photographs: find them, follow persons, and write both views for training.

Examples:
    python -m mtl_dist.prepare party.mp4 cut
    python -m mtl_dist.prepare recordings/ recordings-cut --annotations labels.csv --one-person --jobs 8
    python -m mtl_dist.prepare photos/ photos-cut --skip-bad-images
    python -m mtl_dist.prepare s3://bucket/films /shared/cut --every-frames 5

DEST gets cropped/<video>/00001.jpg (the box with context) and cropped_aligned/<video>/00001.jpg (112 x 112, eyes, nose
and mouth on the usual template). The numbers are those of the frames, from 1. Further persons of a video are in
<video>_2, <video>_3 ...; a photograph's video is its directory. frames.parquet has a row a face, and one for a frame
without any: seconds, box, points, confidence, sharpness, yaw, track, and why a face was left out. faces.png shows who
was found. Run again, the command makes what is missing; the same input gives the same bytes.

--annotations is a table with a row a label: `video` and `frame` (from 1), or `seconds`, or `start` and `end`; or
`image`, a photograph's path; `person` where there are several; and the columns of labels that `shards create` knows
(valence, arousal, expression, AU1 ...), which goes on with faces.csv. A face without a label stays without. By seconds
a frame gets the label nearest in time, at most half a frame away (--within).

Under `ray job submit`, or with RAY_ADDRESS, videos are searched over the cluster; all nodes must see DEST.
"""

from __future__ import annotations

from mtl_dist.errors import program, read_options, run_command
from mtl_dist.prepare.options import PrepareCommand, check_command


def main(args: list[str] | None = None) -> None:
    """Read the command line, then cut faces out. Raises `InputError` for what the user can mend."""
    command = read_options(PrepareCommand, args, prog=program("mtl_dist.prepare"), description=__doc__)
    check_command(command)
    from mtl_dist.prepare.job import prepare  # Arrow and all, which --help does not wait for

    prepare(command)


def script() -> None:
    """Be `mtl-prepare`, or python -m mtl_dist.prepare."""
    run_command(main)


if __name__ == "__main__":
    script()
