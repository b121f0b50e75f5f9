"""Branches of a live sandbox: fork, merge and diff, beside building the same state again and a plain os.fork.

Times are what the SDK sees on loopback; the goals are for the server side, so the HTTP round trip comes on top.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from benchmarks.daemon import Daemon
from benchmarks.series import Series, timed_ms
from podflare import Sandbox

GIB = 1 << 30
MIB = 1 << 20
STATE = "import json, re, decimal, statistics\ndata = {n: [n] * 10 for n in range(100_000)}"
REBUILD = "the same state built again in a fresh sandbox"
FLOOR = "plain os.fork of a process with 1 GiB, child's first word"


def measure(full: bool) -> list[Series]:
    rounds = 20 if full else 8
    with Daemon("--pool-size", "0") as daemon:
        series = _forks(daemon, rounds) + _turns(daemon, rounds)
        series += [
            merge_series(daemon, rounds),
            merge_series(daemon, min(rounds, 5), STATE, ", 100,000 lists in memory"),
        ]
        series += _large(daemon, 8 if full else 4) + _diff(daemon, 100_000 if full else 20_000)
    return [*series, Series(FLOOR, "ms", tuple(_plain_fork() for _ in range(rounds)))]


def _forks(daemon: Daemon, rounds: int) -> list[Series]:
    """fork(n) alone, for several n; and one child's way to the state by running the code again."""
    found = []
    with daemon.sandbox() as parent:
        parent.run_code(STATE)
        goals = {1: "<= 10 ms (server side)", 5: "<= 30 ms (server side)", 32: "<= 200 ms (server side)"}
        for count, goal in goals.items():
            values = tuple(_fork_ms(parent, count) for _ in range(rounds if count < 32 else 3))
            found.append(Series(f"fork({count})", "ms", values, goal, REBUILD if count == 1 else ""))
        found.append(_memory_of_a_child(daemon, parent))
    rebuilt = tuple(timed_ms(lambda: _rebuild(daemon)) for _ in range(rounds))
    return [*found, Series(REBUILD, "ms", rebuilt)]


def _fork_ms(parent: Sandbox, count: int) -> float:
    children: list[Sandbox] = []
    taken = timed_ms(lambda: children.extend(parent.fork(count)))
    for child in children:
        child.close()
    return taken


def _rebuild(daemon: Daemon) -> None:
    with daemon.sandbox() as sandbox:
        sandbox.run_code(STATE)


def _memory_of_a_child(daemon: Daemon, parent: Sandbox) -> Series:
    """What each of eight children adds, having run a cell."""
    before = daemon.pss_bytes()
    with ExitStack() as stack:
        for child in parent.fork(8):
            stack.enter_context(child).run_code("len(data)")
        added = (daemon.pss_bytes() - before) / 8 / MIB
    return Series("memory that a forked child adds (PSS)", "MiB", (added,), "<= 6 MiB", note="mean of 8")


def _turns(daemon: Daemon, rounds: int) -> list[Series]:
    """fork(2), work in both, keep one: the time of merge_into."""
    merges = []
    with daemon.sandbox() as parent:
        parent.run_code(STATE)
        for number in range(min(rounds, 15)):
            winner, other = parent.fork(2)
            winner.run_code(f"data[0] = {number}")
            merges.append(timed_ms(lambda winner=winner: parent.merge_into(winner)))  # type: ignore[misc]
            other.close()
    return [Series("merge_into", "ms", tuple(merges), "<= 5 ms")]


def merge_series(daemon: Daemon, rounds: int, state: str = "", what: str = "", engine: str = "") -> Series:
    """Two forks, one of which goes on to change files and variables, and the other to take the changes over."""
    values = []
    with daemon.sandbox() as parent:
        parent.run_code(state)
        one, two = parent.fork(2)
        with one, two:
            one.diff(two, variables=True)  # both know what they have before anything changes
            for number in range(rounds):
                two.run_code(
                    f"for n in range(10): open(f'/root/{{n}}', 'w').write('{number}' * 1000)\n"
                    f"v0, v1, v2, v3, v4 = [{number}], {number}, '{number}', ({number},), {{{number}}}"
                )
                values.append(timed_ms(lambda: one.merge(two)))
    return Series(f"{engine}merge of 10 files and 5 variables{what}", "ms", tuple(values))


def _large(daemon: Daemon, rounds: int) -> list[Series]:
    with Sandbox(host=daemon.url, ram_mib=4096) as parent:
        parent.run_code(f"block = bytearray({GIB})\nfor i in range(0, {GIB}, 4096): block[i] = 1")
        values = tuple(_fork_ms(parent, 1) for _ in range(rounds))
    return [Series("fork(1) with 1 GiB of live data", "ms", values, "<= 25 ms (server side)", FLOOR)]


def _diff(daemon: Daemon, files: int) -> list[Series]:
    """Two forks of a sandbox with many files, ten changed in one."""
    with daemon.sandbox() as parent:
        parent.run_code(
            f"import os\nfor n in range({files}):\n"
            "    folder = f'/root/tree/{n // 1000}'\n    os.makedirs(folder, exist_ok=True)\n"
            "    open(f'{folder}/{n}', 'w').write(str(n))"
        )
        one, two = parent.fork(2)
        with one, two:
            two.run_code("for n in range(10): open(f'/root/tree/0/{n}', 'w').write('changed')")
            work: Callable[[], object] = lambda: one.diff(two)  # noqa: E731  # timed_ms takes a callable
            assert len(one.diff(two)["modified"]) == 10
            values = tuple(timed_ms(work) for _ in range(10))
    return [Series(f"diff, 10 changed among {files:,} files", "ms", values, "<= 20 ms")]


def _plain_fork() -> float:
    """The floor: what the kernel needs for the memory alone."""
    block = bytearray(GIB)
    for start in range(0, GIB, 4096):
        block[start] = 1

    def fork() -> None:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writer, b".")
            os._exit(0)
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        os.waitpid(pid, 0)

    return timed_ms(fork)
