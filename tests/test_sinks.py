"""Who else is told of a run: every step once, whatever failed, and a server that fails costs the run nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.config import build_config
from mtl_dist.errors import InputError
from mtl_dist.report import attaching
from mtl_dist.report.attaching import PLACE, attach_page, check_attachable
from mtl_dist.report.options import ReportCommand
from mtl_dist.runs.checkpoint import committed
from mtl_dist.runs.lives import Stale
from mtl_dist.runs.weights import open_best
from mtl_dist.training.sinks import mlflow, opening, sending
from mtl_dist.training.sinks.opening import IDENTITY, check_installed, describe_run, open_sinks
from mtl_dist.training.sinks.sending import Sender
from mtl_dist.training.sinks.sink import About, Known, Row
from mtl_dist.training.tracking import Tracker, read_records, rows_until, values_of
from tests.conftest import REPO, assert_one_message, run_here, run_module, within
from tests.test_training import STEPS_PER_EPOCH, train, train_args

ABOUT = About("0123456789abcdef", "run", "s3://bucket/runs/run", {"optim.lr": 0.1, "data.val": "", "loss.va": 1.0})
needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")


class Server:
    """A service that keeps all points that it was ever sent, and fails at the calls of these numbers."""

    def __init__(self, failing: set[int] = frozenset()):
        self.points: list[tuple[str, int]] = []
        self.endings: list[str] = []
        self.files: dict[str, bytes] = {}
        self.failing, self.num_calls, self.lock = failing, 0, threading.Lock()

    def call(self) -> None:
        self.num_calls += 1
        if self.num_calls in self.failing:
            raise ConnectionError("the server is gone")


class Client:
    """A `Service` of a `Server`; a killed process sends no more."""

    name = "server"

    def __init__(self, server: Server):
        self.server, self.is_killed = server, False

    def kill(self) -> None:
        with self.server.lock:
            self.is_killed = True

    @contextlib.contextmanager
    def _call(self):
        with self.server.lock:
            if self.is_killed:
                raise SystemExit
            self.server.call()
            yield

    def begin(self) -> Known:
        with self._call():
            known = Known()
            for name, step in self.server.points:
                known.of[name] = max(known.of.get(name, 0), step)
            return known

    def send(self, rows: list[Row]) -> None:
        with self._call():
            for number, row in enumerate(rows):
                if self.server.num_calls + number in self.server.failing:
                    raise ConnectionError("cut off in the middle")  # what came before stays
                self.server.points += [(name, row.step) for name in row.values]

    def finish(self, ending, files) -> None:
        with self._call():
            self.server.endings.append(ending)
            self.server.files |= files


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(sending, "SEND_EVERY_S", 0.001)
    monkeypatch.setattr(sending, "RETRY_EVERY_S", 0.001)


def values(step: int) -> dict[str, float]:
    return {"loss/total": 1 / step} | ({"score/p": 0.5} if step % 4 == 0 else {})


def history(last: int):
    return lambda: [Row(step, values(step), {}) for step in range(1, last + 1)]


def tell(sender: Sender, first: int, last: int) -> None:
    for step in range(first, last + 1):
        for name, value in values(step).items():
            sender.add(step, {name: value})  # an evaluation comes after its step


STARTS = st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of those that are killed
@settings(max_examples=40, deadline=None)
@given(starts=STARTS, failing=st.sets(st.integers(1, 12)))
def test_every_value_of_every_step_is_there_once_whatever_was_killed_and_whatever_failed(starts, failing):
    """Each start goes on from a checkpoint at or before the last step that was done, and is killed some steps later."""
    sending.SEND_EVERY_S = sending.RETRY_EVERY_S = 0.001
    server, saved, done = Server(failing), 0, 0
    for further, is_sent in starts:
        client = Client(server)
        sender = Sender(client, history(saved))
        done = min(saved + further, 40)
        tell(sender, saved + 1, done)
        if is_sent:
            time.sleep(0.01)
        client.kill()
        saved = (saved + done) // 2
    sender = Sender(Client(server), history(saved))
    tell(sender, saved + 1, 44)
    server.failing = set()
    sender.close("finished", {"scores.json": b"{}"})
    counts = Counter(server.points)
    assert counts == Counter({(name, step): 1 for step in range(1, 45) for name in values(step)})
    for name in ("loss/total", "score/p"):
        steps = [step for known, step in server.points if known == name]
        assert steps == sorted(steps)
    assert server.endings == ["finished"]
    assert server.files == {"scores.json": b"{}"}


def test_a_step_is_sent_whole_also_where_its_scores_come_later():
    server = Server()
    sender = Sender(Client(server))
    sender.add(4, {"loss/total": 1.0})
    time.sleep(0.05)
    assert server.points == [], "more may come of it"
    sender.add(4, {"score/p": 0.5})
    sender.add(5, {"loss/total": 0.5})
    deadline = time.monotonic() + 10
    while len(server.points) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert server.points == [("loss/total", 4), ("score/p", 4)]
    sender.close("stopped", {})
    assert server.points[2:] == [("loss/total", 5)]
    assert server.endings == ["stopped"]


def test_a_service_that_hangs_or_fails_is_one_line_and_costs_the_run_no_time(monkeypatch, capsys):
    monkeypatch.setattr(sending, "PATIENCE_S", dict.fromkeys(sending.PATIENCE_S, 0.2))
    released = threading.Event()

    class Hanging(Client):
        def begin(self) -> Known:
            released.wait()
            raise ConnectionError("never")

    class Failing(Client):
        def begin(self) -> Known:
            raise ConnectionError("http://user:secret@host refused\nmore")

    for client in (Hanging(Server()), Failing(Server())):
        with within(2):
            sender = Sender(client)
            tell(sender, 1, 1000)
            sender.close("finished", {})
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("server does not answer (")
        assert line.endswith("when the same command starts again")
        assert "secret" not in line
    released.set()


def test_what_a_service_cannot_take_for_long_is_left_to_the_next_start(monkeypatch):
    """And memory is bounded: what it has at last has no gap."""
    monkeypatch.setattr(sending, "MAX_WAITING", 10)
    server, is_back = Server(), threading.Event()

    class Away(Client):
        def begin(self) -> Known:
            is_back.wait(10)
            return super().begin()

    sender = Sender(Away(server))
    tell(sender, 1, 100)
    assert len(sender._waiting) == 10
    is_back.set()
    sender.close("stopped", {})
    steps = sorted(step for name, step in server.points if name == "loss/total")
    assert steps == list(range(1, 11))
    sender = Sender(Client(server), history(100))
    sender.close("finished", {})
    assert Counter(server.points) == Counter((name, step) for step in range(1, 101) for name in values(step))


def test_a_process_that_has_a_successor_sends_nothing_more(monkeypatch, capsys):
    """It was frozen: the first thing that it does is to ask."""
    monkeypatch.setattr(sending, "CHECK_EVERY_S", 0.0)
    server, has_successor = Server(), threading.Event()

    def check() -> None:
        if has_successor.is_set():
            raise Stale

    sender = Sender(Client(server), check=check)
    tell(sender, 1, 3)
    deadline = time.monotonic() + 10
    while len(server.points) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    has_successor.set()
    tell(sender, 4, 9)
    with within(2):
        sender.close("finished", {})
    assert server.points == [("loss/total", 1), ("loss/total", 2)]
    assert server.endings == []
    assert "server" not in capsys.readouterr().out


def test_a_run_has_one_id_for_ever_and_a_new_run_of_the_name_another(tmp_path):
    config = build_config({"run": {"storage": str(tmp_path), "name": "run"}})
    first = describe_run(config)
    assert describe_run(config) == first
    (tmp_path / "run" / IDENTITY).write_text("{}")
    with pytest.raises(InputError, match=r"tracked\.json is damaged .*delete it"):
        describe_run(config)
    (tmp_path / "run" / IDENTITY).unlink()
    assert describe_run(config).id != first.id


def test_a_page_is_attached_only_to_a_run_that_was_tracked(monkeypatch, tmp_path):
    """Before anything is predicted or written; the run gets no id by being asked for it."""
    monkeypatch.setattr(opening, "find_spec", lambda package: True)
    for name in ("mlflow", "wandb"):
        done = run_here("mtl_dist.report", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--attach", name)
        assert_one_message(done, f"run {tmp_path}/run was never tracked", "--run.track")
    assert not list(tmp_path.iterdir())


@pytest.mark.whole
def test_a_page_is_attached_only_to_a_run_that_has_ended(monkeypatch, shards, tmp_path):
    """Its service would take the page for its end."""
    train(shards, tmp_path, "run", "--train.epochs", "2", "--train.stop-epoch", "1")
    describe_run(build_config({"run": {"storage": str(tmp_path), "name": "run"}}))  # as if it was tracked
    monkeypatch.setattr(opening, "find_spec", lambda package: True)
    command = ReportCommand((f"{tmp_path}/run",), out="", attach=("mlflow",))
    check_attachable(command)
    weights = open_best(f"{tmp_path}/run")
    config = weights.config.model_copy(update={"train": weights.config.train.model_copy(update={"stop_epoch": None})})
    monkeypatch.setattr(attaching, "open_best", lambda uri: weights._replace(config=config))
    with pytest.raises(InputError, match=rf"run {tmp_path}/run has not ended: step 5 of 10; .*leave out --attach"):
        check_attachable(command)


def test_a_service_that_refuses_a_page_is_one_message_and_says_where_the_page_is(monkeypatch, tmp_path):
    class Refusing:
        def __init__(self, about: About): ...

        def attach(self, history, files) -> bool:
            if files[PLACE] == b"fails":
                raise ConnectionError("refused by https://user:verysecret@host/api")
            return False

    monkeypatch.setitem(opening.SERVICES, "mlflow", Refusing)
    weights = SimpleNamespace(config=build_config({"run": {"name": "run"}}), newest_step=1)
    monkeypatch.setattr(attaching, "open_best", lambda uri: weights)
    for page, reason in (("fails", "ConnectionError: refused by https://host/api"), ("page", "it has no such run")):
        (tmp_path / "page.html").write_text(page)
        command = ReportCommand((f"{tmp_path}/run",), out="", attach=("mlflow",))
        with pytest.raises(InputError, match=rf"{reason}.* it is at {tmp_path}/page.html"):
            attach_page(command, str(tmp_path / "page.html"))


def test_no_password_of_an_address_is_told(tmp_path):
    config = build_config({"run": {"storage": str(tmp_path)}, "data": {"train": "https://user:secret@host/faces"}})
    assert describe_run(config).settings["data.train"] == "https://host/faces"


def test_by_default_only_files_of_tensorboard_are_written(tmp_path):
    config = build_config({"run": {"storage": str(tmp_path), "name": "run"}})
    (board,) = open_sinks(config, resumed_at=0, history=list)
    assert all(name.startswith("tensorboard/") for name in board.files())
    assert not list(tmp_path.iterdir())
    assert open_sinks(build_config({"run": {"track": []}}), resumed_at=0, history=list) == []


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(name, monkeypatch, shards, tmp_path):
    monkeypatch.setattr(opening, "find_spec", lambda package: None)
    for more in ([], ["--dry-run"]):
        done = run_here(*train_args(shards, tmp_path, "run"), "--run.track", "tensorboard", name, *more)
        assert_one_message(done, f"run.track has {name}", f"pip install 'mtl_dist[{name}]'")
    assert not list(tmp_path.iterdir())
    check_installed(["tensorboard"])


def test_a_record_of_every_kind_is_drawn_by_its_values_and_nothing_else():
    step = {"kind": "step", "step": 3, "epoch": 0, "lr": 0.1, "loss": {"va": 1.0, "total": 2.0}}
    more = {
        "weights": {"va": 0.5},
        "gradients": {"norm": {"va": 3.0}, "cosine": {"va au": -0.5}},
        "taught": {"va": 0.2},
    }
    assert values_of(step) == {"lr": 0.1, "loss/va": 1.0, "loss/total": 2.0}
    assert values_of(step | more | {"gradient_norm": 4.0, "rates": {"heads": 0.1, "backbone x0.1": 0.01}}) == {
        "lr": 0.1, "lr/heads": 0.1, "lr/backbone x0.1": 0.01, "loss/va": 1.0, "loss/total": 2.0, "weight/va": 0.5,
        "taught/va": 0.2, "gradient_norm/va": 3.0, "gradient_cosine/va au": -0.5, "gradient_norm/total": 4.0,
    }  # fmt: skip
    pace = {"kind": "pace", "step": 3, "steps": 2, "images_per_s": 9.0, "seconds": {"data": 0.1, "forward": 0.2}}
    assert values_of(pace) == {"time/data": 0.1, "time/forward": 0.2}
    slowest = {"rank": 1, "host": "node", "own_s": 0.3, "median_s": 0.2}
    assert values_of(pace | {"slowest": slowest, "gpu_gib": 5.0}) == {
        "time/data": 0.1, "time/forward": 0.2, "slowest/rank": 1, "slowest/own_s": 0.3, "slowest/median_s": 0.2,
        "memory/gpu_gib": 5.0,
    }  # fmt: skip


def test_sinks_hear_how_a_start_has_ended_and_are_given_its_scores(tmp_path):
    class Heard:
        def __init__(self):
            self.closed = []

        def add(self, step, values) -> None: ...

        def files(self) -> dict:
            return {}

        def close(self, ending, files) -> None:
            self.closed.append((ending, set(files)))

    scores = dict.fromkeys(("p", "va", "expr", "au", "ccc_v", "ccc_a"), 0.5) | {"covers": ["va", "expr", "au"]}
    heard = Heard()
    for resumed_at, is_failing in ((0, False), (0, True), (8, False)):
        tracker = Tracker(
            str(tmp_path),
            resumed_at=resumed_at,
            num_ranks=1,
            is_over=lambda step: step >= 8,
            sinks=[heard],
            kept={"config.yaml": b""},
        )
        try:
            with tracker:
                if is_failing:
                    raise RuntimeError
                if resumed_at:
                    tracker.evaluated(8, 0, scores, scores)
        except RuntimeError:
            pass
    files = {"config.yaml"}
    assert heard.closed == [
        ("stopped", files), ("failed", files), ("finished", files | {"scores.json", "scores.txt"})
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- MLflow


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """A local store of MLflow, whose tables are made once; a test copies it."""
    where = tmp_path_factory.mktemp("store") / "mlflow.db"
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{where}").search_experiments()
    return where.read_bytes()


@pytest.fixture
def client(store, tmp_path, monkeypatch, request):
    """A client of a store in a file, or, of parameter "server", of a real server with that file behind it."""
    (tmp_path / "mlflow.db").write_bytes(store)
    local = f"sqlite:///{tmp_path}/mlflow.db"
    with served(local, tmp_path) if getattr(request, "param", "") == "server" else contextlib.nullcontext(local) as uri:
        yield connect(uri, tmp_path, monkeypatch)


def connect(uri: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)  # where a local store keeps files
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    from mlflow import MlflowClient

    place = None if uri.startswith("http") else str(tmp_path / "artifacts")  # None: the server serves them
    MlflowClient().create_experiment("mtl_dist", artifact_location=place)
    return MlflowClient()


@contextlib.contextmanager
def served(store_uri: str, tmp_path: Path):
    """A real server of MLflow, on a free port."""
    pytest.importorskip("flask")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store_uri, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--artifacts-destination", str(tmp_path / "served")]
    server = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    try:
        wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the server did not start")


def runs_of(client) -> list:
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def histories(client, run) -> dict[str, list[tuple[int, float]]]:
    found = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: [(metric.step, metric.value) for metric in metrics] for name, metrics in found.items()}


def expected_of(run_uri: str) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows_until(run_uri, 10**9):
        for name, value in row.values.items():
            points.setdefault(name, []).append((row.step, value))
    return points


@needs_mlflow
@pytest.mark.whole
def test_mlflow_has_one_run_with_every_value_once_however_often_it_is_found(client, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "faces")  # made where there is none
    for last in (3, 3, 7):
        service = mlflow.MLflow(ABOUT)
        known = service.begin()
        rows = [
            known.lacks(Row(step, values(step) | {"gradient_cosine/va au": -0.5}, {})) for step in range(1, last + 1)
        ]
        service.send([row for row in rows if row.values])
    service.finish("finished", {"scores.txt": b"P 0.5"})
    (run,) = runs_of(client)
    assert client.get_experiment(run.info.experiment_id).name == "faces"
    assert histories(client, run) == {
        "loss/total": [(step, 1 / step) for step in range(1, 8)],
        "score/p": [(4, 0.5)],
        "gradient_cosine/va au": [(step, -0.5) for step in range(1, 8)],
    }
    assert run.data.params == {"optim.lr": "0.1", "data.val": "", "loss.va": "1.0"}
    assert run.info.status == "FINISHED"
    assert Path(client.download_artifacts(run.info.run_id, "scores.txt")).read_text() == "P 0.5"
    again = mlflow.MLflow(ABOUT._replace(settings={"optim.lr": 0.2, "new": 1}))  # a parameter is never another
    again.begin()
    (run,) = runs_of(client)
    assert run.info.status == "RUNNING"
    assert (run.data.params["optim.lr"], run.data.params["new"]) == ("0.1", "1")


@needs_mlflow
@pytest.mark.whole
@pytest.mark.parametrize("client", ["file", "server"], indirect=True)
def test_a_training_that_was_killed_and_continued_is_one_run_of_mlflow_with_every_step_once(
    client, shards, tmp_path, monkeypatch
):
    """kill -9 two steps behind a checkpoint; the steps after it are done again."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "AKIAverysecret")
    monkeypatch.setattr(sending, "SEND_EVERY_S", 0.01)
    more = ["--run.track", "mlflow", "--checkpoint.every-steps", "2", "--loss.gradients-every", "3"]
    args = train_args(shards, tmp_path, "run", *more)
    dying = ["tests.dying", "in a step", "9", "0", str(tmp_path / "marker"), "--", *args[1:]]
    done = run_module(*dying, env={"PYTHONPATH": str(REPO)})
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    begun = committed(str(tmp_path / "run"))[0][-1].step
    assert begun < 9
    train(shards, tmp_path, "run", *more)
    (run,) = runs_of(client)
    found, expected = histories(client, run), expected_of(f"{tmp_path}/run")
    found = {name: points for name, points in found.items() if not name.startswith("speed/")}  # as of the console
    for name in ("loss/total", "loss/va", "lr", "gradient_norm/total", "score/p"):
        assert name in expected
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        if not name.startswith("time/"):
            assert found[name] == points, name  # a run that is continued has the very same numbers
    assert [step for step, _ in found["loss/total"]] == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["train.global_batch"] == "8"
    scores = json.loads(Path(client.download_artifacts(run.info.run_id, "scores.json")).read_text())
    assert scores == [record for record in read_records(f"{tmp_path}/run") if record["kind"] == "eval"][-1]
    assert "P" in Path(client.download_artifacts(run.info.run_id, "scores.txt")).read_text()
    assert not (tmp_path / "run" / "tensorboard").exists(), "it was not asked for"
    dump = "\n".join(sqlite3.connect(tmp_path / "mlflow.db").iterdump())
    assert "verysecret" not in dump
    for page in (b"<p>first", b"<p>second"):
        (tmp_path / "page.html").write_bytes(page)
        attach_page(ReportCommand((f"{tmp_path}/run",), out="", attach=("mlflow",)), str(tmp_path / "page.html"))
    (after,) = runs_of(client)
    assert (after.info.status, after.data.metrics) == (run.info.status, run.data.metrics)
    (there,) = client.list_artifacts(run.info.run_id, "report")
    assert there.path == PLACE
    assert Path(client.download_artifacts(run.info.run_id, PLACE)).read_bytes() == b"<p>second"


@needs_mlflow
@pytest.mark.whole
def test_a_run_that_the_server_does_not_know_gets_no_page_and_is_not_made(client):
    assert not mlflow.MLflow(ABOUT).attach([], {PLACE: b"<p>"})
    assert runs_of(client) == []


@needs_mlflow
@pytest.mark.whole
def test_a_server_that_is_not_there_or_never_answers_costs_one_line(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sending, "PATIENCE_S", dict.fromkeys(sending.PATIENCE_S, 0.5))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections, and says nothing
        for port in (silent.getsockname()[1], 1):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:verysecret@127.0.0.1:{port}")
            with within(5):
                sender = Sender(mlflow.MLflow(ABOUT))
                tell(sender, 1, 5)
                sender.close("finished", {})
            told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mlflow does not answer")]
            assert len(told) == 1
            assert "verysecret" not in told[0]


@needs_mlflow
@pytest.mark.slow
def test_a_real_server_of_mlflow_that_is_killed_meanwhile_has_every_step_once(store, tmp_path, monkeypatch):
    pytest.importorskip("flask")
    (tmp_path / "mlflow.db").write_bytes(store)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")

    def start() -> subprocess.Popen:
        server = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
        wait_for(port)
        return server

    server = start()
    try:
        sender = Sender(mlflow.MLflow(ABOUT))
        tell(sender, 1, 50)
        time.sleep(3)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        tell(sender, 51, 100)
        time.sleep(3)
        server = start()
        time.sleep(3)
        tell(sender, 101, 150)
        sender.close("finished", {"scores.txt": b"P"})
        from mlflow import MlflowClient

        (run,) = runs_of(MlflowClient())
        assert histories(MlflowClient(), run)["loss/total"] == [(step, 1 / step) for step in range(1, 151)]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


# ---------------------------------------------------------------------------------------------------------------- W&B


def read_wandb(path: Path) -> list:
    """The records of a transaction log of W&B: LevelDB's format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, pieces, found = path.read_bytes(), 7, b"", []  # 7: the file's own header
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if kind == 0:
            break
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            found.append(record)
            pieces = b""
    return found


def wandb_history(path: Path) -> dict[str, list[int]]:
    steps: dict[str, list[int]] = {}
    for record in read_wandb(path):
        if record.HasField("history"):
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                steps.setdefault(name, []).append(record.history.step.num)
    return steps


@needs_wandb
@pytest.mark.whole
def test_offline_wandb_has_the_run_from_its_first_step_on_in_what_a_continued_start_writes(
    shards, tmp_path, monkeypatch
):
    """`wandb sync` lets a later directory of a run take the place of an earlier one."""
    monkeypatch.chdir(tmp_path)
    env = {f"WANDB_{kind}": str(tmp_path) for kind in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR", "ARTIFACT_DIR")}
    env |= {"WANDB_MODE": "offline", "PYTHONPATH": str(REPO)}
    more = ["--run.track", "wandb", "--checkpoint.every-steps", "2"]
    args = train_args(shards, tmp_path, "run", *more)
    done = run_module("tests.dying", "in a step", "9", "0", str(tmp_path / "marker"), "--", *args[1:], env=env)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    done = run_module(*args, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len({path.name for path in logs}) == 1, "one run"
    assert len(logs) == 2
    found, expected = wandb_history(logs[-1]), expected_of(f"{tmp_path}/run")
    for name in ("loss/total", "loss/va", "lr", "gradient_norm/total", "score/p"):
        assert found[name] == [step for step, _ in expected[name]], name
    assert found["loss/total"] == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    (tmp_path / "page.html").write_text("<p>page")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    attach_page(ReportCommand((f"{tmp_path}/run",), out="", attach=("wandb",)), str(tmp_path / "page.html"))
    (new,) = set(tmp_path.glob("wandb/offline-run-*/*.wandb")) - set(logs)
    assert new.name == logs[-1].name, "the same run"
    assert wandb_history(new)["loss/total"] == found["loss/total"]
    kept = [record.artifact for record in read_wandb(new) if record.HasField("artifact")]
    kept += [record.request.log_artifact.artifact for record in read_wandb(new) if record.HasField("request")]
    assert [entry.path for artifact in kept for entry in artifact.manifest.contents] == [PLACE]
