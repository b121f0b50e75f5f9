"""What this engine keeps of a machine (engines/snapshots.py): memory, devices, disk, and root, a link to the image's,
which may be built anew.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from podflare.engines.microvm.origins import Origin
from podflare.engines.microvm.vmm import Shape
from podflare.engines.snapshots import Keeping, Kept
from podflare.errors import Conflict, MachineFailed


def begin(keeping: Keeping, root: Path, shape: Shape) -> Origin:
    """Files to save a machine to.  Raises: OSError."""
    kept_root = keeping.folder / "root"
    try:
        kept_root.hardlink_to(root)
    except OSError:
        shutil.copyfile(root, kept_root)  # another file system
    return Origin.within(keeping.folder, kept_root, shape)


def more(origin: Origin, machine_key: str) -> dict[str, object]:
    """What going on from it needs besides its files."""
    return {"key": machine_key, "shape": asdict(origin.shape)}


def origin_of(kept: Kept, machine_key: str) -> Origin:
    """Raises: Conflict if it cannot go on under this machine key; MachineFailed if it is damaged."""
    try:
        origin = Origin.within(kept.folder, kept.folder / "root", Shape(**kept.more["shape"]))
        made_by = kept.more["key"]
    except (KeyError, TypeError) as exc:
        raise MachineFailed(f"snapshot {kept.about.name!r} cannot be used: {exc!r}") from exc
    if made_by != machine_key:
        raise Conflict("this snapshot was made by another kind or version of hypervisor; it cannot go on here")
    return origin
