"""Predict valence, arousal, expression and action units of face images, with one trained model or the mean of several.

Examples:
    python -m mtl_dist.predict --runs runs/cropped --input photos/ --out photos.csv
    python -m mtl_dist.predict --runs runs/cropped runs/other --input face.mp4 --every-frames 5 --out face.parquet
    python -m mtl_dist.predict --runs s3://bucket/runs/cropped --input DATA_SHARDS/cropped/val --out val.parquet
    python -m mtl_dist.predict --runs exported/ --input test_set.txt --images DATA/cropped --out predictions.txt

--input is a directory of images or of videos (below it and behind links too, in the order of their names), a list of
images (.txt, a path a line, with or without a header), a video file, or a shard set, whose labels are scored. Images
are JPEG, PNG, WEBP, BMP, GIF or TIFF; what is transparent is seen on black, and what is not stored upright is
turned as its EXIF says (--exif ignore: not). Frames of videos are as a player shows them.

The models expect faces: pictures cut to one face as those they were trained on. Models of both views read a directory
with cropped/ and cropped_aligned/ below it, or a list with --images: a frame has one name in both. A shard set is of
the models' one view (mtl_dist.ensemble combines views of shard sets). Of a video every frame's middle square is taken.

With --faces pictures and videos are whole: faces are found in them, followed through a video, and cut out for every
view. --out has a row a face and frame, with the person, the box and the detector's confidence; a frame without a face
has one row, without predictions. A directory holds photographs or videos, not both.

--out is written whole or not at all: .csv and .parquet have a row a frame (row, image, valence, arousal, expression,
p_<class>, p_AU<number>, of a video the frame's seconds from where it starts, and labels where there are some), .txt is
the file of the challenge (AUs on above 0.5).
"""

from __future__ import annotations

from mtl_dist.errors import program, read_options, run_command
from mtl_dist.predict.options import PredictCommand, check_command


def main(args: list[str] | None = None) -> None:
    """Read the command line, then predict. Raises `InputError` for what the user can mend."""
    command = read_options(PredictCommand, args, prog=program("mtl_dist.predict"), description=__doc__)
    check_command(command)
    from mtl_dist.predict.job import predict_input  # torch and all, which --help does not wait for

    predict_input(command)


def script() -> None:
    """Be `mtl-predict`, or python -m mtl_dist.predict."""
    run_command(main, interrupted="nothing was written")


if __name__ == "__main__":
    script()
