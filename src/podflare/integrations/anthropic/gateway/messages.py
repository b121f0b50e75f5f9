"""`/v1/messages` and its `count_tokens`: turns of the hosted tool, and requests that are none of our business."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx

from podflare.errors import BadRequest
from podflare.integrations.anthropic.containers.lease import Lease
from podflare.integrations.anthropic.containers.registry import Containers
from podflare.integrations.anthropic.gateway.exchange import Exchange, beside
from podflare.integrations.anthropic.gateway.upstream import Headers, Upstream, encoded, passed_down, whole
from podflare.integrations.anthropic.hosted import course, request
from podflare.integrations.anthropic.hosted.blocks import Block, Call
from podflare.integrations.anthropic.hosted.rounds import Paused, Turn
from podflare.integrations.anthropic.hosted.stream import PING, encode

_EVENT_STREAM = "text/event-stream; charset=utf-8"


async def create_message(exchange: Exchange, upstream: Upstream, containers: Containers) -> None:
    """POST /v1/messages."""
    raw = await exchange.body()
    body = await exchange.parsed(raw)
    async with exchange.watched():
        parsed = await _hosted(exchange, upstream, raw, body)
        if parsed is None:
            return
        lease, files = await Lease.begin(containers, exchange.owner, parsed)
        try:
            turn = Turn(parsed, files, f"msg_local_{secrets.token_hex(12)}")
            begin = course.streamed if parsed.streaming else course.in_one_piece
            shell = _Shell(exchange, upstream, lease, streaming=parsed.streaming)
            await shell.follow(begin(turn, lease.described))
        finally:
            lease.end()


async def count_tokens(exchange: Exchange, upstream: Upstream, containers: Containers) -> None:
    """POST /v1/messages/count_tokens: of what the model would get."""
    raw = await exchange.body()
    body = await exchange.parsed(raw)
    async with exchange.watched():
        parsed = await _hosted(exchange, upstream, raw, body)
        if parsed is None:
            return
        lease, files = await Lease.begin(containers, exchange.owner, parsed)
        lease.end()
        rewritten = encoded(_answered(parsed).upstream_body([], files, relaxed=False))
        await pass_through(exchange, upstream, rewritten)


async def _hosted(
    exchange: Exchange, upstream: Upstream, raw: bytes, body: dict[str, Any]
) -> request.HostedRequest | None:
    """The request, if it concerns a sandbox and is one that is served here; else it has been answered."""
    if not request.concerns_sandbox(body):
        await pass_through(exchange, upstream, raw)
        return None
    refusal = request.thread_refusal(body)
    if refusal is not None:
        await exchange.refuse(400, refusal)
        return None
    return request.parse(body)


def _answered(parsed: request.HostedRequest) -> request.HostedRequest:
    """Raises: BadRequest for a conversation that cannot be sent, because calls in it were not run yet."""
    if parsed.pending:
        raise BadRequest("messages: tokens cannot be counted while a code execution waits to be run")
    return parsed


async def pass_through(exchange: Exchange, upstream: Upstream, content: bytes | None) -> None:
    """Ask the model's API the very same, and give back the very answer."""
    headers = upstream.headers(exchange.headers)
    response = await upstream.send(exchange.scope["method"], exchange.path, headers, content)
    try:
        await exchange.start(response.status_code, passed_down(response.headers))
        async for data in response.aiter_bytes():
            await exchange.piece(data)
        await exchange.piece(b"", more=False)
    finally:
        with anyio.CancelScope(shield=True):
            await response.aclose()


class _Shell:
    """Does what a turn wants done."""

    def __init__(self, exchange: Exchange, upstream: Upstream, lease: Lease, *, streaming: bool) -> None:
        self._exchange = exchange
        self._upstream = upstream
        self._lease = lease
        self._streaming = streaming
        self._headers: Headers | None = None
        """Of the API's first answer."""
        self._open: httpx.Response | None = None
        self._pieces: AsyncIterator[bytes]

    async def follow(self, effects: course.Course) -> None:
        """Until the client has its answer.

        Raises: PodflareError, httpx.HTTPError before anything was shown; ClientGone.
        """
        outcome: Any = None
        try:
            while True:
                try:
                    effect = effects.send(outcome)
                except StopIteration as end:
                    await self._finish(end.value)
                    return
                outcome = await self._done(effect)
        finally:
            effects.close()
            with anyio.CancelScope(shield=True):
                await self._close()

    async def _finish(self, refused: course.Reply | None) -> None:
        if refused is not None:
            answer = await whole(refused.response)
            await self._exchange.whole(answer.status, answer.headers, answer.body)
        elif self._streaming:
            await self._exchange.piece(b"", more=False)

    async def _done(self, effect: course.Effect) -> Any:
        if isinstance(effect, course.Perform):
            return await self._perform(effect.call)
        if isinstance(effect, course.Send):
            return await self._send(effect)
        if isinstance(effect, course.Emit):
            await self._give(effect.data)
        elif isinstance(effect, course.Wait):
            await anyio.sleep(effect.seconds)
        elif isinstance(effect, course.Read):
            try:
                return await anext(self._pieces, b"")
            except httpx.HTTPError:
                return b""
        elif isinstance(effect, course.ReadAll):
            return (await whole(effect.reply.response)).body
        elif isinstance(effect, course.Close):
            await self._close()
        return None

    async def _perform(self, call: Call) -> Block | Paused:
        if not self._streaming:
            return await self._lease.run(call)
        async with beside(self._ping):
            outcome = await self._lease.run(call)
        return outcome  # noqa: RET504  # for the type checker the block above could end without it

    async def _ping(self) -> None:
        """Signs of life, for as long as it is not cancelled."""
        while True:
            await anyio.sleep(self._exchange.config.ping_s)
            await self._give(encode(PING))

    async def _send(self, effect: course.Send) -> course.Reply:
        await self._close()
        headers = self._upstream.headers(self._exchange.headers)
        try:
            response = await self._upstream.send("POST", self._exchange.path, headers, encoded(effect.body))
        except httpx.HTTPError:
            if effect.first:
                raise
            return course.Reply(None, None, None)
        self._open, self._pieces = response, response.aiter_bytes()
        if response.status_code == 200 and self._headers is None:
            self._headers = passed_down(response.headers)
        return course.Reply(response.status_code, response.headers.get("retry-after"), response)

    async def _close(self) -> None:
        if self._open is not None:
            response, self._open = self._open, None
            await response.aclose()

    async def _give(self, data: bytes) -> None:
        headers = self._headers or {}
        if not self._streaming:
            await self._exchange.whole(200, {**headers, "content-type": "application/json"}, data)
            return
        if not self._exchange.started:
            kind = {"content-type": _EVENT_STREAM, "cache-control": "no-store"}
            await self._exchange.start(200, {**headers, **kind}, streaming=True)
        await self._exchange.piece(data)
