"""Which containers there are, whose they are, and how long they live."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import anyio
from anyio.abc import TaskGroup

from podflare.errors import BadRequest, Conflict, PodflareError, SandboxNotFound
from podflare.integrations.anthropic.containers.container import Container
from podflare.integrations.anthropic.containers.descriptions import moment
from podflare.integrations.anthropic.containers.files import FileStore
from podflare.integrations.anthropic.containers.index import ContainerRow, Index

if TYPE_CHECKING:
    from podflare import AsyncClient, AsyncSandbox

IDLE_S = 3600.0
CELL_S = 300.0
_REMEMBERED_S = 30 * 24 * 3600.0
"""How long an expired container is still told from one that never was."""
_CLOSE_S = 8.0
_CLOSED_AT_A_TIME = 16
_REAPED_AFTER_S = 60
"""The daemon ends an idle sandbox this much later than its container expires, also if this program was killed."""


@dataclass(frozen=True)
class Settings:
    """How containers are made.  `sandbox` are options of AsyncSandbox."""

    idle_s: float = IDLE_S
    cell_s: float = CELL_S
    """Longest time for one call."""
    sandbox: Mapping[str, object] | None = None


class Containers:
    """All containers of this program, for as long as its `async with` block lasts.

    Its end closes the sandboxes that a later program could not find again.
    """

    def __init__(
        self,
        client: AsyncClient,
        files: FileStore,
        index: Index,
        settings: Settings,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self.files = files
        self._client = client
        self._index = index
        self._now = now
        self._living: dict[str, Container] = {}
        self._lasting = bool(client.host)  # a private daemon, which has no address yet, ends with this program
        self._adopting = anyio.Lock()
        self._tasks: TaskGroup

    async def __aenter__(self) -> Containers:
        self._tasks = await anyio.create_task_group().__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)
        with anyio.CancelScope(shield=True):
            if not self._lasting:
                await self._close_all()
            self._living.clear()
            await self._client.close()

    async def _close_all(self) -> None:
        """In time that is bounded: what is left ends with the private daemon, or when it is idle."""
        limiter = anyio.CapacityLimiter(_CLOSED_AT_A_TIME)

        async def close(sandbox: AsyncSandbox) -> None:
            async with limiter:
                await _close(sandbox)

        with anyio.move_on_after(_CLOSE_S):
            async with anyio.create_task_group() as tasks:
                for container in self._living.values():
                    tasks.start_soon(close, container.sandbox)

    async def create(self, owner: str) -> Container:
        """A new container.  Raises: PodflareError, as AsyncSandbox.create."""
        from podflare import AsyncSandbox

        await self._drop_expired()
        options = dict(self.settings.sandbox or {})
        options.setdefault("idle_timeout_seconds", int(self.settings.idle_s) + _REAPED_AFTER_S)
        sandbox = await AsyncSandbox.create(client=self._client, **options)
        return self._register(owner, sandbox)

    def _register(self, owner: str, sandbox: AsyncSandbox, container_id: str | None = None) -> Container:
        container = Container(
            container_id or f"container_{secrets.token_hex(12)}", owner, sandbox, self.files, self._tasks
        )
        container.expires_at = self._now() + self.settings.idle_s
        self._living[container.id] = container
        daemon = self._client.host if self._lasting else ""
        self._index.keep_container(ContainerRow(container.id, owner, sandbox.id, daemon, container.expires_at))
        return container

    async def find(self, owner: str, container_id: str) -> Container:
        """A living container of this owner.

        Raises: BadRequest that says whether it is unknown or has expired.
        """
        container = self._living.get(container_id)
        if container is None:
            container = await self._adopt(owner, container_id)
        if container.owner != owner:
            raise _unknown(container_id)
        if container.gone or (not container.in_use and container.expires_at < self._now()):
            await self._expire(container)
            raise _expired(container_id)
        self.touch(container)
        return container

    async def _adopt(self, owner: str, container_id: str) -> Container:
        """A container of an earlier life of this program whose sandbox still lives."""
        from podflare import AsyncSandbox

        async with self._adopting:
            if container_id in self._living:
                return self._living[container_id]
            row = self._index.container(container_id)
            if row is None or row.owner != owner:
                raise _unknown(container_id)
            if row.expires_at < self._now() or not self._lasting or row.daemon != self._client.host:
                raise _expired(container_id)
            try:
                sandbox = await AsyncSandbox.connect(row.sandbox_id, client=self._client)
            except SandboxNotFound:
                raise _expired(container_id) from None
            return self._register(owner, sandbox, container_id)

    def touch(self, container: Container) -> None:
        """It was used just now."""
        container.expires_at = self._now() + self.settings.idle_s
        self._index.extend_container(container.id, container.expires_at)

    async def fork(self, owner: str, container_id: str, n: int) -> list[Container]:
        """n copies of a container: memory, files, everything.

        Raises: as find; PodflareError as AsyncSandbox.fork.
        """
        origin = await self.find(owner, container_id)
        if origin.waits:
            raise Conflict(f"container: code in {container_id} waits for the results of its tool calls")
        made = []
        for sandbox in await origin.sandbox.fork(n):
            copy = self._register(owner, sandbox)
            copy.adopt_state(origin)
            made.append(copy)
        return made

    def described(self, container: Container) -> dict[str, object]:
        """The `container` object of an answer."""
        return {"id": container.id, "expires_at": moment(container.expires_at), "skills": None}

    async def _drop_expired(self) -> None:
        now = self._now()
        for container in [each for each in self._living.values() if not each.in_use and each.expires_at < now]:
            await self._expire(container)
        self._index.forget_containers(now - _REMEMBERED_S)

    async def _expire(self, container: Container) -> None:
        if self._living.pop(container.id, None) is not None:
            self._index.extend_container(container.id, min(container.expires_at, self._now() - 1))
            await _close(container.sandbox)


async def _close(sandbox: AsyncSandbox) -> None:
    try:
        await sandbox.close()
    except PodflareError:
        return  # its daemon is away; idle sandboxes end by themselves


def _unknown(container_id: str) -> BadRequest:
    return BadRequest(f"container: {container_id:.100} does not exist; send the request without `container`")


def _expired(container_id: str) -> BadRequest:
    return BadRequest(f"container: {container_id:.100} has expired; send the request without `container`")
