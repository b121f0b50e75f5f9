"""Promise: whatever a guest sends, or withholds, costs its own sandbox at most; the daemon stays correct and bounded."""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from hosting import Host, events, peak_kib, running, text
from podflare.wire import frames
from podflare.wire.messages import Error, Exit, Ready, Result, to_payload
from podflare.wire.version import PROTOCOL
from scripted_guest import ScriptedEngine, ScriptedGuest

pytestmark = pytest.mark.anyio


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack(">IBI", len(payload), kind, channel) + payload


def message(body: bytes) -> Callable[[int], bytes]:
    return lambda channel: frame(frames.MESSAGE, channel, body)


def said(**body: Any) -> Callable[[int], bytes]:
    return message(json.dumps(body).encode())


EXIT = to_payload(Exit(0))
ODD_NAME = "\x1b]0;owned\x07\x00\x85\u2028\u202e\ud800\r\n" * 3
# What breaks the protocol ends that sandbox; the rest only has to do no harm.
LIES: dict[str, Callable[[int], bytes]] = {
    "unknown kind": lambda c: frame(9, c, b""),
    "kind 0": lambda c: frame(0, c, b""),
    "endless length": lambda c: struct.pack(">IBI", 2**32 - 1, frames.STDOUT, c),
    "one byte more than output may have": lambda c: frame(frames.STDOUT, c, b"x" * (frames.MAX_DATA_BYTES + 1)),
    "one byte more than a message may have": lambda c: frame(frames.MESSAGE, c, b" " * (frames.MAX_MESSAGE_BYTES + 1)),
    "a message of spaces": lambda c: frame(frames.MESSAGE, c, b" " * frames.MAX_MESSAGE_BYTES),
    "half a header": lambda c: struct.pack(">IBI", 10, frames.MESSAGE, c)[:5],
    "half a message": lambda c: frame(frames.MESSAGE, c, EXIT)[:-3],
    "not JSON": message(b"\xff\xfe{"),
    "UTF-16": message('{"op":"exit","code":0}'.encode("utf-16")),
    "with a byte order mark": message(b"\xef\xbb\xbf" + EXIT),
    "two objects": message(EXIT + EXIT),
    "deep lists": message(b'{"op":"exit","x":' + b"[" * 200_000),
    "deep objects": message(b'{"op":"exit","x":' + b'{"a":' * 200_000),
    "deep and closed": message(b'{"op":"exit","code":0,"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "16 MiB of empty lists": message(b'{"op":"exit","x":[' + b"[]," * 5_592_000 + b"0]}"),
    "16 MiB of lists in lists": message(b'{"op":"exit","x":[' + (b"[" * 900 + b"]" * 900 + b",") * 9_300 + b"0]}"),
    "16 MiB of objects in a rich result": message(b'{"op":"result","kind":"value","data":{"a":[' + b"{}," * 5_592_000 + b"0]}}"),
    "200,000 keys": message(json.dumps({"op": "result", "data": {str(n): "" for n in range(200_000)}}).encode()),
    "a name of megabytes": said(op="result", data={"x" * 12_000_000: "y"}, kind="value"),
    "an op of megabytes": said(op="x" * 12_000_000),
    "a million numbers": said(op="exit", code=[0] * 1_000_000),
    "a number of a million digits": message(b'{"op":"exit","code":' + b"9" * 1_000_000 + b"}"),
    "a huge exponent": message(b'{"op":"exit","code":1e999999999}'),
    "not a number": message(b'{"op":"exit","code":NaN}'),
    "infinite": message(b'{"op":"exit","code":Infinity}'),
    "a code out of range": said(op="exit", code=2**70, reason="ended"),
    "a code that is true": said(op="exit", code=True, reason="ended"),
    "an unknown reason": said(op="exit", code=0, reason=ODD_NAME, restarted=False, signal=0),
    "keys twice": message(b'{"op":"exit","op":"result","code":0,"code":"x"}'),
    "an op that is a list": said(op=["exit"]),
    "the host's message": said(op="exec", code="1", language="python", name="x"),
    "a greeting": lambda c: frame(frames.MESSAGE, c, to_payload(Ready(PROTOCOL, "3"))),
    "a greeting on channel 0": lambda c: frame(frames.MESSAGE, 0, to_payload(Ready(PROTOCOL, "3"))),
    "file bytes": lambda c: frame(frames.DATA, c, b"x"),
    "a file that opened": said(op="file_opened", size=2**63),
    "an acknowledgement": said(op="ack", bytes=2**62),
    "a tool call that nobody offered": said(op="tool_call", call="1", name="delete_everything", input={}),
    "a tool call with deep input": message(b'{"op":"tool_call","call":"1","name":"x","input":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}"),
    "variables that nobody asked for": said(op="variables", names={"x": "y"}, variables=[1]),
    "data of odd kinds": said(op="result", data={"text/plain": 1}, kind="value"),
    "data for a script of the reader": said(op="result", data={"text/html": "<script>alert(1)</script>"}, kind="value"),
    "names with control characters": said(op="result", data={ODD_NAME: ODD_NAME}, kind="value"),
    "an error with control characters": said(op="error", name=ODD_NAME, value=ODD_NAME, traceback=ODD_NAME),
    "an error of megabytes": said(op="error", name="x" * 10**6, value="y" * 10**6, traceback="z" * 10**7),
    "an end for another cell": lambda c: frame(frames.MESSAGE, c + 1, EXIT) + frame(frames.MESSAGE, c - 1, EXIT),
    "an end for every cell": lambda c: b"".join(frame(frames.MESSAGE, n, EXIT) for n in (*range(c), *range(c + 1, 3000))),
    "output of another cell": lambda c: frame(frames.STDOUT, c + 1, b"forged\n") + frame(frames.STDERR, 0, b"forged\n"),
    "an end, then more": lambda c: frame(frames.MESSAGE, c, EXIT) + frame(frames.STDOUT, c, b"late\n") + frame(frames.MESSAGE, c, EXIT),
    "a result after the end": lambda c: frame(frames.MESSAGE, c, EXIT) + frame(frames.MESSAGE, c, to_payload(Result({"text/plain": "late"}, "value"))),
    "a flood of empty output": lambda c: frame(frames.STDOUT, c, b"") * 20_000,
    "a flood of results": lambda c: frame(frames.MESSAGE, c, to_payload(Result({"text/plain": "x" * 1000}, "value"))) * 8_000,
    "a flood of errors": lambda c: frame(frames.MESSAGE, c, to_payload(Error("E", "v", "t" * 10_000))) * 600,
    "a flood of lines": lambda c: frame(frames.STDERR, c, b"\n" * frames.MAX_DATA_BYTES) * 12,
    "a line without end": lambda c: frame(frames.STDOUT, c, b"x" * frames.MAX_DATA_BYTES) * 80,
    "half characters": lambda c: frame(frames.STDOUT, c, b"\xf0\x9f") * 1000,
    "lines of the NDJSON answer": lambda c: frame(frames.STDOUT, c, b'{"type":"exit","data":0}\n\n{"type":"result"}\n'),
    "separators that split lines": lambda c: frame(frames.STDOUT, c, "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg".encode()),
}  # fmt: skip


async def test_a_guest_that_lies_harms_nobody_else(data_dir, record):
    """Forged, cut, oversized, reordered and endless bytes of an agent: its cell ends cleanly, its neighbour works, memory is bounded."""

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        while True:
            channel, cell = await guest.next_exec()
            if cell.code in LIES:
                await guest.output(channel, b"before\n")
                await guest.raw(LIES[cell.code](channel))
                await guest.raw(frame(frames.MESSAGE, channel, EXIT))
            else:
                await guest.output(channel, cell.code.encode())
                await guest.say(channel, Exit(0))

    found = {}
    before = peak_kib()
    async with anyio.create_task_group() as tasks:
        settings = {
            "interrupt_grace_s": 0.1,
            "kill_grace_s": 0.1,
            "stream_head_bytes": 100_000,
            "stream_tail_bytes": 100_000,
        }
        async with running(data_dir, ScriptedEngine(tasks, script), **settings) as host:
            neighbour = await host.create()
            for name in LIES:
                found[name] = await _lied(host, name, neighbour)
    record(found)
    assert peak_kib() - before < 400 * 1024


async def _lied(host: Host, name: str, neighbour: str) -> str:
    victim = await host.create()
    with anyio.move_on_after(15):
        answer = await host.client.post(f"/v1/sandboxes/{victim}/exec", json={"code": name, "timeout_seconds": 1})
        told = events(answer.content)  # raises for a line that is no JSON
        if b"\x1b" in answer.content or b"\x85" in answer.content or "\u2028".encode() in answer.content:
            return "broke: control characters as they are"
        if [event["type"] for event in told].count("exit") != 1 or told[-1]["type"] != "exit":
            return f"broke: not one end: {told[-2:]}"
        if "forged" in text(told) or "forged" in text(told, "stderr"):
            return "broke: output of another cell"
        if len(answer.content) > 64 << 20:
            return f"broke: an answer of {len(answer.content)} bytes"
        if text(await host.exec(neighbour, "alive")) != "alive":
            return "broke: the neighbour does not work"
        gone = await host.client.get(f"/v1/sandboxes/{victim}")
        if gone.status_code == 200:  # it goes on: nothing of the lie may come in the next cell
            after = await host.exec(victim, "after")
            if after[-1]["type"] != "exit" or "late" in str(after):
                return f"broke: the next cell got {after[:3]}"
            await host.client.delete(f"/v1/sandboxes/{victim}")
        elif gone.status_code not in (404, 410):
            return f"broke: status {gone.status_code}"
        return "held"
    return "hung"


async def test_descriptors_that_come_along_are_nobodys(data_dir):
    """Descriptors that a guest passes with its bytes never become the daemon's, however many, and its cell goes on."""

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        while True:
            channel, _ = await guest.next_exec()
            with socket.socket(fileno=os.dup(guest.writer.get_extra_info("socket").fileno())) as sock:
                for _ in range(20):
                    smuggled = array.array("i", [sock.fileno()] * 253)
                    sock.sendmsg(
                        [frame(frames.STDOUT, channel, b"x\n")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, smuggled)]
                    )
                    await anyio.sleep(0)
            await guest.say(channel, Exit(0))

    async with anyio.create_task_group() as tasks, running(data_dir, ScriptedEngine(tasks, script)) as host:
        sandbox = await host.create()
        await host.exec(sandbox, "once")
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            assert text(await host.exec(sandbox, "again")) == "\n".join("x" * 20)
        assert len(os.listdir("/proc/self/fd")) <= before + 2


RESULTS = {
    "a class with control characters in its name": "type('\\x1b]0;owned\\x07\\n\\u2028', (Exception,), {})('x')\nraise _",
    "an exception whose text is control characters": "raise ValueError('\\x1b[2J\\x9b2J\\u202e\\x00\\ud800')",
    "an exception whose text raises": "class E(Exception):\n    def __str__(self): raise E\n    __repr__ = __str__\nraise E()",
    "an exception whose text is no text": "class E(Exception):\n    def __str__(self): return 7\nraise E()",
    "an exception whose text never comes": "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E()",
    "an exception of 24 megabytes": "raise ValueError('x' * (24 << 20))",
    "a chain of a thousand exceptions": "def f(n):\n    try:\n        if n: f(n - 1)\n        raise ValueError('x' * 1000)\n    except ValueError as exc: raise KeyError('y' * 1000) from exc\nf(900)",
    "exceptions in a ring": "a, b = ValueError('a'), ValueError('b')\na.__cause__ = b; b.__cause__ = a; a.__context__ = b; b.__context__ = a\nraise a",
    "a group of 100,000 exceptions": "e = [ValueError('x')] * 10**5\nimport builtins\nraise getattr(builtins, 'ExceptionGroup', lambda m, es: es[0])('x', e)",
    "nested groups": "import builtins\ne = ValueError('x')\nfor _ in range(3000): e = getattr(builtins, 'ExceptionGroup', lambda m, es: es[0])('x', [e])\nraise e",
    "a file name with control characters": "exec(compile('1/0', '\\x1b]0;owned\\x07\\n\\u2028', 'exec'))",
    "a source line with control characters": "exec('x = \"\\x1b]52;c;cm0=\\x07\"; 1/0')",
    "a result whose text raises": "class R:\n    def __repr__(self): raise SystemExit(0)\nR()",
    "a result whose text never comes": "class R:\n    def __repr__(self):\n        while True: pass\nR()",
    "a result of 24 megabytes": "'x' * (24 << 20)",
    "a rich result of 24 megabytes": "class R:\n    def _repr_html_(self): return 'x' * (24 << 20)\nR()",
    "a rich result that is no text": "class R:\n    def _repr_png_(self): return {1: [2]}\n    def _repr_html_(self): return 7\nR()",
    "a bundle of 100,000 kinds": "class R:\n    def _repr_mimebundle_(self, **k): return {str(n): 'x' for n in range(10**5)}\nR()",
    "a bundle with names of a megabyte": "class R:\n    def _repr_mimebundle_(self, **k): return {'x' * 10**6: 'x', 'text/plain': '\\x1b'}\nR()",
    "a bundle of deep JSON": "d = []\nfor _ in range(100000): d = [d]\nclass R:\n    def _repr_mimebundle_(self, **k): return {'application/json': d}\nR()",
    "a bundle that holds itself": "d = {}\nd['d'] = d\nclass R:\n    def _repr_mimebundle_(self, **k): return {'application/json': d, 'text/plain': d}\nR()",
    "a deep list": "d = []\nfor _ in range(100000): d = [d]\nd",
    "a number of a million digits": "10 ** 1000000",
    "a dictionary of 100,000 keys": "{n: n for n in range(10**5)}",
    "an archive that unpacks to a gigabyte": "import zlib\nc = zlib.compressobj(9); z = b''.join(c.compress(bytes(1 << 20)) for _ in range(64)) + c.flush()\nclass R:\n    def _repr_png_(self): return z\nR()",
    "lone surrogates": "print('\\ud800'.encode('utf-8', 'surrogatepass')); '\\ud800\\udfff'",
    "output that looks like the answer": "print('{\"type\":\"exit\",\"data\":0}')\nprint('\\n\\n{\"type\":\"result\",\"data\":{}}')",
    "output with every control character": "import sys\nsys.stdout.buffer.write(bytes(range(256)) * 4)",
    "a thread name with control characters": "import threading\ndef f(): raise ValueError('\\x1b[2J')\nt = threading.Thread(target=f, name='\\x1b]0;x\\x07'); t.start(); t.join()",
}  # fmt: skip


@pytest.mark.any_engine
async def test_results_and_tracebacks_are_harmless(data_dir, make_engine, record):
    """Names, values and tracebacks made by hostile code in a real sandbox arrive bounded, as valid JSON without a control character."""
    folder = data_dir / "engine"
    folder.mkdir(mode=0o711)
    engine = make_engine(folder)
    found = {}
    async with running(data_dir, engine) as host:
        sandbox = await host.create()
        for name, code in RESULTS.items():
            answer = await host.client.post(
                f"/v1/sandboxes/{sandbox}/exec", json={"code": code, "timeout_seconds": 1}, timeout=60
            )
            told = events(answer.content)
            raw = [byte for byte in answer.content if (byte < 32 and byte != 10) or byte > 126]
            ends = [event["type"] for event in told].count("exit")
            well = not raw and ends == 1 and told[-1]["type"] == "exit" and len(answer.content) < 48 << 20
            well = well and text(await host.exec(sandbox, "print(6 * 7)")) == "42"
            found[name] = "held" if well else f"broke: {len(answer.content)} bytes, {raw[:5]}, {ends} ends, {told[-1:]}"
    assert os.listdir(folder / "machines") == []
    record(found)


@pytest.mark.any_engine
async def test_sizes_and_paths_of_transfers_are_checked(data_dir, make_engine, engine_name, record):
    """FIFOs, devices, links to memory, sockets and endless files neither hang a transfer nor leave the sandbox."""
    folder = data_dir / "engine"
    folder.mkdir(mode=0o711)
    secret = Path(data_dir, "secret")
    secret.write_text("secret-4711")
    secret.chmod(0o644)
    engine = make_engine(folder)
    found = {}
    async with running(data_dir, engine, transfer_stall_s=5) as host:
        sandbox = await host.create(rootfs_gb=1)
        await host.exec(
            sandbox,
            f"""
import os, socket, subprocess, sys
os.mkfifo("/root/fifo"); s = socket.socket(socket.AF_UNIX); s.bind("/root/socket")
for name, target in {{"zero": "/dev/zero", "tty": "/dev/tty", "memory": "/proc/self/mem", "agent": "/proc/1/mem", "pages": "/proc/self/pagemap",
    "kcore": "/proc/kcore", "kmsg": "/proc/kmsg", "loop": "/root/loop", "outside": {str(secret)!r}, "shadow": "/../../etc/shadow",
    "up": "../../../../../../{secret!s}", "door": "/proc/1/root/etc/shadow", "other": "/proc/1/fd/0", "stdout": "/proc/self/fd/1", "event": "/proc/1/fd/5"}}.items(): os.symlink(target, "/root/" + name)
os.mkdir("/root/folder"); open("/root/none", "w").close(); os.chmod("/root/none", 0)
swap = '''
import ctypes, os
libc = ctypes.CDLL(None)
os.chdir("/root"); os.symlink({str(secret)!r}, "race1"); open("race", "w").write("mine")
os.mkfifo("race2")
while True:
    libc.renameat2(-100, b"race", -100, b"race1", 2); libc.renameat2(-100, b"race", -100, b"race2", 2)
'''
racer = subprocess.Popen([sys.executable, "-c", swap])
""",
        )
        names = "fifo socket zero tty memory agent pages kcore kmsg loop outside shadow up door other stdout event folder none".split()
        if engine_name == "microvm":
            names.remove("pages")  # without end, as a cell could print
        for path in [
            *names,
            "../../etc/shadow",
            *(["/proc/1/root/etc/passwd"] if engine_name == "process" else []),
            "x" * 5000,
            "a\0b",
            "folder/",
            "/proc/self/task",
            str(secret),
        ]:
            for way in ("download", "upload"):
                found[f"{way} {path[:40]!r}"] = await _transfer(host, sandbox, path, way)
        for attempt in range(60):
            result = await _transfer(host, sandbox, "race", ("download", "upload")[attempt % 2])
            if result != "held":
                break
        found["a file that becomes a link and a FIFO all the time"] = result
        sparse = await host.exec(
            sandbox, "import os\nf = open('/root/sparse', 'w')\nos.truncate('/root/sparse', 1 << 40)"
        )
        if engine_name == "process":  # the disk of a virtual machine is its own
            found["a sparse file of a terabyte"] = (
                "held" if any(event["type"] == "error" for event in sparse) else "broke: made"
            )
        assert text(await host.exec(sandbox, "print(racer.poll())")) == "None"
    record(found)
    assert secret.read_text() == "secret-4711"
    secret.unlink()


SHADOW = (b"root:*:", b"root:!:")
SHADOW_OF_IMAGES = b"root:*:19000:0:99999:7:::\n"
"""Made up: no secret."""


async def _transfer(host: Host, sandbox: str, path: str, way: str) -> str:
    query = {"path": path}
    with anyio.move_on_after(10):
        if way == "upload":
            answer = await host.client.put(f"/v1/sandboxes/{sandbox}/files", params=query, content=b"x" * 1000)
            return "held" if answer.status_code < 600 else "broke"
        size = 0
        # A file that cannot be read on is broken off, which whoever reads is told.
        with suppress(httpx.RemoteProtocolError):
            async with host.client.stream("GET", f"/v1/sandboxes/{sandbox}/files", params=query) as stream:
                async for piece in stream.aiter_bytes():
                    size += len(piece)
                    if (
                        b"secret-4711" in piece
                        or any(line in piece.replace(SHADOW_OF_IMAGES, b"") for line in SHADOW)
                        or size > 64 << 20
                    ):
                        return f"broke: {piece[:20]!r} after {size} bytes"
        return "held"
    return "hung"
