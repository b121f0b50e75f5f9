"""The image's own Python, run on this computer from unpacked packages: it compiles modules and installs wheels.

It is started through its own loader with its own libraries, so that it is the image's in every respect (version,
markers, wheel tags) without a change of root, which would need privileges.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from podflare.engines.microvm.image import tools
from podflare.engines.microvm.image.debs import Apt, Deb
from podflare.engines.microvm.image.rootfs import Entry
from podflare.engines.templates.store import Interpreter
from podflare.errors import TemplateFailed

EXECUTABLE = "/usr/bin/python3"
"""In the image."""
_NEEDED = re.compile(r"libc6|zlib1g|libexpat1|(?:lib)?python3\.\d+(?:-minimal|-stdlib)?")
"""Packages that the interpreter needs to compile; with wheels to install it needs all."""
_BY_SHELL = re.compile(
    rb"\A#!/bin/sh\n'''exec' \"?" + re.escape(EXECUTABLE).encode() + rb"\"? \"\$0\" \"\$@\"\n' '''\n"
)
"""How pip begins a command whose interpreter has a path that is too long for a first line."""
_LIBRARIES = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
_LOADER = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
_UNPACK_TIMEOUT_S = 60.0
_COMPILE_TIMEOUT_S = 600.0


class ImagePython:
    """Python unpacked in a directory."""

    def __init__(self, folder: Path, version: str) -> None:
        self.folder = folder
        self.version = version
        self._launcher = folder / "python3"

    @classmethod
    def unpack(cls, apt: Apt, debs: Sequence[Deb], folder: Path, *, whole: bool) -> ImagePython:
        """Unpack what it needs into the empty directory `folder`.

        Args: whole: all packages, for what imports more than the standard library's core.
        Raises: TemplateFailed.
        """
        for deb in debs:
            if whole or _NEEDED.fullmatch(deb.name):
                tools.run(["dpkg-deb", "-x", str(apt.path(deb)), str(folder)], timeout_s=_UNPACK_TIMEOUT_S)
        found = sorted((folder / "usr/bin").glob("python3.[0-9]*"))
        if not found:
            raise TemplateFailed("the packages hold no Python")
        python = cls(folder, found[0].name.removeprefix("python"))
        python._write_launcher(found[0])
        return python

    def _write_launcher(self, program: Path) -> None:
        libraries = ":".join(str(self.folder / name) for name in _LIBRARIES)
        words = [str(self.folder / _LOADER), "--library-path", libraries, str(program)]
        self._launcher.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        self._launcher.chmod(0o755)

    def interpreter(self) -> Interpreter:
        """As the builder of templates knows interpreters."""
        return Interpreter(str(self._launcher), self.version, (), ())

    def compile(self, files: Path, root: Path) -> None:
        """Write the compiled form beside every module below `files`, the same bytes each time.

        Args: root: directory that is / in the image.
        Raises: TemplateFailed.
        """
        # Neither times nor the order of sets may get in; what this run imports, or pip's did, must not leave its own.
        command = [str(self._launcher), "-B", "-S", "-s", "-m", "compileall", "-f", "-q", "-q"]
        command += ["--invalidation-mode", "unchecked-hash", "-s", str(root), "-p", "/", str(files)]
        try:
            tools.run(command, timeout_s=_COMPILE_TIMEOUT_S, cwd=root, environment={"PYTHONHASHSEED": "0"})
        except TemplateFailed:
            # Some packages hold modules for other versions; they stay as they are.
            if not any(files.rglob("*.pyc")):
                raise

    def standard_library(self) -> Iterator[Entry]:
        """The compiled standard library."""
        folder = self.folder / "usr/lib" / f"python{self.version}"
        self.compile(folder, self.folder)
        for path in sorted(folder.rglob("*.pyc")):
            yield Entry(str(path.relative_to(self.folder)), path.read_bytes())

    def compiled(self, files: dict[str, bytes], root: str, scratch: Path) -> dict[str, bytes]:
        """Compiled forms of modules that will lie below `root` in the image.

        Args:
            files: path below `root` -> source.
            scratch: a directory to use.
        Raises: TemplateFailed.
        """
        below = scratch / root.strip("/")
        for name, content in files.items():
            (below / name).parent.mkdir(parents=True, exist_ok=True)
            (below / name).write_bytes(content)
        self.compile(below, scratch)
        return {str(path.relative_to(below)): path.read_bytes() for path in sorted(below.rglob("*.pyc"))}

    def for_the_image(self, content: bytes) -> bytes:
        """`content` of a command, with the image's interpreter instead of this one."""
        for path in (self._launcher, self.folder / "usr/bin" / f"python{self.version}"):
            content = content.replace(str(path).encode(), EXECUTABLE.encode())
        return _BY_SHELL.sub(f"#!{EXECUTABLE}\n".encode(), content)
