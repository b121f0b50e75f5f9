"""Bodies in and answers out, on bare ASGI: caps and deadlines while reading, JSON and errors while writing.

Knows no routes and nothing of sandboxes.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any
from urllib.parse import parse_qsl

import anyio
from starlette.types import Message, Receive, Scope, Send

from podflare.errors import BadRequest, TooLarge
from podflare.wire.api import MAX_BODY_BYTES, MAX_BODY_VALUES
from podflare.wire.codec import decode_object

Headers = list[tuple[bytes, bytes]]
MAX_QUERY_FIELDS = 128
JSON_TYPE = (b"content-type", b"application/json")


class ClientGone(Exception):
    """The client closed its connection before its request was complete: there is nobody to answer."""


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of that lower-case name."""
    headers: Headers = scope["headers"]
    for key, value in headers:
        if key == name:
            return str(value, "latin-1")
    return None


def query_fields(scope: Scope) -> list[tuple[str, str]]:
    """All query parameters.  Bytes that are not UTF-8 (file names may hold them) survive as surrogates.

    Raises: BadRequest for too many.
    """
    text: str = scope["query_string"].decode("latin-1")
    try:
        return parse_qsl(text, keep_blank_values=True, errors="surrogateescape", max_num_fields=MAX_QUERY_FIELDS)
    except ValueError as exc:
        raise BadRequest(f"the query has more than {MAX_QUERY_FIELDS} parameters") from exc


def query(scope: Scope, name: str) -> str | None:
    """The first query parameter of that name.  Raises: as query_fields."""
    return next((value for key, value in query_fields(scope) if key == name), None)


def flag(scope: Scope, name: str) -> bool:
    """A query parameter that is true or false; without it, false.  Raises: BadRequest; as query_fields."""
    value = query(scope, name) or "false"
    if value not in ("true", "false"):
        raise BadRequest(f"query: {name!r} must be true or false, got {value!r:.60}")
    return value == "true"


def content_length(scope: Scope) -> int | None:
    """The announced size of the body.  The HTTP parser has checked that it is a number."""
    text = header(scope, b"content-length")
    return int(text) if text is not None and text.isdigit() else None


async def body_chunks(receive: Receive, *, silence_s: float) -> AsyncIterator[bytes]:
    """The request body in the pieces it comes in.

    Raises: BadRequest if the client sends nothing for `silence_s`; ClientGone.
    """
    more = True
    while more:
        try:
            with anyio.fail_after(silence_s):
                message = await receive()
        except TimeoutError:
            raise BadRequest(f"the request body stopped for {silence_s:g} s") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        more = message.get("more_body", False)
        if message.get("body"):
            yield message["body"]


async def read_object(
    scope: Scope, receive: Receive, *, what: str, silence_s: float, max_values: int = MAX_BODY_VALUES
) -> dict[str, Any]:
    """The JSON object in the body; {} if there is no body, whatever its content type.

    Raises: TooLarge above MAX_BODY_BYTES, while reading; BadRequest if it is no JSON object, or has more than
        max_values in it; as body_chunks.
    """
    announced = content_length(scope)
    if announced is not None and announced > MAX_BODY_BYTES:
        raise TooLarge(f"{what}: a body of {announced} bytes, the cap is {MAX_BODY_BYTES}")
    parts: list[bytes] = []
    size = 0
    # The deadline is for the whole of it: a client that drips single bytes gets no more time than another.
    try:
        with anyio.fail_after(silence_s):
            async for chunk in body_chunks(receive, silence_s=silence_s):
                size += len(chunk)
                if size > MAX_BODY_BYTES:
                    raise TooLarge(f"{what}: the body is above the cap of {MAX_BODY_BYTES} bytes")
                parts.append(chunk)
    except TimeoutError:
        raise BadRequest(f"{what}: the body was not complete within {silence_s:g} s") from None
    body = b"".join(parts)
    return decode_object(body, error=BadRequest, what=what, max_values=max_values) if body.strip() else {}


async def send_json(send: Send, status: int, value: Any, extra: Iterable[tuple[bytes, bytes]] = ()) -> None:
    body = json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    await send_whole(send, status, body, [JSON_TYPE, *extra])


async def send_whole(send: Send, status: int, body: bytes, headers: Headers) -> None:
    """A complete answer with a known length."""
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})


async def send_nothing(send: Send) -> None:
    """204.  Not one body byte may follow, or the kept-alive connection is out of step."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


class Answer:
    """An answer whose body comes in pieces.  A client that takes nothing for `stall_s` is treated as gone."""

    def __init__(self, send: Send, stall_s: float) -> None:
        self._send = send
        self._stall_s = stall_s

    async def start(self, content_type: bytes, extra: Headers) -> None:
        headers = [(b"content-type", content_type), (b"cache-control", b"no-store"), *extra]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def piece(self, data: bytes, *, last: bool = False) -> None:
        """Raises: ClientGone if the client takes nothing for too long."""
        message: Message = {"type": "http.response.body", "body": data, "more_body": not last}
        try:
            with anyio.fail_after(self._stall_s):
                await self._send(message)
        except TimeoutError:
            raise ClientGone from None
