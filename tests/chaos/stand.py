"""One run's processes: a daemon, its clients, a program with a private daemon.  Starts them, ends them, looks at what
is left.

This process is the reaper of all of them (a child subreaper), so what lost its parent is found below it.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from chaos import processes as p
from chaos.calls import Caller, Cut
from chaos.engines import Engine
from chaos.holdings import Holdings, disk_usage, groups_by_hierarchy, groups_of
from chaos.judge import Hit, Judge
from chaos.killer import Killer
from chaos.processes import Census, Process
from podflare.engines.templates.build import build
from podflare.engines.templates.definition import parse
from podflare.engines.templates.pip import Sources
from podflare.engines.templates.store import TemplateStore
from podflare.guest import syscalls
from podflare.host.config import default_image_dir

POOL = 2
START_S = 60.0
REAP_S = 15.0
"""After the end of a daemon, until nothing of it is left."""
SETTLE_S = 30.0
"""After the last call, until a daemon holds no more than before."""
FINISH_S = 150.0
"""For clients to end their operations and to check and close their sandboxes."""
FD_BUDGET = 12
RSS_BUDGET_BYTES = 64 * 2**20
EVERY_S = (0.05, 0.35)
"""Between two deeds."""
DAEMON_LIFE_S = (4.0, 12.0)
CLIENT_LIFE_S = (2.0, 8.0)
EMBEDDED_LIFE_S = (2.0, 6.0)
PODFLARE = (sys.executable, "-m", "podflare")
IMAGE_S = 300.0
TEMPLATE = b'name = "warm"\npreload = ["json", "decimal"]\n'


@dataclass
class Client:
    """A client process and the thread that hears it."""

    name: str
    process: subprocess.Popen[str]
    workers: list[str]
    ear: threading.Thread
    finished: bool = False


@dataclass
class Stand:
    """Used as a context: nothing runs after it."""

    folder: Path
    judge: Judge
    draw: random.Random
    restart_limit_s: float
    engine: Engine
    image_dir: Path | None = None
    starts_s: list[float] = field(default_factory=list)
    late: list[tuple[float, float]] = field(default_factory=list)
    """Starts above the limit: how long they took, and what one with nothing to reap took then."""
    disk_bytes: list[int] = field(default_factory=list)
    baseline: Holdings | None = None
    last: Holdings | None = None

    def __enter__(self) -> Stand:
        syscalls.set_child_subreaper()
        self._uds = f"{self.folder}/s"
        self._data = self.folder / "d"
        self._killer = Killer(self.engine, self.judge, self.draw)
        self._clients: list[Client] = []
        self._count = 0
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PODFLARE_")}
        for name in ("r", "c", "t"):
            (self.folder / name).mkdir(mode=0o711)
        places = {"XDG_RUNTIME_DIR": "r", "XDG_CACHE_HOME": "c", "XDG_DATA_HOME": "c", "TMPDIR": "t"}
        self._environment = {**environment, **{name: str(self.folder / place) for name, place in places.items()}}
        if self.engine.name == "microvm":
            folder = str(self.image_dir or default_image_dir(os.environ))
            words = [*PODFLARE, "image", "build", "--image-dir", folder]
            subprocess.run(words, check=True, timeout=IMAGE_S, stdout=subprocess.DEVNULL)
            self._environment["PODFLARE_IMAGE_DIR"] = folder
        else:
            store = TemplateStore(self.folder / "templates")
            build(
                parse(TEMPLATE, self.folder), store, sources=Sources((), no_index=True), again=False,
                attempt=lambda scratch, built: None, tell=lambda step: None,
            )  # fmt: skip
        self._log = open(self.folder / "log", "ab")  # closed by __exit__
        self._start_daemon()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._killer.resume_due(all_of_them=True)
        for client in self._clients:
            client.process.kill()
        self._daemon.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._daemon.wait(20)
        for process in self._below().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        self._reap_all()
        self._log.close()

    # The daemon.

    def _start_daemon(self) -> None:
        self._daemon, took = self._serve(self._uds, self._data)
        self.starts_s.append(took)

    def _serve(self, uds: str, data: Path) -> tuple[subprocess.Popen[bytes], float]:
        """A daemon that is ready, and how long that took."""
        command = [
            *PODFLARE,
            "serve",
            "--engine",
            self.engine.name,
            "--uds",
            uds,
            "--announce",
            "--data-dir",
            str(data),
        ]
        command += ["--template-dir", str(self.folder / "templates"), "--pool-size", str(POOL)]
        start = time.monotonic()
        daemon = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log, env=self._environment
        )
        assert daemon.stdout is not None
        with daemon.stdout as announced:
            if not select.select([announced], [], [], START_S)[0] or not announced.readline():
                raise RuntimeError(f"the daemon did not start: {self.log()}")
        return daemon, time.monotonic() - start

    def _check_start(self, took_s: float) -> None:
        """Too late is what is late where a daemon that has nothing to reap is not."""
        if took_s <= self.restart_limit_s:
            return
        other, usual_s = self._serve(f"{self.folder}/o", self.folder / "o.d")
        other.terminate()
        other.wait(START_S)
        self.late.append((round(took_s, 2), round(usual_s, 2)))
        if took_s > 2 * usual_s:
            self.judge.violation(f"the daemon took {took_s:.2f} s to start again, a fresh one {usual_s:.2f} s")

    def _restart_daemon(self) -> None:
        """Kill it and start the next one: in time, and nothing of the first is left."""
        old, instances = self._daemon.pid, set(os.listdir(self._data / "instances"))
        family = self._tree(old)
        self.judge.hit(Hit(time.monotonic(), p.DAEMON, "kill"))
        self.judge.daemon_ends.append(time.monotonic())
        self._daemon.kill()
        self._daemon.wait()
        self._killer.resume_due(all_of_them=True)
        self._start_daemon()
        self.judge.daemon_ends.append(time.monotonic())  # until now connections were refused
        self._check_start(self.starts_s[-1])
        self._expect(lambda: [f"process {one.pid} ({one.name})" for one in p.still(family)], REAP_S, "a dead daemon")
        self._expect(
            lambda: [*(instances & set(os.listdir(self._data / "instances"))), *groups_of(instances, self.engine.name)],
            REAP_S, "a dead daemon",
        )  # fmt: skip

    def log(self) -> str:
        lines = (self.folder / "log").read_text("utf-8", "replace").splitlines()
        return "\n".join([line for line in lines if "http_request" not in line][-40:])

    # Clients.

    def _start_client(self) -> None:
        self._count += 1
        name = f"c{self._count}"
        seed = str(self.draw.randrange(10**9))
        arguments = ["chaos.client", self._uds, name, seed, "2", self.engine.name]
        self._start(name, arguments, [f"{name}a", f"{name}b"])

    def _start_embedded(self) -> None:
        self._count += 1
        name = f"e{self._count}"
        self._start(name, ["chaos.embedded", name], [name])

    def _start(self, name: str, arguments: list[str], workers: list[str]) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=self._environment,
        )  # fmt: skip
        assert process.stdout is not None
        client = Client(name, process, workers, threading.Thread())
        client.ear = threading.Thread(target=self._hear, args=(client, process.stdout), daemon=True)
        client.ear.start()
        self._clients.append(client)

    def _hear(self, client: Client, lines: IO[str]) -> None:
        for line in lines:
            if not line.endswith("\n"):
                return  # killed in the middle of a word
            client.finished = client.finished or '"finished"' in line
            self.judge.hear(client.name, line)

    def _kill_client(self, client: Client) -> None:
        embedded = client.name.startswith("e")
        family = [] if not embedded else self._tree(client.process.pid)
        self.judge.hit(Hit(time.monotonic(), "embedding program" if embedded else "client", "kill"))
        client.process.kill()
        self._forget(client)
        if embedded:
            self._expect(
                lambda: [f"process {one.pid} ({one.name})" for one in p.still(family)], REAP_S, "a killed program"
            )

    def _forget(self, client: Client) -> None:
        client.process.wait()
        client.ear.join(10)
        assert client.process.stdin is not None and client.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            client.process.stdin.close()
        client.process.stdout.close()
        self.judge.client_was_killed(client.workers)
        self._clients.remove(client)

    def _finish_clients(self) -> None:
        """Have them check and close everything, and end."""
        for client in self._clients:
            assert client.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                client.process.stdin.close()
        deadline = time.monotonic() + FINISH_S
        for client in list(self._clients):
            while client.process.poll() is None and time.monotonic() < deadline:
                self._killer.resume_due()
                self._reap()
                time.sleep(0.02)
            if client.process.poll() is None:
                doing = {worker: self.judge.under_way.get(worker) for worker in client.workers}
                self.judge.violation(f"{client.name} does not come to an end: {doing}")
                client.process.kill()
            client.ear.join(10)
            if not client.finished:
                self.judge.violation(f"{client.name} died with status {client.process.returncode}: {self.log()}")
            self._forget(client)

    # A round.

    def round(self, number: int, seconds: float, clients: int) -> None:
        """Load and, unless the judge is calm, deeds; then a look at what is left."""
        until = time.monotonic() + seconds
        for _ in range(clients):
            self._start_client()
        if self.engine.name == "process" and (self.judge.calm or number % 2):
            self._start_embedded()
        daemon_end, client_end, embedded_end = (
            time.monotonic() + self.draw.uniform(*life) for life in (DAEMON_LIFE_S, CLIENT_LIFE_S, EMBEDDED_LIFE_S)
        )
        while (now := time.monotonic()) < until and not self.judge.violations:
            self._reap()
            self._killer.resume_due()
            if self.judge.calm:
                time.sleep(0.05)
            elif now > daemon_end:
                self._restart_daemon()
                daemon_end = time.monotonic() + self.draw.uniform(*DAEMON_LIFE_S)
            elif now > client_end:
                self._kill_client(self.draw.choice([one for one in self._clients if one.name.startswith("c")]))
                self._start_client()
                client_end = time.monotonic() + self.draw.uniform(*CLIENT_LIFE_S)
            elif now > embedded_end and (programs := [one for one in self._clients if one.name.startswith("e")]):
                self._strike_embedded(programs[0])
                embedded_end = time.monotonic() + self.draw.uniform(*EMBEDDED_LIFE_S) / 2
            else:
                self._killer.strike(self._daemon.pid)
                time.sleep(self.draw.uniform(*EVERY_S))
        self._killer.resume_due(all_of_them=True)
        self._finish_clients()
        self._settle()

    def _strike_embedded(self, program: Client) -> None:
        """The program itself, its daemon, or what is below that."""
        everything = Census().all()
        daemons = [one for one in everything.values() if one.parent == program.process.pid and one.state != "Z"]
        choice = self.draw.random()
        if choice < 0.35:
            self._kill_client(program)
            self._start_embedded()
        elif daemons and choice < 0.6:
            self._killer.do(daemons[0], "embedded daemon", daemons[0].pid, signal.SIGKILL)
        elif daemons:
            self._killer.strike(daemons[0].pid)

    # What is left.

    def _settle(self) -> None:
        """All is closed: nothing may be left but what an idle daemon has."""
        caller = Caller(self._uds)
        try:
            for sandbox in caller.call("GET", "/v1/sandboxes").json()["sandboxes"]:
                if not self.judge.explains(sandbox):
                    self.judge.violation(f"the daemon has a sandbox that nobody made: {sandbox}")
                caller.call("DELETE", f"/v1/sandboxes/{sandbox['id']}", limit_s=20)
            self._expect(lambda: self._left(caller), SETTLE_S, "closed sandboxes")
        except Cut as exc:
            self.judge.violation(f"the daemon died by itself: {exc}; {self.log()}")
            return
        finally:
            caller.close()
        self._measure()

    def _left(self, caller: Caller) -> list[str]:
        self._reap()
        capacity: dict[str, Any] = caller.call("GET", "/v1/capacity").json()
        ready = capacity["pool"]["ready"]
        found = []
        if capacity["sandboxes"] or ready != POOL:
            found.append(f"sandboxes {capacity['sandboxes']}, warm {ready}: {capacity['pool']['problem']}")
        everything = Census().all()
        counts = dict.fromkeys(self.engine.of_each_sandbox, 0)
        for one in p.below(os.getpid(), everything).values():
            kind = self.engine.kind_of(one, self._daemon.pid, everything)
            if kind in counts:
                counts[kind] += 1
            elif one.state == "Z" or kind not in self.engine.of_an_idle_daemon:
                found.append(f"{kind or 'orphan'} {one}")
        found += [f"{count} processes: {kind}" for kind, count in counts.items() if count != ready]
        (instance,) = os.listdir(self._data / "instances")
        for name, allowed in ((f"{self.engine.name}/machines", ready), ("outputs", 0)):
            inside = os.listdir(self._data / "instances" / instance / name)
            if len(inside) != allowed:
                found.append(f"{name}: {inside}")
        return found + [
            group
            for groups in groups_by_hierarchy([instance], self.engine.name)
            if len(groups) != ready
            for group in groups
        ]

    def _measure(self) -> None:
        now = self.last = Holdings.of(self._daemon.pid)
        self.disk_bytes.append(disk_usage(self._data / "instances"))
        if self.baseline is None:
            self.baseline = now
            return
        if now.fds > self.baseline.fds + FD_BUDGET or now.mounts > self.baseline.mounts:
            self.judge.violation(f"the daemon holds more than at first: {now}, then {self.baseline}")
        if now.rss_bytes > self.baseline.rss_bytes + RSS_BUDGET_BYTES:
            self.judge.violation(f"the daemon's memory grew: {now}, then {self.baseline}")

    def _expect(self, left: Callable[[], list[str]], limit_s: float, of: str) -> None:
        """Violation if something is left after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while found := left():
            if time.monotonic() > deadline:
                self.judge.violation(f"left of {of} after {limit_s:g} s: {'; '.join(found)}\n{self.log()}")
                return
            self._reap()
            time.sleep(0.02)  # a condition with no event: the ends of other processes' children

    def _tree(self, pid: int) -> list[Process]:
        everything = Census().all()
        return [one for one in p.below(pid, everything).values() if one.state != "Z"]

    def _below(self) -> dict[int, Process]:
        return Census().below(os.getpid())

    def _reap(self) -> None:
        """Children that came to this process when their parents were killed."""
        ours = {self._daemon.pid, *(client.process.pid for client in self._clients)}
        for one in Census().all().values():
            if one.parent == os.getpid() and one.state == "Z" and one.pid not in ours:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(one.pid, os.WNOHANG)

    def _reap_all(self) -> None:
        deadline = time.monotonic() + 10
        while self._below() and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
            time.sleep(0.01)

    # Words.

    def words(self) -> str:
        judge = self.judge
        return (
            f"{judge.operations.total()} operations, {len(judge.hits)} events, {judge.errors.total()} errors, "
            f"{len(judge.violations)} violations; {self.last}"
        )

    def report(self) -> str:
        again = sorted(self.starts_s[1:]) or [0.0]
        late = ", ".join(f"{took} s (a fresh one {usual} s)" for took, usual in self.late)
        return (
            f"starts      first {self.starts_s[0]:.2f} s; again {len(self.starts_s) - 1} times, "
            f"median {again[len(again) // 2]:.2f} s, longest {again[-1]:.2f} s; above the limit: {late or 'none'}\n"
            f"holdings    first {self.baseline}, last {self.last}\n"
            f"disk        below instances/: first {self.disk_bytes[:1]}, last {self.disk_bytes[-1:]} bytes"
        )
