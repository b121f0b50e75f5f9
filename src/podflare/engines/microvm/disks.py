"""The disks of machines: sparse files with a file system of the size that the machine may fill."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from podflare.engines.microvm.memory import copy_sparse
from podflare.errors import MachineFailed

MAKER = "mke2fs"
MAKE_TIMEOUT_S = 60.0


def find_maker() -> str | None:
    """Where mke2fs is; distributions keep it where an ordinary user's PATH does not lead."""
    return shutil.which(MAKER) or shutil.which(MAKER, path="/usr/sbin:/sbin")


def make_disk(path: Path, size_bytes: int) -> None:
    """A new, empty disk.  Blocks for some tens of milliseconds.  Raises: MachineFailed."""
    maker = find_maker()
    if maker is None:
        raise MachineFailed("mke2fs is missing (Debian: apt install e2fsprogs)")
    with path.open("xb") as file:
        file.truncate(size_bytes)
    # No journal: a disk goes with its machine, or is saved while nothing is under way.
    command = [maker, "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "lazy_itable_init=1,discard"]
    try:
        subprocess.run([*command, str(path)], check=True, capture_output=True, timeout=MAKE_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as exc:
        said = getattr(exc, "stderr", b"") or b""
        raise MachineFailed(f"a disk could not be made: {said.decode(errors='replace')[:300] or exc}") from exc


def copy_disk(source: Path, target: Path) -> None:
    """Blocks.  Raises: OSError."""
    reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        writing = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            copy_sparse(reading, writing)
        finally:
            os.close(writing)
    finally:
        os.close(reading)
