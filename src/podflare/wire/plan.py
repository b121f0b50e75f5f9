"""What the process engine orders and its zygote carries out: decided in one place, done in another.

Plain data, from the daemon to its own trusted processes; user code never sees or writes it.  Travels as JSON.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Dict, Optional, Tuple

from podflare.wire.uplink import Uplink, uplink_from_dict


@dataclass(frozen=True)
class Tree:
    """A directory of the computer that every machine sees at `target`."""

    source: str
    target: str
    writable: bool
    """True: each machine gets a private overlay on it.  False: read-only bind mount, because the owners of its
    files have no id inside the machine (an ordinary user's daemon over root's files)."""
    map_ids: bool
    """Show root's files as the machine's root (idmapped mount).  Only a root daemon can."""


@dataclass(frozen=True)
class SkeletonEntry:
    """One entry of the read-only layer below every machine's root: exactly one of the last three, or a directory."""

    path: str
    mode: int = 0o755
    text: Optional[str] = None
    copy_of: Optional[str] = None
    link_to: Optional[str] = None


@dataclass(frozen=True)
class IdMap:
    """Ids of a machine's user namespace: inside 0..count-1 are `first`.. as its parent namespace sees them."""

    first: int
    count: int


@dataclass(frozen=True)
class StagePlan:
    """The zygote's own root: all of the computer that machines may ever see, and nothing else."""

    own_user_namespace: bool
    """An ordinary user's zygote first makes itself root of a user namespace."""
    stage_dir: str
    """An empty directory to mount the stage on."""
    machines_dir: str
    ids: IdMap
    trees: Tuple[Tree, ...]
    skeleton: Tuple[SkeletonEntry, ...]
    hide: Tuple[str, ...]
    """Directories inside the machine that are covered by an empty one."""
    devices: Tuple[str, ...]
    preload: Tuple[str, ...]
    """Modules to import before any machine is made; they are imported from the machine's files, without privileges."""
    filters: Tuple[str, ...]
    """Compiled seccomp programs, hexadecimal, which every machine loads in this order."""
    environment: Tuple[Tuple[str, str], ...]
    paths: Tuple[str, ...] = ()
    """What sys.path of every machine has besides the standard library.  Empty: what the interpreter's site
    configuration says."""
    tunnels: bool = False
    """Whether machines can have a way out: the device that makes interfaces is put on the stage."""


@dataclass(frozen=True)
class MachinePlan:
    """One machine."""

    id: str
    """Name of its directory below machines_dir."""
    hostname: str
    rlimits: Tuple[Tuple[int, int], ...]
    """(resource, limit), soft and hard alike, for the agent and all below it."""
    repl_rlimits: Tuple[Tuple[int, int], ...]
    """The same for the REPL and all below it only."""
    shm_bytes: int
    layers: Tuple[str, ...] = ()
    """Directories below machines_dir with what the machine was forked with, topmost first."""
    home: str = "/root"
    uplink: Optional[Uplink] = None
    """None: no network but loopback."""


def stage_to_json(plan: StagePlan) -> bytes:
    return json.dumps(asdict(plan)).encode()


def stage_from_json(data: bytes) -> StagePlan:
    body: Dict[str, Any] = json.loads(data)
    body["ids"] = IdMap(**body["ids"])
    body["trees"] = tuple(Tree(**tree) for tree in body["trees"])
    body["skeleton"] = tuple(SkeletonEntry(**entry) for entry in body["skeleton"])
    body["environment"] = tuple((name, value) for name, value in body["environment"])
    for key in ("hide", "devices", "preload", "filters", "paths"):
        body[key] = tuple(body[key])
    return StagePlan(**body)


def machine_to_dict(plan: MachinePlan) -> Dict[str, Any]:
    return asdict(plan)


def machine_from_dict(body: Dict[str, Any]) -> MachinePlan:
    body = dict(body)
    body["rlimits"] = tuple((resource, limit) for resource, limit in body["rlimits"])
    body["repl_rlimits"] = tuple((resource, limit) for resource, limit in body["repl_rlimits"])
    body["layers"] = tuple(body["layers"])
    if body["uplink"] is not None:
        body["uplink"] = uplink_from_dict(body["uplink"])
    return MachinePlan(**body)
