"""The asynchronous SDK on a real daemon and real sandboxes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import anyio
import pytest

from daemons import ServedDaemon
from podflare import AsyncClient, AsyncSandbox, FileMissing

pytestmark = [pytest.mark.anyio, pytest.mark.any_engine, pytest.mark.timeout(90)]


@pytest.mark.both_engines
async def test_first_steps(sdk_daemon: ServedDaemon, tmp_path: Path) -> None:
    """Cells, streams, files and timeouts work as in the synchronous SDK."""
    async with AsyncSandbox(host=sdk_daemon.url) as sandbox:
        assert (await sandbox.run_code("x = 6 * 7\nprint(x)")).stdout == "42"
        assert [event.data async for event in sandbox.run_code_stream("print(x)")] == ["42", 0]
        assert (await sandbox.run_code("while True: pass", timeout=0.5)).exit_code == 124
        await sandbox.upload(b"content" * 500_000, "/data/f")
        assert await sandbox.download("/data/f") == b"content" * 500_000
        assert await sandbox.download_file("/data/f", tmp_path / "f") == 3_500_000
        with pytest.raises(FileMissing):
            await sandbox.download("/nope")


async def test_many_at_once(sdk_daemon: ServedDaemon) -> None:
    """Sandboxes used concurrently in one loop each keep their own state and output."""

    async def work(client: AsyncClient, i: int) -> None:
        async with AsyncSandbox(client=client) as sandbox:
            await sandbox.run_code(f"mine = {i}")
            for turn in range(3):
                assert (await sandbox.run_code(f"print(mine, {turn})")).stdout == f"{i} {turn}"

    async with AsyncClient(sdk_daemon.url) as client, anyio.create_task_group() as tasks:
        for i in range(8):
            tasks.start_soon(work, client, i)


@pytest.mark.both_engines
async def test_cancelled_cell_is_interrupted(sdk_daemon: ServedDaemon) -> None:
    """Cancelling run_code ends the cell, so that the next one runs at once with the state intact."""
    async with AsyncSandbox(host=sdk_daemon.url) as sandbox:
        await sandbox.run_code("x = 1")
        with anyio.move_on_after(0.5) as scope:
            await sandbox.run_code("while True: pass")
        assert scope.cancelled_caught
        with anyio.fail_after(20):
            assert (await sandbox.run_code("print(x)")).stdout == "1"


async def test_leaving_a_stream_frees_the_sandbox(sdk_daemon: ServedDaemon) -> None:
    """A stream left early interrupts its cell."""
    async with AsyncSandbox(host=sdk_daemon.url) as sandbox:
        async for _event in sandbox.run_code_stream("import time\nprint('on')\nwhile True: time.sleep(0.1)"):
            break
        with anyio.fail_after(20):
            assert (await sandbox.run_code("print('free')")).stdout == "free"


def test_loop_after_loop(sdk_daemon: ServedDaemon) -> None:
    """Each asyncio.run has its own connections and leaves none open."""

    async def use() -> str:
        async with AsyncSandbox(host=sdk_daemon.url) as sandbox:
            return (await sandbox.run_code("print(1)")).stdout

    assert [asyncio.run(use()) for _ in range(3)] == ["1"] * 3
