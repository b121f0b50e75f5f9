"""Guests that lie: whatever bytes come out of a sandbox, only that sandbox suffers, and its user is told why."""

from __future__ import annotations

import struct

import anyio
import pytest

from hosting import text
from podflare.wire import frames
from podflare.wire.messages import Ack, DataEnd, Error, Exit, FileDone, FileOpened, Ready, to_payload
from podflare.wire.version import PROTOCOL
from scripted_guest import ScriptedGuest

pytestmark = pytest.mark.anyio


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack(">IBI", len(payload), kind, channel) + payload


BREAKING = {
    "unknown frame kind": lambda c: frame(9, c, b""),
    "endless length": lambda c: struct.pack(">IBI", 2**32 - 1, frames.STDOUT, c),
    "oversized output frame": lambda c: struct.pack(">IBI", frames.MAX_DATA_BYTES + 1, frames.STDOUT, c),
    "not JSON": lambda c: frame(frames.MESSAGE, c, b"\xff\xfe{"),
    "not an object": lambda c: frame(frames.MESSAGE, c, b"[1]"),
    "deep JSON": lambda c: frame(frames.MESSAGE, c, b"[" * 60_000),
    "unknown op": lambda c: frame(frames.MESSAGE, c, b'{"op":"sudo"}'),
    "host's own message": lambda c: frame(frames.MESSAGE, c, b'{"op":"exec","code":"1"}'),
    "exit without code": lambda c: frame(frames.MESSAGE, c, b'{"op":"exit"}'),
    "exit code as text": lambda c: frame(frames.MESSAGE, c, b'{"op":"exit","code":"0"}'),
    "huge exit code": lambda c: frame(frames.MESSAGE, c, b'{"op":"exit","code":1e99}'),
    "file bytes in a cell": lambda c: frame(frames.DATA, c, b"x"),
    "file message in a cell": lambda c: frame(frames.MESSAGE, c, to_payload(FileDone(1))),
    "ready in a cell": lambda c: frame(frames.MESSAGE, c, to_payload(Ready(PROTOCOL, "3"))),
}


@pytest.mark.parametrize("what", BREAKING)
async def test_broken_protocol_ends_that_sandbox_with_a_clear_error(scripted, what):
    """A guest that breaks the protocol loses its machine; the cell ends with the reason and others run on."""

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        while True:
            channel, cell = await guest.next_exec()
            if cell.code == "attack":
                await guest.output(channel, b"said before\n")
                await guest.raw(BREAKING[what](channel))
                await guest.raw(b"\0" * 100_000)
            else:
                await guest.output(channel, b"fine")
                await guest.say(channel, Exit(0))

    async with scripted(script) as h:
        victim, other = await h.create(), await h.create()
        cell = await h.exec(victim, "attack")
        assert (cell[-1]["data"], cell[-1]["reason"]) == (137, "sandbox_failed")
        assert "broke the protocol" in text(cell, "stderr")
        assert text(await h.exec(other, "1")) == "fine"
        gone = (await h.client.get(f"/v1/sandboxes/{victim}")).json()["error"]
        assert "broke the protocol" in gone
        assert h.engine.machines[0].closed and not h.engine.machines[1].closed


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        b"Traceback (most recent call last):\n" * 10,
        frame(frames.STDOUT, 0, b"hello"),
        frame(frames.MESSAGE, 1, to_payload(Ready(PROTOCOL, "3"))),
        frame(frames.MESSAGE, 0, to_payload(Ready(PROTOCOL + 1, "3"))),
        frame(frames.MESSAGE, 0, to_payload(Exit(0))),
        frame(frames.MESSAGE, 0, b" " * 5000),
    ],
)
async def test_guest_that_greets_wrongly_is_never_handed_out(scripted, monkeypatch, greeting):
    """Without a proper Ready no sandbox exists, the create says why, and the machine is closed."""
    monkeypatch.setattr("podflare.host.pool.READY_TIMEOUT_S", 0.3)

    async def script(guest: ScriptedGuest) -> None:
        await guest.raw(greeting)
        await anyio.sleep_forever()

    async with scripted(script) as h:
        answer = await h.client.post("/v1/sandboxes")
        assert answer.status_code in (500, 504) and answer.json()["code"] in ("machine_failed", "deadline_exceeded")
        assert h.engine.machines[0].closed
        assert (await h.client.get("/v1/sandboxes")).json() == {"sandboxes": []}


async def test_guest_that_closes_its_channel_mid_cell(scripted):
    """A guest that hangs up ends the sandbox even if its machine claims to live."""

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        await guest.next_exec()
        guest.writer.close()
        await anyio.sleep_forever()

    async with scripted(script) as h:
        cell = await h.exec(await h.create(), "1")
        assert cell[-1]["reason"] == "sandbox_failed" and "closed its channel" in text(cell, "stderr")


async def test_frames_of_other_conversations_are_ignored(scripted):
    """Output for cells that are over, or never were, does not reach the next cell."""

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        channel, _ = await guest.next_exec()
        await guest.say(channel, Exit(0))
        old = channel
        channel, _ = await guest.next_exec()
        for other in (0, old, channel + 1, 2**32 - 1):
            await guest.output(other, b"forged\n")
            await guest.say(other, Exit(3))
        await guest.output(channel, b"own")
        await guest.say(channel, Exit(0))
        await guest.say(channel, Exit(5))
        await guest.serve_cells()

    async with scripted(script) as h:
        sandbox = await h.create()
        await h.exec(sandbox, "1")
        cell = await h.exec(sandbox, "2")
        assert text(cell) == "own" and cell[-1]["data"] == 0
        assert text(await h.exec(sandbox, "3")) == "3"


async def test_flood_of_tiny_frames_and_errors_is_bounded(scripted):
    """Millions of tiny pieces and results cost the daemon no more than their caps; the cell ends normally."""

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        channel, _ = await guest.next_exec()
        pair = frame(frames.STDOUT, channel, b"\n") + frame(frames.STDERR, channel, b"\n")
        error = frame(frames.MESSAGE, channel, to_payload(Error("E", "v", "t")))
        for _ in range(50):
            await guest.raw(pair * 1000 + error * 20)
        await guest.say(channel, Exit(0))

    settings = {"stream_head_bytes": 10_000, "stream_tail_bytes": 10_000, "max_result_bytes": 100 * 1024}
    async with scripted(script, **settings) as h:
        cell = await h.exec(await h.create(), "1")
        assert cell[-1]["data"] == 0 and cell[-1]["stdout_dropped_bytes"] in (30_000, 30_001)
        assert sum(event["type"] == "error" for event in cell) == 100


async def test_guest_that_never_reads_does_not_block_the_daemon(scripted):
    """A guest that takes no bytes gets its cell killed with its machine; the daemon serves others meanwhile."""
    stuck = []

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        if not stuck:
            stuck.append(guest)
            guest.reader._transport.pause_reading()
            await anyio.sleep_forever()
        await guest.serve_cells()

    async with scripted(script, interrupt_grace_s=0.1, kill_grace_s=0.1) as h:
        victim, other = await h.create(), await h.create()
        async with anyio.create_task_group() as tasks:
            results = []

            async def attack() -> None:
                results.append(await h.exec(victim, "x" * 3_000_000, timeout_seconds=0.2))

            tasks.start_soon(attack)
            assert text(await h.exec(other, "1")) == "1"
        assert results[0][-1]["reason"] == "sandbox_failed"


OPENED = frame(frames.MESSAGE, 1, to_payload(FileOpened(10**9)))
FILE_LIES = {
    "bytes before opened": frame(frames.DATA, 1, b"x"),
    "more than the window": OPENED + frame(frames.DATA, 1, b"x" * frames.MAX_DATA_BYTES) * 40,
    "a window of single bytes": OPENED + frame(frames.DATA, 1, b"x") * 100_000,
    "opened twice": OPENED * 2,
    "acknowledgement of a download": frame(frames.MESSAGE, 1, to_payload(Ack(3))),
    "end of an upload": frame(frames.MESSAGE, 1, to_payload(DataEnd())),
    "a huge message": frame(frames.MESSAGE, 1, b" " * 2_000_000),
    "output": frame(frames.STDOUT, 1, b"x"),
}


@pytest.mark.parametrize("what", FILE_LIES)
async def test_download_from_a_lying_guest(scripted, what):
    """A guest that breaks a download's rules ends its sandbox; the client sees an error or a broken answer, no hang."""

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        await guest.next_frame()
        await guest.raw(FILE_LIES[what])
        await anyio.sleep_forever()

    async with scripted(script) as h:
        sandbox = await h.create()
        reader, writer = await h.connect()
        # A client that takes nothing yet: what the guest sends has to wait in the daemon.
        writer.transport.pause_reading()
        writer.write(
            f"GET /v1/sandboxes/{sandbox}/files?path=x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )
        with anyio.fail_after(20):
            while (gone := await h.client.get(f"/v1/sandboxes/{sandbox}")).status_code != 404:
                await anyio.sleep(0.01)
            assert "broke the protocol" in gone.json()["error"]
            writer.transport.resume_reading()
            answer = await reader.read()
        assert b" 500 " in answer[:20] or not answer.endswith(b"0\r\n\r\n")
        writer.transport.abort()


@pytest.mark.parametrize("lie", [Ack(10**9), FileOpened(3), DataEnd()])
async def test_upload_to_a_lying_guest(scripted, lie):
    """A guest that acknowledges what was never sent, or answers something else, ends its sandbox."""

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        frame = await guest.next_frame()
        await guest.say(frame.channel, lie)
        await anyio.sleep_forever()

    async with scripted(script) as h:
        sandbox = await h.create()
        answer = await h.client.put(f"/v1/sandboxes/{sandbox}/files?path=x", content=b"x" * 10)
        assert answer.status_code == 500 and "broke the protocol" in answer.json()["error"]


async def test_silent_guest_does_not_hold_a_transfer_for_ever(scripted):
    """A guest that says nothing to a file request leads to 504, and the sandbox lives on."""

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        await guest.serve_cells()

    async with scripted(script, transfer_stall_s=0.1) as h:
        sandbox = await h.create()
        assert (await h.client.get(f"/v1/sandboxes/{sandbox}/files?path=x")).status_code == 504
        assert (await h.client.put(f"/v1/sandboxes/{sandbox}/files?path=x", content=b"1")).status_code == 504
        assert text(await h.exec(sandbox, "alive")) == "alive"
