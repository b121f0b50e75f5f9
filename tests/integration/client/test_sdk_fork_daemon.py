"""fork, merge_into, diff and explore on a real daemon and real sandboxes."""

from __future__ import annotations

import concurrent.futures
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import anyio
import pytest

from daemons import ServedDaemon
from podflare import (
    AsyncSandbox,
    Client,
    DeadlineExceeded,
    FileMissing,
    Sandbox,
    SandboxNotFound,
    explore,
    explore_async,
)

pytestmark = [pytest.mark.any_engine, pytest.mark.timeout(90)]


@pytest.fixture(autouse=True)
def no_sandbox_left(sdk_daemon: ServedDaemon, shared_connections: None) -> Iterator[None]:
    """Every test closes what it forks."""
    yield
    assert [info.id for info in Sandbox.list(host=sdk_daemon.url)] == []


@pytest.fixture
def parent(sdk_daemon: ServedDaemon) -> Iterator[Sandbox]:
    """A sandbox with x = [1] and a file, closed before the look at what is left."""
    with Sandbox(host=sdk_daemon.url) as sandbox:
        sandbox.run_code("x = [1]\nopen('/root/f', 'w').write('start\\n')")
        yield sandbox


@pytest.mark.both_engines
def test_branches_go_their_own_ways(parent: Sandbox) -> None:
    """Children have the parent's variables and files; no change crosses in any direction; the tree is told."""
    with ExitStack() as stack:
        first, second = (stack.enter_context(child) for child in parent.fork(2))
        first.run_code("x.append(2); open('/root/f', 'a').write('first\\n')")
        parent.run_code("x.append(3)")
        states = [one.run_code("print(x, open('/root/f').read().split())").stdout for one in (parent, first, second)]
        assert states == ["[1, 3] ['start']", "[1, 2] ['start', 'first']", "[1] ['start']"]
        info = first.info()
        assert (info.parent_id, info.generation) == (parent.id, 1)
        assert info.fork_report is not None and info.fork_report.lossless
        assert set(parent.info().children) == {first.id, second.id}


@pytest.mark.process_engine("virtual machines take all along")
def test_what_cannot_cross_is_told(parent: Sandbox) -> None:
    """Threads, processes and sockets of the parent are named in the child's report, and live on in the parent."""
    parent.run_code(
        "import socket, subprocess, threading\n"
        "stop = threading.Event()\n"
        "threading.Thread(target=stop.wait, name='waiter', daemon=True).start()\n"
        "process = subprocess.Popen(['sleep', '1000'])\n"
        "a, b = socket.socketpair()"
    )
    with parent.fork()[0] as child:
        report = child.info().fork_report
        assert report is not None and not report.lossless
        assert (report.threads, report.processes, report.sockets) == (("waiter",), 1, 2)
        assert "waiter" not in child.run_code("print([t.name for t in threading.enumerate()])").stdout
    assert parent.run_code("print(process.poll(), threading.active_count() > 1)").stdout == "None True"


@pytest.mark.both_engines
def test_random_numbers_differ_unless_asked(parent: Sandbox) -> None:
    """With reseed each branch draws numbers of its own, without it all draw the same."""
    parent.run_code("import random; random.seed(7)")

    def drawn(reseed: bool) -> set[str]:
        texts = set()
        for child in parent.fork(3, reseed=reseed):
            with child:
                texts.add(child.run_code("print(random.random())").stdout)
        return texts

    assert (len(drawn(True)), len(drawn(False))) == (3, 1)


@pytest.mark.both_engines
def test_merge_takes_the_winners_state(parent: Sandbox) -> None:
    """The parent's id goes on with the winner's memory and files; the winner is gone, its sibling is not."""
    winner, sibling = parent.fork(2)
    with sibling:
        winner.run_code("x.append('won'); open('/root/f', 'w').write('won')")
        parent.run_code("x.append('lost')")
        parent.merge_into(winner)
        assert parent.run_code("print(x, open('/root/f').read())").stdout == "[1, 'won'] won"
        assert sibling.run_code("print(x)").stdout == "[1]"
        winner.close()
        with pytest.raises(SandboxNotFound, match="merged"):
            winner.run_code("1")
        with pytest.raises(SandboxNotFound, match=winner.id):
            parent.merge_into(Sandbox._from_id(winner.id, parent._client_for("test")))
        assert parent.run_code("print(x)").stdout == "[1, 'won']"


@pytest.mark.both_engines
def test_a_dead_id_cannot_win(parent: Sandbox, sdk_daemon: ServedDaemon) -> None:
    """Merging a sandbox that is closed or never was is an error that changes nothing."""
    closed = parent.fork()[0]
    closed.close()
    with Client(sdk_daemon.url) as client:
        for dead in (closed.id, "sbx_" + "0" * 32):
            with pytest.raises(SandboxNotFound, match=dead):
                client.merge_into(parent.id, dead)
    assert parent.run_code("print(x)").stdout == "[1]"


def test_diff_tells_files(parent: Sandbox) -> None:
    """Added, removed and changed paths, where asked; details with sizes and a patch; nothing between equals."""
    parent.run_code("mkdir -p /data; echo 1 > /data/a; echo 1 > /tmp/gone", "bash")
    with parent.fork()[0] as child:
        assert parent.diff(child) == {"added": [], "removed": [], "modified": []}
        child.run_code("echo more >> /root/f; rm /tmp/gone; echo 2 > /data/b; touch '/root/new name'", "bash")
        assert parent.diff(child) == {"added": ["/root/new name"], "removed": ["/tmp/gone"], "modified": ["/root/f"]}
        assert parent.diff(child, ["/data"]) == {"added": ["/data/b"], "removed": [], "modified": []}
        change = parent.diff(child, detail=True)["detail"]["/root/f"]
        assert (change["kind"], change["size_before"], change["size_after"]) == ("file", 6, 11)
        assert "+more" in change["patch"].splitlines()
        with pytest.raises(ValueError, match="absolute"):
            parent.diff(child, ["relative"])


@pytest.mark.both_engines
def test_fork_waits_for_the_running_cell(parent: Sandbox) -> None:
    """A fork sees the end of the cell before it; with a timeout below that it fails, and nothing was made."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = threading.Event()

        def run() -> None:
            code = (
                "import os, time\nprint('on', flush=True)\nwhile not os.path.exists('/tmp/go'): time.sleep(0.01)\nx = 5"
            )
            for _event in parent.run_code_stream(code):
                running.set()

        cell = pool.submit(run)
        assert running.wait(20)
        with pytest.raises(DeadlineExceeded):
            parent.fork(2, timeout=0.3)
        assert parent.info().children == ()
        parent.upload(b"", "/tmp/go")
        with parent.fork(timeout=20)[0] as child:
            assert child.run_code("print(x)").stdout == "5"
        cell.result(20)


def test_a_killed_program_leaves_no_forks(sdk_daemon: ServedDaemon, parent: Sandbox) -> None:
    """A program killed while its fork waits for a running cell: the daemon makes no child for it."""
    script = (
        "import sys\nfrom podflare import Sandbox\n"
        "s = Sandbox.connect(sys.argv[2], host=sys.argv[1])\nprint('forking', flush=True)\ns.fork(3)"
    )
    running = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        def run() -> None:
            for _event in parent.run_code_stream("import time\nprint('on')\nwhile True: time.sleep(0.1)"):
                running.set()

        cell = pool.submit(run)
        assert running.wait(20)
        program = subprocess.Popen([sys.executable, "-c", script, sdk_daemon.url, parent.id], stdout=subprocess.PIPE)
        assert program.stdout is not None and program.stdout.readline() == b"forking\n"
        program.kill()
        program.communicate(timeout=20)
        parent.interrupt()
        cell.result(20)
    assert parent.run_code("print(x)").stdout == "[1]"  # behind whatever waited
    assert parent.info().children == ()


def test_generations_have_no_end(parent: Sandbox) -> None:
    """Fork and merge, again and again, goes on beyond the depth to which the kernel nests namespaces."""
    for turn in range(28):
        child = parent.fork()[0]
        child.run_code(f"x.append({turn})")
        parent.merge_into(child)
    assert parent.run_code("print(len(x))").stdout == "29"
    assert parent.info().generation == 28


def test_explore_merges_the_best(parent: Sandbox) -> None:
    """Forty candidates in two batches; the best one's memory and files are the sandbox's afterwards."""
    candidates = [f"x.append({n}); open('/root/f', 'w').write('{n}')" for n in range(40)]
    found = explore(parent, candidates, "-abs(sum(x) - 31)", parallel=4)
    assert found.best is not None and (found.best.index, found.best.score) == (30, 0.0)
    assert parent.run_code("print(x, open('/root/f').read())").stdout == "[1, 30] 30"
    assert parent.info().children == ()


def test_explore_ends_runaway_and_broken_candidates(parent: Sandbox, engine_name: str) -> None:
    """A candidate that spins, one that kills its Python and one that raises lose; a timeout bounds all of it."""
    candidates = ["while True: pass", "import os; os._exit(3)", "1 / 0", "x.append(4)"]
    found = explore(parent, candidates, "sum(x)", timeout=1 if engine_name == "process" else 5)
    assert [attempt.score for attempt in found.attempts] == [None, None, None, 5.0]
    assert "timed_out" in found.attempts[0].problem or "KeyboardInterrupt" in found.attempts[0].problem
    assert parent.run_code("print(x)").stdout == "[1, 4]"


@pytest.mark.both_engines
def test_explore_keeps_a_beam(parent: Sandbox) -> None:
    """The kept branches come back in order, live and open; the sandbox is as it was."""
    found = explore(parent, [f"x.append({n})" for n in (5, 9, 7)], lambda branch, result: _sum(branch), keep=2)
    assert [attempt.score for attempt in found.ranking] == [10.0, 8.0]
    assert [branch.run_code("print(x)").stdout for branch in found.branches] == ["[1, 9]", "[1, 7]"]
    for branch in found.branches:
        branch.close()
    assert parent.run_code("print(x)").stdout == "[1]"


def _sum(branch: Sandbox) -> float:
    return float(branch.run_code("print(sum(x))").stdout)


def test_ctrl_c_in_explore_leaves_no_branch(sdk_daemon: ServedDaemon, parent: Sandbox) -> None:
    """A program stopped by Ctrl-C while candidates spin closes every branch on its way out."""
    script = (
        "import sys, podflare\n"
        "s = podflare.Sandbox.connect(sys.argv[2], host=sys.argv[1])\n"
        "podflare.explore(s, [\"open('/tmp/on', 'w')\\nwhile True: pass\"] * 3, 'x', parallel=3)"
    )
    program = subprocess.Popen([sys.executable, "-c", script, sdk_daemon.url, parent.id], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    with Client(sdk_daemon.url) as client:
        while len([child for child in parent.info().children if _has(client, child, "/tmp/on")]) < 3:
            assert program.poll() is None and time.monotonic() < deadline
    program.send_signal(signal.SIGINT)
    _, stderr = program.communicate(timeout=30)
    assert b"KeyboardInterrupt" in stderr and b"PodflareError" not in stderr
    assert parent.info().children == ()
    assert parent.run_code("print(x)").stdout == "[1]"


def _has(client: Client, sandbox_id: str, path: str) -> bool:
    try:
        client.download(sandbox_id, path)
    except FileMissing:
        return False
    return True


@pytest.mark.anyio
async def test_explore_async_and_its_cancellation(sdk_daemon: ServedDaemon) -> None:
    """The twin merges the best; cancelled while candidates spin, it leaves no branch and the sandbox as it was."""
    async with AsyncSandbox(host=sdk_daemon.url) as sandbox:
        await sandbox.run_code("x = 1")
        found = await explore_async(sandbox, ["x = 2", "x = 3"], "x")
        assert found.best is not None and found.best.score == 3.0
        with anyio.move_on_after(1) as scope:
            await explore_async(sandbox, ["while True: pass"] * 3, "x")
        assert scope.cancelled_caught
        assert (await sandbox.info()).children == ()
        assert (await sandbox.run_code("print(x)")).stdout == "3"
        a, b = await sandbox.fork(2)
        await b.run_code("open('/root/new', 'w')")
        assert (await sandbox.diff(b))["added"] == ["/root/new"]
        await sandbox.merge_into(b)
        await a.close()


@pytest.mark.both_engines
def test_diff_tells_variables(parent: Sandbox) -> None:
    """With variables=True the answer tells those that a branch added, removed and changed, and files as ever."""
    parent.run_code("rows = [1]; gone = 1; same = {1, 2}")
    with parent.fork()[0] as child:
        child.run_code("rows.append(2); del gone; new = 'x'; open('/root/new', 'w')")
        found = parent.diff(child, variables=True)
        assert found["added"] == ["/root/new"]
        variables = found["variables"]
        assert [list(variables[key]) for key in ("added", "removed", "changed", "unread")] == [
            ["new"], ["gone"], ["rows"], [],
        ]  # fmt: skip
        change = variables["changed"]["rows"]
        assert (change["type_before"], change["type_after"]) == ("list", "list")
        assert change["fingerprint_before"] != change["fingerprint_after"]
        assert "variables" not in parent.diff(child)
        back = child.diff(parent, variables=True)["variables"]["changed"]["rows"]
        assert back["fingerprint_after"] == change["fingerprint_before"]


@pytest.mark.anyio
async def test_async_diff_tells_variables(sdk_daemon: ServedDaemon) -> None:
    """The twin tells them, too."""
    async with AsyncSandbox(host=sdk_daemon.url) as sandbox:
        await sandbox.run_code("x = 1")
        async with (await sandbox.fork(1))[0] as child:
            await child.run_code("x = 2.5")
            variables = (await sandbox.diff(child, variables=True))["variables"]
            assert variables["changed"]["x"]["type_after"] == "float"


def test_forks_of_the_private_daemon_outlive_their_parent_object() -> None:
    """Without an address, too: children use the parent's connection, also after the parent was closed."""
    parent = Sandbox()
    parent.run_code("x = 6 * 7")
    child, other = parent.fork(2)
    parent.close()
    assert child.run_code("print(x)").stdout == "42"
    child.merge_into(other)
    assert re.fullmatch("sbx_[0-9a-f]{32}", child.id)
    child.close()
