"""Bash cells: one fresh `bash -c` each, in a process group of its own."""

from __future__ import annotations

import os
import signal
from typing import Callable, List, Tuple, Union

from podflare.guest import environment
from podflare.guest.interrupts import INTERRUPT_SIGNAL

CANNOT_RUN, NOT_FOUND = 126, 127
"""Exit codes of a shell that cannot run, or find, a command."""
_RESET = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGCHLD,
    INTERRUPT_SIGNAL,
)
"""What the agent or the interpreter ignores or handles, and a shell must not inherit."""


_MAX_ARGUMENT_BYTES = 128 * 1024 - 1
"""execve(2), MAX_ARG_STRLEN: the longest single argument, whatever the limit of all together."""


def start(code: str, output: Tuple[int, int], home: str, before: Callable[[], None]) -> int:
    """Pid, session and process group of a new bash that runs `code` in `home` with standard input at end of file.

    Args: before: called in the new process.
    Raises: OSError if no process can be made.
    """
    for fd in output:
        os.set_blocking(fd, True)  # an earlier process may have changed it for everybody
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.set_wakeup_fd(-1)
        os.setsid()
        before()
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        for fd, source in enumerate((null, *output)):
            os.dup2(source, fd)
        environment.enter_home(home)
        for number in _RESET:
            signal.signal(number, signal.SIG_DFL)
        # Every other descriptor of the agent is close-on-exec.
        os.execvp("bash", ["bash", *_arguments(os.fsencode(code))])
    except FileNotFoundError:
        os.write(2, b"podflare: bash is not installed in this template\n")
        os._exit(NOT_FOUND)
    except BaseException as exc:  # noqa: BLE001  # whatever it is, this must not return into the agent's code
        os.write(2, f"podflare: bash could not be started: {exc}\n".encode("utf-8", "replace"))
    finally:
        os._exit(CANNOT_RUN)
    raise AssertionError("unreachable")


def _arguments(code: bytes) -> List[Union[str, bytes]]:
    """How to have bash run `code`: as an argument, or from a nameless file if it is too long for one."""
    if len(code) <= _MAX_ARGUMENT_BYTES:
        return ["-c", code]
    fd = os.memfd_create("cell")
    os.set_inheritable(fd, True)
    with open(fd, "wb", closefd=False) as file:
        # bash reads a script through a descriptor of its own, so this one need not go to the commands.
        file.write(b"exec %d<&-; " % fd + code)
    return [f"/proc/self/fd/{fd}"]
