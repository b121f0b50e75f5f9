"""A host daemon of the benchmark's own on loopback, and what its processes use."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from podflare import Client, Sandbox

START_S = 30.0
STOP_S = 30.0


class Daemon:
    """`podflare serve` on a free loopback port, for as long as its `with` block lasts."""

    def __init__(self, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._data_dir = tempfile.mkdtemp(prefix="podflare-bench-")
        Path(self._data_dir).chmod(0o711)  # a machine of a root daemon enters with another id
        self._log = Path(self._data_dir) / "log"
        command = [
            sys.executable,
            "-m",
            "podflare",
            "serve",
            "--port",
            str(port),
            "--data-dir",
            self._data_dir,
            *arguments,
        ]
        keep = {name: value for name, value in os.environ.items() if not name.startswith("PODFLARE_")}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=keep)

    def __enter__(self) -> Daemon:
        try:
            self._wait_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._data_dir, ignore_errors=True)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        with Client(self.url) as client:
            while not client.healthz():
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the daemon did not start:\n{self._log.read_text(errors='replace')}")
                time.sleep(0.02)

    def settle(self, seconds: float = 0.3) -> None:
        """Let the pool refill: a burst of creates is another benchmark than a single one."""
        time.sleep(seconds)

    def sandbox(self) -> Sandbox:
        return Sandbox(host=self.url)

    def pss_bytes(self) -> int:
        """Proportional memory of the daemon and everything below it; shared pages count once in the sum."""
        return sum(_pss(pid) for pid in _tree(self._process.pid))

    def disk_bytes(self) -> int:
        """What its data directory holds, each inode once."""
        counted = subprocess.run(["du", "-s", "-B1", self._data_dir], capture_output=True, text=True, check=False)
        return int(counted.stdout.split()[0])


def _tree(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def _pss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0
