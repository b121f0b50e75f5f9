"""The way without a line of change: a program for Anthropic's hosted tool, run as it is behind `podflare gateway`.

Owns the gateway's process and the program's.  Prints nothing: the caller shows what the program prints.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from podflare import Client
from podflare.demo.agent import DEFAULT_MODEL
from podflare.demo.scripted_model import MODEL as SCRIPTED_MODEL
from podflare.demo.scripted_model import ScriptedModel
from podflare.errors import NotBuilt, PodflareError
from podflare.integrations.anthropic.containers.index import Index

PROGRAM = Path(__file__).with_name("hosted_program.py")
_API = "https://api.anthropic.com"
_START_S = 40.0
_STOP_S = 20.0
_PROGRAM_S = 300.0
_IDLE_S = 300
_FOLDER = "podflare-demo-"


@dataclass(frozen=True)
class HostedStart:
    """The gateway accepts connections and the program begins."""

    gateway: str
    upstream: str
    program: Path


def run_hosted(
    show: Callable[[HostedStart | str], None],
    *,
    host: str | None = None,
    model: str | None = None,
    scripted: bool = False,
) -> None:
    """Run the program behind a gateway of its own on a free loopback port, and end both.

    Args:
        show: called with HostedStart, then with each line that the program prints.
        host, model, scripted: as for `run_demo`.
    Raises: PodflareError if the gateway does not start, or the program fails.
    """
    for package, extra in (("anthropic", "anthropic"), ("python_multipart", "gateway")):
        if importlib.util.find_spec(package) is None:
            raise NotBuilt(f"this part of the demo needs another package: pip install 'podflare[{extra}]'")
    environment = _environment()
    scripted = scripted or not os.environ.get("ANTHROPIC_API_KEY")
    with ExitStack() as stack:
        if scripted:
            upstream, name = stack.enter_context(ScriptedModel()).url, SCRIPTED_MODEL
            environment["ANTHROPIC_API_KEY"] = "not-needed"
        else:
            upstream, name = os.environ.get("ANTHROPIC_BASE_URL") or _API, model or DEFAULT_MODEL
        address = stack.enter_context(_gateway(upstream, host, environment))
        show(HostedStart(address, upstream, PROGRAM))
        _run_program(name, {**environment, "ANTHROPIC_BASE_URL": address}, show)


def _environment() -> dict[str, str]:
    """Ours without what was set for another gateway, or would send a proxy what stays on this machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PODFLARE_GATEWAY_")}
    beside = kept.get("no_proxy") or kept.get("NO_PROXY")
    kept["no_proxy"] = kept["NO_PROXY"] = ",".join(filter(None, (beside, "127.0.0.1")))
    return kept


@contextmanager
def _gateway(upstream: str, host: str | None, environment: dict[str, str]) -> Iterator[str]:
    """Its address.  It ends with the block, and with this process in whatever way that one ends."""
    command = [sys.executable, "-m", "podflare", "gateway", "--port", "0", "--announce", "--upstream", upstream]
    command += ["--idle-timeout", str(_IDLE_S)]  # what outlives a killed demo at a daemon of the user's ends soon
    with ExitStack() as stack:
        data_dir, lock = stack.enter_context(_data_folder())
        stack.callback(_end_sandboxes, host, Path(data_dir, "gateway.sqlite"))
        log = stack.enter_context(tempfile.TemporaryFile())
        its_end, our_end = os.pipe()
        stack.callback(os.close, our_end)
        try:
            process = subprocess.Popen(
                [*command, "--data-dir", data_dir, *([] if host is None else ["--daemon", host])],
                stdin=its_end,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the demo, which then ends the gateway
                pass_fds=[lock],
            )
            stack.callback(_stop, process)
            _end_with_us(its_end, process.pid)
        finally:
            os.close(its_end)
        yield _address(process, log)


@contextmanager
def _data_folder() -> Iterator[tuple[str, int]]:
    """A temporary directory and the descriptor that locks it, for as long as a process has that open.

    It goes with the block; after a SIGKILL of this process with the next demo.
    """
    base = Path(tempfile.gettempdir())
    for left in base.glob(f"{_FOLDER}*"):
        with suppress(OSError):  # of a demo that runs, of another user, or just removed by another demo
            os.close(_locked(left))
            shutil.rmtree(left)
    unlocked = Path(tempfile.mkdtemp(prefix=f".{_FOLDER}", dir=base))  # under a name that nobody removes
    lock = _locked(unlocked)
    folder = unlocked.rename(base / unlocked.name[1:])
    try:
        yield str(folder), lock
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked(folder: Path) -> int:
    """Raises: OSError if a process has locked it, or it is not this user's."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(lock).st_uid != os.geteuid():
            raise PermissionError(f"{folder} is another user's")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _end_sandboxes(host: str | None, index_file: Path) -> None:
    """At a daemon of the user's they would outlive the gateway, as containers do."""
    if not index_file.exists():
        return
    with closing(Index(index_file)) as index:
        left = index.lasting_sandboxes()
    if left:
        with Client(host) as client:
            for sandbox_id in left:
                client.destroy_sandbox(sandbox_id)


def _end_with_us(pipe_end: int, pid: int) -> None:
    """Have the kernel send SIGTERM to `pid` when the other end of the pipe is closed, be it by SIGKILL of this one."""
    fcntl.fcntl(pipe_end, fcntl.F_SETOWN, pid)
    fcntl.fcntl(pipe_end, fcntl.F_SETSIG, signal.SIGTERM)
    fcntl.fcntl(pipe_end, fcntl.F_SETFL, fcntl.fcntl(pipe_end, fcntl.F_GETFL) | os.O_ASYNC)


def _address(process: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    """What the gateway announces.  Raises: PodflareError with its last words if it announces nothing."""
    assert process.stdout is not None
    line = process.stdout.readline() if select.select([process.stdout], [], [], _START_S)[0] else b""
    if not line:
        log.seek(0)
        words = log.read().decode("utf-8", "replace").strip()[-2000:]
        raise PodflareError(f"the gateway did not start: {words or f'no word of it in {_START_S:.0f} s'}")
    return str(json.loads(line)["address"])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        if process.stdout is not None:
            process.stdout.close()


def _run_program(model: str, environment: dict[str, str], show: Callable[[HostedStart | str], None]) -> None:
    """Raises: PodflareError if it fails, or takes too long."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), model],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        text=True,
        errors="replace",
    )
    limit = threading.Timer(_PROGRAM_S, process.kill)
    limit.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            show(line.rstrip("\n"))
    finally:
        limit.cancel()
        limit.join()
        process.kill()
        code = process.wait()
        if process.stdout is not None:
            process.stdout.close()
    if code != 0:
        raise PodflareError(f"the program failed with exit code {code}; what it printed last says why")
