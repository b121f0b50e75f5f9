"""The look from outside: is this process confined as planned?  Reads only what the kernel says of it.

A machine is handed out after this check and never without it (design: fail closed).
"""

from __future__ import annotations

from pathlib import Path

from podflare.engines.base import Wall
from podflare.engines.linux.cgroups import Cgroup
from podflare.errors import IsolationIncomplete
from podflare.wire.uplink import INTERFACE

_NAMESPACES: dict[str, Wall] = {
    "user": "user_namespace",
    "pid": "pid_namespace",
    "mnt": "mount_namespace",
    "net": "network_namespace",
    "ipc": "ipc_namespace",
    "uts": "uts_namespace",
    "cgroup": "cgroup_namespace",
}


_KERNELS_OWN = {"tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0"}
"""Which every new network namespace has where the kernel's modules for them are loaded.  They are down and without an
address, and nothing in the machine can change that."""

REPL_CAPABILITIES = 1 << 18 | 1 << 21
"""CAP_SYS_CHROOT and CAP_SYS_ADMIN in the machine's user namespace: what a REPL forks into other machines with."""


def namespaces_of(pid: int) -> dict[str, str]:
    """Identity of each namespace of a process, as `pid:[4026531836]`.  Raises: OSError if it is gone."""
    return {name: str(Path(f"/proc/{pid}/ns/{name}").readlink()) for name in _NAMESPACES}


def check_repl(pid: int, *, namespaces: dict[str, str], filters: int) -> None:
    """Is process `pid` the REPL that a machine with these namespaces waits for, and no more than that?

    Args:
        filters: the number of the machine's agent.
    Raises: IsolationIncomplete; the caller ends the machine.
    """
    problems: list[str] = []
    try:
        status, found = _status(pid), namespaces_of(pid)
    except OSError as exc:
        raise IsolationIncomplete(f"the forked Python process vanished: {exc}") from exc
    if found != namespaces:
        problems.append("it is not in the namespaces made for it")
    for name in ("CapInh", "CapBnd", "CapAmb"):
        if int(status[name], 16):
            problems.append(f"{name} is {status[name]}")
    for name in ("CapPrm", "CapEff"):
        if int(status[name], 16) & ~REPL_CAPABILITIES:
            problems.append(f"{name} is {status[name]}")
    loaded = (status["Seccomp"], int(status.get("Seccomp_filters", "0")))
    if status["NoNewPrivs"] != "1" or loaded != ("2", filters):
        problems.append("its system-call filter is not the expected one")
    if problems:
        raise IsolationIncomplete(f"the forked process is not what was ordered: {'; '.join(problems)}")


def check_confinement(
    pid: int, *, filters: int, root: bool, cgroup: Cgroup | None, uplink: bool = False
) -> tuple[Wall, ...]:
    """The walls around process `pid`, an agent that waits to be let go.

    Args:
        filters: seccomp programs that are to be loaded; the last one, on signals, may be missing.
        root: the daemon is root, so the agent must have another user id.
        cgroup: the control group that must hold it.
        uplink: it is to have the one interface of a way out, besides loopback.
    Raises: IsolationIncomplete with every wall that is missing.
    """
    status = _status(pid)
    missing: list[str] = []
    walls: list[Wall] = []

    def demand(wall: Wall, holds: bool, found: str) -> None:
        (walls.append(wall) if holds else missing.append(f"{wall} ({found})"))

    for name, wall in _NAMESPACES.items():
        ours, theirs = (Path(f"/proc/{who}/ns/{name}").readlink() for who in ("self", pid))
        demand(wall, ours != theirs, f"{name} namespace is the daemon's")
    sets = {key: int(status[key], 16) for key in ("CapInh", "CapEff", "CapBnd", "CapAmb", "CapPrm")}
    may = sets.pop("CapPrm") & ~REPL_CAPABILITIES  # which the agent gives to REPLs, and uses for nothing itself
    demand("dropped_capabilities", not may and not any(sets.values()), str(sets))
    demand("no_new_privileges", status.get("NoNewPrivs") == "1", "NoNewPrivs is off")
    mode, loaded = status.get("Seccomp"), int(status.get("Seccomp_filters", str(filters)))
    demand("seccomp", mode == "2" and loaded in (filters, filters - 1), f"mode {mode}, {loaded} filters")
    if loaded == filters:
        walls.append("signal_filter")
    demand("private_root", _root_is_overlay(pid), "the root directory is not an overlay")
    if root:
        uids = status.get("Uid", "0").split()
        demand("separate_uid", "0" not in uids, f"user ids {uids}")
    interfaces, planned = _interfaces(pid), {"lo", INTERFACE} if uplink else {"lo"}
    if interfaces - _KERNELS_OWN != planned:
        missing.append(f"network (the interfaces are {', '.join(sorted(interfaces))})")
    if cgroup is not None and not cgroup.holds(pid):
        missing.append("control group (the agent is not in it)")
    if missing:
        raise IsolationIncomplete(f"the machine was not confined as planned and is not used: {'; '.join(missing)}")
    return tuple(walls)


def _status(pid: int) -> dict[str, str]:
    rows = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {key: value.strip() for key, _, value in rows}


def _interfaces(pid: int) -> set[str]:
    """proc_pid_net(5): names of the network interfaces that a process sees."""
    rows = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    return {row.partition(":")[0].strip() for row in rows}


def _root_is_overlay(pid: int) -> bool:
    """proc_pid_mountinfo(5): the mount whose mount point is / must be ours."""
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[4] == "/":
            return rest.split()[0] == "overlay"
    return False
