"""Files over HTTP: whole or not at all, outside the queue of cells, in constant memory."""

from __future__ import annotations

import hashlib

import anyio
import pytest

from hosting import peak_kib, text, wait_until
from podflare.wire.messages import Ack, Cancel, Exit, FileDone, FileFailed, FileWrite
from scripted_guest import ScriptedGuest

pytestmark = pytest.mark.anyio

MIB = 2**20


@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 256 * 1024 + 1, 5 * MIB])
async def test_round_trip(host, size):
    """What is uploaded is what is downloaded, byte for byte, whatever its size."""
    async with host() as h:
        sandbox = await h.create()
        content = hashlib.sha256(b"seed").digest() * (size // 32 + 1)
        answer = await h.client.put(f"/v1/sandboxes/{sandbox}/files?path=dir/f.bin", content=content[:size])
        assert (answer.status_code, answer.json()["size"]) == (200, size)
        got = await h.client.get(f"/v1/sandboxes/{sandbox}/files?path=dir/f.bin")
        assert got.content == content[:size]
        assert got.headers["x-podflare-file-size"] == str(size)


async def test_upload_without_announced_length(host):
    """A chunked upload works and is complete."""
    async with host() as h:
        sandbox = await h.create()

        async def pieces():
            for number in range(1000):
                yield b"%04d" % number

        answer = await h.client.put(f"/v1/sandboxes/{sandbox}/files?path=f", content=pieces())
        assert answer.json()["size"] == 4000


async def test_strange_names(host):
    """Names with blanks, quotes, newlines, non-ASCII and non-UTF-8 bytes are only names."""
    async with host() as h:
        sandbox = await h.create()
        for quoted in ("a%20b", "%22%27%24%28x%29", "new%0Aline", "%C3%A9%E2%80%A8", "byte-%FF"):
            url = f"/v1/sandboxes/{sandbox}/files?path={quoted}"
            assert (await h.client.put(url, content=quoted.encode())).status_code == 200, quoted
            assert (await h.client.get(url)).content == quoted.encode()


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("missing", 404, "file_missing"),
        ("/etc", 400, "file_access_error"),
        ("/dev/zero", 400, "file_access_error"),
        ("", 400, "bad_request"),
        ("nul%00byte", 400, "bad_request"),
        ("x" * 5000, 400, "bad_request"),
    ],
)
async def test_unreadable_paths(host, path, status, code):
    """What is no readable file is an error that names the reason, not an endless or empty download."""
    async with host() as h:
        sandbox = await h.create()
        answer = await h.client.get(f"/v1/sandboxes/{sandbox}/files?path={path}")
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        put = await h.client.put(f"/v1/sandboxes/{sandbox}/files", content=b"x")
        assert put.status_code == 400


async def test_files_do_not_wait_for_cells(host):
    """Upload and download work while a cell runs."""
    async with host() as h:
        sandbox = await h.create()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(h.exec, sandbox, "import time\nwhile True: time.sleep(1)")
            url = f"/v1/sandboxes/{sandbox}/files?path=f"
            assert (await h.client.put(url, content=b"data")).status_code == 200
            assert (await h.client.get(url)).content == b"data"
            while not (await h.client.post(f"/v1/sandboxes/{sandbox}/interrupt")).json()["interrupted"]:
                await anyio.sleep(0.01)


async def test_large_files_pass_in_constant_memory(host):
    """A hundred megabytes up and down raise the daemon's memory by a fraction of that."""
    async with host() as h:
        sandbox = await h.create()
        await h.client.put(f"/v1/sandboxes/{sandbox}/files?path=f", content=b"warm")
        before = peak_kib()
        piece = b"\xa5" * MIB

        async def pieces():
            for _ in range(100):
                yield piece

        answer = await h.client.put(f"/v1/sandboxes/{sandbox}/files?path=f", content=pieces())
        assert answer.json()["size"] == 100 * MIB
        got = 0
        async with h.client.stream("GET", f"/v1/sandboxes/{sandbox}/files?path=f") as answer:
            async for chunk in answer.aiter_raw():
                got += len(chunk)
        assert got == 100 * MIB
        assert peak_kib() - before < 40 * 1024


async def test_upload_above_the_disk_is_refused_at_once(host):
    """A length that cannot fit is refused before its bytes travel."""
    async with host() as h:
        sandbox = await h.create(rootfs_gb=1)
        reader, writer = await h.connect()
        head = f"PUT /v1/sandboxes/{sandbox}/files?path=f HTTP/1.1\r\nHost: x\r\nContent-Length: {2**31}\r\n\r\n"
        writer.write(head.encode())
        with anyio.fail_after(20):
            assert b" 413 " in await reader.readline()
        writer.transport.abort()


async def test_upload_broken_off_leaves_nothing(host):
    """A client that leaves in the middle of an upload leaves neither the file nor a part of it."""
    async with host() as h:
        sandbox = await h.create()
        _, writer = await h.connect()
        head = f"PUT /v1/sandboxes/{sandbox}/files?path=f HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        writer.write(head.encode() + b"x" * 500_000)
        await writer.drain()
        writer.transport.abort()
        with anyio.fail_after(20):
            while text(await h.exec(sandbox, "import os; print(os.listdir('.'))")) != "[]":
                await anyio.sleep(0.02)


async def test_body_that_stops_cancels_the_upload(scripted):
    """An upload whose client falls silent is cancelled in the guest and answered."""
    said = []

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        while True:
            said.append(type((await guest.next_message())[1]))

    async with scripted(script, body_timeout_s=0.2) as h:
        sandbox = await h.create()
        reader, writer = await h.connect()
        head = f"PUT /v1/sandboxes/{sandbox}/files?path=f HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc"
        writer.write(head.encode())
        with anyio.fail_after(20):
            assert b" 400 " in await reader.readline()
        await wait_until(lambda: said == [FileWrite, Cancel])
        writer.transport.abort()


async def test_full_disk_is_told_while_uploading(scripted):
    """When the sandbox's disk is full in the middle of an upload, the answer says so and the connection goes on."""

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        frame = await guest.next_frame()
        await guest.next_frame()
        await guest.say(frame.channel, FileFailed("no_space", "f: No space left on device"))
        await guest.serve_cells()

    async with scripted(script) as h:
        sandbox = await h.create()
        answer = await h.client.put(f"/v1/sandboxes/{sandbox}/files?path=f", content=b"x" * 20 * MIB)
        assert answer.status_code == 400 and "No space left" in answer.json()["error"]
        assert text(await h.exec(sandbox, "alive")) == "alive"


async def test_slow_download_client_stops_the_guest(scripted):
    """A client that takes nothing holds the guest at its window instead of filling the daemon's memory."""
    sent = []

    async def script(guest: ScriptedGuest) -> None:
        from podflare.wire import frames
        from podflare.wire.messages import WINDOW_BYTES, FileOpened

        await guest.ready()
        frame = await guest.next_frame()
        await guest.say(frame.channel, FileOpened(10**9))
        unacknowledged = 0
        while True:
            while unacknowledged + frames.MAX_DATA_BYTES <= WINDOW_BYTES:
                await guest.output(frame.channel, b"x" * frames.MAX_DATA_BYTES, frames.DATA)
                unacknowledged += frames.MAX_DATA_BYTES
                sent.append(frames.MAX_DATA_BYTES)
            _, message = await guest.next_message()
            if isinstance(message, Cancel):
                return
            assert isinstance(message, Ack)
            unacknowledged -= message.bytes

    async with scripted(script) as h:
        sandbox = await h.create()
        _, writer = await h.connect()
        writer.transport.pause_reading()
        writer.write(f"GET /v1/sandboxes/{sandbox}/files?path=f HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await wait_until(lambda: sum(sent) >= 4 * MIB)
        await anyio.sleep(0.1)
        assert sum(sent) <= 8 * MIB
        writer.transport.abort()


async def test_too_many_transfers_are_refused(scripted):
    """Transfers beyond the limit of a sandbox get 429."""

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        frame = await guest.next_frame()
        while (await guest.next_frame()).channel == frame.channel:
            pass

    async with scripted(script, max_transfers=1, transfer_stall_s=0.5) as h:
        sandbox = await h.create()
        codes = []

        async def get() -> None:
            codes.append((await h.client.get(f"/v1/sandboxes/{sandbox}/files?path=f")).status_code)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(get)
            tasks.start_soon(get)
        assert sorted(codes) == [429, 504]


async def test_cells_run_while_an_upload_is_slow(scripted):
    """A half-done upload does not keep cells waiting."""

    started = anyio.Event()

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        upload = (await guest.next_frame()).channel
        started.set()
        channel, _ = await guest.next_exec()
        await guest.output(channel, b"ran")
        await guest.say(channel, Exit(0))
        while (frame := await guest.next_frame()).kind == 4 or frame.channel != upload:
            pass
        await guest.say(upload, FileDone(6))
        await anyio.sleep_forever()

    async with scripted(script) as h:
        sandbox = await h.create()
        go = anyio.Event()

        async def pieces():
            yield b"abc"
            await go.wait()
            yield b"def"

        async with anyio.create_task_group() as tasks:

            async def put() -> None:
                answer = await h.client.put(f"/v1/sandboxes/{sandbox}/files?path=f", content=pieces())
                assert answer.json()["size"] == 6

            tasks.start_soon(put)
            await started.wait()
            assert text(await h.exec(sandbox, "1")) == "ran"
            go.set()
