"""Promise: whatever a sandbox puts into its files, or swaps in them meanwhile, what the host does with them ends in time,
reads and writes nothing of the machine, and costs the daemon little."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from hosting import Host, events, peak_kib, running, text
from machines import DrivenMachine
from podflare.engines.base import EngineOptions, Limits
from podflare.engines.process.engine import ProcessEngine
from podflare.errors import PodflareError

pytestmark = pytest.mark.anyio

STEP_S = 45.0
"""Each operation's limit here, on a busy machine: nothing may hang."""
SECRET = "a-secret-of-the-machine-4711"


@asynccontextmanager
async def walled(data_dir: Path) -> AsyncIterator[Host]:
    folder = data_dir / "engine"
    folder.mkdir(mode=0o711)
    engine = ProcessEngine(EngineOptions(data_dir=str(folder), instance=f"t{data_dir.name}"))
    async with running(data_dir, engine, transfer_stall_s=10) as host:
        host.client.timeout = STEP_S
        yield host
    assert os.listdir(folder / "machines") == []


@pytest.fixture
def victim(data_dir: Path) -> Path:
    """A directory of the machine that everybody could write to, with a file whose text must come out nowhere."""
    folder = data_dir / "victim"
    folder.mkdir()
    folder.chmod(0o777)
    for name in ("x", "deep"):
        (folder / name).write_text(SECRET)
        (folder / name).chmod(0o666)
    return folder


def _untouched(folder: Path) -> bool:
    return {path.name: path.read_text() for path in folder.iterdir()} == {"x": SECRET, "deep": SECRET}


async def operation(host: Host, what: str, ours: str, theirs: str, path: str) -> bytes:
    """What the host answers, whatever it is; a fork is closed again.  Raises: TimeoutError."""
    one = f"/v1/sandboxes/{ours}"
    query: dict[str, Any] = {"path": path}
    with anyio.fail_after(STEP_S):
        if what == "download":
            answer = await host.client.get(f"{one}/files", params=query)
        elif what == "upload":
            answer = await host.client.put(f"{one}/files", params=query, content=b"x" * 1000)
        elif what == "diff":
            answer = await host.client.get(f"{one}/diff/{theirs}", params={"detail": "true"})
        elif what == "merge":
            answer = await host.client.post(f"{one}/merge/{theirs}", json={"variables": False, "on_conflict": "theirs"})
        elif what == "usage":
            answer = await host.client.get(f"{one}/usage")
        else:
            answer = await host.client.post(f"{one}/fork", json={"n": 1})
            for child in answer.json().get("children", ()):
                assert (await host.client.delete(f"/v1/sandboxes/{child}")).is_success
    assert answer.status_code < 500 or answer.json()["error"], what
    return answer.content


# Whatever is swapped for what: a directory on the way, the last name, what it is; by one call each, without a gap.
RACER = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
victim = {victim!r}
os.makedirs("/root/d/e", exist_ok=True); os.chdir("/root")
for folder in ("d", "d/e"): open(folder + "/x", "w").write("mine"); open(folder + "/deep", "w").write("mine")
os.symlink(victim, "away"); os.symlink("../" * 20 + victim, "up"); os.symlink("/proc/1/root" + victim, "door")
os.symlink(victim + "/x", "leaf"); os.mkfifo("fifo"); os.link("d/x", "hard"); os.mkdir("empty"); os.symlink("loop", "loop")
print("ready", flush=True)
pairs = [("d", "away"), ("d/e", "up"), ("d/x", "leaf"), ("d/x", "fifo"), ("d/e/x", "hard"), ("d", "door"), ("d/e", "empty"), ("d/x", "loop"), ("d/e", "d/x")]
while True:
    for left, right in pairs:
        for _ in range(2):
            libc.renameat2(-100, left.encode(), -100, right.encode(), 2)
"""
START_RACER = """
import subprocess, sys
racer = subprocess.Popen([sys.executable, "-c", {code!r}], stdout=subprocess.PIPE)
racer.stdout.readline()
"""


async def test_links_and_files_that_change_places_all_the_time(data_dir, victim, record):
    """While code swaps directories, files, links out and FIFOs by renameat2, no operation leaves the sandbox or hangs."""
    found: dict[str, str] = {}
    start = START_RACER.format(code=RACER.format(victim=str(victim)))
    async with walled(data_dir) as host:
        parent = await host.create()
        await host.exec(parent, "import os; os.makedirs('/root/d/e'); open('/root/d/x', 'w').write('old')")
        one, two = await host.fork(parent, n=2)
        for sandbox in (one, two):
            assert text(await host.exec(sandbox, start), "stderr") == ""
        for what in ("download", "upload", "diff", "merge", "fork", "usage"):
            found[what] = "held"
            ends = time.monotonic() + 1.0
            for path in ("d/x", "d/e/x", "leaf", "d/e/deep") * 30:
                try:
                    said = await operation(host, what, one, two, path)
                except TimeoutError:
                    found[what] = "hung"
                    break
                if SECRET.encode() in said:
                    found[what] = f"broke: it told {said[:200]!r}"
                if time.monotonic() > ends and what not in ("download", "upload"):
                    break
            if not _untouched(victim):
                found[what] = "broke: it wrote to the machine's file"
        for sandbox in (one, two):
            assert text(await host.exec(sandbox, "print(racer.poll(), 6 * 7)")) == "None 42"
    record(found)


ODD = r"""
import os, socket
os.chdir("/root"); os.mkfifo("fifo"); s = socket.socket(socket.AF_UNIX); s.bind("socket")
os.symlink("/dev/zero", "zero"); os.symlink("/proc/self/mem", "memory"); os.symlink("loop", "loop"); os.symlink(VICTIM + "/x", "out")
os.symlink("../" * 30 + VICTIM.lstrip("/"), "up"); os.symlink("/" * 3000, "slashes")
for number in range(1500): os.symlink(f"chain{number - 1}" if number else VICTIM, f"chain{number}")
with open("sparse", "w") as f: f.truncate(1 << 30)
for name in (b"\xff\xfe", b"new\nline", b"\x1b]0;owned\x07", b"\xe2\x80\xa8", b"-rf", b" ", b"\x01" * 255, "\u202e".encode()):
    os.mkdir(b"odd-" + name[:240]); open(b"odd-" + name[:240] + b"/" + name, "w").write("x\x1b[2J\n")
open("none", "w").close(); os.chmod("none", 0); os.mkdir("closed"); open("closed/x", "w").close(); os.chmod("closed", 0)
for number in range(300): os.link("sparse", f"name{number}")
os.setxattr("odd- / ", "user.x", b"\0\x1b" * 100)
os.mkdir("d")
for _ in range(120): os.mkdir("d/n"); os.rename("d", "e"); os.mkdir("d"); os.rename("e", "d/e")
"""


async def test_odd_things_in_the_tree(data_dir, victim, record):
    """FIFOs, sockets, links to devices and out, holes of a gigabyte under 300 names, closed and odd names: all answered."""
    found: dict[str, str] = {}
    async with walled(data_dir) as host:
        parent = await host.create(rootfs_gb=2)
        one, two = await host.fork(parent, n=2)
        made = await host.exec(two, f"VICTIM = {str(victim)!r}\n{ODD}")
        assert made[-1]["data"] == 0, made
        before = peak_kib()
        for what, sandbox, other in (
            ("usage", two, ""),
            ("diff", one, two),
            ("diff", two, one),
            ("fork", two, ""),
            ("merge", one, two),
            ("merge", two, one),
        ):
            name = f"{what} of {'the odd one' if sandbox == two else 'the other one'}"
            try:
                said = await operation(host, what, sandbox, other, "")
            except TimeoutError:
                found[name] = "hung"
                continue
            raw = {byte for byte in said if byte < 32 or byte > 126}
            found[name] = f"broke: {said[:300]!r}" if SECRET.encode() in said or raw else "held"
        for path in (
            "chain1499",
            "chain30",
            "slashes",
            "out",
            "up",
            "closed/x",
            "x/" * 2000 + "x",
            "/" * 4000 + "x",
            "odd-\x1b]0;owned\x07/x",
        ):
            for what in ("download", "upload"):
                said = await operation(host, what, two, "", path)
                found[f"{what} {path[:20]!r}"] = f"broke: {said[:100]!r}" if SECRET.encode() in said else "held"
        assert peak_kib() - before < 200 * 1024
        for sandbox in (one, two):
            assert text(await host.exec(sandbox, "print(6 * 7)")) == "42"
    record(found)
    assert _untouched(victim)


DEEP = """
import os
os.chdir("/root")
for _ in range({depth}): os.mkdir("n"); os.chdir("n")
open("bottom", "w").write("x"); os.chdir("/root")
"""


async def test_directories_without_end(data_dir, record):
    """Directories nested deeper than what is looked at are an error that says so, and the sandbox and its end are well."""
    found: dict[str, str] = {}
    async with walled(data_dir) as host:
        parent = await host.create()
        one, two = await host.fork(parent, n=2)
        assert (await host.exec(two, DEEP.format(depth=900)))[-1]["data"] == 0
        for what, sandbox, other in (("diff", one, two), ("merge", one, two), ("fork", two, ""), ("usage", two, "")):
            said = await operation(host, what, sandbox, other, "")
            told = b"nested deeper than 256" in said or what == "usage"
            found[what] = "held" if told else f"broke: {said[:200]!r}"
        for sandbox in (one, two):
            assert text(await host.exec(sandbox, "print(6 * 7)")) == "42"
    record(found)


MOVER = """
import os, time
os.mkdir("/root/w"); os.chdir("/root/w")
folders = [f"{number:03d}" for number in range(NAMES)]
for name in folders: os.mkdir(name)
os.mkdir("000/big")
for number in range(FILES):
    with open(f"000/big/{number}", "wb") as file: file.write(os.urandom(SIZE))
print("ready", flush=True)
# In the order in which it is listed, ahead of whoever copies.
folders = [name for name in os.listdir(".") if name.isdigit()]
here = "000"
while True:
    for name in folders:
        if name != here: os.rename(f"{here}/big", f"{name}/big"); here = name
        time.sleep(PAUSE)
"""


def test_what_is_moved_ahead_of_a_copy_is_not_copied_without_end(new_machine, record):
    """A big directory that is always where the copier comes next makes no fork's files larger than the limit allows."""
    limits = Limits(memory_bytes=512 * 2**20, disk_bytes=24 * 2**20, max_processes=64)
    machine = new_machine(limits)
    code = f"NAMES, FILES, SIZE, PAUSE = 300, 600, 32768, 0.02\n{MOVER}"
    machine.run(START_RACER.format(code=code))
    layers = machine.machine.directory.parent
    found = {}
    for attempt in range(1):
        before = set(os.listdir(layers))
        start = time.monotonic()
        children: list[DrivenMachine] = []
        try:
            children = machine.fork(timeout_s=60)
            largest = max(_size(layers / name) for name in set(os.listdir(layers)) - before)
            found[f"fork {attempt}"] = "held" if largest < 3 * limits.disk_bytes else f"broke: {largest >> 20} MiB"
        except PodflareError as exc:
            told = "faster than they could be copied" in str(exc)
            found[f"fork {attempt}"] = "held" if told else f"broke: {exc}"
        finally:
            for child in children:
                child.close()
        assert time.monotonic() - start < STEP_S
    machine.run("racer.kill(); racer.wait()")
    record(found)
    (child,) = machine.fork()
    child.close()


def _size(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


NAMES = """
import os
os.chdir("/root")
for _ in range(14): os.mkdir("\\1" * 250); os.chdir("\\1" * 250)
for number in range(4600): os.close(os.open("\\1" * 245 + f"{number:05d}", os.O_CREAT))
os.chdir("/root")
"""


async def test_names_of_megabytes(data_dir, record):
    """Differences whose names alone take more than an answer holds are refused, and the daemon never has them."""
    found: dict[str, str] = {}
    async with walled(data_dir) as host:
        parent = await host.create()
        one, two = await host.fork(parent, n=2)
        cell = await host.client.post(f"/v1/sandboxes/{two}/exec", json={"code": NAMES})
        assert events(cell.content)[-1]["data"] == 0
        before = peak_kib()
        for what in ("diff", "merge"):
            said = await operation(host, what, one, two, "")
            found[what] = "held" if b"too_large" in said else f"broke: {len(said)} bytes, {said[:100]!r}"
        assert peak_kib() - before < 20 * 1024
    record(found)
