"""JSON that carries its own checksum: whatever one bit becomes, it is found, or it says the same."""

import json
import os

import pytest

from mtl_dist.errors import Damaged, InputError
from mtl_dist.report.results import SCORE_KEYS, open_ensemble
from mtl_dist.sealed import seal, unseal
from mtl_dist.training.launch import _read_note
from tests.test_checkpoint import flips

CONTENTS = {
    "score.json": ({"p": 0.699, "covers": ["va"], "rows": 7, "steps": {"+ weights": {"va": [0.5, 0.5]}}}, SCORE_KEYS),
    "checked.json": ({"format": 2, "images_sha256": "ab12", "bad": {"a/1.jpg": "cut short"}}, ("format", "bad")),
    "a rank's note": ({"kind": "InputError", "message": "no such backbone"}, ()),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_flipped_bit_of_sealed_json_is_found_or_changes_nothing(name):
    content, unsealed = CONTENTS[name]
    num_found = 0
    for data in flips(seal(content)):
        try:
            assert unseal(data, unsealed=unsealed) == content, data
        except Damaged:
            num_found += 1
    assert num_found > 500


def test_what_was_written_before_it_was_sealed_is_read_and_anything_else_is_not():
    content, unsealed = CONTENTS["score.json"]
    assert unseal(json.dumps(content).encode(), unsealed=unsealed) == content
    for other in (content | {"shb256": "0" * 64}, content | {"sha256": "0" * 64}):
        with pytest.raises(Damaged, match="its checksum does not match its content"):
            unseal(json.dumps(other).encode(), unsealed=unsealed)


def test_a_damaged_note_of_a_rank_is_an_error_that_says_so(tmp_path):
    note = tmp_path / "note.json"
    sealed = seal(CONTENTS["a rank's note"][0])
    for data in flips(sealed):
        note.write_bytes(data)
        error = _read_note(str(note))
        assert str(error) == "no such backbone" or "is damaged" in str(error), data


def test_what_cannot_be_read_is_not_called_damaged(tmp_path):
    pipe = tmp_path / "score.json"
    os.mkfifo(pipe)
    for read in (lambda: _read_note(str(pipe)), lambda: open_ensemble(str(tmp_path), [], [])):
        with pytest.raises(InputError, match=f"^{pipe} is a device or a pipe"):
            read()
