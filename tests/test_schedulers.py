"""Files of schedulers other than KubeRay: budgets and a queue of Kubernetes, Kubeflow, Slurm and SkyPilot.

The rules of PodDisruptionBudget, Kueue (v1beta2), TrainJob (v1alpha1) and SkyPilot are written out here as far as these
files use them. The Slurm script is run, with stand-ins for Slurm's commands.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPO
from tests.test_cluster_configs import KUBERAY, SECRET_NAME, SECRET_VALUE, StrictLoader, flags, load, quantity
from tests.test_readme import flags_of

BUDGETS, QUEUE = REPO / "cluster/kubernetes/pdb.yaml", REPO / "cluster/kubernetes/kueue.yaml"
TRAINJOB, SKYPILOT = REPO / "cluster/kubeflow/trainjob.yaml", REPO / "cluster/skypilot/train.yaml"
SBATCH = REPO / "cluster/slurm/train.sbatch"
FILES = [BUDGETS, QUEUE, TRAINJOB, SKYPILOT, SBATCH]
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
SUBMITTER = {"cpu": 0.5, "memory": quantity("200Mi")}  # what KubeRay gives the pod that submits a RayJob


def read_all(path: Path) -> list[dict]:
    return list(yaml.load_all(path.read_text(), StrictLoader))


def requests_of(resource: dict) -> dict[str, float]:
    """What all pods of a RayJob, RayCluster or TrainJob ask for at most."""
    spec, total = resource["spec"], {}
    if resource["kind"] == "TrainJob":
        pods = [(spec["trainer"]["numNodes"], spec["trainer"]["resourcesPerNode"]["requests"])]
    else:
        cluster = spec.get("rayClusterSpec", spec)
        groups = [
            (1, cluster["headGroupSpec"]),
            *((group["maxReplicas"], group) for group in cluster["workerGroupSpecs"]),
        ]
        pods = [(count, group["template"]["spec"]["containers"][0]["resources"]["requests"]) for count, group in groups]
        pods += [(1, SUBMITTER)] if resource["kind"] == "RayJob" else []
    for count, requests in pods:
        for name, value in requests.items():
            total[name] = total.get(name, 0.0) + count * quantity(value)
    return total


def ray_pods() -> dict[tuple[str, str], dict[str, str]]:
    """{(file, head or worker): labels} of all pods, with those that KubeRay adds."""
    pods = {}
    for path in KUBERAY:
        resource = load(path)
        if resource["kind"] not in ("RayJob", "RayCluster"):
            continue
        cluster = resource["spec"].get("rayClusterSpec", resource["spec"])
        name = resource["metadata"]["name"] + ("-x7k2p" if resource["kind"] == "RayJob" else "")
        for kind, group in [("head", cluster["headGroupSpec"]), *(("worker", g) for g in cluster["workerGroupSpecs"])]:
            own = group["template"].get("metadata", {}).get("labels", {})
            pods[path.stem, kind] = own | {"ray.io/cluster": name, "ray.io/node-type": kind}
    return pods


# ---- disruption budgets ----


def test_budgets_keep_heads_and_the_workers_that_a_run_needs():
    found = {}
    for budget in read_all(BUDGETS):
        assert (budget["apiVersion"], budget["kind"]) == ("policy/v1", "PodDisruptionBudget")
        spec = budget["spec"]
        # Of pods whose owner has no scale Kubernetes takes a number that stays, no share and no maxUnavailable.
        assert spec.keys() == {"minAvailable", "selector"}
        assert type(spec["minAvailable"]) is int
        wanted = spec["selector"]["matchLabels"].items()
        for pod in [pod for pod, labels in ray_pods().items() if wanted <= labels.items()]:
            found[pod] = spec["minAvailable"]
    train = load(REPO / "cluster/kuberay/rayjob-train.yaml")["spec"]
    least = int(flags(train["entrypoint"])["--ray.num-ranks"][0])
    assert least == train["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"]
    assert found == {("rayjob-train", "head"): 1, ("rayjob-train", "worker"): least, ("raycluster", "head"): 1}


# ---- the queue ----


def test_the_queue_has_flavors_quota_and_a_way_in():
    resources = {resource["kind"]: resource for resource in read_all(QUEUE)}
    assert resources.keys() == {"ResourceFlavor", "ClusterQueue", "LocalQueue"}
    assert {resource["apiVersion"] for resource in resources.values()} == {"kueue.x-k8s.io/v1beta2"}
    (group,) = resources["ClusterQueue"]["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] == resources["ResourceFlavor"]["metadata"]["name"]
    assert [each["name"] for each in flavor["resources"]] == group["coveredResources"]  # in this order, too
    assert resources["ClusterQueue"]["spec"]["namespaceSelector"] == {}  # left out: no namespace may
    assert resources["LocalQueue"]["spec"] == {"clusterQueue": resources["ClusterQueue"]["metadata"]["name"]}
    assert resources["LocalQueue"]["metadata"]["namespace"]


def test_what_can_be_queued_names_the_queue_and_fits_its_quota():
    queue = {resource["kind"]: resource for resource in read_all(QUEUE)}
    (group,) = queue["ClusterQueue"]["spec"]["resourceGroups"]
    quota = {each["name"]: quantity(each["nominalQuota"]) for each in group["flavors"][0]["resources"]}
    for resource in [*map(load, KUBERAY), *read_all(TRAINJOB)]:
        if resource["kind"] == "Secret":
            continue
        cluster = resource["spec"].get("rayClusterSpec", resource["spec"])
        can_wait = not cluster.get("enableInTreeAutoscaling")  # Kueue admits nothing that grows by itself
        name = resource["metadata"].get("labels", {}).get(QUEUE_LABEL)
        assert name == (queue["LocalQueue"]["metadata"]["name"] if can_wait else None), resource["metadata"]["name"]
        if not can_wait:
            continue
        assert resource["spec"].get("shutdownAfterJobFinishes", True)
        runs = 2 if resource["metadata"]["name"] == "mtl-dist-train" and resource["kind"] == "RayJob" else 1
        for what, asked in requests_of(resource).items():
            assert runs * asked <= quota[what], (resource["metadata"]["name"], what)


# ---- Kubeflow ----


def test_the_trainjob_has_what_its_kind_takes():
    (job,) = read_all(TRAINJOB)
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"].keys() == {"runtimeRef", "trainer"}
    trainer = job["spec"]["trainer"]
    assert trainer.keys() <= {"image", "command", "args", "env", "numNodes", "numProcPerNode", "resourcesPerNode"}
    requests, limits = trainer["resourcesPerNode"]["requests"], trainer["resourcesPerNode"]["limits"]
    assert requests["nvidia.com/gpu"] == limits["nvidia.com/gpu"] == str(trainer["numProcPerNode"])
    image = load(REPO / "cluster/kuberay/rayjob-train.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert trainer["image"] == image["template"]["spec"]["containers"][0]["image"]
    (secret,) = [resource for resource in map(load, KUBERAY) if resource["kind"] == "Secret"]
    for variable in trainer["env"]:
        assert ("value" in variable) != bool(SECRET_NAME.search(variable["name"])) or "valueFrom" in variable
        if "valueFrom" in variable:
            source = variable["valueFrom"]["secretKeyRef"]
            assert source == {"name": secret["metadata"]["name"], "key": variable["name"]}
            assert source["key"] in secret["stringData"]
    values = {variable["name"]: variable.get("value") for variable in trainer["env"]}
    assert int(values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < 30  # of Kubernetes for a pod to end in
    assert values["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


# ---- SkyPilot ----


def test_the_skypilot_task_is_on_spot_and_comes_back():
    (task,) = read_all(SKYPILOT)
    assert task.keys() == {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 2}
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in task["run"]
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        used = set(re.findall(r"\$\{?([A-Z_]+)", script))
        assert {name for name in used if not name.startswith("SKYPILOT_")} <= task["envs"].keys()


# ---- all of them ----


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_file_holds_a_secret(path):
    text = path.read_text()
    assert not SECRET_VALUE.search(text)
    for name, value in re.findall(r"(?m)^\s*(?:export )?([A-Z_]+)[:=] *(\S+)", text):
        assert not SECRET_NAME.search(name), (name, value)


def train_command(path: Path) -> list[str]:
    """The words behind `-m mtl_dist.train` in a file."""
    if path == TRAINJOB:
        words = read_all(path)[0]["spec"]["trainer"]["args"]
    else:
        text = read_all(path)[0]["run"] if path == SKYPILOT else path.read_text()
        words = shlex.split(text[text.index("torchrun --nnodes") :].replace("\\\n", " ").partition("\n")[0])
    return words[words.index("mtl_dist.train") + 1 :]


@pytest.mark.parametrize("path", [TRAINJOB, SKYPILOT, SBATCH], ids=lambda path: path.stem)
def test_the_command_has_its_flags(path):
    named = {word.partition("=")[0] for word in train_command(path) if word.startswith("--")}
    assert "--run.name" in named
    for flag in named:
        assert flag in flags_of("mtl_dist.train"), flag


# ---- Slurm ----


def sbatch_options() -> dict[str, str]:
    lines = [line for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH --")]
    options = (line.removeprefix("#SBATCH --").partition("=") for line in lines)
    return {name: value for name, _, value in options}


def test_the_script_is_sound_bash():
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run(
        [checker, str(SBATCH)] if checker else ["bash", "-n", str(SBATCH)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_slurm_puts_the_job_back_and_gives_ranks_time_to_save():
    options, text = sbatch_options(), SBATCH.read_text()
    assert "requeue" in options
    assert options["open-mode"] == "append"  # what the job wrote before stays
    assert options["ntasks-per-node"] == "1"  # torchrun starts a node's ranks
    notice = int(re.fullmatch(r"B:USR1@(\d+)", options["signal"])[1])
    assert int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text)[1]) < notice


# Waits to be told; notes what it was started with and what it was sent, and ends with $ENDS.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$NOTES/words"
trap 'echo TERM >> "$NOTES/sent"; kill "$!"; exit "$ENDS"' TERM
sleep 60 & touch "$NOTES/started"
[ -z "$AT_ONCE" ] || { kill "$!"; exit "$ENDS"; }
wait "$!"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'node-a\\nnode-b\\n'; else echo "$*" >> "$NOTES/asked"; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts the script as Slurm would on the first node, among stand-ins, which note in a directory what they saw."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "cropped", "SLURM_JOB_NODELIST": "node-[a-b]"}
    job |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "8"}
    started = []

    def start(*, ends: int, at_once: bool = False) -> subprocess.Popen:
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        own = job | {"PATH": path, "NOTES": str(tmp_path), "ENDS": str(ends), "AT_ONCE": "1" if at_once else ""}
        started.append(subprocess.Popen(["bash", str(SBATCH), "--preset", "a b"], env=own, stdout=subprocess.PIPE))
        return started[-1]

    yield tmp_path, start
    for process in started:
        process.kill()


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def signal_and_wait(process: subprocess.Popen, notes: Path, number: int) -> int:
    deadline = time.monotonic() + 60
    while not (notes / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)  # its traps are set right after that
    process.send_signal(number)
    return process.wait(60)


def test_a_job_that_is_out_of_time_saves_and_goes_back_into_the_queue(slurm):
    notes, start = slurm
    process = start(ends=1)
    assert signal_and_wait(process, notes, signal.SIGUSR1) != 0
    assert lines_of(notes / "sent") == ["TERM"]
    assert lines_of(notes / "asked") == ["requeue 4242"]
    words = lines_of(notes / "words")
    assert words[words.index("--rdzv-endpoint") + 1].startswith("node-a:")
    assert words[words.index("--nnodes") + 1 : words.index("--nnodes") + 4 : 2] == ["2", "4"]
    assert words[-6:] == ["-m", "mtl_dist.train", "--run.name", "cropped", "--preset", "a b"]


def test_a_job_that_is_cancelled_saves_and_stays_away(slurm):
    notes, start = slurm
    assert signal_and_wait(start(ends=1), notes, signal.SIGTERM) != 0
    assert lines_of(notes / "sent") == ["TERM"]
    assert lines_of(notes / "asked") == []


@pytest.mark.parametrize("ends", [0, 1])
def test_a_job_that_ends_by_itself_is_not_started_again(slurm, ends):
    notes, start = slurm
    assert start(ends=ends, at_once=True).wait(60) == ends
    assert lines_of(notes / "asked") == []
