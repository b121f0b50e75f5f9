"""The model's API over HTTP.  Everything that comes back is bounded; nothing of it is logged."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import httpx

from podflare.errors import ProtocolError
from podflare.integrations.anthropic.hosted.definitions import forward_betas
from podflare.integrations.anthropic.hosted.refusals import retry_after_s
from podflare.integrations.anthropic.hosted.stream import Event, EventReader

Headers = dict[str, str]

MAX_ANSWER_BYTES = 64 * 1024 * 1024
_CONNECT_S = 15.0
_UP = ("anthropic-", "x-stainless-")
_UP_EXACT = ("user-agent", "accept", "content-type")
_DOWN = ("anthropic-", "x-ratelimit-")
_DOWN_EXACT = ("request-id", "retry-after", "retry-after-ms", "x-should-retry", "content-type")


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Headers
    body: bytes

    @property
    def ok(self) -> bool:
        return self.status == 200

    def json(self) -> Any:
        """Raises: ProtocolError if it is no JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as exc:
            raise ProtocolError("the model's API answered with something that is no JSON") from exc

    def error(self) -> dict[str, Any]:
        """The `error` object of a failure."""
        try:
            found = self.json()["error"]
            return {"type": str(found["type"]), "message": str(found["message"])}
        except (ProtocolError, KeyError, TypeError):
            return {"type": "api_error", "message": f"the model's API answered with status {self.status}"}


@dataclass
class EventStream:
    """An answer that streams: either `failed`, or events."""

    response: httpx.Response
    headers: Headers
    failed: Answer | None = None

    async def events(self) -> AsyncIterator[Event]:
        """Raises: ProtocolError; httpx.HTTPError if the connection breaks."""
        reader = EventReader()
        async for data in self.response.aiter_bytes():
            for event in reader.feed(data):
                yield event


class Upstream:
    """The connections to the model's API."""

    def __init__(self, url: str, key: str | None, silence_s: float) -> None:
        self._url = url
        self._key = key
        timeout = httpx.Timeout(silence_s, connect=_CONNECT_S, pool=_CONNECT_S)
        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=50)
        self._client = httpx.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False, trust_env=True)

    async def aclose(self) -> None:
        await self._client.aclose()

    def headers(self, given: Mapping[str, str]) -> Headers:
        """Headers for the API: the client's, with our key where there is one, without what is done here."""
        kept = {
            name: value
            for name, value in given.items()
            if name.startswith(_UP)
            or name in _UP_EXACT
            or (self._key is None and name in ("authorization", "x-api-key"))
        }
        betas = forward_betas(kept.pop("anthropic-beta", None))
        if betas is not None:
            kept["anthropic-beta"] = betas
        if self._key is not None:
            kept["x-api-key"] = self._key
        return kept

    @asynccontextmanager
    async def open(
        self, method: str, path: str, headers: Headers, content: bytes | None
    ) -> AsyncIterator[httpx.Response]:
        """A raw answer.  Raises: httpx.HTTPError."""
        request = self._client.build_request(method, self._url + path, headers=headers, content=content)
        response = await self._client.send(request, stream=True)
        try:
            yield response
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()

    async def ask(self, path: str, headers: Headers, body: Mapping[str, Any], *, first: bool = True) -> Answer:
        """A whole answer.  Later samplings of a turn are tried again where that can help.

        Raises: httpx.HTTPError; ProtocolError if it is too large.
        """
        content = encoded(body)
        attempt = 0
        while True:
            try:
                async with self.open("POST", path, headers, content) as response:
                    answer = await whole(response)
                if answer.ok or first:
                    return answer
                wait_s = retry_after_s(attempt, answer.status, answer.headers.get("retry-after"))
                if wait_s is None:
                    return answer
            except httpx.TransportError:
                wait_s = None if first else retry_after_s(attempt, None, None)
                if wait_s is None:
                    raise
            attempt += 1
            await anyio.sleep(wait_s)

    @asynccontextmanager
    async def stream(
        self, path: str, headers: Headers, body: Mapping[str, Any], *, first: bool
    ) -> AsyncIterator[EventStream]:
        """An answer that streams.  As `ask`."""
        content = encoded(body)
        attempt = 0
        while True:
            wait_s: float | None
            try:
                request = self._client.build_request("POST", self._url + path, headers=headers, content=content)
                response = await self._client.send(request, stream=True)
            except httpx.TransportError:
                wait_s = None if first else retry_after_s(attempt, None, None)
                if wait_s is None:
                    raise
            else:
                try:
                    failed = None if response.status_code == 200 else await whole(response)
                    wait_s = None
                    if failed is not None and not first:
                        wait_s = retry_after_s(attempt, failed.status, failed.headers.get("retry-after"))
                    if wait_s is None:
                        yield EventStream(response, passed_down(response.headers), failed)
                        return
                finally:
                    with anyio.CancelScope(shield=True):
                        await response.aclose()
            attempt += 1
            await anyio.sleep(wait_s)


def encoded(body: Mapping[str, Any]) -> bytes:
    """JSON for the API.  Lone surrogates, which clients can send as escapes, stay escapes."""
    return json.dumps(body, ensure_ascii=True, separators=(",", ":")).encode("ascii")


async def whole(response: httpx.Response) -> Answer:
    """Raises: ProtocolError above MAX_ANSWER_BYTES."""
    parts: list[bytes] = []
    size = 0
    async for data in response.aiter_bytes():
        size += len(data)
        if size > MAX_ANSWER_BYTES:
            raise ProtocolError(f"the model's API sent an answer above {MAX_ANSWER_BYTES} bytes")
        parts.append(data)
    return Answer(response.status_code, passed_down(response.headers), b"".join(parts))


def passed_down(headers: Mapping[str, str]) -> Headers:
    """Those headers of an answer that are for the client."""
    return {
        name.lower(): value
        for name, value in headers.items()
        if name.lower().startswith(_DOWN) or name.lower() in _DOWN_EXACT
    }
