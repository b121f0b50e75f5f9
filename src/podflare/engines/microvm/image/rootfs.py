"""The root file system: what packages hold, put together as one read-only squashfs without installing anything.

Files stream from the packages into the file system's maker, which needs no privilege for root's files and gives the
same bytes for the same input.  What scripts of packages would do and a sandbox needs is in `_own_files`.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from podflare.engines.microvm.image import debs, tools
from podflare.errors import TemplateFailed

MADE_AT = 1_700_000_000
"""Time of all files."""
COMPRESSION = ("-comp", "lz4", "-b", "128K")
"""Cheap to read, for many machines read the same file."""
_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Directories that are links into /usr; packages may name either."""
_LEFT_OUT = (
    "usr/share/man/", "usr/share/info/", "usr/share/locale/", "usr/share/lintian/", "usr/share/bug/",
    "usr/share/doc-base/", "usr/share/gcc/", "usr/share/gdb/", "usr/share/pixmaps/", "usr/lib/systemd/",
    "usr/lib/udev/", "usr/share/i18n/", "usr/share/perl/5.36.0/pod/", "usr/share/menu/",
)  # fmt: skip
_CERTIFICATES = "usr/share/ca-certificates/"
_TAKEN_FROM = {
    "usr/share/base-passwd/passwd.master": "etc/passwd",
    "usr/share/base-passwd/group.master": "etc/group",
    "usr/share/base-files/nsswitch.conf": "etc/nsswitch.conf",
}
"""What scripts of packages copy."""
_PROGRAM_LINKS = {"python": "python3", "awk": "mawk", "which": "which.debianutils", "pager": "less"}
"""In usr/bin, where a package has what they point to."""
_FOLDERS = (
    "dev", "etc/ssl/certs", "home", "mnt", "opt", "proc", "root", "run", "srv", "sys", "usr/local/bin", "var/cache",
    "var/log", "var/tmp",
)  # fmt: skip
_TEXTS = {
    "etc/hostname": "sandbox\n",
    "etc/hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "etc/resolv.conf": "",
    "etc/machine-id": "",
    "etc/shadow": "root:*:19000:0:99999:7:::\n",
    "root/.bashrc": "",
}
_WRITE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Entry:
    """A file that is no package's; with `link`, a symbolic link."""

    path: str
    """Without a leading /."""
    content: bytes = b""
    mode: int = 0o644
    link: str = ""


class Writer:
    """Collects one root file system.  The first entry of a path counts."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._seen: set[str] = set()
        self._certificates: dict[str, bytes] = {}

    def add_package(self, path: Path) -> None:
        """All files of a package but documentation.  Raises: TemplateFailed."""
        with debs.content(path) as package:
            for member in package:
                self._add_member(member, package)

    def _add_member(self, member: tarfile.TarInfo, package: tarfile.TarFile) -> None:
        name = merged(member.name)
        if not name or name.startswith(_LEFT_OUT) or _is_documentation(name):
            return
        file = package.extractfile(member) if member.isreg() else None
        content = file.read() if file is not None else b""
        if name.startswith(_CERTIFICATES) and name.endswith(".crt"):
            self._certificates[name] = content
        if name in _TAKEN_FROM:
            self.add_file(_TAKEN_FROM[name], content)
        if member.islnk():
            member.linkname = merged(member.linkname)
        member.name, member.uname, member.gname = name, "", ""
        member.pax_headers = {}
        self._add(member, content)

    def has(self, name: str) -> bool:
        """Whether something has this path."""
        return name in self._seen

    def add(self, entry: Entry) -> None:
        if entry.link:
            self.add_link(entry.path, entry.link)
        else:
            self.add_file(entry.path, entry.content, entry.mode)

    def add_file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self._add_parents(name)
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(content), mode
        self._add(entry, content)

    def add_link(self, name: str, target: str) -> None:
        self._add_parents(name)
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, target, 0o777
        self._add(entry, b"")

    def add_folder(self, name: str, mode: int = 0o755) -> None:
        self._add_parents(name)
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode = tarfile.DIRTYPE, mode
        self._add(entry, b"")

    def add_own(self) -> None:
        """What scripts of the packages would have made; after the last package."""
        for name in _FOLDERS:
            self.add_folder(name, 0o1777 if name.endswith("tmp") else 0o700 if name == "root" else 0o755)
        self.add_link("etc/mtab", "../proc/self/mounts")
        for name in filter(lambda name: self.has(f"usr/{name}"), _MERGED):
            self.add_link(name, f"usr/{name}")
        for name, target in _PROGRAM_LINKS.items():
            if self.has(f"usr/bin/{target}"):
                self.add_link(f"usr/bin/{name}", target)
        for name, text in _TEXTS.items():
            self.add_file(name, text.encode(), 0o640 if name == "etc/shadow" else 0o644)
        self.add_file("etc/ssl/certs/ca-certificates.crt", b"".join(self._certificates.values()))

    def _add_parents(self, name: str) -> None:
        parent = posixpath.dirname(name)
        if parent and parent not in self._seen:
            self.add_folder(parent)

    def _add(self, entry: tarfile.TarInfo, content: bytes) -> None:
        if entry.name in self._seen:
            return
        self._seen.add(entry.name)
        self._archive.addfile(entry, io.BytesIO(content))


def merged(name: str) -> str:
    """A path of a package as it is in the root: without ./, and below /usr what belongs there now."""
    plain = name.removeprefix("./").strip("/")
    if plain == ".":
        return ""
    top = plain.split("/", 1)[0]
    return f"usr/{plain}" if top in _MERGED else plain


def _is_documentation(name: str) -> bool:
    # A directory within would be made by whoever builds, if only a file in it were kept.
    return name.startswith("usr/share/doc/") and name.count("/") > 3 and name.split("/", 4)[4] != "copyright"


def write(target: Path, fill: Callable[[Writer], None]) -> None:
    """Make the file system of what `fill` puts into it.

    Args: target: a file that is not there yet.
    Raises: TemplateFailed; OSError.
    """
    command = ["sqfstar", *COMPRESSION, "-no-progress", "-quiet", "-reproducible", "-no-xattrs"]
    # Owner and time of the root directory can be set by no other means than everybody's.
    command += ["-root-mode", "755", "-all-root", str(target)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(MADE_AT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdin is not None and process.stderr is not None
        try:
            with tarfile.open(fileobj=process.stdin, mode="w|", format=tarfile.GNU_FORMAT) as archive:
                writer = Writer(archive)
                fill(writer)
                writer.add_own()
            process.stdin.close()
        except BrokenPipeError:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # it says below why it ended
        except BaseException:
            process.kill()
            raise
        said = process.stderr.read()
    if process.returncode != 0:
        raise TemplateFailed(tools.failure(command, process.returncode, said))
