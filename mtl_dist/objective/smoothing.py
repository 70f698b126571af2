"""Smoothing of frame-wise values within videos: a centred mean over the frames at most so many numbers away."""

from __future__ import annotations

import numpy as np

from mtl_dist.timeline import Timeline


def last_known(timeline: Timeline, is_known: np.ndarray) -> np.ndarray:
    """Return the row (n,) int64 that each row's values are taken from: where it is not known, the last known before it.

    -1 where its video has none before it. is_known (n,) bool.
    """
    order = np.lexsort((timeline.frame, timeline.video))
    known, video = is_known[order], timeline.video[order]
    place = np.maximum.accumulate(np.where(known, np.arange(len(order)), -1))
    is_same = (place >= 0) & (video[place] == video)
    source = np.empty(len(order), np.int64)
    source[order] = np.where(is_same, order[place], -1)
    return source


def smooth(values: np.ndarray, timeline: Timeline, half_windows: np.ndarray) -> np.ndarray:
    """Replace each value by the mean of its video's rows at most `half_windows` (D,) frame numbers away.

    values (n, D) -> (n, D) float64. A window is cut off at the ends of its video; 0 leaves a column as it is.
    """
    smoothed = np.array(values, np.float64)
    if not np.any(half_windows) or not len(smoothed):
        return smoothed
    # Videos one behind the other, with more than a window between them.
    stride = int(timeline.frame.max()) + int(np.max(half_windows)) + 1
    place = timeline.video * stride + timeline.frame
    order = np.argsort(place, kind="stable")
    place = place[order]
    for column, half in enumerate(half_windows):
        if half:
            sums = np.concatenate([[0.0], np.cumsum(smoothed[order, column])])
            begin, end = np.searchsorted(place, place - half, "left"), np.searchsorted(place, place + half, "right")
            smoothed[order, column] = (sums[end] - sums[begin]) / (end - begin)
    return smoothed
