"""Where connections of one VM's programs are accepted: a network namespace on the host with a tun and a listener in it.

A short-lived process, confined to that namespace, makes both (guest/landing.py) and sends their descriptors; these are
all that keeps the namespace, so it ends with whoever holds them, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

from podflare.engines.bundle import build_bundle
from podflare.engines.linux.ending import remove_tree
from podflare.engines.linux.waiting import wait_readable
from podflare.errors import EgressUnavailable

READY_TIMEOUT_S = 20.0
_WORDS_BYTES = 4096


class Landing:
    """One VM's.  Begun by its constructor; whoever made it closes it."""

    def __init__(self, bundle: Path) -> None:
        """Args: bundle: what `make_bundle` gave.  Raises: EgressUnavailable."""
        self._fds: list[int] = []
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        # An ordinary user has the rights for it in a user namespace of its own.
        enter = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
        command = [*enter, "--", sys.executable, "-I", "-S", str(bundle), "landing", str(theirs.fileno())]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command,
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

    async def ends(self) -> tuple[int, int]:
        """(tun, listener), which stay this object's.

        Raises: EgressUnavailable with what is missing; DeadlineExceeded.
        """
        if not self._fds:
            await wait_readable(self._control, READY_TIMEOUT_S, "the network of a virtual machine was not ready")
            data, self._fds, _, _ = socket.recv_fds(self._control, 16, 2)
            for fd in self._fds:
                os.set_inheritable(fd, False)
            words = await asyncio.get_running_loop().run_in_executor(None, self._last_words)
            if not data or len(self._fds) != 2:
                raise EgressUnavailable(f"virtual machines can have no network here: {words}")
        tun, listener = self._fds
        return tun, listener

    def _last_words(self) -> str:
        """What the process said, once it has ended."""
        assert self._process.stderr is not None
        said = self._process.stderr.read(_WORDS_BYTES).decode("utf-8", "replace").strip()
        self._process.wait()
        return said.rpartition("\n")[2]

    def close(self) -> None:
        """The namespace goes, unless somebody has copies of the descriptors.  Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._control.close()
        while self._fds:
            os.close(self._fds.pop())


def make_bundle(folder: Path) -> Path:
    """The code of landings, below a directory of this daemon.  Blocks.  Raises: OSError."""
    bundle = folder / "bundle"
    if not bundle.exists():
        made = build_bundle(folder / f"bundle-{secrets.token_hex(4)}")
        try:
            made.rename(bundle)
        except OSError:
            if not bundle.exists():
                raise
            remove_tree(made)  # another birth was faster
    return bundle
