"""The sinks by name, and the id that a run has in all of them, which is kept in its storage."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable
from importlib.util import find_spec

from mtl_dist import storage
from mtl_dist.config import Config
from mtl_dist.errors import Damaged, InputError
from mtl_dist.sealed import seal, unseal
from mtl_dist.settings import flatten
from mtl_dist.training.sinks.mlflow import MLflow
from mtl_dist.training.sinks.sending import Sender
from mtl_dist.training.sinks.sink import About, Row, Service, Sink
from mtl_dist.training.sinks.tensorboard import TensorBoard
from mtl_dist.training.sinks.wandb import WandB

SERVICES: dict[str, Callable[[About], Service]] = {"mlflow": MLflow, "wandb": WandB}
IDENTITY = "tracked.json"


def check_installed(names: Iterable[str], *, where: str = "run.track") -> None:
    """Raise `InputError` for a service whose package is not there; `where` is the setting that names it."""
    for name in names:
        if name in SERVICES and find_spec(name) is None:
            raise InputError(
                f"{where} has {name}, and the package {name} is not installed here; give every node "
                f"pip install 'mtl_dist[{name}]', or leave {name} out"
            )


def open_sinks(
    config: Config,
    *,
    resumed_at: int,
    history: Callable[[], Iterable[Row]],
    check: Callable[[], None] = lambda: None,
) -> list[Sink]:
    """Open what `run.track` names, for a run that goes on after a step. Raises `InputError`.

    `history` gives the steps up to that one; `check` is that of `Sender`.
    """
    names = dict.fromkeys(config.run.track)
    check_installed(names)
    sinks: list[Sink] = [TensorBoard(purge_step=resumed_at + 1)] if "tensorboard" in names else []
    if services := [SERVICES[name] for name in names if name in SERVICES]:
        about = describe_run(config)
        sinks += [Sender(service(about), history, check) for service in services]
    return sinks


def describe_run(config: Config, run_uri: str = "") -> About:
    """Say what a service is told of a run, wherever it lies now; of one that trains, rank 0 of its latest start."""
    uri = run_uri or config.run.uri
    settings = {name: _without_password(value) for name, value in flatten(config).items()}
    return About(_identity(uri), config.run.name, _without_password(uri), settings)


def check_tracked(run_uri: str) -> None:
    """Raise `InputError` for a run that no service was ever told of."""
    if not storage.exists(storage.join(run_uri, IDENTITY)):
        raise InputError(
            f"run {run_uri} was never tracked by MLflow or W&B, so it has no run there; leave out --attach, "
            "or continue the run with --run.track"
        )


def _without_password(value):
    return re.sub(r"//[^/@\s]*@", "//", value) if isinstance(value, str) else value


def _identity(run_uri: str) -> str:
    """Return the run's own id, the same for ever: drawn, and stored before anybody is told of it."""
    where = storage.join(run_uri, IDENTITY)
    try:
        return unseal(storage.read_bytes(where))["id"]
    except FileNotFoundError:
        drawn = secrets.token_hex(8)
        storage.write_bytes(where, seal({"id": drawn}))
        return drawn
    except (Damaged, KeyError) as error:
        raise InputError(f"{where} is damaged ({error}); delete it: MLflow and W&B then get a new run") from None
