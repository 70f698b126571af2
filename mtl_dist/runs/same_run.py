"""What a checkpoint and a configuration must have alike for a run to go on."""

from __future__ import annotations

from typing import Any

from mtl_dist.config import Config
from mtl_dist.data.order import VERSIONS
from mtl_dist.errors import InputError
from mtl_dist.settings import Varies, flatten, varying
from mtl_dist.unread import find_unread, why_unread

NAMING_WEIGHTS = ("model.weights", "run.start", "loss.teacher")  # URIs, which nodes may have by other paths
DECIDED_AT_THE_START = "engine.autocast"  # where it is auto


def find_lack(state: dict[str, Any]) -> str:
    """Say what of a state is not there, or no such thing; empty where all is."""
    kinds = {"config": dict, "identity": dict, "step": int, "scores": dict}
    return next((f"no {name}" for name, kind in kinds.items() if not isinstance(state.get(name), kind)), "")


def weights_name(uri: Any) -> str:
    """Return the part of a URI of weights that is the same on all nodes, and wherever a job's files are uploaded to."""
    return str(uri).rstrip("/").rpartition("/")[2]


def differences(state: dict[str, Any], config: Config, level: Varies) -> dict[str, tuple[Any, Any]]:
    """Return {setting: (value there, value here)} where a checkpoint and a configuration must be alike and are not.

    What nothing reads counts for nothing. Files are compared by the part of their URI that is the same on all nodes.
    """
    # A setting that is newer than the checkpoint has the default, which is what was done before there was a choice.
    theirs, mine = flatten(Config()) | state["config"], flatten(config)
    unread, free = find_unread(config), varying(Config, level)
    unlike = {}
    for key in sorted(theirs.keys() | mine.keys()):
        pair = theirs.get(key), mine.get(key)
        same = weights_name(pair[0]) == weights_name(pair[1]) if key in NAMING_WEIGHTS else pair[0] == pair[1]
        same |= key == DECIDED_AT_THE_START and "auto" in pair
        if not same and key not in free and not why_unread(key, unread):
            unlike[key] = pair
    return unlike


def check_same_run(state: dict[str, Any], config: Config, identity: dict[str, str], where: str) -> None:
    """Raise `InputError` unless a checkpoint's configuration and data are those of the run that wants it."""
    if lack := find_lack(state):
        raise InputError(f"{where}/state.json is not what training writes: {lack}; delete {where}")
    if (version := state.get("order", VERSIONS[0])) not in VERSIONS:
        raise InputError(
            f"run '{config.run.name}' has a checkpoint of order {version!r} ({where}); this version of mtl_dist knows "
            f"{', '.join(map(str, VERSIONS))}: continue it with the one that began it, or give it another --run.name"
        )
    for key, (theirs, mine) in differences(state, config, Varies.BY_PART).items():
        raise InputError(
            f"run '{config.run.name}' has a checkpoint with {key} {theirs!r} ({where}), but the "
            f"configuration says {mine!r}; give the run another --run.name, or the same {key}"
        )
    for name, sha256 in identity.items():
        if state["identity"].get(name) != sha256:
            raise InputError(
                f"run '{config.run.name}' has a checkpoint trained on another {name} ({where}): sha256 "
                f"{state['identity'].get(name)}, not {sha256}; give the run another --run.name, or the same data"
            )
