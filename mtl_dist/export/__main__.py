"""Export a trained model: its weights as safetensors, ONNX that is checked against torch, and a model card.

Examples:
    python -m mtl_dist.export runs/cropped --out exported/
    python -m mtl_dist.export s3://bucket/runs/cropped --out s3://bucket/exported/cropped --images photos/
    python -m mtl_dist.export runs/cropped/checkpoints/step_000003000_1f3a9c2e --out exported/ --formats safetensors

Writes to --out: model.safetensors (the weights as evaluated), model.onnx (uint8 pixels in, VA and probabilities out,
any number of images), README.md, and config.json last. onnxruntime must answer as torch does on real faces, 64 of the
run's validation set or of --images, and on noise: the largest difference is printed, and above 1e-4 nothing is written
and the exit code is 1. `python -m mtl_dist.predict --runs OUT` predicts with what was exported.
"""

from __future__ import annotations

from mtl_dist.errors import program, read_options, run_command
from mtl_dist.export.options import ExportCommand, check_command


def main(args: list[str] | None = None) -> None:
    """Read the command line, then export. Raises `InputError` for what the user can mend."""
    command = read_options(ExportCommand, args, prog=program("mtl_dist.export"), description=__doc__)
    check_command(command)
    from mtl_dist.export.job import export  # torch and all, which --help does not wait for

    export(command)


def script() -> None:
    """Be `mtl-export`, or python -m mtl_dist.export."""
    run_command(main, interrupted="nothing was written")


if __name__ == "__main__":
    script()
