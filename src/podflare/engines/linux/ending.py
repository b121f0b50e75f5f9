"""The end of what machines consist of: processes that are killed, directories that user code filled."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from pathlib import Path

from podflare.engines.linux.waiting import resolve

END_TIMEOUT_S = 10.0


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
    """Remove a machine's directory, whatever user code made of it (modes, depth, names).

    Every process that could change it meanwhile is dead.
    """
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except (OSError, RecursionError):
        # Directories without permission, or deeper than Python's stack: the system's tools have no such limits.
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf", "--one-file-system"]):
            subprocess.run([*command, "--", str(path)], stderr=subprocess.DEVNULL, timeout=60, check=False)
