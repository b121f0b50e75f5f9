"""A daemon in the test's own event loop, behind a real socket, and a client of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx

from podflare.engines.base import Engine
from podflare.host.config import Config
from podflare.host.engines import Engines
from podflare.host.recover import open_instance
from podflare.serve import listen, serve_until

STEP_S = 20.0
"""Hard limit of each wait in these tests."""


@dataclass
class Host:
    """A running daemon and a client of it."""

    config: Config
    engine: Any
    client: httpx.AsyncClient
    address: Any
    leftovers: list[str] = field(default_factory=list)

    async def create(self, **body: Any) -> str:
        answer = await self.client.post("/v1/sandboxes", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    async def exec(self, sandbox: str, code: str, **more: Any) -> list[dict[str, Any]]:
        """All events of one cell."""
        answer = await self.client.post(f"/v1/sandboxes/{sandbox}/exec", json={"code": code, **more})
        assert answer.status_code == 200, answer.text
        return events(answer.content)

    async def fork(self, sandbox: str, **body: Any) -> list[str]:
        answer = await self.client.post(f"/v1/sandboxes/{sandbox}/fork", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["children"])

    async def merge(self, sandbox: str, winner: str) -> httpx.Response:
        return await self.client.post(f"/v1/sandboxes/{sandbox}/merge_into/{winner}", timeout=40)

    async def info(self, sandbox: str) -> dict[str, Any]:
        answer = await self.client.get(f"/v1/sandboxes/{sandbox}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def diff(self, sandbox: str, other: str, **query: Any) -> dict[str, Any]:
        answer = await self.client.get(f"/v1/sandboxes/{sandbox}/diff/{other}", params=query)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A raw connection."""
        if isinstance(self.address, str):
            return await asyncio.open_unix_connection(self.address)
        return await asyncio.open_connection(*self.address[:2])

    async def raw(self, request: bytes) -> bytes:
        """What comes back for exactly these bytes, until the server closes or falls silent after an answer."""
        reader, writer = await self.connect()
        try:
            writer.write(request)
            with anyio.fail_after(STEP_S):
                return await reader.read()
        finally:
            writer.transport.abort()


def events(body: bytes) -> list[dict[str, Any]]:
    """Decode NDJSON as the original's client does: lines by str.splitlines, empty ones skipped."""
    return [json.loads(line) for line in body.decode().splitlines() if line]


def text(cell: list[dict[str, Any]], kind: str = "stdout") -> str:
    return "\n".join(event["data"] for event in cell if event["type"] == kind)


@asynccontextmanager
async def running(data_dir: Path, engine: Engine | Engines, *others: Engine, **settings: Any) -> AsyncIterator[Host]:
    settings = {"uds": str(data_dir / "s"), "pool_size": 0, "data_dir": data_dir / "data", **settings}
    config = Config(**settings)
    sock = listen(config)
    address = sock.getsockname()
    instance = open_instance(config.data_dir, lambda directory, name: None)
    stop = anyio.Event()
    try:
        engines = engine if isinstance(engine, Engines) else Engines(engine, *others)
        await engines.start()
        base = "http://podflare" if config.uds else f"http://127.0.0.1:{address[1]}"
        transport = httpx.AsyncHTTPTransport(uds=config.uds)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve_until, stop, config, engines, instance, sock)
            try:
                async with httpx.AsyncClient(transport=transport, base_url=base, timeout=STEP_S) as client:
                    yield Host(config, engine, client, address)
            finally:
                stop.set()
        left = [path.name for path in instance.outputs.iterdir()]
        assert left == [], f"files of cells left: {left}"
    finally:
        instance.close()
        sock.close()
        Path(config.uds).unlink(missing_ok=True) if config.uds else None


async def wait_until(condition: Callable[[], bool]) -> None:
    """Until a condition without an event of its own holds."""
    with anyio.fail_after(STEP_S):
        while not condition():
            await anyio.sleep(0.005)


def peak_kib() -> int:
    """The most memory that this process, with the daemon in it, ever had."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
