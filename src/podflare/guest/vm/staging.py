"""A place of its own for a merge in a virtual machine, on the machine's disk and out of reach of what runs in it.

As in the process engine, what the three sides have is layers: the machine's own, over the image's; a layer over that
with what differs where the other machine changed something, to make it what both were; and over that one with what the
other machine has there.  Rows come from the engine, which has checked them; that no link is followed is held here, too.
"""

from __future__ import annotations

import base64
import errno
import os
import stat
from typing import Any, List, Sequence, Tuple

from podflare.guest import syscalls as sc
from podflare.guest.process.transplant import DIRECTORY, Changed, open_folder, remove
from podflare.guest.vm.manifest import mark_of_file
from podflare.guest.vm.system import EMPTY

BASE, THEIRS, OURS = "base", "theirs", "ours"
OVERLAY = "root"
LOWER = "/skel"
"""The image's files, in the place."""
_DISK = "/dev/vdb"
_IMAGE = "/dev/vda"
_NAME = "merge"
_MS_NOATIME = 1024
_NO_SPECIAL = sc.MS_NOSUID | sc.MS_NODEV
_FILE = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Staging:
    """Begun by its constructor, which moves the process into it."""

    def __init__(self) -> None:
        """Needs root of the machine.  Raises: OSError."""
        self.machine = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        """The mount namespace in which the machine's files are /."""
        sc.unshare(sc.CLONE_NEWNS)
        sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)
        sc.mount("merge", EMPTY, "tmpfs", _NO_SPECIAL, "mode=700,size=1m")
        for name in ("disk", "skel", "files"):
            os.mkdir(f"{EMPTY}/{name}")
        # Both are mounted already, elsewhere: the same file systems once more.
        sc.mount(_DISK, f"{EMPTY}/disk", "ext4", _NO_SPECIAL | _MS_NOATIME)
        sc.mount(_IMAGE, EMPTY + LOWER, "squashfs", _NO_SPECIAL | sc.MS_RDONLY)
        sc.mount("/", f"{EMPTY}/files", None, sc.MS_BIND)
        os.makedirs(f"{EMPTY}/machines/{OURS}/{OVERLAY}/upper")
        sc.mount(f"{EMPTY}/disk/upper", f"{EMPTY}/machines/{OURS}/{OVERLAY}/upper", None, sc.MS_BIND)
        os.chroot(EMPTY)
        os.chdir("/")
        self._disk = os.open("/disk", DIRECTORY)
        self._files = os.open("/files", DIRECTORY)
        self._remove()
        for name in (BASE, THEIRS):
            os.makedirs(f"/disk/{_NAME}/{name}/{OVERLAY}/upper")
            os.symlink(f"/disk/{_NAME}/{name}", f"/machines/{name}")
        self._tops = {name: os.open(f"/machines/{name}/{OVERLAY}/upper", DIRECTORY) for name in (BASE, THEIRS)}

    def put(self, layer: str, rows: Sequence[Sequence[Any]]) -> None:
        """Add to a layer: [path, kind, mode, target or null] each, directories before what is in them.

        The kind "nothing" hides what lies below; of a file its content follows (`write`).
        Raises: OSError.
        """
        for path, kind, mode, target in rows:
            folder, name = self._folder(layer, path)
            try:
                _make(folder, name, kind, mode, target)
            finally:
                os.close(folder)

    def write(self, layer: str, pieces: Sequence[Sequence[Any]]) -> None:
        """Contents of files that are there: [path, size, mtime, [[offset, base64]...]] each.  Raises: OSError."""
        for path, size, mtime_ns, extents in pieces:
            folder, name = self._folder(layer, path)
            try:
                fd = os.open(name, _FILE, dir_fd=folder)
                try:
                    os.ftruncate(fd, size)
                    for offset, data in extents:
                        _write(fd, base64.b64decode(data), offset)
                    os.utime(fd, ns=(mtime_ns, mtime_ns))
                finally:
                    os.close(fd)
            finally:
                os.close(folder)

    def check(self, marks: Sequence[Tuple[str, str]]) -> None:
        """Raises: Changed if one of the machine's files is not what it was when it was listed (manifest.py)."""
        for path, mark in marks:
            try:
                folder = open_folder(self._files, _parts(path)[:-1])
                try:
                    status = os.stat(_parts(path)[-1], dir_fd=folder, follow_symlinks=False)
                finally:
                    os.close(folder)
            except OSError as exc:
                raise Changed(path) from exc
            if not stat.S_ISREG(status.st_mode) or mark_of_file(status) != mark:
                raise Changed(path)

    def end(self) -> None:
        """Take it away.  What the process has mounted goes with it."""
        self._remove()

    def _remove(self) -> None:
        try:
            remove(self._disk, _NAME)
        except FileNotFoundError:
            pass

    def _folder(self, layer: str, path: str) -> Tuple[int, str]:
        """The directory that a path is in, and the name there."""
        parts = _parts(path)
        return open_folder(self._tops[layer], parts[:-1], make=_make_folder), parts[-1]


def _make_folder(folder: int, parts: Sequence[str]) -> None:
    os.mkdir(parts[-1], 0o755, dir_fd=folder)


def _make(folder: int, name: str, kind: str, mode: int, target: Any) -> None:
    if kind == "directory":
        os.mkdir(name, 0o700, dir_fd=folder)
        _set_mode(folder, name, DIRECTORY, mode)
    elif kind == "file":
        os.close(os.open(name, _FILE | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder))
        _set_mode(folder, name, _FILE, mode)
    elif kind == "link":
        os.symlink(target, name, dir_fd=folder)
    elif kind == "nothing":
        os.mknod(name, stat.S_IFCHR | 0o600, 0, dir_fd=folder)  # what overlayfs takes for it
    else:
        # What cannot be anybody else's is only told of, so that it is no less than what it was.
        types = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "device": stat.S_IFBLK}
        os.mknod(name, types[kind] | mode, 0, dir_fd=folder)
        os.utime(name, ns=(0, 0), dir_fd=folder, follow_symlinks=False)


def _set_mode(folder: int, name: str, how: int, mode: int) -> None:
    fd = os.open(name, how, dir_fd=folder)
    try:
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def _write(fd: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        count = os.pwrite(fd, rest, offset)
        rest, offset = rest[count:], offset + count


def _parts(path: str) -> List[str]:
    """Raises: OSError for what is no path."""
    parts = [part for part in path.split("/") if part]
    if not parts or not path.startswith("/") or "." in parts or ".." in parts:
        raise OSError(errno.EINVAL, "no path of a file")
    return parts
