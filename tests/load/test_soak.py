"""Hours of use in minutes: what a daemon holds after a long churn is what it held before."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from daemons import served
from podflare import Sandbox, close_default_client

SECONDS = float(os.environ.get("SOAK_SECONDS", "900"))
CLIENTS = 4
WARM_UP_S = 20.0
RSS_BUDGET_BYTES = 48 * 2**20
"""Room for ten minutes' remembered Idempotency-Keys, which are bounded, and for the allocator's own scatter."""
FD_BUDGET = 8


@dataclass(frozen=True)
class Holdings:
    """What the daemon's process and those below it hold of the machine."""

    rss_bytes: int
    fds: int
    processes: int
    zombies: int
    files: int

    @classmethod
    def of(cls, pid: int, data_dir: Path) -> Holdings:
        states = _states_below(pid)
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return cls(
            rss_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
            fds=len(os.listdir(f"/proc/{pid}/fd")),
            processes=len(states),
            zombies=states.count("Z"),
            files=sum(len(files) + len(folders) for _, folders, files in os.walk(data_dir)),
        )


def _states_below(root: int) -> list[str]:
    rows: dict[int, tuple[int, str]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            rows[int(name)] = (int(fields[1]), fields[0])
    found: list[str] = []
    wave = {root}
    while wave:
        wave = {pid for pid, (parent, _) in rows.items() if parent in wave}
        found += [rows[pid][1] for pid in wave]
    return found


def _quiet(sandbox: Sandbox) -> None:
    assert sandbox.run_code("x = 20\nprint(x + 22)").stdout == "42"


def _chatty(sandbox: Sandbox) -> None:
    assert sandbox.run_code("print('y' * 100 + '\\n', end='') or [print(n) for n in range(20000)] and None").ok


def _failing(sandbox: Sandbox) -> None:
    assert sandbox.run_code("1 / 0").exit_code == 1


def _too_long(sandbox: Sandbox) -> None:
    assert sandbox.run_code("while True: pass", timeout=0.2).exit_code == 124


def _suicidal(sandbox: Sandbox) -> None:
    sandbox.run_code("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert sandbox.run_code("print(1)").stdout == "1"


def _orphaning(sandbox: Sandbox) -> None:
    assert sandbox.run_code("for n in 1 2 3; do (sleep 1000 &) ; done; sleep 1000 &", "bash").exit_code == 0


def _moving_files(sandbox: Sandbox) -> None:
    content = os.urandom(300_000)
    sandbox.upload(content, "/root/f")
    assert sandbox.download("/root/f") == content


def _leaving(sandbox: Sandbox) -> None:
    for _ in sandbox.run_code_stream("print('first')\nwhile True: pass"):
        break


LIVES: tuple[Callable[[Sandbox], None], ...] = (
    _quiet, _chatty, _failing, _too_long, _suicidal, _orphaning, _moving_files, _leaving
)  # fmt: skip


def _churn(url: str, until: float, seed: int, failures: list[BaseException], done: list[int]) -> None:
    draw = random.Random(seed)
    while time.monotonic() < until and not failures:
        try:
            with Sandbox(host=url) as sandbox:
                for life in draw.sample(LIVES, 3):
                    life(sandbox)
        except BaseException as error:  # noqa: BLE001 - raised again by the test's own thread
            failures.append(error)
        done[seed] += 1


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 300)
def test_a_long_churn_leaves_nothing_behind(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After many sandboxes that behaved badly, memory, descriptors, processes and files are within their budgets."""
    with served(data_dir) as daemon:
        done = [0] * CLIENTS
        _run_clients(daemon.url, WARM_UP_S, done)
        before = _settled(daemon.pid, data_dir / "d")
        _run_clients(daemon.url, SECONDS, done)
        after = _settled(daemon.pid, data_dir / "d")
        with capsys.disabled():
            print(f"\n{sum(done)} sandboxes; before {before}; after {after}")
        assert after.zombies == 0
        assert after.processes <= before.processes
        assert after.fds <= before.fds + FD_BUDGET
        assert after.files <= before.files
        assert after.rss_bytes <= before.rss_bytes + RSS_BUDGET_BYTES


def _run_clients(url: str, seconds: float, done: list[int]) -> None:
    failures: list[BaseException] = []
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=_churn, args=(url, until, number, failures, done)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close_default_client()
    if failures:
        raise failures[0]


def _settled(pid: int, data_dir: Path) -> Holdings:
    """The holdings once releases that go on behind closed sandboxes have ended (two equal looks, at most 30 s)."""
    deadline = time.monotonic() + 30
    last = Holdings.of(pid, data_dir)
    while time.monotonic() < deadline:
        time.sleep(1)  # nothing announces the end of a release
        now = Holdings.of(pid, data_dir)
        if (now.processes, now.fds, now.files) == (last.processes, last.fds, last.files):
            return now
        last = now
    return last
