"""The private daemon: starts with the first sandbox, ends with its process, and tells when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from podflare import (
    AsyncSandbox,
    Client,
    DaemonStartFailed,
    DaemonUnreachable,
    Sandbox,
    close_default_client,
)
from podflare.client import _embedded

pytestmark = pytest.mark.timeout(90)

ENGINES = """
import os
from podflare import Sandbox, PodflareError

def tell(**options):
    try:
        with Sandbox(**options) as sandbox:
            print(sandbox.info().engine)
    except PodflareError as error:
        print(type(error).__name__, error)

tell()
tell(engine="microvm")
os.environ["PATH"] = "/nonexistent"
import podflare; podflare.close_default_client()
tell(engine="microvm")
tell(engine="process")
os.environ["PODFLARE_ENGINE"] = "process"
podflare.close_default_client()
tell(engine="microvm")
os.environ["PODFLARE_ENGINE"] = "microvm"
podflare.close_default_client()
tell()
"""

PROGRAM = """
import os, sys
from podflare import Sandbox
sandbox = Sandbox()
print(sandbox.run_code("print(6 * 7)").stdout, sandbox._maybe_client.host, flush=True)
"""
"""A user's program: answers with a cell's output and the address of its daemon."""


def wait_for(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)  # between two looks at a condition that has no event


@contextlib.contextmanager
def program(text: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """A program that runs meanwhile; killed at the end if it still runs."""
    words = [sys.executable, "-c", text]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]  # options of Popen
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


def is_served(path: str) -> bool:
    return _embedded._answers(Path(path))


def daemon_pid() -> int:
    assert _embedded._current is not None
    return _embedded._current.pid


def test_first_sandbox_starts_a_private_daemon() -> None:
    """No address, no account: a sandbox; socket 0600 in a directory 0700; the next sandbox uses the same daemon."""
    with Sandbox() as sandbox, Sandbox() as second:
        assert sandbox.run_code("print(6 * 7)").stdout == "42"
        assert second.run_code("print('x' in globals())").stdout == "False"
        path = Path(Client().host or sandbox._maybe_client.host.removeprefix("unix:"))  # type: ignore[union-attr]  # open
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert {sandbox.id, second.id} == {info.id for info in Sandbox.list()}
    pid = daemon_pid()
    close_default_client()
    assert not path.parent.exists()
    assert not Path(f"/proc/{pid}").exists()


def test_programs_end_takes_everything_with_it() -> None:
    """A program that ends without closing its sandbox leaves no daemon, no socket, no directory, and no words."""
    with program(PROGRAM) as process:
        stdout, stderr = process.communicate(timeout=40)
    output, address = stdout.split()
    assert (output, stderr, process.returncode) == ("42", "", 0)
    assert not Path(address.removeprefix("unix:")).parent.exists()


def test_killed_program_takes_its_daemon_with_it() -> None:
    """kill -9 of the program ends daemon and sandboxes; the next daemon clears what was left."""
    with program(PROGRAM + "import time; time.sleep(600)") as process:
        assert process.stdout is not None
        path = process.stdout.readline().split()[1].removeprefix("unix:")
        assert is_served(path)
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: not is_served(path))
    folder = Path(path).parent
    wait_for(lambda: not any(str(folder) in words for words in _command_lines()))
    with Sandbox():
        assert not folder.exists()


def _command_lines() -> list[str]:
    lines = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            lines.append(Path(f"/proc/{name}/cmdline").read_text().replace("\0", " "))
    return lines


def kill_daemon() -> None:
    assert _embedded._current is not None
    os.kill(daemon_pid(), signal.SIGKILL)
    wait_for(lambda: _embedded._current is None or not _embedded._current.alive())


@pytest.fixture
def reaped() -> Iterator[None]:
    """A daemon that was killed leaves control groups; the next one removes them."""
    yield
    with Sandbox():
        pass


@pytest.mark.usefixtures("reaped")
def test_killed_daemon_is_told_and_replaced() -> None:
    """A sandbox whose daemon died says so, closes silently, and the next sandbox works on a new daemon."""
    sandbox = Sandbox()
    kill_daemon()
    with pytest.raises(DaemonUnreachable, match="SIGKILL") as caught:
        sandbox.run_code("1")
    assert isinstance(caught.value, httpx.ConnectError) and isinstance(caught.value, ConnectionError)
    with pytest.raises(OSError, match="gone"):
        sandbox.upload(b"", "/x")
    sandbox.close()
    with Sandbox() as fresh:
        assert fresh.run_code("print(1)").stdout == "1"
        with pytest.raises(DaemonUnreachable, match="private daemon"):
            Sandbox._adopt(sandbox.id, Client(), address=sandbox._address, owns_client=False).run_code("1")


@pytest.mark.usefixtures("reaped")
def test_killed_daemon_takes_its_gate_with_it() -> None:
    """kill -9 of the daemon ends the process that carries its sandboxes' connections, too."""
    Sandbox(egress=["api.example.com"])
    daemon = daemon_pid()
    children = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
    (gate,) = [pid for pid in children if "egress.gate" in Path(f"/proc/{pid}/cmdline").read_text()]
    kill_daemon()
    wait_for(lambda: not Path(f"/proc/{gate}").exists())


@pytest.mark.usefixtures("reaped")
def test_daemon_killed_in_the_middle_of_a_cell() -> None:
    """The running call ends at once with an error that names the daemon's end."""
    with Sandbox() as sandbox:
        with pytest.raises(ConnectionError, match="private daemon"):
            for event in sandbox.run_code_stream("import time\nprint('on')\nwhile True: time.sleep(0.1)"):
                assert event.data == "on"
                os.kill(daemon_pid(), signal.SIGKILL)


@pytest.mark.usefixtures("reaped")
def test_a_clients_own_daemon_is_replaced_too() -> None:
    """A client that outlives its daemon makes its next sandbox on a new one."""
    with Client() as client:
        old = Sandbox(client=client)
        os.kill(daemon_pid(), signal.SIGKILL)
        with Sandbox(client=client) as new:
            assert new.run_code("print(1)").stdout == "1"
            with pytest.raises(DaemonUnreachable, match="private daemon"):
                old.run_code("1")
        old.close()


def test_threads_share_one_daemon() -> None:
    """Eight first uses at the same time start one daemon."""
    with ThreadPoolExecutor(8) as pool:
        sandboxes = list(pool.map(lambda _: Sandbox(), range(8)))
    assert len({sandbox._address for sandbox in sandboxes}) == 1
    assert [sandbox.run_code("print(1)").stdout for sandbox in sandboxes] == ["1"] * 8
    for sandbox in sandboxes:
        sandbox.close()


def test_forked_process_has_a_daemon_of_its_own() -> None:
    """After os.fork the child's sandboxes are its own, and neither its use nor its end touches the parent's."""
    with Sandbox() as sandbox:
        sandbox.run_code("x = 1")
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                try:
                    sandbox.run_code("x")
                except DaemonUnreachable as exc:
                    os.write(write, b"told " if "forked" in str(exc) else b"wrong ")
                with Sandbox() as own:
                    os.write(write, own.run_code("print('x' in globals())").stdout.encode())
                    os.write(write, b" own" if own._address != sandbox._address else b" same")
                close_default_client()
                code = 0
            finally:
                os._exit(code)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            assert pipe.read() == b"told False own"
        assert os.waitpid(pid, 0)[1] == 0
        assert sandbox.run_code("print(x)").stdout == "1"


WORKERS = """
import multiprocessing, sys
from podflare import Sandbox

def work(i):
    with Sandbox() as sandbox:
        return sandbox.run_code(f"print({i})").stdout

if __name__ == "__main__":
    with Sandbox() as sandbox, multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        print(*pool.map(work, range(4)), sandbox.run_code("print('own')").stdout)
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_multiprocessing_workers(tmp_path: Path, method: str) -> None:
    """Workers, spawned or forked, each use a daemon that ends with them; the parent's goes on."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    done = subprocess.run([sys.executable, str(script), method], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0 1 2 3 own\n", "")
    with Sandbox():  # the workers were killed: what they could not remove is removed now
        pass


def test_start_does_not_block_the_event_loop() -> None:
    """While the daemon starts, other tasks of the loop run."""

    async def main() -> tuple[str, float]:
        gaps = [0.0]
        stop = asyncio.Event()

        async def watch() -> None:
            last = time.monotonic()
            while not stop.is_set():
                await asyncio.sleep(0.005)  # the measurement itself: how late the loop comes round
                now = time.monotonic()
                gaps.append(now - last)
                last = now

        watcher = asyncio.create_task(watch())
        async with AsyncSandbox() as sandbox:
            output = (await sandbox.run_code("print(1)")).stdout
        stop.set()
        await watcher
        return output, max(gaps)

    import httpx  # noqa: F401  # loading it is not what is measured

    output, gap = asyncio.run(main())
    assert output == "1"
    assert gap < 0.3


def test_ctrl_c_is_not_for_the_daemon() -> None:
    """SIGINT to the whole foreground group reaches the program, whose sandbox goes on."""
    text = PROGRAM + (
        "try:\n    sandbox.run_code(\"print('on')\\nwhile True: pass\")\n"
        "except KeyboardInterrupt:\n    print(sandbox.run_code('print(1)').stdout, flush=True)\n"
    )
    with program(text, start_new_session=True) as process:
        assert process.stdout is not None
        host = process.stdout.readline().split()[1]
        with Client(host) as client:
            (info,) = client.list_sandboxes()
            wait_for(lambda: any(event.data == "on" for event in client.replay(info.id)) or _runs(client))
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "1\n"
        process.communicate(timeout=20)
        assert process.returncode == 0


def _runs(client: Client) -> bool:
    return client.capacity().get("running_cells", 0) > 0


def test_users_directory_cannot_shadow_modules(tmp_path: Path) -> None:
    """A json.py or podflare/ in the user's directory is not what the daemon imports."""
    (tmp_path / "podflare").mkdir()
    (tmp_path / "podflare/__init__.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "socket.py").write_text("raise SystemExit('shadowed')")
    text = "import os, sys\nsys.path = [entry for entry in sys.path if entry]\nos.chdir(sys.argv[1])\n" + PROGRAM
    words = [sys.executable, "-c", text, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=40)
    assert done.stdout.startswith("42"), done.stderr


def test_secrets_of_the_program_stay_out_of_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon's environment has no variable that it does not need."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    with Sandbox() as sandbox:
        environment = Path(f"/proc/{daemon_pid()}/environ").read_text()
        assert "sk-secret" not in environment
        assert "sk-secret" not in sandbox.run_code("import os; print(dict(os.environ))").stdout


def test_failed_start_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that refuses to start gives its own last words and what to do; the next try is a new start."""
    monkeypatch.setenv("PODFLARE_REQUIRE", "no_such_wall")
    with pytest.raises(DaemonStartFailed, match=r"(?s)no_such_wall.*podflare doctor"):
        Sandbox()
    monkeypatch.delenv("PODFLARE_REQUIRE")
    with Sandbox() as sandbox:
        assert sandbox.run_code("print(1)").ok


def test_broken_interpreter_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An interpreter that cannot be run, says nothing or nonsense, is a DaemonStartFailed in time."""
    monkeypatch.setattr(_embedded, "START_TIMEOUT_S", 0.3)
    monkeypatch.setattr(_embedded, "STOP_TIMEOUT_S", 0.2)
    for name, text, reason in (
        ("none", None, "No such file"),
        ("dies", "#!/bin/sh\necho oops >&2; exit 3", "exit code 3"),
        ("mute", "#!/bin/sh\nexec sleep 600", "not ready within"),
        ("deaf", "#!/bin/sh\ntrap '' TERM; while :; do sleep 1; done", "not ready within"),
        ("lies", "#!/bin/sh\necho hello; exec sleep 600", "hello"),
    ):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
            path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        with pytest.raises(DaemonStartFailed, match=reason):
            Sandbox()
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(DaemonStartFailed, match=r"sys\.executable"):
        Sandbox()


def test_long_runtime_directory_is_passed_over(monkeypatch: pytest.MonkeyPatch, private_temp: Path) -> None:
    """Where XDG_RUNTIME_DIR is too long for a socket path, or not there, the next place is used."""
    for place in (private_temp / ("x" * 100), private_temp / "missing"):
        if "x" in place.name:
            place.mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
        with Sandbox() as sandbox:
            assert sandbox.run_code("print(1)").ok
            assert sandbox._address is not None and str(place) not in str(sandbox._address)
        close_default_client()
        if place.exists():
            place.rmdir()


def test_ends_leave_threads_and_descriptors_as_they_were() -> None:
    """Starting and ending the daemon again and again leaks neither."""
    with Sandbox():
        pass
    close_default_client()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        with Sandbox() as sandbox:
            assert sandbox.run_code("print(1)").ok
        close_default_client()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_use_after_the_end_starts_anew() -> None:
    """close_default_client ends the sandboxes with their daemon; using one says so, a new one works."""
    sandbox = Sandbox()
    close_default_client(clear_disk_cache=True)
    with pytest.raises(DaemonUnreachable, match="private daemon"):
        sandbox.run_code("1")
    sandbox.close()
    with Sandbox() as fresh:
        assert fresh.run_code("print(1)").ok


def test_the_engine_that_a_sandbox_names(private_temp: Path) -> None:
    """The private daemon starts an engine when a sandbox names it and says what is missing; a variable narrows it."""
    environment = {**os.environ, "XDG_DATA_HOME": str(private_temp / "cache" / "no-images")}
    with program(ENGINES, env=environment) as process:
        out, err = process.communicate(timeout=80)
    lines = out.splitlines()
    assert len(lines) >= 6, err
    plain, no_image, no_programs, still, refused, failed = lines[:6]
    assert (plain, still) == ("process", "process")
    # The first one of a computer without virtual machines.
    assert "podflare image build" in no_image or "the microvm engine cannot work here" in no_image
    assert no_programs.startswith("IsolationIncomplete") and "the microvm engine cannot work here" in no_programs
    assert "unknown engine 'microvm'; this daemon offers: process" in refused
    assert failed.startswith("DaemonStartFailed") and "the microvm engine cannot work here" in out
