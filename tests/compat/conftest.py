"""The published client, in an environment of its own, against this project's daemon."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemons import ServedDaemon, served

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-client/bin/python"
VERSION = "0.0.22"

Script = Callable[..., str]


@pytest.fixture(scope="session")
def real_client() -> Path:
    """Interpreter of the environment with the published client; made if it is missing.

    Skips, or fails where CI is set, if it cannot be made.
    """
    if not PYTHON.exists():
        made = subprocess.run(
            [str(ROOT / "scripts/setup.sh"), "--real-client"], capture_output=True, text=True, timeout=300
        )
        reason = (made.stdout + made.stderr).strip()[-500:]
    probe = "from importlib.metadata import version; print(version('podflare'))"
    if PYTHON.exists():
        found = subprocess.run([str(PYTHON), "-I", "-c", probe], capture_output=True, text=True, timeout=60)
        if found.stdout.strip() == VERSION:
            return PYTHON
        reason = f"{PYTHON} has {found.stdout.strip() or found.stderr.strip()[-200:]!r}"
    message = f"the published client {VERSION} is not installed ({reason}); run scripts/setup.sh --real-client"
    pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return PYTHON


@pytest.fixture(scope="session")
def compat_daemon(private_temp: Path) -> Iterator[ServedDaemon]:
    """A daemon without keys whose heartbeats are quick, so that silence is tested in seconds."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir=private_temp))
    folder.chmod(0o711)
    with served(folder, env={"PODFLARE_HEARTBEAT_SECONDS": "1"}, gate=True) as daemon:
        yield daemon


@pytest.fixture
def script(real_client: Path, compat_daemon: ServedDaemon, tmp_path: Path) -> Script:
    """Runs a program with the published client; `HOST` in it is the daemon; gives back what it printed."""

    def run(text: str, *, host: str | None = None, **variables: str) -> str:
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        program = f"HOST = {host or compat_daemon.url!r}\nimport podflare\nfrom podflare import Client, Sandbox\n{text}"
        done = subprocess.run(
            [str(real_client), "-I", "-W", "error", "-c", program],
            capture_output=True, text=True, timeout=60, env={**environment, **variables}, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
