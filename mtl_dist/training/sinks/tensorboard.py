"""TensorBoard's event files, in the run's own storage: a sequence of files for every start of the run."""

from __future__ import annotations

import io
import socket
import struct
import time
from collections.abc import Mapping

import numpy as np
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from mtl_dist.training.growing import Growing
from mtl_dist.training.sinks.sink import Ending

BOARD = "tensorboard"


class TensorBoard:
    """Event files of TensorBoard, of their own for every start of the run."""

    def __init__(self, *, purge_step: int):
        begun = f"{BOARD}/events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}"
        # TensorBoard reads files in the order of their names, and drops what earlier ones have from this step on.
        self._parts = Growing(lambda number: f"{begun}.{number:06d}" if number else begun)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))

    def show(self, step: int, name: str, pixels: np.ndarray) -> None:
        (height, width), png = pixels.shape[:2], io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png.getvalue())
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)])))

    def files(self) -> dict[str, list[bytes]]:
        return self._parts.take_changed()

    def close(self, ending: Ending, files: Mapping[str, bytes]) -> None:
        """Do nothing: what there is was stored with the last checkpoint."""

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        self._parts.append(length + next(checks) + data + next(checks))
