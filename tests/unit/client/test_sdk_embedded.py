"""client/_embedded.py without a daemon: directories, leftovers, the kept log."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from podflare.client import _embedded
from podflare.errors import DaemonStartFailed


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one place for private directories."""
    monkeypatch.setattr(_embedded._config, "runtime_directories", lambda: iter([str(tmp_path)]))
    return tmp_path


def test_directory_is_private_and_goes(runtime: Path) -> None:
    """0700, under its final name once it is locked, and gone after `remove`, which may be repeated."""
    directory = _embedded._Directory()
    (found,) = runtime.iterdir()
    assert str(found) == directory.path and found.name.startswith("podflare-")
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    directory.remove()
    directory.remove()
    assert list(runtime.iterdir()) == []


def test_only_leftovers_are_removed(runtime: Path) -> None:
    """What a dead process left goes; directories in use, with other content, or of another kind stay."""
    used = _embedded._Directory()
    left = runtime / "podflare-left"
    left.mkdir()
    socket.socket(socket.AF_UNIX).bind(str(left / "daemon.sock"))
    foreign = runtime / "podflare-foreign"
    foreign.mkdir()
    (foreign / "precious").touch()
    (runtime / "podflare-file").touch()
    (runtime / "podflare-link").symlink_to(left)
    served = runtime / "podflare-served"
    served.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(served / "daemon.sock"))
        server.listen()
        _embedded._remove_leftovers(str(runtime))
    names = {path.name for path in runtime.iterdir()}
    used_name = Path(used.path).name
    assert names == {used_name, "podflare-foreign", "podflare-file", "podflare-link", "podflare-served"}
    used.remove()


def test_no_place_for_a_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """When every place is too long or missing, the error lists each with its reason."""
    places = [str(tmp_path / ("x" * 120)), str(tmp_path / "missing")]
    monkeypatch.setattr(_embedded._config, "runtime_directories", lambda: iter(places))
    with pytest.raises(DaemonStartFailed, match=r"too long for a socket path.*missing: No such file"):
        _embedded._Directory()


def test_log_keeps_the_last_lines_only() -> None:
    """A daemon that writes without end fills neither a pipe nor memory."""
    read, write = os.pipe()
    log = _embedded._Log(read)
    with os.fdopen(write, "w") as stream:
        for number in range(100_000):
            stream.write(f"line {number}\n")
    log.join(20)
    assert log._size < 2 * 64 * 1024 + _embedded.KEPT_LOG_BYTES
    assert log.last_lines().splitlines() == [f"line {number}" for number in range(99_988, 100_000)]
