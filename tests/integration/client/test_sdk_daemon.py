"""The synchronous SDK on a real daemon and real sandboxes."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import httpx
import pytest

from daemons import ServedDaemon, served
from podflare import (
    Client,
    FileMissing,
    NotBuilt,
    PodflareWarning,
    Sandbox,
    SandboxNotFound,
    Unauthorized,
    UnknownTemplate,
)

pytestmark = [pytest.mark.any_engine, pytest.mark.timeout(90)]


@pytest.mark.both_engines
def test_first_steps(sandbox: Sandbox) -> None:
    """State stays between cells, bash sees the same files, a bad cell leaves everything usable."""
    assert sandbox.run_code("x = 6 * 7\nprint(x)").stdout == "42"
    assert sandbox.run_code("print(x + 1)").stdout == "43"
    failed = sandbox.run_code("print('before'); 1/0")
    assert (failed.ok, failed.stdout) == (False, "before")
    assert failed.error is not None and failed.error.name == "ZeroDivisionError"
    assert "ZeroDivisionError" in failed.stderr
    sandbox.run_code("open('/tmp/f', 'w').write('shared')")
    assert sandbox.run_code("cat /tmp/f", "bash").stdout == "shared"
    assert sandbox.run_code("print(x)").stdout == "42"


@pytest.mark.both_engines
def test_last_value_is_a_result_not_output(sandbox: Sandbox) -> None:
    """The value of a last expression arrives as a rich result beside an empty stdout."""
    result = sandbox.run_code("{'a': 1}")
    assert (result.stdout, result.results[0].text, result.duration > 0) == ("", "{'a': 1}", True)


@pytest.mark.both_engines
def test_stream_arrives_while_the_cell_runs(sandbox: Sandbox) -> None:
    """An event is here before the cell goes on: the cell waits for a file made after its first line was seen."""
    code = (
        "import os, time\nprint('one', flush=True)\nwhile not os.path.exists('/tmp/go'): time.sleep(0.01)\nprint('two')"
    )
    seen = []
    for event in sandbox.run_code_stream(code):
        seen.append(event.data)
        if event.data == "one":
            sandbox.upload(b"", "/tmp/go")
    assert seen == ["one", "two", 0]


@pytest.mark.both_engines
def test_leaving_a_stream_frees_the_sandbox(sandbox: Sandbox) -> None:
    """A stream left early interrupts its cell, so that the next call does not wait for it."""
    for _event in sandbox.run_code_stream("import time\nprint('on')\nwhile True: time.sleep(0.1)"):
        break
    started = time.monotonic()
    assert sandbox.run_code("print('free')").stdout == "free"
    assert time.monotonic() - started < 10


@pytest.mark.both_engines
def test_timeout_keeps_the_state(sandbox: Sandbox) -> None:
    """A cell above its timeout ends with 124 and says so; variables are still there."""
    sandbox.run_code("x = 1")
    result = sandbox.run_code("while True: pass", timeout=0.5)
    assert (result.exit_code, result.reason) == (124, "timed_out")
    assert "timed out" in result.stderr
    assert sandbox.run_code("print(x)").stdout == "1"


@pytest.mark.both_engines
def test_interrupt_from_another_thread(sandbox: Sandbox) -> None:
    """`interrupt` ends the running cell as Ctrl-C would, and tells whether one ran."""
    assert sandbox.interrupt() is False
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        started = threading.Event()

        def run() -> list[object]:
            seen = []
            for event in sandbox.run_code_stream("import time\nprint('on')\nwhile True: time.sleep(0.1)"):
                seen.append(event)
                started.set()
            return seen

        running = pool.submit(run)
        assert started.wait(20)
        assert sandbox.interrupt() is True
        exit_event = running.result(20)[-1]
    assert exit_event.extra["reason"] == "interrupted"  # type: ignore[attr-defined]  # an Event
    assert sandbox.run_code("print('alive')").ok


def test_ctrl_c_interrupts_the_cell(sandbox: Sandbox, sdk_daemon: ServedDaemon) -> None:
    """A program that dies of Ctrl-C in run_code leaves its sandbox free for others."""
    script = (
        "import sys\nfrom podflare import Client, Sandbox\n"
        "s = Sandbox.connect(sys.argv[2], host=sys.argv[1])\n"
        "s.run_code(\"open('/tmp/on', 'w')\\nwhile True: pass\")"
    )
    program = subprocess.Popen([sys.executable, "-c", script, sdk_daemon.url, sandbox.id], stderr=subprocess.PIPE)
    _wait_for(lambda: _exists(sandbox, "/tmp/on"))
    program.send_signal(signal.SIGINT)
    _, stderr = program.communicate(timeout=20)
    assert b"KeyboardInterrupt" in stderr
    assert sandbox.run_code("print('free')", timeout=20).stdout == "free"


def _exists(sandbox: Sandbox, path: str) -> bool:
    try:
        sandbox.download(path)
    except FileMissing:
        return False
    return True


def _wait_for(condition, limit_s: float = 20.0) -> None:  # type: ignore[no-untyped-def]  # a predicate
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)  # between two looks at a condition that has no event


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_files_travel_byte_for_byte(sandbox: Sandbox, tmp_path: Path, size: int) -> None:
    """Binary content of any size comes back as it went, from memory and from files, into new directories."""
    content = os.urandom(size)
    (tmp_path / "in").write_bytes(content)
    sandbox.upload(content, "/data/deep/a.bin")
    sandbox.upload("/data/deep/b.bin", content)
    sandbox.upload(str(tmp_path / "in"), "/data/deep/c.bin")
    for name in "abc":
        assert sandbox.download(f"/data/deep/{name}.bin") == content
    assert sandbox.download_file("/data/deep/a.bin", tmp_path / "out") == size
    assert (tmp_path / "out").read_bytes() == content
    assert sandbox.run_code("import os; print(os.path.getsize('/data/deep/a.bin'))").stdout == str(size)


@pytest.mark.both_engines
def test_file_transfers_leave_the_repl_alone(sandbox: Sandbox) -> None:
    """Uploads and downloads make no names in the REPL, follow no chdir and pass by a running cell."""
    sandbox.run_code("import os; os.chdir('/tmp'); base64 = 'mine'; open = None")
    sandbox.upload(b"x", "/root/f")
    assert sandbox.download("/root/f") == b"x"
    assert sandbox.run_code("print(base64, open)").stdout == "mine None"


def test_file_errors_are_os_errors_with_the_path(sandbox: Sandbox) -> None:
    """A missing file and a directory are named; both are also OSError and HTTPStatusError."""
    with pytest.raises(FileMissing, match="/nope") as caught:
        sandbox.download("/nope")
    assert isinstance(caught.value, OSError) and isinstance(caught.value, httpx.HTTPStatusError)
    with pytest.raises(OSError, match="/tmp"):
        sandbox.upload(b"x", "/tmp")


def test_what_is_gone_says_why(sdk_daemon: ServedDaemon) -> None:
    """A closed sandbox is SandboxNotFound with the cause, for every client that knew its id."""
    with Client(sdk_daemon.url) as client:
        sandbox = Sandbox(client=client)
        other = Sandbox._from_id(sandbox.id, client)
        sandbox.close()
        with pytest.raises(SandboxNotFound, match="closed"):
            other.run_code("1")
        other.close()  # gone is closed


def test_reaped_sandbox_closes_silently(sdk_daemon: ServedDaemon) -> None:
    """Leaving the block after the idle timeout raises nothing, and the error before named the timeout."""
    with Sandbox(host=sdk_daemon.url, idle_timeout_seconds=1) as sandbox, Client(sdk_daemon.url) as client:
        _wait_for(lambda: sandbox.id not in [info.id for info in client.list_sandboxes()])
        with pytest.raises(SandboxNotFound, match="idle"):
            sandbox.run_code("1")


def test_extend(sandbox: Sandbox) -> None:
    """A sandbox's lifetimes can be changed while it lives; without any the call is an error of its own."""
    info = sandbox.extend(500, idle_timeout_seconds=70)
    assert info.timeout_seconds is not None and 500 <= info.timeout_seconds <= 600 and info.idle_timeout_seconds == 70
    assert sandbox.info().idle_timeout_seconds == 70
    with pytest.raises(ValueError, match="timeout_seconds"):
        sandbox.extend()


def test_connect_list_info(sandbox: Sandbox, sdk_daemon: ServedDaemon) -> None:
    """A second program finds a living sandbox, with its state and its labels."""
    sandbox.run_code("x = 5")
    found = Sandbox.connect(sandbox.id, host=sdk_daemon.url)
    assert found.run_code("print(x)").stdout == "5"
    assert sandbox.id in [info.id for info in Sandbox.list(host=sdk_daemon.url)]
    assert "no_new_privileges" in sandbox.info().isolation
    with Sandbox(host=sdk_daemon.url, metadata={"run": "7"}) as labelled:
        assert labelled.info().metadata == {"run": "7"}


def test_effective_values_and_warning(sdk_daemon: ServedDaemon) -> None:
    """Limits come back as they are in force, with a warning for one that is not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sandbox = Sandbox(host=sdk_daemon.url, egress=False, ram_mib=256)
    texts = [str(one.message) for one in caught if issubclass(one.category, PodflareWarning)]
    with sandbox:
        # Where no control group holds memory, the daemon says that, too.
        assert any("ram_mib" in text for text in texts) is ("memory_limit" not in sandbox.info().isolation)
        info = sandbox.info()
        assert (info.egress, info.ram_mib) == (False, 256)


def test_refusals_of_the_daemon(sandbox: Sandbox, sdk_daemon: ServedDaemon) -> None:
    """Unknown templates and languages, and what is not built, are typed errors with the daemon's text."""
    with pytest.raises(UnknownTemplate, match="no-such"):
        Sandbox(host=sdk_daemon.url, template="no-such")
    with pytest.raises(ValueError, match="language"):
        sandbox.run_code("1", "cobol")  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(NotBuilt, match="not built"):
        Sandbox(host=sdk_daemon.url, persistent=True)


def test_api_keys(private_temp: Path, data_dir: Path) -> None:
    """With keys configured, none and a wrong one are refused, the right one works, in argument and variable."""
    with served(data_dir, env={"PODFLARE_API_KEYS": "pf_right,pf_other"}) as daemon:
        for key in (None, "pf_wrong"):
            with pytest.raises(Unauthorized, match="PODFLARE_API_KEY"):
                Sandbox(host=daemon.url, api_key=key)
        with Sandbox(host=daemon.url, api_key="pf_right") as sandbox:
            assert sandbox.run_code("print(1)").ok
            with pytest.raises(SandboxNotFound):
                Sandbox.connect(sandbox.id, host=daemon.url, api_key="pf_other")


def test_environment_names_the_daemon(sdk_daemon: ServedDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each address variable alone directs a plain `Sandbox()`, with or without other arguments."""
    for name in ("PODFLARE_HOSTD_URL", "PODFLARE_HOST", "PODFLARE_API_URL"):
        monkeypatch.setenv(name, sdk_daemon.url)
        with Sandbox() as plain, Sandbox(api_key="pf_any") as keyed:
            assert {plain.id, keyed.id} <= {info.id for info in Sandbox.list()}
        monkeypatch.delenv(name)


def test_whole_output_of_a_loud_cell(sandbox: Sandbox) -> None:
    """Of 20 MB the result has head and tail and counts the rest; `output` has every byte."""
    result = sandbox.run_code("line = 'x' * 999\nfor i in range(20_000): print(line)")
    assert result.stdout_dropped_bytes > 0
    assert result.stdout_dropped_bytes + len(result.stdout) == pytest.approx(20_000_000, abs=1000)
    assert sandbox.output(result.cell_id) == b"x" * 999 + (b"\n" + b"x" * 999) * 19_999 + b"\n"


@pytest.mark.both_engines
def test_replay(sandbox: Sandbox) -> None:
    """The events of earlier cells, oldest first."""
    sandbox.run_code("print('a')")
    sandbox.run_code("print('b')")
    assert [event.data for event in sandbox.replay()] == ["a", 0, "b", 0]


@pytest.mark.both_engines
def test_one_sandbox_many_threads(sandbox: Sandbox) -> None:
    """Cells sent at the same time run one after the other, and each gets its own output."""
    sandbox.run_code("n = 0")
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        results = list(pool.map(lambda i: sandbox.run_code(f"n += 1; print({i}, n)").stdout, range(10)))
    assert [int(text.split()[0]) for text in results] == list(range(10))
    assert sorted(int(text.split()[1]) for text in results) == list(range(1, 11))


def test_many_sandboxes_many_threads(sdk_daemon: ServedDaemon) -> None:
    """Interleaved cells of several sandboxes never mix their states or outputs."""

    def work(i: int) -> list[str]:
        with Sandbox(host=sdk_daemon.url) as sandbox:
            sandbox.run_code(f"mine = {i}")
            return [sandbox.run_code(f"print(mine, {turn})").stdout for turn in range(3)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, lines in enumerate(pool.map(work, range(8))):
            assert lines == [f"{i} {turn}" for turn in range(3)]


def test_nothing_grows_with_use(sdk_daemon: ServedDaemon) -> None:
    """Sandbox after sandbox uses the same connection: descriptors and threads stay as they were."""

    def holdings() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with Sandbox(host=sdk_daemon.url) as sandbox:
        sandbox.run_code("1")
    before = holdings()
    for _ in range(15):
        with Sandbox(host=sdk_daemon.url) as sandbox:
            assert sandbox.run_code("print(1)").ok
    assert holdings() == before


def test_forked_child_has_its_own_connections(sandbox: Sandbox) -> None:
    """After os.fork both processes go on with the same sandbox, and the child holds no socket of the parent."""
    sandbox.run_code("x = 3")
    inherited = [fd for fd in os.listdir("/proc/self/fd") if _is_inet_socket(fd)]
    assert inherited
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            still = [fd for fd in inherited if _is_inet_socket(fd)]
            answer = f"{still} {sandbox.run_code('print(x)').stdout}"
        except BaseException as exc:  # noqa: BLE001  # the child may not return into pytest
            answer = repr(exc)
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    assert sandbox.run_code("print(x)").stdout == "3"
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"[] 3"
    os.waitpid(pid, 0)


def _is_inet_socket(fd: str) -> bool:
    """Whether it is a connection over loopback, and not a socket of the test's own engine or event loop."""
    try:
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
            return False
    except OSError:
        return False
    with socket.socket(fileno=os.dup(int(fd))) as sock:
        return sock.family == socket.AF_INET
