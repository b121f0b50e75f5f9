"""What this computer offers to the zygote of a template: read once, then planned with (plan.py)."""

from __future__ import annotations

import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from podflare.engines.templates.store import Interpreter

TOP_LEVEL = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")

TUN_DEVICE = "/dev/net/tun"
NO_TUNNELS = (
    f"{TUN_DEVICE} cannot be used here, so sandboxes can have no network: `modprobe tun`, `chmod 666 {TUN_DEVICE}`, "
    f"or give the daemon's container the device (--device {TUN_DEVICE})"
)

_ETC_COPIES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/localtime",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/protocols",
    "/etc/services",
    "/etc/mime.types",
)


@dataclass(frozen=True)
class Directory:
    """A directory of the computer; `mine` if the daemon's user owns it."""

    path: str
    mine: bool


@dataclass(frozen=True)
class HostFacts:
    """Everything that the plan of a stage depends on."""

    root: bool
    directories: tuple[Directory, ...]
    """Top-level system directories, then the interpreter's prefix where it lies elsewhere."""
    links: tuple[tuple[str, str], ...]
    """Top-level symbolic links as (path, target): /bin -> usr/bin."""
    etc_copies: tuple[str, ...]
    etc_links: tuple[tuple[str, str], ...]
    python: str
    own_packages: tuple[str, ...]
    """Package directories inside `directories` that are hidden from machines."""
    tunnels: bool = False
    """Whether TUN_DEVICE can be used."""


def read_facts(interpreter: Interpreter | None = None) -> HostFacts:
    """Facts about the running computer and an interpreter, by default the one that runs the daemon."""
    if interpreter is None:
        prefixes: tuple[str, ...] = (sys.base_prefix, sys.base_exec_prefix)
        python, hidden = os.path.realpath(base_python()), _own_packages()
    else:
        # A template brings its packages: those of this computer would make it another one on every computer.
        prefixes, python, hidden = interpreter.prefixes, interpreter.executable, interpreter.site_directories
    directories: list[Directory] = []
    links: list[tuple[str, str]] = []
    for name in TOP_LEVEL:
        path = Path("/", name)
        if path.is_symlink():
            links.append((str(path), str(path.readlink())))
        elif path.is_dir():
            directories.append(_directory(str(path)))
    for prefix in dict.fromkeys(prefixes):
        real = os.path.realpath(prefix)
        if not any(_inside(real, known.path) for known in directories):
            directories.append(_directory(real))
    return HostFacts(
        root=os.geteuid() == 0,
        directories=tuple(directories),
        links=tuple(links),
        etc_copies=tuple(path for path in _ETC_COPIES if os.access(path, os.R_OK)),
        etc_links=_alternatives(),
        python=python,
        own_packages=tuple(path for path in hidden if any(_inside(path, known.path) for known in directories)),
        tunnels=_machines_open(TUN_DEVICE),
    )


def _machines_open(device: str) -> bool:
    """Whether machines' agents can open a device, before they are confined.

    Its mode is not all: the node can be there and nothing behind it, or a control group can forbid it.  Nor is that it
    opens here: the machines of a root daemon have other ids.
    """
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
        return os.geteuid() != 0 or Path(device).stat().st_mode & 0o6 == 0o6
    except OSError:
        return False


def base_python() -> str:
    """The interpreter below the daemon's virtual environment."""
    return getattr(sys, "_base_executable", None) or sys.executable


def _directory(path: str) -> Directory:
    return Directory(path, Path(path).stat().st_uid == os.geteuid())


def _inside(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent.rstrip("/") + "/")


def _alternatives() -> tuple[tuple[str, str], ...]:
    """Debian's and Fedora's /etc/alternatives: /usr/bin/awk and others are links through it."""
    folder = Path("/etc/alternatives")
    if not folder.is_dir():
        return ()
    return tuple((str(path), str(path.readlink())) for path in sorted(folder.iterdir()) if path.is_symlink())


def _own_packages() -> tuple[str, ...]:
    if sys.prefix != sys.base_prefix:
        return ()  # a virtual environment: it lies outside of what machines see
    names = ("purelib", "platlib")
    return tuple(dict.fromkeys(path for name in names if Path(path := sysconfig.get_path(name)).is_dir()))
