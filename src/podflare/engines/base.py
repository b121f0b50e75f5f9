"""What an engine owes the host: machines with a byte channel to a guest, limits, walls, an end.

Knows nothing of cells, HTTP or owners.  Whoever creates a machine owns it and must `aclose` it.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from podflare.wire.api import Diff, TemplateInfo
from podflare.wire.merges import MergeSide
from podflare.wire.uplink import Uplink

Wall = Literal[
    "user_namespace",
    "pid_namespace",
    "mount_namespace",
    "network_namespace",
    "ipc_namespace",
    "uts_namespace",
    "cgroup_namespace",
    "private_root",
    "seccomp",
    "signal_filter",
    "dropped_capabilities",
    "no_new_privileges",
    "separate_uid",
    "memory_limit",
    "process_limit",
    "cpu_limit",
    "disk_limit",
    "hypervisor",
]
"""One barrier or limit between a sandbox and the rest.  docs/security-model.md says what each stops."""


BYTES_PER_FILE = 16 * 1024
"""As in a new ext4: a file system that is shared in proportion of its bytes is shared so in its inodes, too."""

Capability = Literal["fork", "processes cross", "generations", "diff", "merge", "snapshot", "network", "templates"]
"""What engines can do differently.  docs/engines.md is made of what each says of itself (Engine.capabilities)."""


Behaviour = Literal[
    "a full disk",
    "the computer's disk full",
    "system calls",
    "code against its agent",
    "processors",
    "usage",
    "report of a fork",
]
"""What engines do differently though all can do it.  Each says in `behaviour` how; docs/engines.md is made of that."""


@dataclass(frozen=True)
class Limits:
    """What one machine may use.  Applied before any user code runs."""

    memory_bytes: int
    disk_bytes: int
    max_processes: int = 512
    cpu_weight: int = 100
    cpus: float | None = None
    """Processor time it may take in any stretch of time, in processors; None for all that nobody else wants."""

    @property
    def max_files(self) -> int:
        """Files, directories and links that it may have made: one for each BYTES_PER_FILE of disk."""
        return self.disk_bytes // BYTES_PER_FILE


@dataclass(frozen=True)
class MachineSpec:
    """What to start."""

    template: str
    limits: Limits
    hostname: str = "sandbox"
    uplink: Uplink | None = None
    """None: no network but loopback."""


@dataclass(frozen=True)
class WallStatus:
    """Whether this machine (the computer) can put up a wall, and what to do if not."""

    wall: Wall
    available: bool
    detail: str = ""
    """Why not and how to get it; or by which means it is there."""


@dataclass(frozen=True)
class EngineReport:
    """Answer of `Engine.probe`: for `podflare doctor` and the daemon's start."""

    engine: str
    usable: bool
    walls: tuple[WallStatus, ...]
    problem: str = ""
    """With usable False: what is missing and what to do, one line."""
    no_uplink: str = ""
    """Why machines can have no way out, and what to do, one line; empty if they can."""
    notes: tuple[str, ...] = ()
    """What else to know of how it will work here, one line each: which means were found, which is taken, and why."""


@dataclass(frozen=True)
class Usage:
    """What a machine uses now."""

    memory_bytes: int = 0
    processes: int = 0
    oom_kills: int = 0
    """How often the kernel ended a process of this machine for memory, since its start."""
    private_memory_bytes: int = 0
    """In pages that no process of another machine has; only measured in detail, as are the following."""
    changed_files: int = 0
    """Files, links and deleted names of its own since it was made or forked; MAX_COUNTED_FILES means: or more."""
    disk_bytes: int = 0
    """What those take."""


MAX_COUNTED_FILES = 100_000
"""Where `Usage` stops counting."""


@dataclass(frozen=True)
class Death:
    """Why a machine is gone."""

    reason: str
    """One line for the user."""
    out_of_memory: bool = False
    out_of_disk: bool = False


@dataclass(frozen=True)
class Snapshot:
    """What is told of a machine that is kept on disk."""

    name: str
    spec: MachineSpec
    """Of the machine; what is restored has the same."""
    created_at_ms: int
    size_bytes: int
    """On disk."""
    note: Mapping[str, Any]
    """What Machine.snapshot was given to keep with it."""


@dataclass(frozen=True)
class FileConflict:
    """A path that both machines changed since they were one, and not alike."""

    path: str
    why: str
    ours: MergeSide | None
    """None: nothing is there."""
    theirs: MergeSide | None
    version: str
    """Of what both sides have: another one, another conflict."""
    paths: tuple[str, ...]
    """All that change with it if theirs is taken: of a directory what is in it, too."""
    paths_if_ours: tuple[str, ...] = ()
    """Likewise if ours is: a text of which only some lines are in conflict changes in any case."""


@dataclass(frozen=True)
class FilesPlan:
    """What a merge of files would do."""

    merged: tuple[str, ...]
    """Paths that change, conflicts apart; sorted."""
    conflicts: tuple[FileConflict, ...]
    skipped: tuple[tuple[str, str], ...]
    """(path, kind) of what only its owner can have: sockets, devices."""


class FileMerge(Protocol):
    """A merge of one machine's files into another's under way.  Owned by whoever began it, who closes it.

    Nothing changes before `apply`, and what that did is undone by `aclose` unless `keep` came before.
    """

    plan: FilesPlan

    async def apply(self, decisions: Mapping[str, str], *, timeout_s: float) -> None:
        """Change the files.  Each appears whole, under its name, at one moment; open ones keep their old content.

        Args: decisions: of each conflict "ours" or "theirs", by path.
        Raises: Conflict if running code changed one of them meanwhile; TooLarge if the disk limit does not allow it;
            DeadlineExceeded, MachineFailed.  Then nothing has changed, or the message says what could not be undone.
        """

    async def keep(self) -> None:
        """What was applied stays; what the other machine had then is the base of the next merge of the two."""

    async def aclose(self) -> None:
        """Undo what was not kept and release everything.  Idempotent; shielded from cancellation inside."""


@dataclass(frozen=True)
class UplinkEnds:
    """Descriptors, non-blocking, that were the machine's before any user code ran in it.

    Whoever wants to keep them longer than the machine takes copies of them.
    """

    packets: int
    """Each read is an IP packet that the machine sends, each write one that it receives."""
    listener: int
    """Listening TCP socket in the machine's network namespace, on the machine's address and a port of its own."""
    frames: int | None = None
    """Of a machine with a kernel of its own: each read is an Ethernet frame that its interface sends, each write one
    that it receives.  A SOCK_SEQPACKET socket; or an AF_PACKET one, at which frames are lost that nobody reads.  Then
    `packets` leads to a namespace with nothing but the listener in it."""


class Machine(Protocol):
    """One isolated unit.  Owned by whoever created it; nothing of it is left once `aclose` returned."""

    id: str
    spec: MachineSpec
    walls: tuple[Wall, ...]
    """The walls checked to be in force, sorted."""
    fork_report: dict[str, Any]
    """Of a forked machine: what could not cross from its parent (threads, processes, sockets, pipes, terminals)."""
    channel: socket.socket
    """Connected, non-blocking stream to the guest agent.  Closed by `aclose`.

    `fork` and `snapshot` may put another one in its place, also if they fail, with Ready unread; what was under way in
    the former one is lost then, and nobody answers there any more.
    """

    @property
    def uplink(self) -> UplinkEnds | None:
        """With spec.uplink: the ends of the machine's way out, for who serves it; closed by `aclose`.

        Until somebody reads from them, what the machine sends goes nowhere.
        """

    async def set_limits(self, limits: Limits) -> None:
        """Replace the limits of the running machine.

        Called by the host when a pooled machine is handed out, before user code ran.
        Raises: MachineFailed if they could not be applied (the caller closes the machine).
        """

    async def usage(self, *, detail: bool = False) -> Usage:
        """Current use.  Zeros for what this machine cannot measure; never raises for a dead machine.

        Args:
            detail: look at the memory of each process, and at all files, too: milliseconds, off the event loop.
        """

    async def fork(self, count: int, *, reseed: bool, timeout_s: float) -> tuple[Machine, ...]:
        """Copies of this running machine, memory included, each with its guest ready (Ready unread on `channel`).

        Precondition: no cell runs.  Called by the host under the sandbox's exec lock.
        Args:
            count: 1 to 32.
            reseed: give the global random generators of each child fresh state.
        Raises: NotBuilt if the engine cannot fork; Conflict if this machine cannot be forked any deeper;
            MachineFailed, IsolationIncomplete, NoCapacity, DeadlineExceeded.  On any of them no copy exists.
        If cancelled: no copy exists, and this machine is unchanged.
        """

    async def diff(self, other: Machine, paths: tuple[str, ...], *, detail: bool, timeout_s: float) -> Diff:
        """Which files below `paths` the other machine has otherwise.  Neither is disturbed; running cells write on.

        Links are compared, never followed.  Cost follows what the two changed since they were one.
        Args:
            other: a machine of the same engine.
            paths: absolute, without `.` and `..`.
            detail: tell sizes, and text changes as patches.
        Raises: NotBuilt if the engine cannot compare; TooLarge if more differs than an answer holds; MachineFailed
            if one of them is gone; DeadlineExceeded.
        """

    async def merge_files(self, other: Machine, paths: tuple[str, ...], *, timeout_s: float) -> FileMerge:
        """Plan to bring what the other machine changed below `paths`, since both were one, into this one.

        Precondition: no cell runs in either.  Other running code may write on.
        Args:
            paths: as in `diff`.
        Raises: NotBuilt if the engine cannot merge; Conflict if it is not known what both were; TooLarge;
            MachineFailed; DeadlineExceeded.
        """

    async def snapshot(self, name: str, *, note: Mapping[str, Any] | None = None, timeout_s: float) -> None:
        """Keep this running machine on disk under a name, exact, memory included; it goes on at once.

        Precondition: no cell runs.  Called by the host under the sandbox's exec lock.
        What is kept outlives this machine and this daemon, and can be restored any number of times (Engine.restore).
        Args: note: plain JSON, kept with it (Engine.describe_snapshot).
        Raises: NotBuilt if the engine cannot keep machines; BadRequest for a name that cannot be one; Conflict if it
            is taken; MachineFailed, DeadlineExceeded.  Then, and if cancelled, nothing is kept.
        """

    async def wait_dead(self) -> Death:
        """Return once the machine ended by itself or by `aclose`.  Any number of waiters."""

    async def aclose(self) -> None:
        """End every process and release everything.  Idempotent; shielded from cancellation inside."""


class Engine(Protocol):
    """Makes machines of one kind.  A daemon has one of each kind at most."""

    name: str
    how: str
    """By which of several means it makes machines, one line for the log; empty before `start`, and if there is one."""
    capabilities: Mapping[Capability, str]
    """What it can, in words for users; what is missing here is refused with NotBuilt (or EgressUnavailable)."""
    pool_size: int
    """Warm machines that a daemon keeps if nobody says how many: a burst of creates, for what one waiting costs."""
    expected_memory_bytes: int
    """What a new machine, or a fork, may be expected to use: idle, and after a few imports.  So much has to be free."""
    rehearsal: str
    """A cell that the pool runs in each warm machine, where a machine's first one is slow; empty: none."""

    @property
    def templates(self) -> tuple[str, ...]:
        """Names that `create` accepts, as of now."""

    def describe(self, template: str) -> TemplateInfo:
        """What is known of a template.  `problem` says why one of `templates` cannot be used.

        Raises: UnknownTemplate with the name and what there is.
        """

    async def probe(self) -> EngineReport:
        """What this computer offers, without starting anything lasting.  At most 10 s."""

    async def start(self) -> None:
        """Acquire what is shared by all machines (the zygote).

        Raises: IsolationIncomplete if this computer cannot make a machine; the message says why and what to do.
        """

    def can_change(self, made: Limits, wanted: Limits) -> bool:
        """Whether Machine.set_limits can turn a machine made with the limits `made` into one with `wanted`.

        The host asks before it hands out a warm machine; where it cannot, another one has to be created.
        """

    async def create(self, spec: MachineSpec, *, timeout_s: float) -> Machine:
        """A machine whose guest agent has been verified and sent its Ready frame (still unread on `channel`).

        Raises: UnknownTemplate; TemplateFailed; IsolationIncomplete if a wall could not be verified; NoCapacity;
            EgressUnavailable if the spec asks for a way out and there can be none here; DeadlineExceeded after
            timeout_s; MachineFailed otherwise.  On any of them no machine exists.
        If cancelled: no machine exists.
        """

    @property
    def snapshots(self) -> tuple[str, ...]:
        """Names of what Machine.snapshot has kept, by any daemon with this directory."""

    def describe_snapshot(self, name: str) -> Snapshot:
        """Blocks.  Raises: NotBuilt; BadRequest if there is none; MachineFailed if it is damaged."""

    async def restore(self, name: str, *, timeout_s: float) -> Machine:
        """A machine that goes on from a snapshot, as one that `create` gives.

        Raises: NotBuilt if the engine cannot keep machines; BadRequest if there is none of that name; Conflict if it
            cannot go on here; otherwise as `create`.
        """

    def remove_snapshot(self, name: str) -> None:
        """Machines that were restored from it live on.  Blocks.  Raises: NotBuilt; BadRequest if there is none."""

    async def aclose(self) -> None:
        """Close every machine, then what `start` acquired.  Idempotent."""


@dataclass(frozen=True)
class EngineOptions:
    """What every engine is told by the composition root."""

    data_dir: str
    """A directory of this engine in this daemon alone."""
    instance: str
    """Unique name of the engine in this daemon life, for names of cgroups and the like."""
    require: tuple[Wall, ...] = field(default=())
    """Walls whose absence makes `start` and `create` fail."""
    template_dir: str = ""
    """Where built templates are (engines/templates/store.py), read again at each create; empty: there are none."""
    image_dir: str = ""
    """The same for images of virtual machines (engines/microvm/image/store.py)."""
    snapshot_dir: str = ""
    """Where snapshots are kept, for later daemons, too; empty: none can be."""
    vmm: str = "auto"
    """Which virtual machine monitor the microvm engine takes: auto, qemu or firecracker."""
    firecracker: str = ""
    """Path of the Firecracker to take; empty: the one on the PATH."""
    disk_bytes_per_s: int = 0
    disk_operations_per_s: int = 0
    """What each machine of the microvm engine may read from its disk and write to it; 0: no limit."""
