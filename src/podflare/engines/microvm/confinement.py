"""What a VMM process may do on the host: little, for a guest that breaks out of its VM is in it.

Pure but for `own`, and for `verify`, which looks at the process from outside.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from podflare.engines.base import Wall
from podflare.engines.microvm.tap import Entrance
from podflare.errors import IsolationIncomplete

VMM_ID = 0x7001_0000
"""User and group of a root daemon's VMMs: above those of the process engine's machines, and nobody else's."""

_ALWAYS: dict[Wall, tuple[str, str]] = {"seccomp": ("Seccomp", "2"), "no_new_privileges": ("NoNewPrivs", "1")}
"""What /proc/<pid>/status says of any VMM."""
_NAMESPACES: dict[Wall, str] = {"network_namespace": "net", "ipc_namespace": "ipc"}
_CAPABILITY_SETS = ("CapEff", "CapPrm", "CapInh", "CapAmb")
_BOUNDING_SET = "CapBnd"
ALWAYS: tuple[Wall, ...] = tuple(_ALWAYS)
AS_ROOT: tuple[Wall, ...] = ("separate_uid", "dropped_capabilities", *_NAMESPACES)
"""What a root daemon puts up besides."""
ENTERED: tuple[Wall, ...] = ("dropped_capabilities", "network_namespace")
"""What an ordinary user's daemon does, where a VMM is in a namespace with its tap."""


@dataclass(frozen=True)
class Confinement:
    """How VMMs of one daemon are started."""

    user_id: int | None
    """Of their own; None: the daemon's, which is no root then."""
    kvm_group: int | None = None
    """That may open /dev/kvm, where it is used."""
    jailed: bool = False
    """By Firecracker's jailer, which leaves the bounding set as it is: without new privileges nothing comes of that."""

    @classmethod
    def detect(cls, *, kvm: bool, jailed: bool = False) -> Confinement:
        """What the user of this process can set up."""
        group = Path("/dev/kvm").stat().st_gid if kvm else None
        return cls(VMM_ID if os.geteuid() == 0 else None, group, jailed)

    def wrap(self, command: list[str], entrance: Entrance | None = None) -> list[str]:
        """The command that starts `command` confined: it ends with the daemon, and cannot gain privileges.

        Args: entrance: of the network namespace for it to be in.
        """
        privileges = ["setpriv", "--pdeathsig", "KILL", "--no-new-privs"]
        capabilities = ["--inh-caps", "-all", "--bounding-set", "-all"]
        if self.user_id is None:
            if entrance is None:
                return [*privileges, "--", *command]
            return entrance.wrap([*privileges, *capabilities, "--", *command])
        groups = ["--clear-groups"] if self.kvm_group is None else ["--groups", str(self.kvm_group)]
        identity = ["--reuid", str(self.user_id), "--regid", str(self.user_id), *groups]
        confined = [*privileges, *identity, *capabilities, "--", *command]
        if entrance is None:
            return ["unshare", "--net", "--ipc", "--", *confined]
        return entrance.wrap(["unshare", "--ipc", "--", *confined])

    def own(self, file: int | Path) -> None:
        """Give a file or directory to the VMMs.  Raises: OSError."""
        if self.user_id is not None:
            os.chown(file, self.user_id, self.user_id)

    def verify(self, pid: int, *, entered: bool = False) -> tuple[Wall, ...]:
        """The walls around a VMM process, read from /proc.

        Args: entered: it was started through an entrance.
        Raises: IsolationIncomplete if one of those that this puts up is missing; OSError if the process is gone.
        """
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line)
        more = AS_ROOT if self.user_id is not None else ENTERED if entered else ()
        walls = (*ALWAYS, *more)
        missing = sorted(wall for wall in walls if not self._stands(wall, pid, status))
        if missing:
            raise IsolationIncomplete(f"a virtual machine monitor could not be confined: {', '.join(missing)}")
        return walls

    def _stands(self, wall: Wall, pid: int, status: Mapping[str, str]) -> bool:
        if wall in _ALWAYS:
            field, value = _ALWAYS[wall]
            return status[field].strip() == value
        if wall == "separate_uid":
            return set(status["Uid"].split()) == {str(self.user_id)}
        if wall == "dropped_capabilities":
            jailed = self.jailed and self.user_id is not None
            sets = _CAPABILITY_SETS if jailed else (*_CAPABILITY_SETS, _BOUNDING_SET)
            return all(int(status[name], 16) == 0 for name in sets)
        kind = _NAMESPACES[wall]
        return Path(f"/proc/{pid}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink()
