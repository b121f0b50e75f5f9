"""Snapshots: machines kept on disk under a name, exact, to be restored any number of times, by later daemons, too.

One directory each:  memory, devices, disk, root (a link to the image's, which may be built anew) and about.json.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from podflare.engines.base import Limits, MachineSpec
from podflare.engines.linux.ending import remove_tree
from podflare.engines.microvm.origins import Origin
from podflare.engines.microvm.vmm import Shape
from podflare.engines.templates.store import check_owner
from podflare.errors import BadRequest, Conflict, MachineFailed

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_FORMAT = 1


@dataclass(frozen=True)
class Kept:
    """A snapshot, ready to go on."""

    spec: MachineSpec
    origin: Origin
    machine_key: str


class SavedMachines:
    """Those below one directory, which need not exist."""

    def __init__(self, folder: str) -> None:
        """Args: folder: empty: none can be kept."""
        self._folder = Path(folder) if folder else None

    @property
    def names(self) -> tuple[str, ...]:
        try:
            found = [] if self._folder is None else [path.name for path in self._folder.iterdir()]
        except OSError:
            return ()
        return tuple(sorted(name for name in found if _NAME.fullmatch(name)))

    @contextmanager
    def keeping(self, name: str, kept_root: Path, shape: Shape) -> Iterator[Origin]:
        """Files to save a machine to; they get the name if the block ends well.

        Raises: BadRequest for a name that cannot be one; Conflict if it is taken; OSError.
        """
        if self._folder is None:
            raise BadRequest("this daemon keeps no snapshots: it has no directory for them")
        if not _NAME.fullmatch(name):
            raise BadRequest(f"{name!r:.80} is no name: 1 to 64 letters, digits, '_', '.', '-', no sign first")
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        half = self._folder / f".{secrets.token_hex(8)}"
        half.mkdir(mode=0o700)
        try:
            _link_or_copy(kept_root, half / "root")
            yield Origin.within(half, half / "root", shape)
            try:
                half.rename(self._folder / name)
            except OSError as exc:
                raise Conflict(f"there is a snapshot {name!r} already") from exc
        finally:
            if half.exists():
                remove_tree(half)

    def describe(self, origin: Origin, spec: MachineSpec, machine_key: str) -> None:
        """Write what a snapshot is, beside its files."""
        kept = asdict(replace(spec, uplink=None))  # what a restored machine may reach is said when it is restored
        body = {"format": _FORMAT, "key": machine_key, "shape": asdict(origin.shape), "spec": kept}
        (origin.disk.parent / "about.json").write_text(json.dumps(body))

    def get(self, name: str) -> Kept:
        """Raises: BadRequest if there is none; MachineFailed if it is damaged."""
        if self._folder is None or name not in self.names:
            raise BadRequest(f"no snapshot {name!r:.80}; there is: {', '.join(self.names) or 'none'}")
        folder = self._folder / name
        try:
            check_owner(folder)
            body: dict[str, Any] = json.loads((folder / "about.json").read_text())
            if body["format"] != _FORMAT:
                raise ValueError(f"its format is {body['format']!r:.20}, this version's is {_FORMAT}")
            spec = body["spec"]
            machine = MachineSpec(spec["template"], Limits(**spec["limits"]), spec["hostname"])
            return Kept(machine, Origin.within(folder, folder / "root", Shape(**body["shape"])), body["key"])
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise MachineFailed(f"snapshot {name!r} cannot be used: {exc}") from exc

    def remove(self, name: str) -> None:
        """Machines that were restored from it live on.  Raises: BadRequest if there is none."""
        if self._folder is None or name not in self.names:
            raise BadRequest(f"no snapshot {name!r:.80}; there is: {', '.join(self.names) or 'none'}")
        remove_tree(self._folder / name)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)  # another file system
