"""The end of what machines consist of: processes that are killed, directories that user code filled."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import signal
from pathlib import Path

from podflare.engines.linux.waiting import resolve

END_TIMEOUT_S = 10.0
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


async def end_process(pidfd: int) -> None:
    """SIGKILL the process, wait for its end, close the pidfd."""
    loop = asyncio.get_running_loop()
    gone: asyncio.Future[None] = loop.create_future()
    loop.add_reader(pidfd, resolve, gone)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        # A process in uninterruptible sleep is not waited for longer; it ends when its device answers.
        await asyncio.wait([gone], timeout=END_TIMEOUT_S)
    except ProcessLookupError:
        pass
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def remove_tree(path: Path) -> None:
    """Remove a machine's directory, whatever user code made of it (modes, depth, names).  What cannot be removed stays.

    Every process that could change it meanwhile is dead.
    """
    with contextlib.suppress(OSError):
        path.chmod(0o700)
        top = os.open(path, _DIRECTORY)
        try:
            _remove_below(top)
        finally:
            os.close(top)
        path.rmdir()


def _remove_below(top: int) -> None:
    """Each directory moves to the top before it is emptied, so that depth costs neither a stack nor descriptors."""
    numbers = itertools.count()
    prefix = f".{secrets.token_hex(8)}-"
    waiting: list[str] = []

    def clear(folder: int) -> None:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for name, is_folder in found:
            if not is_folder:
                os.unlink(name, dir_fd=folder)
                continue
            os.chmod(name, 0o700, dir_fd=folder)
            waiting.append(f"{prefix}{next(numbers)}")
            os.rename(name, waiting[-1], src_dir_fd=folder, dst_dir_fd=top)

    clear(top)
    while waiting:
        name = waiting.pop()
        folder = os.open(name, _DIRECTORY, dir_fd=top)
        try:
            clear(folder)
        finally:
            os.close(folder)
        os.rmdir(name, dir_fd=top)
