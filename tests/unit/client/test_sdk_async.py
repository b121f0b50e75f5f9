"""AsyncSandbox over a scripted daemon: the same behaviour, and what cancellation does."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import httpx
import pytest
from scripted_daemon import SANDBOX_ID, ScriptedDaemon, ndjson

from podflare import AsyncClient, AsyncSandbox, Conflict, DaemonUnreachable, SandboxNotFound

pytestmark = pytest.mark.anyio

DONE = ndjson({"type": "stdout", "data": "42"}, {"type": "exit", "data": 0})


async def test_block_create_and_await(daemon: ScriptedDaemon, async_client: AsyncClient) -> None:
    """`async with`, `await AsyncSandbox.create()` and `await AsyncSandbox()` give an open sandbox."""
    daemon.answer("POST", "/exec", 200, content=DONE)
    async with AsyncSandbox(client=async_client) as sandbox:
        assert (await sandbox.run_code("print(42)", timeout=2)).stdout == "42"
        assert [event.data async for event in sandbox.run_code_stream("print(42)")] == ["42", 0]
    for opened in (await AsyncSandbox.create(client=async_client), await AsyncSandbox(client=async_client)):
        assert opened.id == SANDBOX_ID
        await opened.aclose()
    assert len([call for call in daemon.calls if call.startswith("DELETE")]) == 3


async def test_unopened_sandbox_says_how_to_open_it(async_client: AsyncClient) -> None:
    """Use before opening is a clear error, and closing it is nothing."""
    sandbox = AsyncSandbox(client=async_client)
    with pytest.raises(Conflict, match="async with"):
        await sandbox.run_code("1")
    await sandbox.close()


async def test_files(daemon: ScriptedDaemon, async_client: AsyncClient, tmp_path: Path) -> None:
    """Upload in both orders and from files, download to bytes and to a file."""
    daemon.answer("PUT", "/files", 204)
    daemon.answer("GET", "/files", 200, content=b"content" * 300_000)
    (tmp_path / "in").write_bytes(b"from file" * 200_000)
    async with AsyncSandbox(client=async_client) as sandbox:
        await sandbox.upload(b"one", "/x")
        await sandbox.upload("/x", b"two" * 1_000_000)
        await sandbox.upload_file(tmp_path / "in", "/x")
        assert await sandbox.download("/x") == b"content" * 300_000
        assert await sandbox.download_file("/x", tmp_path / "out") == 2_100_000
    puts = [request.content for request in daemon.requests if request.method == "PUT"]
    assert puts == [b"one", b"two" * 1_000_000, b"from file" * 200_000]


async def test_cancelled_create_leaves_no_sandbox(daemon: ScriptedDaemon) -> None:
    """A create that is cancelled on its way is looked up by its key and closed."""
    arrived = anyio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        await request.aread()
        request.headers["x-async"] = "1"
        if not arrived.is_set():
            arrived.set()
            await anyio.sleep_forever()
        return daemon(request)

    client = AsyncClient("http://daemon.test", transport=httpx.MockTransport(answer))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(AsyncSandbox(client=client)._open)
        await arrived.wait()
        tasks.cancel_scope.cancel()
    assert daemon.calls == ["POST /v1/sandboxes", f"DELETE /v1/sandboxes/{SANDBOX_ID}"]


async def test_cancelled_body_still_closes(daemon: ScriptedDaemon, async_client: AsyncClient) -> None:
    """Leaving the block by cancellation sends the close."""
    opened = anyio.Event()

    async def use() -> None:
        async with AsyncSandbox(client=async_client):
            opened.set()
            await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(use)
        await opened.wait()
        tasks.cancel_scope.cancel()
    assert daemon.calls[-1] == f"DELETE /v1/sandboxes/{SANDBOX_ID}"


async def test_block_never_masks_the_bodys_exception(daemon: ScriptedDaemon, async_client: AsyncClient) -> None:
    """As in the synchronous SDK; without one, the failed close is raised."""
    daemon.fail("DELETE", SANDBOX_ID, httpx.ConnectError("refused"))
    with pytest.raises(KeyError, match="mine"):
        async with AsyncSandbox(client=async_client):
            raise KeyError("mine")
    with pytest.raises(DaemonUnreachable):
        async with AsyncSandbox(client=async_client):
            pass


async def test_errors_are_the_same(daemon: ScriptedDaemon, async_client: AsyncClient) -> None:
    """A sandbox that is gone is a SandboxNotFound and an HTTPStatusError here too."""
    daemon.answer("POST", "/exec", 404, json={"error": "gone: closed", "code": "sandbox_not_found"})
    sandbox = await AsyncSandbox.create(client=async_client)
    with pytest.raises(SandboxNotFound, match="gone: closed") as caught:
        await sandbox.run_code("1")
    assert isinstance(caught.value, httpx.HTTPStatusError)


async def test_smaller_calls(daemon: ScriptedDaemon, async_client: AsyncClient) -> None:
    """replay, output, interrupt, info, list, connect and fork are awaited and give values."""
    daemon.answer("GET", "/replay", 200, content=DONE)
    daemon.answer("GET", "/output", 200, content=b"whole")
    daemon.answer("POST", "/interrupt", 200, json={"interrupted": False, "cell_id": None})
    daemon.answer("GET", SANDBOX_ID, 200, json={"id": SANDBOX_ID})
    daemon.answer("GET", "/v1/sandboxes", 200, json={"sandboxes": [{"id": SANDBOX_ID}]})
    daemon.answer("POST", "/fork", 200, json={"children": ["sbx_a"]})
    sandbox = await AsyncSandbox.connect(SANDBOX_ID, client=async_client)
    assert [event.data for event in await sandbox.replay()] == ["42", 0]
    assert await sandbox.output("c1") == b"whole"
    assert await sandbox.interrupt("c1") is False
    assert json.loads(daemon.requests[-1].content) == {"cell_id": "c1"}
    assert (await sandbox.info()).id == SANDBOX_ID
    assert [info.id for info in await AsyncSandbox.list(client=async_client)] == [SANDBOX_ID]
    assert [child.id for child in await sandbox.fork()] == ["sbx_a"]
    assert await async_client.healthz() is False
