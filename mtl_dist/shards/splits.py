"""Split rows into train and val by video and person: nobody is on both sides."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtl_dist.errors import InputError

MAX_LISTED = 5  # names in one message


def video_of(images: pa.Array) -> pa.Array:
    """Return the directory of every image: all before the last '/', '' where there is none."""
    return pc.replace_substring_regex(images, pattern="/?[^/]*$", replacement="", max_replacements=1)


def split_by_video(videos: pa.Array, persons: pa.Array | None, *, fraction: float, seed: int) -> np.ndarray:
    """Choose the validation rows, (N,) bool: whole videos, and whole persons where `persons` has them (null: unknown).

    `X_left` and `X_right` are halves of the video X. Groups are taken in an order drawn by the seed, each if it brings
    the number of rows nearer to `fraction` of all; both sides have at least one group. Raises `InputError` where
    everything is one group.
    """
    group = group_rows(videos, persons)
    sizes = np.bincount(group)
    if len(sizes) < 2:
        raise InputError(
            f"all {len(videos)} rows are of one video or person ('{videos[0]}'), so --val-fraction cannot part them; "
            "name the column that tells videos apart with --columns.video (that of the images, if each stands alone)"
        )
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 2]))).permutation(len(sizes))
    wanted, taken, chosen = fraction * len(group), 0, np.zeros(len(sizes), bool)
    for number in order:
        if abs(taken + sizes[number] - wanted) < abs(taken - wanted):
            chosen[number] = True
            taken += sizes[number]
    if chosen.all() or not chosen.any():
        smallest = order[np.argmin(sizes[order])]
        chosen[smallest] = not chosen[smallest]
    return chosen[group]


def group_rows(videos: pa.Array, persons: pa.Array | None) -> np.ndarray:
    """Number the connected groups of videos and persons: (N,) int64 from 0, the same where rows must stay together."""
    video = _number(pc.replace_substring_regex(videos, pattern="_(left|right)$", replacement=""))
    if persons is None:
        return video
    person = _number(persons)
    known = person >= 0
    edges = np.unique(np.column_stack([video[known], person[known]]), axis=0)
    label = np.arange(video.max() + 1)
    while True:  # every video takes the least label of those it shares a person with
        least = np.full(person.max(initial=-1) + 1, len(label))
        np.minimum.at(least, edges[:, 1], label[edges[:, 0]])
        new = label.copy()
        np.minimum.at(new, edges[:, 0], least[edges[:, 1]])
        new = new[new]  # a label is itself a video of the group: a long chain is walked in a few rounds
        if (new == label).all():
            return np.unique(label, return_inverse=True)[1][video]
        label = new


def check_apart(what: str, names: pa.Array, is_val: np.ndarray, where: str) -> None:
    """Raise an `InputError` if a name (null: unknown) is on both sides of a split that the source makes itself."""
    number = _number(names)
    both = np.intersect1d(number[is_val], number[~is_val])
    both = both[both >= 0]
    if len(both):
        listed = sorted(str(names[np.argmax(number == place)]) for place in both[:MAX_LISTED])
        more = f" and {len(both) - MAX_LISTED} more" if len(both) > MAX_LISTED else ""
        raise InputError(
            f"{where}: {len(both)} {what}s are in train and in val: {', '.join(listed)}{more}; a score would count "
            f"what was learnt by heart; correct the split, or do not look at {what}s with --columns.{what} ''"
        )


def _number(names: pa.Array) -> np.ndarray:
    """(N,) int64: equal names have equal numbers, from 0 in order of appearance; null is -1."""
    return pc.fill_null(names.dictionary_encode().indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
