"""The instance directory of one daemon life, and the reaping of those that dead daemons left.

`data_dir/instances/<instance>/` belongs to the daemon that holds the flock on its `lock` file; the kernel drops the
lock with the process, however it ended.  Whoever gets the lock of a directory may remove it, nobody else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from podflare.errors import BadRequest
from podflare.host import telemetry

FRESH_S = 60.0
"""A directory under its first name is left alone for so long: its daemon may be about to lock and rename it."""

Reap = Callable[[Path, str], None]
"""Engine hook: end and remove everything that the dead instance (its directory, its name) left outside the directory
and mounted in it.  The directory itself is removed by the caller.  Blocking; raises OSError if something resists."""


@dataclass
class Instance:
    """This daemon's directory, locked until `close`."""

    name: str
    directory: Path
    living: tuple[str, ...] = ()
    """Names of other instances that live in the same data directory."""
    _lock: int = field(default=-1, repr=False)
    _reaping: threading.Thread | None = field(default=None, repr=False)

    @property
    def outputs(self) -> Path:
        """Where kept output of cells goes."""
        return self.directory / "outputs"

    def finish_reaping(self) -> None:
        """Wait until nothing is left of the dead daemons that the start found."""
        if self._reaping is not None:
            self._reaping.join()

    def close(self) -> None:
        """Finish the reaping, remove the directory and give up the lock.  Idempotent."""
        self.finish_reaping()
        if self._lock >= 0:
            try:
                _remove(self.directory)
            except OSError as exc:
                telemetry.problem("instance directory left for the next start", directory=self.directory, error=exc)
            os.close(self._lock)
            self._lock = -1


def open_instance(data_dir: Path, reap: Reap) -> Instance:
    """Make and lock this daemon's directory; begin to remove the directories of dead daemons.

    That goes on behind the start, in a thread: it takes as long as they had sandboxes.
    Raises: BadRequest if the data directory cannot be used (message says what to do).
    """
    instances = data_dir / "instances"
    # The ids of a root daemon's machines must be able to enter, not to look around: names are random.
    mode = 0o711 if os.geteuid() == 0 else 0o700
    try:
        _private(data_dir, mode)
        _private(instances, mode)
        dead, living = _take_dead(instances)
        name = "i" + secrets.token_hex(6)
        # Made under a name that reaping skips and renamed when locked, so that nobody ever sees it unlocked.
        fresh = instances / f".new-{name}"
        fresh.mkdir(mode=mode)
        lock = _lock(fresh)
        (fresh / "outputs").mkdir(mode=0o700)
        fresh.rename(instances / name)
    except OSError as exc:
        raise BadRequest(f"cannot use the data directory {data_dir}: {exc}; choose another with --data-dir") from exc
    reaping = threading.Thread(target=_reap_all, args=(dead, reap), name="reaping")
    reaping.start()
    return Instance(name, instances / name, living, lock, reaping)


def _private(path: Path, mode: int) -> None:
    """Make `path`, or check that nobody else could have put anything there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=mode)
        path.chmod(mode)
    found = path.lstat()
    if found.st_uid != os.geteuid() or not path.is_dir() or path.is_symlink():
        raise PermissionError(f"{path} is not a directory of this user")
    if found.st_mode & 0o022:
        raise PermissionError(f"others may write to {path} (chmod go-w it)")


def _lock(directory: Path) -> int:
    """An fd holding the directory's lock.  Raises: BlockingIOError if a living daemon holds it."""
    # Not inheritable: a child that kept it open would keep a dead daemon's lock.
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _take_dead(instances: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """The directories of dead daemons, each with its lock, now held here; and the names of those that live."""
    dead, living = [], []
    for directory in sorted(instances.iterdir()):
        try:
            if directory.name.startswith(".new-") and time.time() - directory.stat().st_mtime < FRESH_S:
                continue
            dead.append((directory, _lock(directory)))
        except BlockingIOError:
            living.append(directory.name)
        except OSError:
            # Just removed by another daemon that reaps at the same time.
            continue
    return dead, tuple(living)


def _reap_all(dead: list[tuple[Path, int]], reap: Reap) -> None:
    for directory, lock in dead:
        try:
            reap(directory, directory.name)
            _remove(directory)
            telemetry.event("dead daemon reaped", instance=directory.name)
        except OSError as exc:
            telemetry.problem("could not reap what a dead daemon left", instance=directory.name, error=exc)
        finally:
            os.close(lock)


def _remove(directory: Path) -> None:
    """Remove a directory whose files may have had their owner's write permission taken away.

    Raises: OSError if something is mounted in it: removing would reach into what is mounted there.
    """
    mounts = _mounts_below(directory)
    if mounts:
        raise OSError(f"still mounted: {', '.join(mounts[:3])}")

    def retry(function: Callable[[str], object], path: str, _: object) -> None:
        with contextlib.suppress(OSError):
            Path(path).parent.chmod(0o700)
            if not Path(path).is_symlink():
                Path(path).chmod(0o700)
            function(path)

    shutil.rmtree(directory, onerror=retry)
    if directory.exists():
        telemetry.problem("directory could not be removed completely", directory=directory)


def _mounts_below(directory: Path) -> list[str]:
    prefix = os.path.realpath(directory) + "/"
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return []
    # The fifth field is the mount point, with blanks and the like as octal escapes.
    points = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split()[4]) for line in lines)
    return [point for point in points if (point + "/").startswith(prefix)]
