"""What a local cluster is and where it keeps its files: `cluster.json`, `env.sh`, the token, logs, Ray's sessions.

    DIR/cluster.json  env.sh  token  logs/      gone after `down`
    DIR/s3/                                     what the S3 server stores; kept unless `down --purge`
    /tmp/mtl-ID/                                Ray's sessions and sockets, one directory a host

The id is a function of DIR: `down` needs none of these files.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import random
import secrets
import shlex
import shutil
import socket
import string
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.processes import HOST_VARIABLE, ID_VARIABLE, ClusterError
from mtl_dist.errors import InputError

BUCKET = "mtl"
MARKER = ".mtl_cluster"  # in the S3 server's directory; not a bucket, since buckets are directories
REGION = "us-east-1"  # rclone accepts any; clients refuse to sign without one
FORK_S = 2.0  # that a process may take from its fork to its program, on a busy machine
# Below the kernel's ephemeral range: no outgoing connection takes a port between our check and the server's bind.
# Above the 10002-19999 of other Ray clusters' workers.
PORT_RANGE = range(20_000, 32_000)

# What a user's shell may hold that would lead a node or a client to another cluster or to other credentials.
FOREIGN_PREFIXES = ("RAY_", "AWS_", "RCLONE_", "MTL_CLUSTER_")
FOREIGN_CREDENTIALS = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")

# A host that answers nothing is dead for Ray after 9 to 13 s (Ray's defaults: 50 to 65 s): checks begin 1 s after an
# answer, each waits 3 s, three in a row must fail. One answer within those seconds keeps it, so that a starved raylet
# stays; a stall of the GCS itself costs every host one check, not three.
HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclasses.dataclass(frozen=True)
class ClusterState:
    """What `cluster.json` holds. Nothing in it changes while the cluster runs, whatever dies and starts again."""

    cluster_id: str
    dir: Path
    hosts: int
    cpus_per_host: int
    network: str  # "namespaces" | "loopback"
    subnet: str  # the first three numbers of all addresses
    gcs_address: str
    dashboard_url: str
    s3_endpoint: str
    access_key: str
    secret_key: str = dataclasses.field(repr=False)
    ready: bool = False  # `up` has finished

    @property
    def token_path(self) -> Path:
        return self.dir / "token"

    def host_ip(self, host: int) -> str:
        return host_ip(self.subnet, host)

    def client_env(self) -> dict[str, str]:
        """Return the variables with which ray, `ray job submit`, boto3 and s3fs find this cluster without arguments."""
        no_proxy = [name for name in os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")).split(",") if name]
        own = [server_ip(self.subnet), *(self.host_ip(host) for host in range(self.hosts))]
        no_proxy = ",".join(dict.fromkeys([*no_proxy, "localhost", "127.0.0.1", *own]))
        return {
            # ray.init reads RAY_ADDRESS. `ray job submit` prefers RAY_API_SERVER_ADDRESS, even to its own --address.
            "RAY_ADDRESS": self.gcs_address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.s3_endpoint,
            "AWS_ENDPOINT_URL_S3": self.s3_endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    def process_env(self, host: int | None) -> dict[str, str]:
        """Return the environment of a host's processes, which Ray's workers inherit; None: of those on no host."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_PREFIXES)}
        inherited.pop("DS_ACCELERATOR", None)
        clients = self.client_env()
        clients.pop("RAY_API_SERVER_ADDRESS")  # inside, RAY_ADDRESS leads to it
        own = {
            ID_VARIABLE: self.cluster_id,
            "SPT_NOENV": "1",  # else setproctitle overwrites /proc/<pid>/environ of Ray's agents, and with it the id
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "TMPDIR": str(runtime_dir(self.cluster_id) / "tmp"),
            "GLOO_SOCKET_IFNAME": "e0" if self.network == "namespaces" else "lo",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_JOB_STOP_WAIT_TIME_S": "60",  # a run saves before its driver is killed; the default is 3
            "RAY_worker_niceness": "0",  # the default, 15, starves ranks beside anything else on the machine
            "DASHBOARD_METRIC_PORT": "0",  # any free one; the defaults are fixed and two clusters would meet
            "AUTOSCALER_METRIC_PORT": "0",
        }
        return inherited | clients | own | HEALTH_CHECKS | ({} if host is None else {HOST_VARIABLE: str(host)})


def plan_state(dir: Path, hosts: int, cpus_per_host: int, *, network: str, subnet: str) -> ClusterState:
    gcs_port, dashboard_port, s3_port = choose_ports(3)
    capitals = string.ascii_uppercase + string.digits
    return ClusterState(
        cluster_id=cluster_id(dir),
        dir=dir,
        hosts=hosts,
        cpus_per_host=cpus_per_host,
        network=network,
        subnet=subnet,
        gcs_address=f"{host_ip(subnet, 0)}:{gcs_port}",
        dashboard_url=f"http://{host_ip(subnet, 0)}:{dashboard_port}",
        s3_endpoint=f"http://{server_ip(subnet)}:{s3_port}",
        access_key="AKIA" + "".join(secrets.choice(capitals) for _ in range(16)),
        secret_key="".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(40)),
    )


def cluster_id(dir: Path) -> str:
    """Return the id of the cluster in `dir`, a function of the path: `down` works without any file."""
    return hashlib.sha256(str(dir).encode()).hexdigest()[:8]


def server_ip(subnet: str) -> str:
    """Return the address of this machine on the cluster's network, the S3 server's: the bridge, or 127.0.0.1."""
    return f"{subnet}.1"


def host_ip(subnet: str, host: int) -> str:
    """Return the address of a host. Not 127.0.0.1: Ray replaces that by the machine's outer address."""
    return f"{subnet}.{2 + host}"


def runtime_dir(id: str) -> Path:
    """Return where Ray keeps sessions and sockets: short, since the path of a Unix socket ends at 107 bytes."""
    return Path("/tmp") / f"mtl-{id}"


def choose_ports(count: int) -> list[int]:
    ports: list[int] = []
    for port in random.SystemRandom().sample(PORT_RANGE, len(PORT_RANGE)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise ClusterError(f"no {count} free ports between {PORT_RANGE.start} and {PORT_RANGE.stop}")


# --------------------------------------------------------------------------------------------------------------- files


def load_state(dir: Path | str) -> ClusterState | None:
    """Read the state in `dir`; None where there is none. That it can be read does not say that the cluster runs."""
    path = Path(dir).expanduser().resolve() / "cluster.json"
    try:
        fields = json.loads(path.read_text())
        return ClusterState(**fields | {"dir": Path(fields["dir"])})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not what `up` writes ({error}): run `down`, which does not need it") from None


def save_state(state: ClusterState) -> None:
    write_private(state.dir / "cluster.json", json.dumps(dataclasses.asdict(state), indent=2, default=str) + "\n")


def write_env_file(state: ClusterState) -> None:
    lines = [f"# {state.dir}: source this to use the cluster from a shell", f"unset {' '.join(FOREIGN_CREDENTIALS)}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in state.client_env().items()]
    write_private(state.dir / "env.sh", "\n".join(lines) + "\n")


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, at no moment half."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)


def is_cluster_dir(dir: Path) -> bool:
    """Say whether `up` made the directory: what other directories hold is never removed."""
    return (dir / "s3" / MARKER).exists()


def remove_state(dir: Path) -> None:
    """Remove every file of the cluster in `dir` except what the S3 server stores."""
    shutil.rmtree(runtime_dir(cluster_id(dir)), ignore_errors=True)
    if not is_cluster_dir(dir):
        return
    for name in ("cluster.json", "env.sh", "token"):
        (dir / name).unlink(missing_ok=True)
        (dir / f".{name}.partial").unlink(missing_ok=True)
    shutil.rmtree(dir / "logs", ignore_errors=True)


@contextlib.contextmanager
def lock(dir: Path) -> Iterator[None]:
    """Hold the directory: the kernel lets go of it when this process dies, however it dies."""
    descriptor = os.open(dir, os.O_RDONLY)
    try:
        _take(descriptor, dir)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, dir: Path) -> None:
    """Take the lock. What a killed one was just starting has it too, until that is a program of its own."""
    until = time.monotonic() + FORK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise InputError(
                    f"another `up`, `down` or `start` is at work in {dir}: wait for it or end it"
                ) from None
        time.sleep(0.05)
