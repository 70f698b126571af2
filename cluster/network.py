"""The hosts of a local cluster as network namespaces: a bridge, and for each host a namespace with a cable to it.

    mtl-ID      the bridge; this machine has the address 10.x.y.1 on it
    mtl-ID-N    the namespace of host N, and the bridge's end of its cable
    e0          the host's end, 10.x.y.(2 + N)

A host sees its own processes only (and a Ray driver on it thus no raylet but its own), has its own name, and finds the
others by theirs. It runs as long as its process 1; files are this machine's, but for /etc/hosts.

What a cluster has made is found by the id in the names, as its processes are by the id in their environment: there is
no list that could be lost. Needs root and the commands of iproute2 and util-linux.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from cluster.processes import ID_VARIABLE, ClusterError, find_processes, is_init, read_command

COMMANDS = {"ip": "iproute2", "nsenter": "util-linux", "unshare": "util-linux", "mount": "mount"}
POOLS = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")

# Run in a host to be, which has its own name and mounts: give it the name $0, and the names of all hosts in $1.
NAMES = 'echo "$0" > /proc/sys/kernel/hostname && mount --bind "$1" /etc/hosts && shift && exec "$@"'
INIT = "trap exit TERM; while :; do sleep 1000000 & wait; done"  # and reaps what its host's processes leave behind


class NetworkError(Exception):
    """This process cannot make or change network namespaces; the message says why."""


def create_network(id: str, hosts: int, hosts_file: Path) -> str:
    """Make the bridge and the namespaces, write the hosts' names; return the subnet ("10.x.y").

    Raises NetworkError, after having removed what was made, where this process may not or cannot.
    """
    for command, package in COMMANDS.items():
        if shutil.which(command) is None:
            raise NetworkError(f"no `{command}` command (package {package})")
    try:
        subnet = choose_subnet(id, read_networks(id))
        run_ip(id, *plan_network(id, hosts, subnet))
        for host in range(hosts):
            # ip changes the namespace only for the whole batch
            lines = ("link set lo up", f"addr add {subnet}.{2 + host}/24 dev e0", "link set e0 up")
            run_ip(id, *lines, namespace=host_name(id, host))
        names = [f"{subnet}.{2 + host} host-{host}\n" for host in range(hosts)]
        hosts_file.write_text("".join(["127.0.0.1 localhost\n", *names]))
        run_command(id, boot_command(id, 0, hosts_file, init="true"))
        return subnet
    except NetworkError:
        remove_network(id)
        raise


def plan_network(id: str, hosts: int, subnet: str) -> list[str]:
    lines = [f"link add {bridge_name(id)} type bridge", f"addr add {subnet}.1/24 dev {bridge_name(id)}"]
    for name in (host_name(id, host) for host in range(hosts)):
        lines += [f"netns add {name}", f"link add {name} type veth peer name e0 netns {name}"]
        lines += [f"link set {name} master {bridge_name(id)} up"]
    return [*lines, f"link set {bridge_name(id)} up"]


def choose_subnet(id: str, taken: Iterable[ipaddress.IPv4Network]) -> str:
    """Return the first free private /24, beginning at one that follows from the id."""
    taken = list(taken)
    for pool in map(ipaddress.IPv4Network, POOLS):
        count = 2 ** (24 - pool.prefixlen)
        for step in range(count):
            first = int(pool.network_address) + ((int(id, 16) + step) % count) * 256
            subnet = ipaddress.IPv4Network((first, 24))
            if not any(subnet.overlaps(other) for other in taken):
                return str(subnet.network_address).rsplit(".", 1)[0]
    raise NetworkError("every private subnet overlaps an address or a route of this machine")


def read_networks(id: str) -> list[ipaddress.IPv4Network]:
    """List the networks of all addresses and routes of this machine, other than its default routes."""
    written = []
    for interface in json.loads(run_command(id, ["ip", "-4", "-j", "addr", "show"])):
        written += [f"{entry['local']}/{entry['prefixlen']}" for entry in interface.get("addr_info", ())]
    routes = json.loads(run_command(id, ["ip", "-4", "-j", "route", "show", "table", "all"]))
    written += [route["dst"] for route in routes if route["dst"] != "default"]
    networks = [ipaddress.IPv4Network(network, strict=False) for network in written]
    return [network for network in networks if network.prefixlen > 1]  # a VPN's default route is 0.0.0.0/1, 128.0.0.0/1


def remove_network(id: str) -> None:
    """Remove the namespaces, cables and the bridge of a cluster, also half of them; raise ClusterError if some stay."""
    if not find_network(id):
        return
    links = [f"link del {name}" for name in find_links(id)]
    namespaces = [f"netns del {name}" for name in find_namespaces(id)]
    errors = ""
    try:
        run_ip(id, *links, *namespaces, force=True)  # a bridge's end takes the host's end along
    except NetworkError as error:
        errors = str(error)
    if left := find_network(id):
        raise ClusterError(f"cannot remove {', '.join(left)}: {errors or 'no reason given'}; run `down` as root")


def find_network(id: str) -> list[str]:
    """List what exists of a cluster's network; each name once, whether namespace, interface or both."""
    return sorted({*find_links(id), *find_namespaces(id)})


def find_links(id: str) -> list[str]:
    return _find("/sys/class/net", id)


def find_namespaces(id: str) -> list[str]:
    return _find("/run/netns", id)


def _find(directory: str, id: str) -> list[str]:
    own = re.compile(rf"{re.escape(bridge_name(id))}(-\d+)?")
    try:
        return sorted(name for name in os.listdir(directory) if own.fullmatch(name))
    except FileNotFoundError:
        return []


def bridge_name(id: str) -> str:
    return f"mtl-{id}"  # the kernel allows 15 characters


def host_name(id: str, host: int) -> str:
    return f"{bridge_name(id)}-{host}"


def boot_command(id: str, host: int, hosts_file: Path, *, init: str = INIT) -> list[str]:
    """Return the command that makes a host of its namespace, and lives as long as the host's process 1."""
    # nsenter, since `ip netns exec` also gives a /sys of its own.
    network = ["nsenter", f"--net=/run/netns/{host_name(id, host)}"]
    slave = ["--propagation", "slave"]  # a namespace that is removed outside is not kept by a mount in here
    names = ["unshare", "--uts", "--mount", *slave]
    names += ["sh", "-c", NAMES, f"host-{host}", str(hosts_file)]
    return [*network, *names, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *slave, "sh", "-c", init]


def enter_command(id: str, host: int) -> list[str]:
    """Return what to put before a command that is to run on a host; its exit code is handed on.

    Raises ClusterError where the host has no process 1.
    """
    init = find_init(id, host)
    if init is None:
        raise ClusterError(f"host {host} is dead: `start {host}` brings it back")
    return ["nsenter", "--target", str(init), "--net", "--uts", "--mount", "--pid", "--wd=."]


def find_init(id: str, host: int) -> int | None:
    """Find process 1 of a host: once it runs INIT, names and /proc are in place."""
    pids = [pid for pid in find_processes(id, host) if is_init(pid) and read_command(pid)[:3] == ["sh", "-c", INIT]]
    return pids[0] if pids else None


def set_link(id: str, host: int, *, up: bool) -> None:
    """Plug a host's cable in or out, at the bridge's end: the host keeps address and routes, its packets vanish."""
    try:
        run_ip(id, f"link set {host_name(id, host)} {'up' if up else 'down'}")
    except NetworkError as error:
        raise ClusterError(str(error)) from None


def is_linked(id: str, host: int) -> bool:
    try:
        return int(Path(f"/sys/class/net/{host_name(id, host)}/flags").read_text(), 16) & 1 == 1  # IFF_UP
    except FileNotFoundError:
        return False


def run_ip(id: str, *lines: str, namespace: str | None = None, force: bool = False) -> None:
    """Run lines of `ip`, one process for all of them."""
    command = ["ip", *(["-n", namespace] if namespace else []), *(["-force"] if force else []), "-batch", "-"]
    run_command(id, command, "\n".join(lines) + "\n")


def run_command(id: str, command: list[str], text: str = "") -> str:
    # The id, so that `down` waits for this process too if it outlives us.
    environment = os.environ | {ID_VARIABLE: id}
    done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.strip()), f"exit code {done.returncode}")
        raise NetworkError(f"`{command[0]}` says: {reason.strip()}")
    return done.stdout
