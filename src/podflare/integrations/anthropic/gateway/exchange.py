"""One request and its answer on bare ASGI: caps while reading, a client that goes away, errors in the API's words."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
import httpx
from starlette.types import Receive, Scope, Send

from podflare.errors import BadRequest, PodflareError, ProtocolError, TooLarge, Unauthorized
from podflare.integrations.anthropic.gateway.config import GatewayConfig
from podflare.integrations.anthropic.hosted import refusals
from podflare.integrations.anthropic.hosted.stream import encode, error_event

_LARGE_BYTES = 1024 * 1024

log = logging.getLogger("podflare.gateway")

Guard = Callable[[str | None, str | None, str | None], None]
"""Gets the headers Host, Origin and Sec-Fetch-Site.  Raises: Forbidden."""


class ClientGone(Exception):
    """There is nobody to answer."""


class Exchange:
    """What a route works with.  `owner` is set by `admit`."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, config: GatewayConfig) -> None:
        self.scope = scope
        self.receive = receive
        self.config = config
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.request_id = f"req_local_{secrets.token_hex(12)}"
        self.owner = ""
        self.started = False
        self._send = send
        self._streaming = False

    @property
    def path(self) -> str:
        """Path and query, as they came."""
        query = self.scope["query_string"].decode("latin-1")
        path = self.scope.get("raw_path", self.scope["path"].encode()).decode("latin-1").partition("?")[0]
        return f"{path}?{query}" if query else path

    def admit(self, guard: Guard | None) -> None:
        """Raises: Unauthorized without a key, or with one that is not among ours; Forbidden for web pages."""
        if guard is not None and not self.config.keys:
            guard(self.headers.get("host"), self.headers.get("origin"), self.headers.get("sec-fetch-site"))
        key = self.headers.get("x-api-key") or ""
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        if not key and scheme.lower() == "bearer":
            key = token.strip()
        if not key:
            raise Unauthorized("x-api-key or authorization header is required")
        known = self.config.keys
        if known and not any(hmac.compare_digest(key.encode(), each.encode()) for each in known):
            raise Unauthorized("invalid x-api-key")
        self.owner = hashlib.sha256(key.encode()).hexdigest()

    async def body(self) -> bytes:
        """The whole body.

        Raises: TooLarge above the cap, while reading; BadRequest if it does not come; ClientGone.
        """
        parts: list[bytes] = []
        size = 0
        cap = self.config.max_body_bytes
        try:
            with anyio.fail_after(self.config.stall_s):
                async for part in self.parts():
                    size += len(part)
                    if size > cap:
                        raise TooLarge(f"Request exceeds the maximum size of {cap} bytes")
                    parts.append(part)
        except TimeoutError:
            raise BadRequest("the request body was not complete in time") from None
        return b"".join(parts)

    async def parts(self) -> AsyncIterator[bytes]:
        """The body in the pieces it comes in.  Raises: ClientGone."""
        more = True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            more = message.get("more_body", False)
            yield message.get("body", b"")

    async def parsed(self, body: bytes) -> dict[str, Any]:
        """Raises: BadRequest if it is no JSON object."""
        try:
            # A large one takes long enough to hold up everybody's streams.
            value = json.loads(body) if len(body) < _LARGE_BYTES else await anyio.to_thread.run_sync(json.loads, body)
        except (ValueError, RecursionError) as exc:
            raise BadRequest("The request body is not valid JSON") from exc
        if not isinstance(value, dict):
            raise BadRequest("The request body must be a JSON object")
        return value

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """What is inside is cancelled when the client goes away.  After the body was read.

        Raises: ClientGone.
        """

        async def watch() -> None:
            while (await self.receive())["type"] != "http.disconnect":
                pass
            raise ClientGone

        async with beside(watch):
            yield

    async def start(self, status: int, headers: Mapping[str, str], *, streaming: bool = False) -> None:
        """Status and headers; a request id of ours unless the headers have one."""
        given = {"request-id": self.request_id, **headers}
        self.request_id = given["request-id"]
        self.started, self._streaming = True, streaming
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def piece(self, data: bytes, *, more: bool = True) -> None:
        """A part of the body.  Raises: ClientGone if the client takes nothing for too long."""
        try:
            with anyio.fail_after(self.config.stall_s):
                await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise ClientGone from None

    async def whole(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """A complete answer."""
        await self.start(status, {"content-type": "application/json", **headers, "content-length": str(len(body))})
        await self.piece(body, more=False)

    async def json(self, status: int, value: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        """A complete JSON answer."""
        body = json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode("ascii")
        await self.whole(status, {**(headers or {}), "content-type": "application/json"}, body)

    async def refuse(self, status: int, error: Mapping[str, Any]) -> None:
        """An error, in whatever way the client still can get it."""
        if not self.started:
            await self.json(status, refusals.body(error, self.request_id))
        elif self._streaming:
            kind, message = str(error["type"]), str(error["message"])
            await self.piece(encode(error_event(kind, message, self.request_id)), more=False)


@asynccontextmanager
async def beside(work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Have `work` done beside what is inside, which is cancelled if it fails.

    Raises: what `work` or the inside raised, as it is and not in a group.
    """
    failures: list[Exception] = []

    async def run() -> None:
        try:
            await work()
        except Exception as exc:  # noqa: BLE001  # raised below, outside the group, which would wrap it
            failures.append(exc)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        try:
            yield
        except Exception as exc:  # noqa: BLE001  # as above
            failures.append(exc)
        tasks.cancel_scope.cancel()
    if failures:
        raise failures[0]


async def guarded(exchange: Exchange, work: Callable[[], Awaitable[None]]) -> None:
    """Do the work of a route; its failures become answers."""
    try:
        await work()
    except ClientGone:
        return
    except PodflareError as exc:
        status, kind = refusals.classified(exc)
        if isinstance(exc, ProtocolError):
            status = 502
        await _tell(exchange, status, kind, str(exc) or type(exc).__name__)
    except httpx.TimeoutException:
        await _tell(exchange, 504, "timeout_error", "the model's API did not answer in time")
    except httpx.HTTPError as exc:
        await _tell(exchange, 502, "api_error", f"the model's API could not be reached ({type(exc).__name__})")
    except Exception as exc:  # noqa: BLE001  # the last border: a bug is an answer, too, and says no secrets
        log.error("a request failed: %s at %s", type(exc).__name__, _where(exc))
        await _tell(exchange, 500, "api_error", "Internal server error")


async def _tell(exchange: Exchange, status: int, kind: str, message: str) -> None:
    try:
        await exchange.refuse(status, {"type": kind, "message": message})
    except ClientGone:
        return


def _where(exc: BaseException) -> str:
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}"
