"""A function of many items, as tasks of a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from mtl_dist.errors import InputError
from mtl_dist.joining import join_cluster, note_idle_gpus

LOOK_EVERY_S = 60.0  # whether tasks that wait have a node to wait for


class TaskFailed(RuntimeError):
    """A task of `map_over_cluster` that failed every time; carries its name and the last reason."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def map_over_cluster(
    function: Callable[[Any], Any],
    items: dict[str, Any],
    *,
    cpus: float,
    gpus: float,
    retries: int,
    autoscaling: bool = False,
    what: str = "prediction",
    unit: str = "member",
) -> Iterator[tuple[str, Any]]:
    """Run `function` of every item as a Ray task of that name; yield (name, result) as they finish.

    A task that raises, or whose worker or node dies, is run again up to `retries` times, where there is room. One that
    keeps failing raises `TaskFailed` here; an `InputError` is raised at once. The other tasks are cancelled then.
    `what` is done and the `unit` of a task, which its flags end with, are for messages.
    """
    import ray
    from ray.exceptions import RayError

    join_cluster("do it on this machine with --local")
    if not gpus:
        note_idle_gpus(what, f"--gpus-per-{unit} 1")
    if not autoscaling and (lack := _lack_of_room(cpus, gpus)):
        raise InputError(
            f"{lack}; ask for fewer (--cpus-per-{unit}, --gpus-per-{unit}), or add nodes (--autoscaling: they come by "
            "themselves)"
        )
    options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": retries, "retry_exceptions": True}
    # A worker that has used one GPU stays on it: Ray starts another for the next task only where it is told here.
    task = ray.remote(max_calls=1)(_answer) if gpus else ray.remote(_answer)
    names = {task.options(name=name, **options).remote(function, item): name for name, item in items.items()}
    try:
        while names:
            done, _ = ray.wait(list(names), num_returns=1, timeout=LOOK_EVERY_S)
            if not done:
                if lack := _lack_of_room(cpus, gpus):  # Ray waits for one without a word, for ever
                    print(f"{lack}: waiting for one; what was finished is kept where this is ended", flush=True)
                continue
            name = names.pop(done[0])
            try:
                answer = ray.get(done[0])
            except RayError as error:
                cause = getattr(error, "cause", None) or error
                raise TaskFailed(name, f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}") from error
            if isinstance(answer, InputError):
                raise answer
            yield name, answer
    finally:
        for left in names:
            ray.cancel(left, force=True)


def ask_every_node(function: Callable[[Any, float], Any], item: Any, *, timeout_s: float) -> Iterator[tuple[str, Any]]:
    """Call `function(item, its GPUs)` on every node of the cluster; yield (address, what it returned).

    Where a task fails, or does not answer within `timeout_s`, the `RayError` stands for its answer. Tasks ask for no
    CPU and no GPU: they run on heads, and beside what is running.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ends_at, tasks = time.monotonic() + timeout_s, {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            tasks[node["NodeManagerAddress"]] = task.remote(item, node["Resources"].get("GPU", 0.0))
    for address, task in tasks.items():
        try:
            yield address, ray.get(task, timeout=max(0.0, ends_at - time.monotonic()))
        except RayError as error:
            yield address, error


def _lack_of_room(cpus: float, gpus: float) -> str:
    """Say that no node could run a task of this size, were it idle; empty where one could."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        return ""
    return f"a task needs {cpus:g} CPU and {gpus:g} GPU, and none of the cluster's {len(nodes)} node(s) has as many"


def _answer(function: Callable[[Any], Any], item: Any) -> Any:
    """Call a function; what no second try mends comes back as a result, which Ray does not retry."""
    try:
        return function(item)
    except InputError as error:
        return error
