"""A network namespace on the host, and descriptors of what is in it.

A short-lived process, confined to that namespace, makes both (guest/landing.py, guest/tap.py) and sends the
descriptors.  These, and whoever entered it, are all that keeps the namespace, so it ends with them, however they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import podflare.errors
from podflare.engines.linux.waiting import wait_readable
from podflare.errors import EgressUnavailable

READY_TIMEOUT_S = 20.0
_WORDS_BYTES = 4096
_PACKAGES = str(Path(podflare.errors.__file__).parents[1])
_ENTRY = "import sys; sys.path.append(sys.argv.pop(1)); from podflare.guest.__main__ import main; main(sys.argv[1:])"
"""The guest's code where it is installed, by a path that comes last: nothing there takes a standard module's place."""


class Outpost:
    """Begun by its constructor; whoever made it closes it."""

    def __init__(self, mode: str, *arguments: str, count: int) -> None:
        """Args:
            mode: of the guest's entry; it gets a socket's number and the other arguments.
            count: of the descriptors that it sends.
        Raises: EgressUnavailable.
        """
        self._fds: list[int] = []
        self._count = count
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        # An ordinary user has the rights for it in a user namespace of its own.
        enter = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
        words = [mode, str(theirs.fileno()), *arguments]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*enter, "--", sys.executable, "-I", "-S", "-c", _ENTRY, _PACKAGES, *words],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env={"PATH": os.environ.get("PATH", os.defpath)},
                    cwd="/",
                )
            except OSError as exc:
                self._control.close()
                raise EgressUnavailable(f"the network of a virtual machine could not be made: {exc}") from exc

    async def descriptors(self) -> list[int]:
        """What it sent, which stays this object's.

        Raises: EgressUnavailable with what is missing; DeadlineExceeded.
        """
        if not self._fds:
            await wait_readable(self._control, READY_TIMEOUT_S, "the network of a virtual machine was not ready")
            data, self._fds, _, _ = socket.recv_fds(self._control, 16, self._count)
            for fd in self._fds:
                os.set_inheritable(fd, False)
            words = await asyncio.get_running_loop().run_in_executor(None, self._last_words)
            if not data or len(self._fds) != self._count:
                raise EgressUnavailable(f"virtual machines can have no network here: {words}")
        return self._fds

    def _last_words(self) -> str:
        """What the process said, once it has ended."""
        assert self._process.stderr is not None
        said = self._process.stderr.read(_WORDS_BYTES).decode("utf-8", "replace").strip()
        self._process.wait()
        return said.rpartition("\n")[2]

    def close(self) -> None:
        """The namespace goes, unless somebody is in it or has copies of the descriptors.  Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._control.close()
        while self._fds:
            os.close(self._fds.pop())
