"""A real cluster on this machine: what it offers, what can befall it, and that it disappears whatever was killed."""

import functools
import ipaddress
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError

from cluster import faults, local, network, parts
from cluster.processes import ClusterError, find_processes, read_command
from cluster.state import BUCKET, REGION, ClusterState, cluster_id, load_state, runtime_dir
from mtl_dist.errors import run_command

pytestmark = pytest.mark.integration
SLOW = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HOSTS = 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    dir = tmp_path_factory.mktemp("cluster")
    with local.LocalCluster(dir, hosts=HOSTS, cpus_per_host=2, purge=True) as state:
        yield state
    assert not state.dir.exists()
    assert_nothing_left(state.dir)


@pytest.fixture
def other_dir(tmp_path):
    yield tmp_path / "other"
    local.down(tmp_path / "other")


@pytest.fixture
def namespaces(cluster):
    if cluster.network != "namespaces":
        pytest.skip("needs the right to make network namespaces")


def assert_nothing_left(dir: Path) -> None:
    assert find_processes(cluster_id(dir)) == []
    assert network.find_network(cluster_id(dir)) == []
    assert not runtime_dir(cluster_id(dir)).exists()
    assert [path.name for path in dir.glob("*")] in ([], ["s3"])


def assert_runs(state: ClusterState) -> None:
    assert parts.dead_parts(state) == []
    assert {parts.read_condition(state, host) for host in range(state.hosts)} == {"running"}
    assert len(parts.read_nodes(state)) == state.hosts


def run(state: ClusterState, *argv: str) -> int:
    return code_of([argv[0], "--dir", str(state.dir), *argv[1:]])


def code_of(args: list[str]) -> int:
    """Run a command of `cluster.local` and return its exit code."""
    try:
        run_command(functools.partial(local.main, args))
    except SystemExit as ended:
        return ended.code
    return 0


# ------------------------------------------------------------------------------------------------------ what it offers


def test_the_s3_server_stores_and_refuses_wrong_credentials(cluster):
    client = open_s3(cluster, cluster.secret_key)
    client.put_object(Bucket=BUCKET, Key="a/b", Body=b"payload")
    assert client.get_object(Bucket=BUCKET, Key="a/b")["Body"].read() == b"payload"
    for access_key, secret_key in ((cluster.access_key, "x" * 40), ("AKIA" + "X" * 16, cluster.secret_key)):
        with pytest.raises(ClientError) as refusal:
            open_s3(cluster, secret_key, access_key=access_key).get_object(Bucket=BUCKET, Key="a/b")
        assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def open_s3(cluster, secret_key, *, access_key=None):
    return boto3.client(
        "s3",
        endpoint_url=cluster.s3_endpoint,
        region_name=REGION,
        aws_access_key_id=access_key or cluster.access_key,
        aws_secret_access_key=secret_key,
    )


def test_a_shell_that_sourced_env_sh_needs_no_arguments(cluster):
    code = "import boto3; print([bucket['Name'] for bucket in boto3.client('s3').list_buckets()['Buckets']])"
    script = f'source {cluster.dir}/env.sh && echo "id:$MTL_CLUSTER_ID" && exec "$0" -c "$1"'
    command = ["bash", "-c", script, sys.executable, code]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"AWS_PROFILE": "none"}
    )
    assert answer.stdout.splitlines() == ["id:", f"['{BUCKET}']"]


def test_secrets_are_in_private_files_and_on_no_command_line(cluster):
    for name in ("cluster.json", "env.sh", "token"):
        assert stat.S_IMODE((cluster.dir / name).stat().st_mode) == 0o600
    secrets = [cluster.secret_key, cluster.token_path.read_text()]
    texts = [path.read_bytes() for path in (cluster.dir / "logs").iterdir()]
    texts += ["\0".join(read_command(pid)).encode() for pid in find_processes(cluster.cluster_id)]
    assert len(texts) > 10
    assert not [secret for secret in secrets for text in texts if secret.encode() in text]
    assert cluster.secret_key not in repr(cluster)


WHO = """
import os, socket, boto3, ray
ray.init()
@ray.remote(num_cpus=1)
def who():
    boto3.client("s3").put_object(Bucket="mtl", Key=f"from/{os.environ['MTL_CLUSTER_HOST']}", Body=b"x")
    own = ray.util.get_node_ip_address()
    return own, socket.gethostname(), os.environ["MTL_CLUSTER_HOST"], os.environ["RAY_ADDRESS"]
nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
on = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
rows = ray.get([who.options(scheduling_strategy=on(node, soft=False)).remote() for node in nodes], timeout=60)
print("driver", ray.util.get_node_ip_address(), ray.cluster_resources()["CPU"])
for row in sorted(rows):
    print(*row)
"""


def test_a_submitted_job_runs_on_every_host_and_reaches_s3(cluster):
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", cluster.dashboard_url, "--"]
    answer = subprocess.run(
        [*submit, "python", "-c", WHO],
        env=os.environ | cluster.client_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout
    lines = answer.stdout.splitlines()
    first = lines.index(f"driver {cluster.host_ip(0)} {2.0 * HOSTS}")
    for host, line in enumerate(lines[first + 1 : first + 1 + HOSTS]):
        name = f"host-{host}" if cluster.network == "namespaces" else os.uname().nodename
        assert line.split() == [cluster.host_ip(host), name, str(host), cluster.gcs_address]
    listing = open_s3(cluster, cluster.secret_key).list_objects_v2(Bucket=BUCKET, Prefix="from/")
    assert [entry["Key"] for entry in listing["Contents"]] == [f"from/{host}" for host in range(HOSTS)]


def test_ray_knows_the_hosts_by_address_and_name(cluster):
    nodes = {(node["node_ip"], node["node_name"]) for node in parts.read_nodes(cluster)}
    assert nodes == {(cluster.host_ip(host), f"host-{host}") for host in range(HOSTS)}


def test_a_driver_runs_on_any_host(cluster, namespaces):
    """Where it would attach to the head's raylet, no worker could answer it."""
    command = [sys.executable, "-m", "cluster.local", "exec", "2", "--dir", str(cluster.dir)]
    answer = subprocess.run([*command, "--", "python", "-c", WHO], cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert answer.returncode == 0, answer.stderr
    assert f"driver {cluster.host_ip(2)} {2.0 * HOSTS}" in answer.stdout


def test_a_host_has_its_own_network_name_and_processes(cluster, namespaces):
    script = "hostname; getent hosts host-0 | cut -d' ' -f1; ip -o -4 addr show e0; ps axww -o args; exit 3"
    command = [sys.executable, "-m", "cluster.local", "exec", "1", "--dir", str(cluster.dir), "--", "sh", "-c", script]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 3
    assert answer.stdout.splitlines()[:2] == ["host-1", cluster.host_ip(0)]
    assert f"inet {cluster.host_ip(1)}/24" in answer.stdout
    assert answer.stdout.count("raylet/raylet") == 1
    assert "gcs_server" not in answer.stdout


def test_up_on_a_running_cluster_starts_nothing(cluster, capsys):
    arguments = ["up", "--dir", str(cluster.dir), "--cpus-per-host", "2", "--hosts"]
    assert code_of([*arguments, "3"]) == 0
    assert "already running" in capsys.readouterr().out
    assert code_of([*arguments, "2"]) == 2
    assert f"3 hosts x 2 CPUs ({cluster.network}) already runs" in capsys.readouterr().err
    assert load_state(cluster.dir) == cluster
    assert run(cluster, "status") == 0
    assert "3 of 3 hosts alive to Ray, 6 CPUs" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- what can befall it


def test_a_cut_host_is_lost_to_ray_and_comes_back(cluster, namespaces, capsys):
    assert run(cluster, "cut", "1") == 0
    assert 5 < faults.wait_for_view(cluster, 1, "DEAD") < 30
    assert [parts.read_condition(cluster, host) for host in range(HOSTS)] == ["running", "cut", "running"]
    assert run(cluster, "status") == 1
    assert f"host 1   cut      {cluster.host_ip(1):<15}DEAD to Ray" in capsys.readouterr().out
    assert len(parts.read_nodes(cluster)) == HOSTS - 1

    assert run(cluster, "mend", "1") == 0
    assert run(cluster, "start", "1") == 0
    assert_runs(cluster)


def test_a_short_cut_is_not_noticed(cluster, namespaces):
    nodes = parts.read_nodes(cluster)
    faults.cut(cluster, 2)
    time.sleep(4)
    faults.mend(cluster, 2)
    time.sleep(8)
    assert [node["node_id"] for node in parts.read_nodes(cluster)] == [node["node_id"] for node in nodes]


def test_a_frozen_host_is_lost_to_ray_and_comes_back(cluster, capsys):
    assert run(cluster, "freeze", "2") == 0
    assert parts.read_condition(cluster, 2) == "frozen"
    assert 5 < faults.wait_for_view(cluster, 2, "DEAD") < 30
    assert run(cluster, "thaw", "2") == 0
    assert run(cluster, "start", "2") == 0
    assert_runs(cluster)
    assert run(cluster, "start", "2") == 0
    assert "host 2 runs already" in capsys.readouterr().out


def test_a_killed_host_comes_back(cluster, capsys):
    assert run(cluster, "kill", "1") == 0
    assert find_processes(cluster.cluster_id, 1) == []
    assert parts.dead_parts(cluster) == ["host-1"]
    assert run(cluster, "kill", "1") == 0
    assert "killed 0 processes of host 1" in capsys.readouterr().out
    faults.start(cluster, 1)
    assert_runs(cluster)


def test_the_s3_server_goes_and_comes_back_with_its_objects(cluster):
    client = open_s3(cluster, cluster.secret_key)
    client.put_object(Bucket=BUCKET, Key="kept", Body=b"payload")
    assert run(cluster, "stop-s3") == 0
    assert parts.dead_parts(cluster) == ["s3"]
    assert run(cluster, "start-s3") == 0
    assert client.get_object(Bucket=BUCKET, Key="kept")["Body"].read() == b"payload"
    assert_runs(cluster)


def test_without_namespaces_the_same_but_cuts(other_dir, capsys):
    """And the head: Ray on all hosts begins anew with it."""
    state = local.up(other_dir, hosts=2, cpus_per_host=1, network="loopback")
    assert network.find_network(state.cluster_id) == []
    assert_runs(state)
    assert run(state, "cut", "1") == 2
    assert "share the loopback interface" in capsys.readouterr().err

    faults.freeze(state, 1)
    assert [parts.read_condition(state, host) for host in (0, 1)] == ["running", "frozen"]
    faults.thaw(state, 1)
    assert_runs(state)
    faults.kill(state, 1)
    faults.start(state, 1)
    assert_runs(state)

    former = {node["node_id"] for node in parts.read_nodes(state)}
    faults.kill(state, 0)
    assert parts.dead_parts(state) == ["gcs", "dashboard", "host-0"]
    assert run(state, "status") == 1
    assert "unknown to Ray" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the head, does not run"):
        faults.start(state, 1)
    faults.start(state, 0)
    assert_runs(state)
    assert not former & {node["node_id"] for node in parts.read_nodes(state)}


# ----------------------------------------------------------------------------------------------- coming up, going down


def test_a_second_cluster_comes_and_goes_beside_the_first(cluster, other_dir, capsys):
    start_and_kill_up(other_dir, when="rclone")
    other = local.up(other_dir, hosts=1, cpus_per_host=1)  # over what is left of the killed one
    assert_runs(other)
    assert_runs(cluster)
    if cluster.network == "namespaces":
        assert other.subnet != cluster.subnet
        faults.cut(other, 0)
        assert run(other, "status") == 1
        assert_runs(cluster)

    os.kill(parts.find_parts(other)["host-0"], signal.SIGKILL)
    while "host-0" not in parts.dead_parts(other):
        time.sleep(0.01)
    assert run(other, "status") == 1
    assert "dead: host-0" in capsys.readouterr().out
    begin = time.monotonic()
    assert run(other, "down") == 0
    assert time.monotonic() - begin < 10
    assert_nothing_left(other_dir)
    assert (other_dir / "s3" / BUCKET).is_dir()
    assert_runs(cluster)


@pytest.mark.parametrize(
    "when", ["mtl-", pytest.param("sh", marks=SLOW), pytest.param("rclone", marks=SLOW), "gcs_server", "raylet"]
)
def test_down_after_a_killed_up_leaves_nothing(cluster, other_dir, when):
    if when in ("mtl-", "sh") and cluster.network == "loopback":
        pytest.skip("needs the right to make network namespaces")
    start_and_kill_up(other_dir, when=when)
    # A network has no process yet, and the shell that makes it may have ended by itself.
    assert local.down(other_dir) > 0 or when in ("mtl-", "sh")
    assert_nothing_left(other_dir)
    assert local.down(other_dir) == 0
    assert_runs(cluster)


def start_and_kill_up(dir: Path, *, when: str) -> None:
    """Run `up` and kill it with SIGKILL once a process called `when`, or a network, carries the cluster's id."""
    up = subprocess.Popen([sys.executable, "-m", "cluster.local", "up", "--dir", str(dir), "--hosts", "2"], cwd=ROOT)
    deadline = time.monotonic() + 60
    while when not in ["mtl-"] * len(network.find_network(cluster_id(dir))) + [
        read_name(pid) for pid in find_processes(cluster_id(dir))
    ]:
        assert up.poll() is None, f"`up` ended before a {when} ran"
        assert time.monotonic() < deadline
        time.sleep(0.002 if when == "mtl-" else 0.05)
    up.kill()
    up.wait()


def read_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def test_down_ends_a_frozen_cluster(other_dir):
    state = local.up(other_dir, hosts=1, cpus_per_host=1)
    faults.freeze(state, 0)
    assert local.down(other_dir) > 0
    assert_nothing_left(other_dir)


def test_a_part_that_dies_is_named_with_its_log(other_dir, monkeypatch):
    monkeypatch.setattr(parts, "OBJECT_STORE_BYTES", 1)
    with pytest.raises(ClusterError, match=r"host-0 ended with code 1 before .*\n--- .*host-0\.log"):
        local.up(other_dir, hosts=1)
    assert_nothing_left(other_dir)


def test_where_namespaces_cannot_be_had_it_says_why(other_dir, monkeypatch, capsys):
    monkeypatch.setattr(network, "COMMANDS", {"no-such-ip": "iproute2"})
    assert code_of(["up", "--network", "namespaces", "--dir", str(other_dir)]) == 2
    error = capsys.readouterr().err
    assert "no network namespaces here: no `no-such-ip` command (package iproute2)" in error
    assert error.count("\n") == 1
    said = []
    assert local.start_network("00000000", 2, "auto", said.append) == ("loopback", "127.0.0")
    assert "no `no-such-ip` command" in said[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives rights up")
def test_without_rights_a_namespace_is_refused_and_nothing_left(tmp_path):
    code = "import sys; from cluster import network; network.create_network('0badcafe', 1, network.Path(sys.argv[1]))"
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", code, str(tmp_path / "hosts")]
    refused = subprocess.run(drop, cwd=ROOT, capture_output=True, text=True)
    assert "Operation not permitted" in refused.stderr.splitlines()[-1]
    assert network.find_network("0badcafe") == []


def test_a_subnet_that_is_in_use_is_passed_over():
    subnet = network.choose_subnet("0000ab00", [])
    assert subnet == "10.171.0"
    assert network.choose_subnet("0000ab00", [ipaddress.IPv4Network("10.171.0.128/30")]) == "10.171.1"
    assert network.choose_subnet("0000ab00", [ipaddress.IPv4Network("10.0.0.0/8")]).startswith("172.")
    with pytest.raises(network.NetworkError, match="every private subnet"):
        network.choose_subnet("0000ab00", map(ipaddress.IPv4Network, network.POOLS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up", "--hosts", "0"], "hosts is 0, expected 1 to"),
        (["up", "--cpus-per-host", "0"], "cpus per host is 0"),
        (["up", "--timeout", "-1"], "timeout is -1"),
        (["up", "--dir", "/dev/null/cluster"], "choose a directory that can be written"),
        (["up", "--dir", str(ROOT)], "holds files of others"),
        (["cut", "0"], "no cluster runs in"),
        (["start", "1"], "no cluster runs in"),
        (["stop-s3"], "no cluster runs in"),
        (["exec", "0", "--", "true"], "no cluster runs in"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(local, "default_dir", lambda: tmp_path)
    assert code_of(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("verb", ["cut", "mend", "kill", "start", "freeze", "thaw"])
def test_a_host_that_is_none_is_refused(cluster, verb, capsys):
    assert run(cluster, verb, "3") == 2
    assert "host is 3, expected 0 to 2" in capsys.readouterr().err


def test_down_and_status_where_nothing_ever_ran_touch_nothing(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    assert code_of(["down", "--purge", "--dir", str(tmp_path)]) == 0
    assert code_of(["status", "--dir", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("nothing") == 2
    assert (tmp_path / "logs").is_dir()
    assert code_of(["down", "--dir", str(tmp_path / "absent")]) == 0
    assert not (tmp_path / "absent").exists()
