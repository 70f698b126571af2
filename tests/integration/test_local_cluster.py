"""A real cluster on this machine: what it offers, and that it disappears whatever was killed."""

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

from cluster import local

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with local.LocalCluster(tmp_path_factory.mktemp("cluster"), nodes=2, cpus_per_node=2, purge=True) as state:
        yield state
    assert not state.dir.exists()
    assert_nothing_left(state.dir)


@pytest.fixture
def other_dir(tmp_path):
    yield tmp_path / "other"
    local.down(tmp_path / "other")


def assert_nothing_left(dir: Path) -> None:
    assert local.find_processes(local.cluster_id(dir)) == []
    assert not local.runtime_dir(local.cluster_id(dir)).exists()
    assert [path.name for path in dir.glob("*")] in ([], ["s3"])


def assert_runs(state: local.ClusterState) -> None:
    assert local.dead_parts(state) == []
    assert len(local.read_nodes(state)) == state.nodes


def start_and_kill_up(dir: Path, *, when: str) -> None:
    """Run `up` and kill it with SIGKILL once a process called `when` carries the cluster's id."""
    up = subprocess.Popen([sys.executable, "-m", "cluster.local", "up", "--dir", str(dir), "--nodes", "1"], cwd=ROOT)
    deadline = time.monotonic() + 60
    while when not in [read_name(pid) for pid in local.find_processes(local.cluster_id(dir))]:
        assert up.poll() is None, f"`up` ended before a {when} ran"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    up.kill()
    up.wait()


def read_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def test_the_s3_server_stores_and_refuses_wrong_credentials(cluster):
    client = open_s3(cluster, cluster.secret_key)
    client.put_object(Bucket=local.BUCKET, Key="a/b", Body=b"payload")
    assert client.get_object(Bucket=local.BUCKET, Key="a/b")["Body"].read() == b"payload"
    for access_key, secret_key in ((cluster.access_key, "x" * 40), ("AKIA" + "X" * 16, cluster.secret_key)):
        with pytest.raises(ClientError) as refusal:
            open_s3(cluster, secret_key, access_key=access_key).get_object(Bucket=local.BUCKET, Key="a/b")
        assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def open_s3(cluster, secret_key, *, access_key=None):
    return boto3.client(
        "s3",
        endpoint_url=cluster.s3_endpoint,
        region_name=local.REGION,
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
    assert answer.stdout.splitlines() == ["id:", f"['{local.BUCKET}']"]


def test_secrets_are_in_private_files_and_on_no_command_line(cluster):
    for name in ("cluster.json", "env.sh", "token"):
        assert stat.S_IMODE((cluster.dir / name).stat().st_mode) == 0o600
    secrets = [cluster.secret_key, cluster.token_path.read_text()]
    texts = [path.read_bytes() for path in (cluster.dir / "logs").iterdir()]
    for pid in local.find_processes(cluster.cluster_id):
        texts.append(Path(f"/proc/{pid}/cmdline").read_bytes())
    assert len(texts) > 10
    assert not [secret for secret in secrets for text in texts if secret.encode() in text]
    assert cluster.secret_key not in repr(cluster)


def test_a_submitted_job_sees_every_node_and_inherits_the_environment(cluster):
    code = (
        "import os, ray; ray.init(); alive = [node for node in ray.nodes() if node['Alive']];"
        " read = ray.remote(lambda: [os.environ[name] for name in ('RAY_ADDRESS', 'AWS_ACCESS_KEY_ID')]);"
        " print(len(alive), ray.cluster_resources()['CPU'], *ray.get(read.remote()))"
    )
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", cluster.dashboard_url, "--"]
    answer = subprocess.run(
        [*submit, "python", "-c", code],
        env=os.environ | cluster.client_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout
    assert f"2 4.0 {cluster.gcs_address} {cluster.access_key}" in answer.stdout.splitlines()


def test_up_on_a_running_cluster_starts_nothing(cluster, capsys):
    arguments = ["up", "--dir", str(cluster.dir), "--cpus-per-node", "2", "--nodes"]
    assert local.main([*arguments, "2"]) == 0
    assert "already running" in capsys.readouterr().out
    assert local.main([*arguments, "3"]) == 2
    assert "2 nodes x 2 CPUs already runs" in capsys.readouterr().err
    assert local.load_state(cluster.dir) == cluster
    assert local.main(["status", "--dir", str(cluster.dir)]) == 0
    assert "2 of 2 nodes alive, 4 CPUs" in capsys.readouterr().out


def test_a_second_cluster_comes_and_goes_beside_the_first(cluster, other_dir, capsys):
    start_and_kill_up(other_dir, when="rclone")
    other = local.up(other_dir, nodes=1, cpus_per_node=1)  # over what is left of the killed one
    assert_runs(other)
    assert_runs(cluster)

    os.kill(other.processes["node-0"].pid, signal.SIGKILL)
    while "node-0" not in local.dead_parts(other):
        time.sleep(0.01)
    assert local.main(["status", "--dir", str(other_dir)]) == 1
    assert "dead: node-0" in capsys.readouterr().out
    begin = time.monotonic()
    assert local.main(["down", "--dir", str(other_dir)]) == 0
    assert time.monotonic() - begin < 10
    assert_nothing_left(other_dir)
    assert (other_dir / "s3" / local.BUCKET).is_dir()
    assert_runs(cluster)


def test_down_after_a_killed_up_leaves_nothing(cluster, other_dir):
    start_and_kill_up(other_dir, when="gcs_server")
    assert local.down(other_dir) > 0
    assert_nothing_left(other_dir)
    assert local.down(other_dir) == 0
    assert_runs(cluster)


def test_a_part_that_dies_is_named_with_its_log(other_dir, monkeypatch):
    monkeypatch.setattr(local, "OBJECT_STORE_BYTES", 1)
    with pytest.raises(local.ClusterError, match=r"node-0 ended with code 1 before .*\n--- .*node-0\.log"):
        local.up(other_dir, nodes=1)
    assert_nothing_left(other_dir)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up", "--nodes", "0"], "nodes is 0, expected 1 to"),
        (["up", "--cpus-per-node", "0"], "cpus per node is 0"),
        (["up", "--timeout", "-1"], "timeout is -1"),
        (["up", "--dir", "/dev/null/cluster"], "choose a directory that can be written"),
        (["up", "--dir", str(ROOT)], "holds files of others"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(local, "default_dir", lambda: tmp_path)
    assert local.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_down_and_status_where_nothing_ever_ran_touch_nothing(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    assert local.main(["down", "--purge", "--dir", str(tmp_path)]) == 0
    assert local.main(["status", "--dir", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("nothing") == 2
    assert (tmp_path / "logs").is_dir()
    assert local.main(["down", "--dir", str(tmp_path / "absent")]) == 0
    assert not (tmp_path / "absent").exists()
