"""Whatever the store, the network, the disk or a stranger does: the same rows, or one named error in bounded time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mtl_dist import s3 as requests
from mtl_dist import storage
from mtl_dist.config import Config
from mtl_dist.data.cache import Cache
from mtl_dist.data.frames import read_image
from mtl_dist.data.index import read_index
from mtl_dist.data.loader import train_batches
from mtl_dist.data.order import Order
from mtl_dist.data.reader import ShardReader
from mtl_dist.data.samples import ImageSamples
from mtl_dist.errors import InputError, StorageError
from mtl_dist.presets import read_config_file
from mtl_dist.processes import as_done, process_pool
from mtl_dist.shards import writer
from mtl_dist.shards.annotations import read_annotations
from mtl_dist.shards.columns import TableOptions
from mtl_dist.shards.skipping import check_images
from mtl_dist.shards.tables import read_table
from tests.conftest import REPO, run_here, run_module, within
from tests.s3_proxy import BUSY, EXPIRED, FOR_EVER, S3Proxy
from tune.space import read_space

pytestmark = pytest.mark.whole

SIZE = 48
TIMEOUT_S = 0.5  # where something stalls; 30 s of users
ATTEMPTS = 4


@pytest.fixture
def proxy(s3, monkeypatch):
    """A proxy before the S3 server; this process's clients go there, with short waits."""
    with S3Proxy(s3) as started:
        monkeypatch.setenv("AWS_ENDPOINT_URL", started.endpoint)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", str(ATTEMPTS))
        monkeypatch.setattr(requests, "_clients", {})
        monkeypatch.setattr(requests, "_answered", set())
        monkeypatch.setattr(requests, "FIRST_WAIT_S", 0.1)
        yield started


@pytest.fixture
def impatient(proxy, monkeypatch):
    """Time out soon: only where something stalls, because a busy machine is slow to answer."""
    monkeypatch.setenv("MTL_S3_TIMEOUT_S", str(TIMEOUT_S))


@pytest.fixture(scope="module")
def stored(s3, shards) -> str:
    """The training set on the S3 server."""
    uri = "s3://mtl/faults/train"
    for path in sorted((shards / "cropped" / "train").iterdir()):
        storage.upload(path, f"{uri}/{path.name}")
    return uri


PARENT = """
import os, signal, time
from mtl_dist.processes import process_pool

def work(_):
    print(os.getpid(), flush=True)
    time.sleep(3600)

if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup takes away
    with process_pool(2) as pool:
        list(pool.map(work, range(2)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_pools_processes_end_with_the_one_that_started_them(tmp_path, number):
    (tmp_path / "parent.py").write_text(PARENT)
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    with subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True, env=env
    ) as parent:
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        assert set(pids) == {pid for pid in pids if is_running(pid)}
        parent.send_signal(number)
    give_up = time.monotonic() + 60
    while any(map(is_running, pids)):
        assert time.monotonic() < give_up, pids
        time.sleep(0.05)


def end_at_zero(number: int) -> int:
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("how", ["map", "as_done"])
def test_a_process_of_a_pool_that_is_killed_ends_the_command_in_one_message(how):
    items = range(4)
    with pytest.raises(InputError, match=r"one of 2 processes was killed, .* smaller --jobs"), process_pool(2) as pool:
        list(pool.map(end_at_zero, items) if how == "map" else as_done(pool, end_at_zero, dict(enumerate(items))))


@pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv here")
def test_a_command_of_the_demo_ends_with_it(tmp_path):
    script = "from mtl_dist.processes import with_parent; import subprocess; "
    script += "subprocess.run(with_parent(['sh', '-c', 'echo $$; exec sleep 3600']))"
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=env) as parent:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    give_up = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < give_up, pid
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()  # a zombie has ended
    except FileNotFoundError:
        return False


CUT_SHORT = """
import os, sys
import numpy as np
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import read_index
from mtl_dist.data.reader import ShardReader
from mtl_dist.errors import run_command

def main():
    uri = sys.argv[1]
    reader = ShardReader(uri, read_index(uri), Cache())
    reader.read_batch(np.arange(4), 48)
    os.truncate(f"{uri}/{reader.index.shards[0].name}.tar", 0)
    reader.read_batch(np.arange(4), 48)

run_command(main)
"""


def test_a_tar_that_is_cut_short_under_its_reader_says_where(shards, tmp_path):
    shutil.copytree(shards / "cropped" / "train", tmp_path / "train")
    done = subprocess.run([sys.executable, "-c", CUT_SHORT, str(tmp_path / "train")], capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr
    assert "read_batch" in done.stderr


@pytest.fixture(scope="module")
def undisturbed(shards) -> list[tuple]:
    return epoch_of(str(shards / "cropped" / "train"), Cache())


def order_of(shard_rows: np.ndarray) -> Order:
    """One stream, so that some shard is needed late."""
    return Order(shard_rows, 8, 1, 2, seed=4)


def batches_of(uri: str, cache: Cache, *, workers: int = 2):
    reader = ShardReader(uri, read_index(uri), cache)
    order = order_of(reader.index.shard_rows)
    return train_batches(
        ImageSamples(reader, SIZE), order, epoch=1, start_step=0, rank=0, num_ranks=1, workers=workers, prefetch=2
    )


def epoch_of(uri: str, cache: Cache) -> list[tuple]:
    """Everything that an epoch yields, as values that compare."""
    return [
        (batch.rows.tolist(), batch.inputs.contiguous().numpy().tobytes(), *(x.numpy().tobytes() for x in batch.labels))
        for batch in batches_of(uri, cache)
    ]


def loader_threads() -> list[str]:
    """What is left of a loader's threads when the requests under way, which closing does not wait for, have ended."""
    give_up = time.monotonic() + 3 * ATTEMPTS * TIMEOUT_S + 10
    while True:
        names = [thread.name for thread in threading.enumerate()]
        names = [name for name in names if name.startswith(("loader", "fetch", "s3-part"))]
        if not names or time.monotonic() > give_up:
            return names
        time.sleep(0.01)


# ----------------------------------------------------------------------------------------------------- reads that end


@pytest.fixture(params=["device", "pipe"])
def endless(request, tmp_path) -> Path:
    """A path that can be read for ever, or waits for ever."""
    path = tmp_path / "endless"
    if request.param == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    return path


def test_what_may_be_read_for_ever_is_refused_by_name(endless, tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("x.csv", "x.parquet", "x.jpg", "set/index.json"):
        (tmp_path / name).symlink_to(endless)
    reads = [
        lambda: storage.read_bytes(str(endless)),
        lambda: storage.download(str(endless), tmp_path / "copy"),
        lambda: read_annotations(endless),
        lambda: read_table(tmp_path / "x.csv", TableOptions()),
        lambda: read_table(tmp_path / "x.parquet", TableOptions()),
        lambda: read_image(tmp_path / "x.jpg"),
        lambda: read_index(str(tmp_path / "set")),
        lambda: read_config_file(str(endless)),
        lambda: read_space(endless, Config()),
        lambda: check_images((tmp_path, ["x.jpg"])),
    ]
    for read in reads:
        with pytest.raises(InputError, match="is a device or a pipe; expected a file"):
            read()


def test_a_small_file_asks_for_little_memory(tmp_path):
    (tmp_path / "x").write_bytes(bytes(1000))
    tracemalloc.start()
    assert len(storage.read_bytes(str(tmp_path / "x"))) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_of_40_gb_is_refused_and_not_read(tmp_path):
    sparse = tmp_path / "x.jpg"
    sparse.touch()
    os.truncate(sparse, 40 << 30)
    (tmp_path / "x.csv").symlink_to(sparse)
    for read in (storage.read_bytes, read_image, read_config_file, lambda path: read_annotations(Path(path))):
        with pytest.raises(InputError, match=r"has 42949672960 bytes; at most \d+ are read"):
            read(str(sparse))
    with pytest.raises(InputError, match=r"x\.csv"):
        read_table(tmp_path / "x.csv", TableOptions())
    assert check_images((tmp_path, ["x.jpg"]))["x.jpg"].startswith("no picture")
    with pytest.raises(InputError, match=r"x\.jpg \(row 3\): no picture"):
        writer._read_image(str(sparse), 3, np.empty(100, np.uint8), "apply")


# -------------------------------------------------------------------------------------------------- the store, a while

FAULTS = {
    "busy": {"status": BUSY},
    "broken": {"status": (500, "InternalError")},
    "reset before an answer": {"after_bytes": -1},
    "reset in the middle": {"after_bytes": 900},
    "closed in the middle": {"after_bytes": 900, "ending": "close"},
    "stalled in the middle": {"after_bytes": 900, "ending": "stall"},
    "stalled before an answer": {"after_bytes": -1, "ending": "stall"},
    "token refused once": {"status": EXPIRED},
    "other bytes once": {"change": lambda data: data[:-1] + b"?"},
}
each_fault = pytest.mark.parametrize("fault", [pytest.param(fault, id=name) for name, fault in FAULTS.items()])


@each_fault
def test_an_epoch_is_the_same_through_faults_that_pass(proxy, impatient, stored, undisturbed, tmp_path, fault):
    is_once = "once" in str([name for name, known in FAULTS.items() if known is fault])
    for suffix in ("shard-000000.tar", "shard-000002.safetensors", "index.json", "shard-000005.tar"):
        if not ("change" in fault and suffix == "index.json"):
            proxy.inject(suffix, **fault, times=1 if is_once else 2)
    assert epoch_of(stored, Cache(tmp_path)) == undisturbed
    assert all(known.seen > known.times for known in proxy.faults), "every fault was met, and got over"
    assert loader_threads() == []


def test_a_server_that_is_away_for_a_while_is_waited_for(proxy, stored, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "6")
    batches = batches_of(stored, Cache(tmp_path, max_bytes=1))
    proxy.inject("shard-000003.tar", after_bytes=10)
    proxy.go_away()
    back = threading.Timer(0.4, proxy.come_back)
    back.start()
    assert [batch.rows.tolist() for batch in batches] == [rows for rows, *_ in undisturbed]
    back.join()


@pytest.mark.parametrize("after_bytes", [100, 70_000])
def test_an_object_of_several_parts_is_whole_through_faults(proxy, s3, tmp_path, monkeypatch, after_bytes):
    monkeypatch.setattr(requests, "PART_BYTES", 100_000)
    content = np.random.default_rng(0).bytes(1_100_000)
    s3.client().put_object(Bucket="mtl", Key="faults/parts", Body=content)
    proxy.inject("parts", after=3, times=3, after_bytes=after_bytes)
    proxy.inject("parts", after=9, times=2, status=BUSY)
    storage.download("s3://mtl/faults/parts", tmp_path / "parts")
    assert (tmp_path / "parts").read_bytes() == content
    assert len(proxy.gets("parts")) == 11 + 5, "only what was broken is read again"


@pytest.mark.parametrize("times", [1, FOR_EVER])
def test_a_part_that_is_shorter_than_asked_for_leaves_no_hole(proxy, s3, tmp_path, monkeypatch, times):
    monkeypatch.setattr(requests, "PART_BYTES", 1000)
    content = np.random.default_rng(0).bytes(4500)
    s3.client().put_object(Bucket="mtl", Key="faults/short", Body=content)
    proxy.inject("short", after=2, times=times, change=lambda data: data[:-9], is_short=True)
    if times == 1:
        storage.download("s3://mtl/faults/short", tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == content
        assert len(proxy.gets("short")) == 5 + 1
        return
    with pytest.raises(StorageError, match=rf"faults/short: .*991.*1000.*{ATTEMPTS} tries"):
        storage.download("s3://mtl/faults/short", tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_an_object_over_8_mib_and_an_empty_one(proxy, s3, tmp_path):
    content = np.random.default_rng(0).bytes((8 << 20) * 2 + 1)
    proxy.inject("large", after=1, after_bytes=0)
    for name, data in (("large", content), ("exact", content[: 8 << 20]), ("empty", b"")):
        storage.upload(write(tmp_path / "from", data), f"s3://mtl/faults/{name}")
        storage.download(f"s3://mtl/faults/{name}", tmp_path / "to")
        assert (tmp_path / "to").read_bytes() == data
        assert storage.read_bytes(f"s3://mtl/faults/{name}") == data
    assert [len(proxy.gets(name)) for name in ("large", "exact", "empty")] == [3 + 1 + 3, 2, 2]


def test_an_answer_that_is_cut_short_and_says_so_of_itself_is_read_again(proxy, s3):
    """Half a line of JSON would be called damaged, and half a list of lines would be believed."""
    s3.client().put_object(Bucket="mtl", Key="faults/lines", Body=b"one\ntwo\n")
    proxy.inject("lines", times=2, change=lambda data: data[:4], is_short=True)
    assert storage.read_bytes("s3://mtl/faults/lines", max_bytes=8) == b"one\ntwo\n"
    with pytest.raises(InputError, match="faults/lines has 8 bytes; at most 7 are read"):
        storage.read_bytes("s3://mtl/faults/lines", max_bytes=7)


@pytest.mark.parametrize("times", [1, 2])
def test_an_upload_in_parts_whose_last_answer_is_lost_is_there(proxy, tmp_path, times):
    content = np.random.default_rng(0).bytes(9 << 20)
    proxy.inject("lost", method="POST", after=1, times=times, after_bytes=-1)  # the first begins the upload
    storage.upload(write(tmp_path / "from", content), "s3://mtl/faults/lost")
    assert storage.read_bytes("s3://mtl/faults/lost") == content


@pytest.mark.parametrize("name", ["busy", "reset before an answer", "stalled before an answer", "token refused once"])
@pytest.mark.parametrize("size", [1000, 9 << 20])
def test_what_is_written_through_faults_is_whole(proxy, impatient, tmp_path, name, size):
    content = np.random.default_rng(0).bytes(size)
    proxy.inject("written", method="PUT", after=size > 1000, **FAULTS[name])
    storage.upload(write(tmp_path / "from", content), "s3://mtl/faults/written")
    assert storage.read_bytes("s3://mtl/faults/written") == content
    assert proxy.faults[0].seen > 1


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------------------------------------ the store, for ever


@pytest.mark.parametrize("name", ["busy", "reset in the middle", "stalled in the middle", "stalled before an answer"])
def test_a_fault_that_stays_is_one_named_error_in_bounded_time(proxy, impatient, stored, tmp_path, name):
    proxy.inject("shard-000002.tar", **FAULTS[name], times=FOR_EVER)
    with (
        within(2 * (ATTEMPTS * TIMEOUT_S + 1) + 3),
        pytest.raises(StorageError, match=rf"shard-000002\.tar.*{ATTEMPTS} tries"),
    ):
        epoch_of(stored, Cache(tmp_path))
    assert loader_threads() == []
    assert not list(tmp_path.glob("*.part"))


def test_a_server_that_went_away_for_ever_is_named_and_is_not_called_mistyped(proxy, stored, tmp_path):
    batches = batches_of(stored, Cache(tmp_path))
    proxy.go_away()
    with within(5), pytest.raises(StorageError, match=rf"{stored}/shard-.*{proxy.endpoint}"):
        list(batches)
    assert loader_threads() == []


def test_a_body_that_trickles_is_given_up(proxy, stored, monkeypatch):
    monkeypatch.setattr(requests, "SLOWEST_S", 0.5)
    monkeypatch.setattr(requests, "CHUNK_BYTES", 100)
    proxy.inject("shard-000000.tar", byte_s=0.002)
    with within(3), pytest.raises(StorageError, match=r"shard-000000\.tar: the store sent \d+ of \d+ bytes in 0.5 s"):
        storage.read_bytes(f"{stored}/shard-000000.tar")


def test_a_store_that_does_not_answer_ends_a_command_with_one_message_and_code_3(proxy, stored, monkeypatch):
    proxy.inject("shard-000002.tar", times=FOR_EVER, **FAULTS["busy"])
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    for run, jobs in ((run_here, "1"), (run_module, "2")):  # errors cross from process to process, too
        done = run("mtl_dist.shards", "verify", stored, "--jobs", jobs)
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith(
            f"error: {stored}/shard-000002.tar: An error occurred (SlowDown)"
        )


@pytest.mark.parametrize("try_s", [0.01, 10, 29, 40, 110])
def test_a_request_ends_within_five_minutes_whatever_each_try_takes(monkeypatch, try_s):
    """By the clock of the defaults: 10 s to connect to each of up to 8 addresses, 30 s for the first byte."""
    clock = [0.0]
    monkeypatch.setattr(requests, "_clients", {})
    monkeypatch.setattr(requests.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(requests.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)
    tries = []

    def stall(client, **where):
        tries.append(clock[0])
        clock[0] += try_s
        raise requests.boto.ReadTimeoutError(endpoint_url="x", error="stalled")

    with pytest.raises(StorageError, match=r"s3://b/k.* tries in \d+ s"):
        requests._request("s3://b/k", stall)
    assert 100 < tries[-1] <= 180, "a server that restarts is waited for"
    assert clock[0] < 300


def test_where_nothing_has_ever_listened_six_tries_are_enough(monkeypatch):
    """The endpoint is mistyped, probably."""
    monkeypatch.setattr(requests, "_clients", {})
    monkeypatch.setattr(requests, "_answered", set())
    monkeypatch.setattr(requests.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)
    tries = []

    def refuse(client, **where):
        tries.append(client.meta.endpoint_url)
        raise requests.boto.EndpointConnectionError(endpoint_url="x", error="refused")

    with pytest.raises(InputError, match="no S3 server answers"):
        requests._request("s3://b/k", refuse)
    assert len(tries) == 6
    requests._answered.add(tries[0])
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "9")
    with pytest.raises(StorageError, match="9 tries"):
        requests._request("s3://b/k", refuse)


def test_those_who_wait_for_one_download_share_its_failure(proxy, impatient, stored, tmp_path):
    proxy.inject("shard-000002.tar", times=FOR_EVER, **FAULTS["stalled in the middle"])
    index, errors = read_index(stored), []

    def open_shard():
        entry = index.shards[2]
        try:
            Cache(tmp_path).open(f"{stored}/{entry.name}.tar", sha256=entry.tar_sha256, size=entry.tar_bytes)
        except StorageError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=open_shard) for _ in range(6)]
    with within(ATTEMPTS * TIMEOUT_S + 2):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(errors) == 6
    assert len(set(errors)) == 1
    assert len(proxy.gets("shard-000002.tar")) == ATTEMPTS
    proxy.faults.clear()
    open_shard()  # later: asked for anew
    assert len(errors) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_is_closed_at_once_while_a_download_stalls(proxy, stored, undisturbed, tmp_path, monkeypatch, workers):
    """The threads that wait end by themselves, and what they were fetching is fetched anew by the next loader."""
    monkeypatch.setenv("MTL_S3_TIMEOUT_S", "6")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    far = shard_needed_late(stored)
    proxy.inject(far, times=1, **FAULTS["stalled in the middle"])
    batches = batches_of(stored, Cache(tmp_path), workers=workers)
    next(batches)
    while not proxy.gets(far):
        time.sleep(0.01)
    with within(3.5):
        batches.close()
    assert [thread for thread in threading.enumerate() if thread.name.startswith("fetch")], "it still waits"
    assert loader_threads() == []
    assert epoch_of(stored, Cache(tmp_path)) == undisturbed


def shard_needed_late(uri: str) -> str:
    """A shard that is fetched ahead, and that no batch needs which is loaded before the first is taken."""
    index = read_index(uri)
    plan = order_of(index.shard_rows).plan(epoch=1, rank=0, num_ranks=1)
    early = np.searchsorted(np.cumsum(index.shard_rows), plan.samples_of(0, 3), side="right")
    (late,) = set(range(len(index.shards))) - set(early.ravel().tolist())
    return f"{index.shards[late].name}.tar"


# ---------------------------------------------------------------------------------------------------------- credentials


@pytest.fixture
def tokens(proxy, s3, tmp_path, monkeypatch) -> Path:
    """Credentials as a role gives them: a program of the user's profile prints them, and they run out in an hour."""
    path = tmp_path / "credentials.json"
    (tmp_path / "config").write_text(f"[profile role]\ncredential_process = cat {path}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "role")
    write_token(path, s3, "first")
    return path


def write_token(path: Path, s3, token: str) -> None:
    about = {
        "Version": 1,
        "AccessKeyId": s3.access_key,
        "SecretAccessKey": s3.secret_key,
        "SessionToken": token,
        "Expiration": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600)),
    }
    path.write_text(json.dumps(about))


def test_credentials_refused_before_their_time_are_renewed(proxy, s3, stored, undisturbed, tokens, tmp_path):
    batches = batches_of(stored, Cache(tmp_path / "cache"))
    proxy.refused_tokens.add("first")
    write_token(tokens, s3, "second")
    assert [batch.rows.tolist() for batch in batches] == [rows for rows, *_ in undisturbed]
    found = {request.token for request in proxy.requests}
    assert found == {"first", "second"}
    assert storage.exists(f"{stored}/index.json")
    proxy.refused_tokens.add("second")
    write_token(tokens, s3, "third")
    assert storage.exists(f"{stored}/index.json"), "HEAD has no body to say why"


def test_credentials_that_stay_refused_are_the_users_to_mend_at_once(proxy, stored, tokens, tmp_path):
    batches = batches_of(stored, Cache(tmp_path / "cache"))
    proxy.refused_tokens.add("first")
    with within(10), pytest.raises(InputError, match=r"shard-.*refuses these credentials.*ExpiredToken"):
        list(batches)
    assert loader_threads() == []


@pytest.mark.parametrize("program", ["false", "echo no JSON"])
def test_a_program_that_gives_no_credentials_is_named(proxy, stored, tokens, program):
    config = tokens.parent / "config"
    config.write_text(f"[profile role]\ncredential_process = {program}\n")
    with pytest.raises(InputError, match=r"no S3 (credentials|client)"):
        storage.read_bytes(f"{stored}/index.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL", "127.0.0.1:9000"),
        ("AWS_PROFILE", "nobody"),
        ("AWS_MAX_ATTEMPTS", "many"),
        ("MTL_S3_TIMEOUT_S", "-1"),
    ],
)
def test_a_wrong_variable_is_the_users_to_mend(proxy, stored, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{stored}|{name}"):
        storage.read_bytes(f"{stored}/index.json")


# ------------------------------------------------------------------------------------------------ replaced during a run


@pytest.mark.parametrize("change", [lambda data: data[::-1], lambda data: data + b"x", lambda data: data[:-9]])
def test_a_shard_replaced_during_the_run_is_named_and_nothing_of_it_is_believed(proxy, stored, tmp_path, change):
    batches = batches_of(stored, Cache(tmp_path))
    proxy.inject("shard-000004.tar", times=FOR_EVER, change=change)
    with pytest.raises(InputError, match=r"shard-000004\.tar is not what the index says.*shards verify"):
        list(batches)
    index = read_index(stored)
    assert not Cache(tmp_path).path(f"{stored}/shard-000004.tar", index.shards[4].tar_sha256).exists()
    assert loader_threads() == []


@pytest.mark.parametrize("size", [500_000, 700_000, 250_000])
def test_an_object_replaced_while_its_parts_are_read_is_read_anew(proxy, s3, tmp_path, monkeypatch, size):
    monkeypatch.setattr(requests, "PART_BYTES", 100_000)
    monkeypatch.setattr(requests, "PARTS_AT_ONCE", 1)
    old, new = np.random.default_rng(0).bytes(500_000), np.random.default_rng(1).bytes(size)
    s3.client().put_object(Bucket="mtl", Key="faults/replaced", Body=old)

    def replace(data: bytes) -> bytes:
        s3.client().put_object(Bucket="mtl", Key="faults/replaced", Body=new)
        return data

    proxy.inject("replaced", after=2, change=replace)
    storage.download("s3://mtl/faults/replaced", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == new


def test_a_mixture_of_two_objects_is_found_by_its_checksum(proxy, stored, tmp_path, monkeypatch):
    """A server whose entity tags do not change with the bytes."""
    monkeypatch.setattr(requests, "PART_BYTES", 3000)
    proxy.inject("shard-000001.tar", after=1, times=FOR_EVER, change=lambda data: data[::-1])
    with pytest.raises(InputError, match=r"shard-000001\.tar is not what the index says"):
        list(batches_of(stored, Cache(tmp_path)))


# ----------------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path):
    """A directory with room for 350 kB and 60 files."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=350k,nr_inodes=60", "none", path], capture_output=True
    ).returncode:
        pytest.skip("this user may not mount a file system")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def put(name: str, content: bytes) -> dict:
    """Store an object; return what the cache needs to open it."""
    storage.write_bytes(name, content)
    return {"uri": name, "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def test_a_disk_that_fills_up_costs_what_is_not_in_use_and_then_is_named(s3, small_disk):
    objects = [put(f"s3://mtl/full/{number}", bytes([number]) * 100_000) for number in range(6)]
    cache = Cache(small_disk)  # its bound, 50 GiB, is never reached
    for about in objects:
        with cache.open(**about) as file:
            assert hashlib.sha256(file.read()).hexdigest() == about["sha256"]
    held = [cache.open(**about) for about in objects[:3]]
    with pytest.raises(InputError, match=r"disk cannot be used: No space.*full/3 needs 100000 bytes.*data\.cache_dir"):
        cache.open(**objects[3])
    assert not list(small_disk.glob("*.part"))
    held.pop().close()
    cache.open(**objects[3]).close()
    with pytest.raises(InputError, match="full/large needs 500000 bytes"):
        cache.open(**put("s3://mtl/full/large", bytes(500_000)))
    for file in held:
        assert len(file.read()) == 100_000


def test_a_disk_without_room_for_a_lock_is_named(s3, small_disk):
    (small_disk / "cache").mkdir()
    about = put("s3://mtl/full/lock", b"x")
    with contextlib.suppress(OSError):
        for number in range(10**6):  # each an inode
            (small_disk / str(number)).touch()
    with pytest.raises(InputError, match=r"cache cannot be used: No space"):
        Cache(small_disk / "cache").open(**about)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_full_disk_is_tried_once_more_after_eviction(s3, tmp_path, monkeypatch, failures):
    old, new = put("s3://mtl/full/old", b"old"), put("s3://mtl/full/new", b"new")
    cache, download, left = Cache(tmp_path), storage.download, [errno.ENOSPC] * failures
    cache.open(**old).close()

    def fill(uri: str, path: Path) -> None:
        if left:
            raise OSError(left.pop(), "No space left on device")
        download(uri, path)

    monkeypatch.setattr(storage, "download", fill)
    with contextlib.nullcontext() if failures == 1 else pytest.raises(InputError, match="No space left"):
        cache.open(**new).close()
    assert not cache.path("s3://mtl/full/old", old["sha256"]).exists()


SHARE = """
import hashlib, sys
from pathlib import Path
from mtl_dist.data.cache import Cache
directory, bound, *objects = sys.argv[1:]
cache = Cache(Path(directory), max_bytes=int(bound))
for name in objects * 4:
    content = name.encode() * 5000
    with cache.open(f"s3://mtl/share/{name}", sha256=hashlib.sha256(content).hexdigest(), size=len(content)) as file:
        assert file.read() == content
print("whole")
"""


def test_jobs_with_bounds_of_their_own_share_a_directory(s3, tmp_path):
    names = [f"{number:04d}" for number in range(10)]
    for name in names:
        storage.write_bytes(f"s3://mtl/share/{name}", name.encode() * 5000)
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", SHARE, str(tmp_path), bound, *names[begin:], *names[:begin]],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
        )
        for bound, begin in (("1", 0), ("50000", 3), ("1000000", 6))
    ]
    assert [job.communicate(timeout=60)[0] for job in jobs] == ["whole\n"] * 3
    assert not list(tmp_path.glob("*.lock"))


# ------------------------------------------------------------------------------------------------- locks of the cache


@pytest.mark.parametrize("failures", [0, 5])
def test_an_object_is_downloaded_by_one_at_a_time_though_locks_are_removed(tmp_path, monkeypatch, failures):
    """Locks, copies and their removal race: 6 threads, a cache that holds nothing which is not open."""
    contents = {f"s3://b/{number}": bytes([number]) * 1000 for number in range(3)}
    cache, active, downloads, wrong = Cache(tmp_path, max_bytes=1), set(), [], []

    def download(uri: str, path: Path) -> None:
        if uri in active:
            wrong.append(uri)
        active.add(uri)
        downloads.append(uri)
        is_failure = failures and len(downloads) % failures == 0
        path.write_bytes(contents[uri][:500])
        time.sleep(0.0005)
        path.write_bytes(contents[uri])
        active.discard(uri)
        if is_failure:
            raise StorageError(f"{uri} is away")

    def use(number: int) -> None:
        for turn in range(50):
            uri = f"s3://b/{number * turn % 3}"
            sha256 = hashlib.sha256(contents[uri]).hexdigest()
            if turn % 2:
                cache.forget(uri, sha256)
            with contextlib.suppress(StorageError), cache.open(uri, sha256=sha256, size=1000) as file:
                if file.read() != contents[uri]:
                    wrong.append(uri)

    monkeypatch.setattr(storage, "download", download)
    threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(downloads) > 50
    assert {path.suffix for path in tmp_path.iterdir()} <= {""}


def test_an_epoch_leaves_no_locks_and_removes_those_of_killed_processes(stored, undisturbed, tmp_path):
    for name in ("a" * 40, "b" * 40):
        (tmp_path / f"{name}.lock").touch()
    (tmp_path / ("b" * 40 + ".part")).mkdir()
    (tmp_path / ("b" * 40 + ".part") / "object").write_bytes(b"half")
    with (tmp_path / ("c" * 40 + ".lock")).open("w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        assert epoch_of(stored, Cache(tmp_path)) == undisturbed
    assert [path.name[0] for path in tmp_path.iterdir() if path.suffix] == ["c"]


def test_a_failed_download_leaves_no_lock(proxy, stored, tmp_path):
    proxy.inject("shard-000002.tar", times=FOR_EVER, **FAULTS["busy"])
    with pytest.raises(StorageError, match=r"shard-000002\.tar"):
        epoch_of(stored, Cache(tmp_path))
    assert {path.suffix for path in tmp_path.iterdir()} == {""}


# ------------------------------------------------------------------------------------------------- killed while writing

WRITE = """
import sys, time
from pathlib import Path
from mtl_dist import storage
with storage.atomic_path(Path(sys.argv[1])) as part:
    part.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_leaves_is_removed_and_what_is_being_written_stays(tmp_path):
    path = tmp_path / "object"
    dead, alive = (
        subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, cwd=REPO) for _ in range(2)
    )
    for process in (dead, alive):
        assert process.stdout.readline() == b"writing\n"
    elsewhere, long_ago = tmp_path / ".part-another-host-abc", tmp_path / ".part-another-host-def"
    longer_name = tmp_path / f".part-{socket.gethostname()}-2-abc"  # of the host "this-one-2"
    for other in (elsewhere, long_ago, longer_name):
        other.write_bytes(b"half")
    os.utime(long_ago, (0, 0))
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    try:
        assert len(list(tmp_path.iterdir())) == 5
        storage.write_bytes(str(path), b"whole")
        assert longer_name.exists()
        longer_name.unlink()
        left = {other for other in tmp_path.iterdir() if other.name.startswith(f".part-{socket.gethostname()}-")}
        assert len(left) == 1
        with left.pop().open("rb") as part, pytest.raises(BlockingIOError):
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert elsewhere.exists()
        assert not long_ago.exists()
    finally:
        alive.kill()
        alive.wait()


SCRATCH = """
import sys, time
from mtl_dist import storage
with storage.scratch_directory("test") as scratch:
    (scratch / "file").write_bytes(b"half")
    print(scratch, flush=True)
    time.sleep(60)
"""


def test_the_scratch_of_a_killed_process_is_removed_and_that_of_a_living_one_stays(tmp_path):
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    options = {"stdout": subprocess.PIPE, "cwd": REPO, "env": env, "text": True}
    dead, alive = (subprocess.Popen([sys.executable, "-c", SCRATCH], **options) for _ in range(2))
    places = [Path(process.stdout.readline().strip()) for process in (dead, alive)]
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    try:
        third = subprocess.Popen([sys.executable, "-c", SCRATCH], **options)
        places.append(Path(third.stdout.readline().strip()))
        assert [place.exists() for place in places] == [False, True, True]
        third.kill()
        third.wait()
    finally:
        alive.kill()
        alive.wait()


def test_the_scratch_of_another_host_stays_for_a_day(tmp_path, monkeypatch):
    """Of a shared place whose locks are seen on their own host alone: that nobody holds it says nothing."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    here = socket.gethostname()
    hosts = {"here": here, "other": "another-host", "longer": f"{here}-2", "old": "old-host"}
    places = {name: tmp_path / f"{storage.SCRATCH_PREFIX}{host}-save-abcd_123" for name, host in hosts.items()}
    places["earlier version"] = tmp_path / f"{storage.SCRATCH_PREFIX}save-abcd_123"
    for place in places.values():
        place.mkdir()
        (place / "object").write_bytes(b"half")
    os.utime(places["old"], (0, 0))
    with storage.scratch_directory("test") as scratch:
        assert {name for name, place in places.items() if place.exists()} == {"other", "longer", "earlier version"}
        assert scratch.name.startswith(f"{storage.SCRATCH_PREFIX}{here}-test-")


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_a_file_has_the_permissions_that_the_users_umask_leaves(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        storage.write_bytes(str(tmp_path / "written"), b"x")
        storage.upload(tmp_path / "written", str(tmp_path / "uploaded"))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


def test_a_scratch_directory_that_another_process_takes_for_abandoned_is_made_again(tmp_path, monkeypatch):
    """Between its making and its lock: 32 workers that start together clean up while they begin."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make, made = tempfile.mkdtemp, []

    def make_and_lose(*args, **options) -> str:
        made.append(make(*args, **options))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose)
    with storage.scratch_directory("test") as scratch:
        assert str(scratch) == made[1]
        assert scratch.is_dir()
