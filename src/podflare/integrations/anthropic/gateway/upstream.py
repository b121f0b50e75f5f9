"""The model's API over HTTP.  Everything that comes back is bounded; nothing of it is logged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from podflare.errors import ProtocolError
from podflare.integrations.anthropic.hosted.definitions import forward_betas

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

    async def send(self, method: str, path: str, headers: Headers, content: bytes | None) -> httpx.Response:
        """An answer whose body is still to be read; the caller closes it.  Raises: httpx.HTTPError."""
        request = self._client.build_request(method, self._url + path, headers=headers, content=content)
        return await self._client.send(request, stream=True)


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
