"""The private daemon of this process: start it once, tell why it ended, end it with the process.

It is a child process behind a Unix socket (0600) in a directory of its own (0700).  It watches this process
and ends by itself when this one dies in whatever way.  Knows no HTTP.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from podflare.client import _config
from podflare.client._config import Address
from podflare.errors import DaemonStartFailed

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 7.0
"""After SIGTERM; the daemon itself takes at most 5 s to close its sandboxes."""
MAX_SOCKET_PATH_BYTES = 107
"""sun_path is 108 bytes with its NUL."""
KEPT_LOG_BYTES = 16 * 1024
SHOWN_LOG_LINES = 12

_PREFIX = "podflare-"
_UNLOCKED_PREFIX = ".podflare-"
"""Of a directory that its process has not locked yet."""
_SOCKET = "daemon.sock"

_HINT = (
    "Run `podflare doctor` to see what this machine lacks, or start `podflare serve` elsewhere and pass host= "
    "(or set PODFLARE_HOSTD_URL)."
)


class _Directory:
    """A private directory, locked while its process lives so that others can tell what was left behind."""

    def __init__(self) -> None:
        self.path, self._lock_fd = self._make()

    @staticmethod
    def _make() -> tuple[str, int]:
        problems = []
        for base in _config.runtime_directories():
            name_bytes = len(os.fsencode(f"{base}/{_PREFIX}xxxxxxxx/{_SOCKET}"))
            if name_bytes > MAX_SOCKET_PATH_BYTES:
                problems.append(f"{base}: too long for a socket path")
                continue
            try:
                _remove_leftovers(base)
                unlocked = Path(tempfile.mkdtemp(prefix=_UNLOCKED_PREFIX, dir=base))  # 0700
            except OSError as exc:
                problems.append(f"{base}: {exc.strerror}")
                continue
            lock_fd = os.open(unlocked, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock_fd, fcntl.LOCK_EX)
            path = unlocked.rename(unlocked.with_name(unlocked.name[1:]))
            return str(path), lock_fd
        raise DaemonStartFailed(
            "no directory for the daemon's socket: " + "; ".join(problems) + ". Set XDG_RUNTIME_DIR."
        )

    @property
    def socket_path(self) -> str:
        return f"{self.path}/{_SOCKET}"

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.forget()
        _remove_leftovers(str(Path(self.path).parent))

    def forget(self) -> None:
        """Let go without removing: for a forked child, whose parent owns the directory."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def _remove_leftovers(base: str) -> None:
    """Remove what killed processes left: their daemons take the socket with them, the directory stays."""
    for path in Path(base).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            info = path.lstat()
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
                continue
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _answers(path / _SOCKET) and {entry.name for entry in path.iterdir()} <= {_SOCKET}:
                    shutil.rmtree(path)
            finally:
                os.close(fd)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.2)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


class _Log:
    """The last bytes that the daemon wrote to stderr.  One thread a daemon, which ends with the daemon."""

    def __init__(self, fd: int) -> None:
        self._kept: collections.deque[bytes] = collections.deque()
        self._size = 0
        self._fd = fd
        self._thread = threading.Thread(target=self._drain, name="podflare-daemon-log", daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        while True:
            try:
                data = os.read(self._fd, 64 * 1024)
            except OSError:
                data = b""
            if not data:
                break
            self._kept.append(data)
            self._size += len(data)
            while self._size - len(self._kept[0]) >= KEPT_LOG_BYTES:
                self._size -= len(self._kept.popleft())
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def last_lines(self) -> str:
        text = b"".join(list(self._kept))[-KEPT_LOG_BYTES:].decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-SHOWN_LOG_LINES:])

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def forget(self) -> None:
        """In a forked child, where the thread does not exist."""
        self._close()


class Daemon:
    """One life of the private daemon."""

    def __init__(self) -> None:
        """Start it without waiting for it.

        Raises: DaemonStartFailed if there is no interpreter, no directory, or the process cannot be made.
        """
        if not sys.executable:
            raise DaemonStartFailed(f"sys.executable is empty, so there is no interpreter to run the daemon. {_HINT}")
        self._directory = _Directory()
        self.address = Address("http://localhost", uds=self._directory.socket_path, embedded=True)
        self._ready = False
        self._ready_lock = threading.Lock()
        self._failure: str | None = None
        try:
            self._process, self._log = self._spawn()
        except OSError as exc:
            self._directory.remove()
            raise DaemonStartFailed(f"cannot run {sys.executable}: {exc.strerror}. {_HINT}") from exc
        except BaseException:
            self._directory.remove()
            raise

    def _spawn(self) -> tuple[subprocess.Popen[bytes], _Log]:
        command = [sys.executable, "-m", "podflare", "serve", "--uds", self._directory.socket_path]
        command += ["--embedded", "--parent-pid", str(os.getpid()), "--announce"]
        log_fd, daemon_fd = os.pipe()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=daemon_fd,
                bufsize=0,
                cwd="/",  # whatever lies in the user's directory must not shadow a module, nor the daemon pin it
                env=_config.daemon_environment(Path(__file__).parents[2]),
                start_new_session=True,  # Ctrl-C is for the user's program, not for its daemon
            )
        except BaseException:
            os.close(log_fd)
            raise
        finally:
            os.close(daemon_fd)
        return process, _Log(log_fd)

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._failure is None and self._process.poll() is None

    def wait_ready(self) -> None:
        """Return once the daemon accepts connections.  Any number of threads.

        Raises: DaemonStartFailed, with the last lines of its log, if it ended or was not ready in time; the
            process is gone then.
        """
        with self._ready_lock:
            if self._ready:
                return
            if self._failure is None:
                problem = self._read_ready_line(time.monotonic() + START_TIMEOUT_S)
                if not problem:
                    self._ready = True
                    return
                self.stop()
                self._failure = f"the private daemon did not start: {problem}.{self._log_excerpt()}\n{_HINT}"
            raise DaemonStartFailed(self._failure)

    def _read_ready_line(self, deadline: float) -> str:
        """ "" when ready, else what is wrong."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        line = b""
        while b"\n" not in line:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poller.poll(left_s * 1000):
                return f"it was not ready within {START_TIMEOUT_S:g} s"
            data = os.read(fd, 4096)
            if not data or len(line) > 64 * 1024:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(2)
                return _ending(self._process.returncode)
            line += data
        try:
            ready = json.loads(line.partition(b"\n")[0])
        except ValueError:
            ready = None
        if not isinstance(ready, dict) or ready.get("ready") is not True:
            return f"it announced {line!r:.200}"
        return ""

    def settle(self) -> None:
        """Give a daemon whose connection just broke the moment it needs to be seen dead."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)

    def ending(self) -> str:
        """Why its sandboxes cannot be reached any more, for an error message; "" while it lives."""
        if self.alive():
            return ""
        ended = _ending(self._process.returncode)
        return (
            f"the private daemon of this process is gone ({ended}), and the sandboxes with it; "
            f"make a new one, which starts a new daemon.{self._log_excerpt()}"
        )

    def _log_excerpt(self) -> str:
        self._log.join(0.5)
        lines = self._log.last_lines()
        return f"\nThe last lines of its log:\n{lines}" if lines else ""

    def stop(self) -> None:
        """End it and remove what it used.  Idempotent, at most STOP_TIMEOUT_S and a little."""
        process = self._process
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._log.join(1)
        if process.stdout is not None:
            process.stdout.close()
        self._directory.remove()

    def forget(self) -> None:
        """In a forked child: close what was inherited, without touching the parent's daemon."""
        self._process.returncode = 0  # else the Popen object would count it as an unreaped child of ours
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.forget()
        self._directory.forget()


def _ending(returncode: int | None) -> str:
    if returncode is None:
        return "it closed its output"
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode}"


_lock = threading.Lock()
_current: Daemon | None = None
_endings: dict[Address, str] = {}
"""Why earlier daemons cannot be reached, for the messages of the sandboxes that lived there."""
_MAX_ENDINGS = 16
_hooks_set = False


def begin() -> Daemon:
    """The living daemon, or a new one that is starting.  Quick: the caller imports meanwhile, then `wait_ready`."""
    global _current, _hooks_set
    with _lock:
        if _current is not None and not _current.alive():
            _retire(_current)
            _current = None
        if _current is None:
            if not _hooks_set:
                atexit.register(stop)
                os.register_at_fork(after_in_child=_forget_in_child)
                _hooks_set = True
            _current = Daemon()
        return _current


def _retire(daemon: Daemon) -> None:
    daemon.stop()
    while len(_endings) >= _MAX_ENDINGS:
        del _endings[next(iter(_endings))]
    _endings[daemon.address] = daemon.ending()


def ready_address() -> Address:
    """Address of the living daemon, started if needed.  Blocks up to START_TIMEOUT_S.

    Raises: DaemonStartFailed.
    """
    daemon = begin()
    daemon.wait_ready()
    return daemon.address


def is_alive(address: Address) -> bool:
    """Whether the daemon of this address lives."""
    current = _current
    return current is not None and current.address == address and current.alive()


def ending(address: Address) -> str:
    """What is known of the end of the daemon that had this address; "" if it lives or never was ours."""
    current = _current
    if current is not None and current.address == address:
        current.settle()
        return current.ending()
    return _endings.get(address, "")


def stop() -> None:
    """End the private daemon of this process, if there is one, with its sandboxes.  The next use starts a new one."""
    global _current
    with _lock:
        if _current is not None:
            _retire(_current)
            _current = None


def _forget_in_child() -> None:
    global _lock, _current
    # Another thread of the parent may have held the lock at the fork.
    _lock = threading.Lock()
    daemon, _current = _current, None
    if daemon is not None:
        _endings[daemon.address] = (
            "this process was forked from the one whose private daemon has the sandbox; make a new one here"
        )
        daemon.forget()
