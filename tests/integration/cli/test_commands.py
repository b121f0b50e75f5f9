"""`ls`, `doctor`, `serve` and `repl` against a real daemon."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import time
from pathlib import Path

from daemons import served
from podflare import Sandbox
from programs import PROGRAM, Cli

WAIT_S = 30.0


def test_ls_shows_sandboxes_as_a_table_and_as_json(cli: Cli) -> None:
    """A sandbox made by the SDK is listed with its metadata, one line each, and gone after its end."""
    with Sandbox(host=cli.address, metadata={"who": "a\nb\x1b[2J"}) as sandbox:
        line = next(line for line in cli("ls").stdout.splitlines() if sandbox.id in line)
        assert r"who=a\nb\x1b[2J" in line and "1024 MiB" in line
        head, *rows = cli("ls", "--usage").stdout.splitlines()
        assert "changed files" in head and any(re.search(rf"{sandbox.id} .* MiB +[12] +0 +who", row) for row in rows)
        listed = json.loads(cli("ls", "--json").stdout)
        assert [entry["state"] for entry in listed if entry["id"] == sandbox.id] == ["ready"]
    assert sandbox.id not in cli("ls").stdout


def test_ls_needs_a_daemon(cli: Cli) -> None:
    """Without an address there is nobody to ask; that is wrong usage, not an empty list."""
    environment = {name: value for name, value in cli.environment.items() if not name.startswith("PODFLARE_")}
    done = subprocess.run([*PROGRAM, "ls"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "PODFLARE_HOSTD_URL" in done.stderr


def test_tree_shows_what_was_forked_from_what(cli: Cli) -> None:
    """Forks stand indented below their parent, with generation and losses; JSON has the same order and the depth."""
    with Sandbox(host=cli.address, metadata={"who": "a\nb"}) as root:
        root.run_code("import subprocess; p = subprocess.Popen(['sleep', '1000'])")
        (child,) = root.fork()
        (grandchild,) = child.fork()
        child.run_code("open('/root/f', 'w').close()")
        with child, grandchild:
            lines = cli("tree").stdout.splitlines()
            at = next(number for number, line in enumerate(lines) if line.startswith(root.id))
            assert r"who=a\nb" in lines[at] and "stayed behind" in lines[0]
            assert lines[0].split("  ")[0] == "sandbox" and "private memory" in lines[0] and "changed files" in lines[0]
            columns = r"+1 +ready +\d+s +\d+\.\d MiB +[12] +1 +processes=1 +who"
            assert re.match(rf"  {child.id} {columns}", lines[at + 1])
            assert re.match(rf"    {grandchild.id} +2 ", lines[at + 2])
            listed = json.loads(cli("tree", "--json").stdout)
            used = {entry["id"]: entry["usage"]["changed_files"] for entry in listed}
            assert (used[root.id], used[child.id]) == (0, 1)
            depths = {entry["id"]: (entry["depth"], entry["parent_id"]) for entry in listed}
            assert depths[child.id] == (1, root.id) and depths[grandchild.id] == (2, child.id)
            child.close()
            assert f"{grandchild.id} [{child.id}]" in cli("tree").stdout


def test_tree_needs_a_daemon(cli: Cli) -> None:
    """As `ls`: without an address it is wrong usage."""
    environment = {name: value for name, value in cli.environment.items() if not name.startswith("PODFLARE_")}
    done = subprocess.run([*PROGRAM, "tree"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "PODFLARE_HOSTD_URL" in done.stderr


def test_doctor_finds_what_the_daemon_uses(cli: Cli) -> None:
    """Every wall that a sandbox has is one that the doctor called available, and sandboxes can be made here."""
    done = cli("doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    available = {wall["wall"] for engine in report["engines"] for wall in engine["walls"] if wall["available"]}
    with Sandbox(host=cli.address) as sandbox:
        assert set(sandbox.info().isolation) <= available
    assert "engine process: usable" in cli("doctor").stdout


def test_serve_refuses_to_be_open_to_everybody(cli: Cli) -> None:
    """An address that others reach needs keys; the message says how."""
    done = cli("serve", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 1 and "PODFLARE_API_KEYS" in done.stderr and "Traceback" not in done.stderr


def test_serve_does_not_start_with_a_part_of_its_engines(cli: Cli, data_dir: Path) -> None:
    """If one of the engines that are named cannot work here there is no daemon, and the line says which and why."""
    words = ("serve", "--port", "0", "--data-dir", f"{data_dir}/serve", "--pool-size", "0")
    done = cli(*words, "--engine", "process,microvm", path="/nonexistent")
    assert done.returncode == 1 and "the microvm engine cannot work here" in done.stderr
    done = cli(*words, "--engine", "process", "--engine", "none")
    assert done.returncode == 1 and "unknown engine 'none'; this version has: process, microvm" in done.stderr
    assert "Traceback" not in done.stderr


def test_run_and_repl_name_the_engine(cli: Cli) -> None:
    """`--engine` says what makes the sandbox; one that the daemon does not offer is told in one line."""
    done = cli("run", "--engine", "process", "-c", "print(6 * 7)")
    assert (done.returncode, done.stdout) == (0, "42\n")
    for words in (("run", "-c", "1"), ("repl",)):
        done = cli(*words, "--engine", "microvm")
        assert done.returncode == 1 and "unknown engine 'microvm'; this daemon offers: process" in done.stderr


def test_repl_in_a_pipe_keeps_state_and_prints_values(cli: Cli) -> None:
    """Cells from a pipe share one Python; values are shown, bash works, errors do not end it."""
    cells = "x = 20\nfor n in range(2):\n    print(n)\n\nx + 22\n1 / 0\n!echo from bash\nx\n"
    done = cli("repl", stdin=cells)
    assert done.stdout.splitlines() == ["0", "1", "42", "from bash", "20"]
    assert "ZeroDivisionError" in done.stderr and done.returncode == 0


class _Terminal:
    """`podflare repl` on a terminal of the test's own."""

    def __init__(self, cli: Cli) -> None:
        self.master, slave = pty.openpty()
        environment = {**cli.environment, "TERM": "dumb"}
        # A session of its own, so that the terminal's Ctrl-C reaches this process group.
        self.process = subprocess.Popen(
            [*PROGRAM, "repl"], env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str) -> None:
        """Read on until `pattern` appears in what was not waited for yet."""
        deadline = time.monotonic() + WAIT_S
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.seen!r}"
            self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
        self.seen = self.seen[found.end() :]

    def press_until(self, key: str, pattern: str) -> None:
        """Press `key` until `pattern` appears: readline sees a signal that came just before it waits with the next."""
        for _ in range(int(WAIT_S)):
            self.type(key)
            ready, _, _ = select.select([self.master], [], [], 1)
            if ready:
                break
        self.wait_for(pattern)

    def close(self) -> int:
        try:
            return self.process.wait(WAIT_S)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.master)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_repl_on_a_terminal(cli: Cli) -> None:
    """Blocks continue, Ctrl-C interrupts a running cell and drops a typed line, Ctrl-D ends it; state stays."""
    terminal = _Terminal(cli)
    try:
        terminal.wait_for("sandbox sbx_[0-9a-f]{32}")
        terminal.wait_for(">>> ")
        terminal.type("def twice(n):\n")
        terminal.wait_for(r"\.\.\. ")
        terminal.type("    return 2 * n\n\n")
        terminal.wait_for(">>> ")
        terminal.type("twice(21)\n")
        terminal.wait_for(r"\n42\r?\n>>> ")
        terminal.type("while True: print('spin', 'ning', sep='') or __import__('time').sleep(0.1)\n")
        terminal.wait_for(r"\.\.\. ")
        terminal.type("\n")
        terminal.wait_for("spinning")
        terminal.type("\x03")
        terminal.wait_for("KeyboardInterrupt")
        terminal.wait_for(">>> ")
        terminal.type("this is dropped")
        terminal.wait_for("dropped")
        terminal.press_until("\x03", ">>> ")
        terminal.type("twice(50)\n")
        terminal.wait_for(r"\n100\r?\n>>> ")
        terminal.type("\x04")
    finally:
        code = terminal.close()
    assert code == 0


def test_serve_ends_on_sigterm(cli: Cli, data_dir: Path) -> None:
    """A daemon that is asked to end does, with exit code 0 and nothing left (the leak check looks)."""
    with cli.start("serve", "--port", "0", "--data-dir", f"{data_dir}/serve", "--pool-size", "0") as daemon:
        assert daemon.stderr is not None
        while "http://127.0.0.1" not in daemon.stderr.readline():
            assert daemon.poll() is None
        daemon.send_signal(signal.SIGTERM)
        daemon.communicate(timeout=30)
    assert daemon.returncode == 0


def test_serve_may_open_as_many_files_as_its_user(data_dir: Path) -> None:
    """The soft limit that a daemon is started with does not limit its sandboxes; the hard one does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        with served(data_dir) as daemon:
            assert resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
