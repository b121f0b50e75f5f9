"""A turn's hold on its container: made when the first call comes, with the turn's files in it."""

from __future__ import annotations

from collections.abc import Mapping

import anyio.to_thread

from podflare.errors import NoCapacity, PodflareError, QuotaExceeded, TooLarge
from podflare.integrations.anthropic.containers.container import Container, Order
from podflare.integrations.anthropic.containers.files import MAX_INLINE_BYTES, FileStore
from podflare.integrations.anthropic.containers.registry import Containers
from podflare.integrations.anthropic.hosted.blocks import (
    CODE,
    SANDBOX_TOOLS,
    TOO_MANY,
    UNAVAILABLE,
    Block,
    Call,
    error_content,
    hosted_result,
)
from podflare.integrations.anthropic.hosted.request import Files, HostedRequest
from podflare.integrations.anthropic.hosted.rounds import Paused
from podflare.integrations.anthropic.hosted.uploads import input_names


def look_up_files(request: HostedRequest, store: FileStore, owner: str) -> Files:
    """What the request's files are.  Blocking.

    Raises: FileMissing for an upload that is not there; TooLarge for more content than a request may have. A document's
        id that is unknown here is the API's business.
    """
    rows = [store.find(owner, file_id) for file_id in request.uploaded]
    names = input_names([(row.id, row.filename) for row in rows])
    shown = [store.find(owner, file_id) for file_id in request.referenced if store.knows(owner, file_id)]
    size = sum(row.size_bytes for row in shown)
    if size > MAX_INLINE_BYTES:
        raise TooLarge(f"the files of documents and images have {size} bytes, the cap is {MAX_INLINE_BYTES}")
    return Files(names, {row.id: (row.mime_type, store.content(row)) for row in shown})


class Lease:
    """The container of one turn."""

    def __init__(self, containers: Containers, owner: str, request: HostedRequest, names: Mapping[str, str]) -> None:
        self._containers = containers
        self._owner = owner
        self._request = request
        self._names = dict(names)
        self._held: Container | None = None
        self._filled = False

    @classmethod
    async def begin(cls, containers: Containers, owner: str, request: HostedRequest) -> tuple[Lease, Files]:
        """Look up the container and the files that a request names.

        Raises: BadRequest, FileMissing, ... for what is not there.
        """
        files = await anyio.to_thread.run_sync(look_up_files, request, containers.files, owner)
        lease = cls(containers, owner, request, files.names)
        if request.container_id is not None:
            lease._hold(await containers.find(owner, request.container_id))
        return lease, files

    def _hold(self, container: Container) -> Container:
        container.in_use += 1
        self._held = container
        return container

    def end(self) -> None:
        """The turn is over, or given up."""
        if self._held is not None:
            self._held.in_use -= 1
            self._containers.touch(self._held)
            self._held = None

    def described(self) -> dict[str, object] | None:
        """The `container` of the answer."""
        if self._held is None:
            return None
        self._containers.touch(self._held)
        return self._containers.described(self._held)

    async def run(self, call: Call) -> Block | Paused:
        """The result block of a call, or what its code wants from the client; what fails is a result, too."""
        name = call.name if call.name in SANDBOX_TOOLS else CODE
        try:
            container = self._held or self._hold(await self._containers.create(self._owner))
            if not self._filled:
                await container.place_files(self._names)
                self._filled = True
        except (NoCapacity, QuotaExceeded) as exc:
            return hosted_result(call, error_content(name, TOO_MANY, str(exc)))
        except PodflareError as exc:
            return hosted_result(call, error_content(name, UNAVAILABLE, str(exc)))
        order = Order(
            self._containers.settings.cell_s, self._request.toolset.functions, self._request.answers.get(call.id)
        )
        return await container.run(call, order)
