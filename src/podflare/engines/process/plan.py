"""Specification -> plan, pure: every security decision of the process engine that can be made without a kernel.

guest/process carries the plans out.
"""

from __future__ import annotations

from podflare.engines.base import Limits, MachineSpec
from podflare.engines.process.facts import Directory, HostFacts
from podflare.wire.plan import IdMap, MachinePlan, SkeletonEntry, StagePlan, Tree

ROOT_FIRST_ID = 0x7000_0000
"""First id of a root daemon's machines: above those of distributions (100000..) and systemd-nspawn (..0x6fffffff)."""
ROOT_ID_COUNT = 0x1_0000
HOME = "/root"
AGENT_OPEN_FILES = 16384
MAX_OPEN_FILES = 4096
"""Of a process of user code.  Fewer than the agent may have, because the kernel counts the descriptors on their way
through sockets for all processes of a user id together, against the limit of who sends one (unix(7), ETOOMANYREFS)."""
MAX_QUEUED_SIGNALS = 2048
MAX_MESSAGE_QUEUE_BYTES = 200 * 1024
MAX_LOCKED_BYTES = 1024 * 1024
"""Of a sandbox and its forks.  The kernel also counts these for the daemon's user, for all sandboxes together."""
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")

# resource.RLIMIT_* of Linux, which are the same on all its architectures that we run on; a test compares them.
RLIMIT_FSIZE, RLIMIT_DATA, RLIMIT_CORE, RLIMIT_NPROC, RLIMIT_NOFILE = 1, 2, 4, 6, 7
RLIMIT_MEMLOCK, RLIMIT_SIGPENDING, RLIMIT_MSGQUEUE = 8, 11, 12

_DIRECTORIES: tuple[tuple[str, int], ...] = (
    ("/etc", 0o755),
    ("/root", 0o700),
    ("/tmp", 0o1777),
    ("/var", 0o755),
    ("/var/tmp", 0o1777),
    ("/var/log", 0o755),
    ("/var/cache", 0o755),
    ("/run", 0o755),
    ("/home", 0o755),
    ("/opt", 0o755),
    ("/srv", 0o755),
    ("/mnt", 0o755),
    ("/proc", 0o555),
    ("/sys", 0o555),
    ("/dev", 0o755),
)

_TEXTS: tuple[tuple[str, str], ...] = (
    (
        "/etc/passwd",
        "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    ),
    ("/etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    ("/etc/hosts", "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"),
    ("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n"),
    ("/etc/resolv.conf", "# no name server: this sandbox has no network\n"),
    ("/etc/machine-id", ""),
    ("/etc/shells", "/bin/sh\n/bin/bash\n"),
)


def plan_stage(
    facts: HostFacts,
    *,
    stage_dir: str,
    machines_dir: str,
    map_ids: bool,
    filters: tuple[bytes, ...] = (),
    preload: tuple[str, ...] = (),
) -> StagePlan:
    """The stage of the `default` template.

    Args:
        map_ids: show root's files as the machines' root; only with facts.root, and if the kernel can.
    """
    return StagePlan(
        own_user_namespace=not facts.root,
        stage_dir=stage_dir,
        machines_dir=machines_dir,
        ids=IdMap(ROOT_FIRST_ID, ROOT_ID_COUNT) if facts.root else IdMap(0, 1),
        trees=tuple(_tree(directory, facts.root, map_ids) for directory in facts.directories),
        skeleton=_skeleton(facts),
        hide=facts.own_packages,
        devices=DEVICES,
        preload=preload,
        filters=tuple(program.hex() for program in filters),
        environment=environment(facts.python),
        tunnels=facts.tunnels,
    )


def _tree(directory: Directory, root: bool, map_ids: bool) -> Tree:
    writable = map_ids if root else directory.mine
    return Tree(directory.path, directory.path, writable=writable, map_ids=root and map_ids)


def environment(python: str) -> tuple[tuple[str, str], ...]:
    """Environment of everything in a machine: nothing of the daemon's."""
    binaries = python.rpartition("/")[0]
    system = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
    path = system if binaries in system else [binaries, *system]
    return (
        ("HOME", HOME),
        ("LANG", "C.UTF-8"),
        ("LOGNAME", "root"),
        ("MPLBACKEND", "agg"),
        ("PATH", ":".join(path)),
        ("SHELL", "/bin/bash"),
        ("TERM", "dumb"),
        ("USER", "root"),
    )


def _skeleton(facts: HostFacts) -> tuple[SkeletonEntry, ...]:
    entries = [SkeletonEntry(path, mode=mode) for path, mode in _DIRECTORIES]
    known = {path for path, _ in _DIRECTORIES}

    def add_directories(path: str) -> None:
        parts = path.strip("/").split("/")
        for depth in range(1, len(parts) + 1):
            current = "/" + "/".join(parts[:depth])
            if current not in known:
                known.add(current)
                entries.append(SkeletonEntry(current))

    for directory in facts.directories:
        add_directories(directory.path)
    entries += [SkeletonEntry(path, link_to=target) for path, target in facts.links]
    entries += [SkeletonEntry(path, mode=0o644, text=text) for path, text in _TEXTS]
    for path in facts.etc_copies:
        add_directories(path.rpartition("/")[0])
        entries.append(SkeletonEntry(path, mode=0o644, copy_of=path))
    if facts.etc_links:
        add_directories("/etc/alternatives")
    entries += [SkeletonEntry(path, link_to=target) for path, target in facts.etc_links]
    entries.append(SkeletonEntry("/etc/os-release", link_to="../usr/lib/os-release"))
    return tuple(entries)


def plan_machine(
    machine_id: str, spec: MachineSpec, *, cgroup_walls: tuple[str, ...], layers: tuple[str, ...] = ()
) -> MachinePlan:
    """One machine; a forked one has the layers of its parent, topmost first.

    Where no control group holds a limit, the nearest rlimit does (per process, not in sum).
    """
    limits = spec.limits
    rlimits = [
        (RLIMIT_CORE, 0),
        (RLIMIT_NOFILE, AGENT_OPEN_FILES),
        (RLIMIT_FSIZE, limits.disk_bytes),
        (RLIMIT_MEMLOCK, MAX_LOCKED_BYTES),
        (RLIMIT_SIGPENDING, MAX_QUEUED_SIGNALS),
        (RLIMIT_MSGQUEUE, MAX_MESSAGE_QUEUE_BYTES),
    ]
    if "process_limit" not in cgroup_walls:
        rlimits.append((RLIMIT_NPROC, limits.max_processes))  # counted per user namespace: this machine's alone
    return MachinePlan(
        id=machine_id,
        hostname=spec.hostname,
        rlimits=tuple(rlimits),
        repl_rlimits=repl_rlimits(limits, cgroup_walls),
        shm_bytes=limits.memory_bytes // 2,
        layers=layers,
        home=HOME,
        uplink=spec.uplink,
    )


def repl_rlimits(limits: Limits, cgroup_walls: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Limits of REPL, shells and all below them, which the agent does not have."""
    memory = () if "memory_limit" in cgroup_walls else ((RLIMIT_DATA, limits.memory_bytes),)
    return ((RLIMIT_NOFILE, MAX_OPEN_FILES), *memory)
