"""`/v1/messages` and its `count_tokens`: turns of the hosted tool, and requests that are none of our business."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import anyio

from podflare.errors import BadRequest
from podflare.integrations.anthropic.containers.lease import Lease
from podflare.integrations.anthropic.containers.registry import Containers
from podflare.integrations.anthropic.gateway.exchange import Exchange, beside
from podflare.integrations.anthropic.gateway.upstream import Answer, EventStream, Headers, Upstream, passed_down
from podflare.integrations.anthropic.hosted import request
from podflare.integrations.anthropic.hosted.rounds import Ask, Run, Turn
from podflare.integrations.anthropic.hosted.stream import PING, Event, encode

_EVENT_STREAM = "text/event-stream; charset=utf-8"


async def create_message(exchange: Exchange, upstream: Upstream, containers: Containers) -> None:
    """POST /v1/messages."""
    raw = await exchange.body()
    body = exchange.parsed(raw)
    async with exchange.watched():
        if not request.concerns_sandbox(body):
            await pass_through(exchange, upstream, raw)
            return
        refusal = request.thread_refusal(body)
        if refusal is not None:
            await exchange.refuse(400, refusal)
            return
        parsed = request.parse(body)
        lease, files = await Lease.begin(containers, exchange.owner, parsed)
        try:
            turn = Turn(parsed, files, f"msg_local_{secrets.token_hex(12)}")
            course = _Course(exchange, upstream, turn, lease)
            await (course.streamed() if parsed.streaming else course.in_one_piece())
        finally:
            lease.end()


async def count_tokens(exchange: Exchange, upstream: Upstream, containers: Containers) -> None:
    """POST /v1/messages/count_tokens: of what the model would get."""
    raw = await exchange.body()
    body = exchange.parsed(raw)
    async with exchange.watched():
        if not request.concerns_sandbox(body):
            await pass_through(exchange, upstream, raw)
            return
        refusal = request.thread_refusal(body)
        if refusal is not None:
            await exchange.refuse(400, refusal)
            return
        parsed = request.parse(body)
        lease, files = await Lease.begin(containers, exchange.owner, parsed)
        lease.end()
        rewritten = _answered(parsed).upstream_body([], files, relaxed=False)
        answer = await upstream.ask(exchange.path, upstream.headers(exchange.headers), rewritten)
        await exchange.whole(answer.status, answer.headers, answer.body)


def _answered(parsed: request.HostedRequest) -> request.HostedRequest:
    """Raises: BadRequest for a conversation that cannot be sent, because calls in it were not run yet."""
    if parsed.pending:
        raise BadRequest("messages: tokens cannot be counted while a code execution waits to be run")
    return parsed


async def pass_through(exchange: Exchange, upstream: Upstream, content: bytes | None) -> None:
    """Ask the model's API the very same, and give back the very answer."""
    headers = upstream.headers(exchange.headers)
    async with upstream.open(exchange.scope["method"], exchange.path, headers, content) as response:
        await exchange.start(response.status_code, passed_down(response.headers))
        async for data in response.aiter_bytes():
            await exchange.piece(data)
        await exchange.piece(b"", more=False)


class _Course:
    """Drives one turn."""

    def __init__(self, exchange: Exchange, upstream: Upstream, turn: Turn, lease: Lease) -> None:
        self._exchange = exchange
        self._upstream = upstream
        self._turn = turn
        self._lease = lease
        self._headers: Headers = {}

    async def in_one_piece(self) -> None:
        """For a client that does not stream."""
        turn = self._turn
        headers = self._upstream.headers(self._exchange.headers)
        while turn.step is not None:
            if isinstance(turn.step, Run):
                turn.take_result(await self._lease.run(turn.step.calls[0]))
                continue
            answer = await self._upstream.ask(self._exchange.path, headers, turn.step.body, first=turn.step.first)
            if not answer.ok:
                await self._exchange.whole(answer.status, answer.headers, answer.body)
                return
            self._headers = self._headers or answer.headers
            turn.take_message(answer.json())
        await self._exchange.json(200, turn.message(self._lease.described()), self._headers)

    async def streamed(self) -> None:
        """For a client that streams.  What fails before anything was shown is an answer with a status of its own."""
        turn = self._turn
        while turn.step is not None:
            if isinstance(turn.step, Run):
                await self._give(turn.opening())
                async with beside(self._ping):
                    outcome = await self._lease.run(turn.step.calls[0])
                await self._give(turn.take_result(outcome))
            elif not await self._ask(turn.step):
                return
        await self._give(turn.closing(self._lease.described()))
        await self._exchange.piece(b"", more=False)

    async def _ask(self, step: Ask) -> bool:
        """One sampling; whether the turn can go on."""
        headers = self._upstream.headers(self._exchange.headers)
        async with self._upstream.stream(self._exchange.path, headers, step.body, first=step.first) as answer:
            if answer.failed is not None:
                await self._fail(answer.failed)
                return False
            return await self._relay(answer)

    async def _fail(self, failed: Answer) -> None:
        if self._exchange.started:
            await self._exchange.refuse(failed.status, failed.error())
        else:
            await self._exchange.whole(failed.status, failed.headers, failed.body)

    async def _relay(self, answer: EventStream) -> bool:
        if not self._exchange.started:
            await self._begin(answer.headers)
        async for event in answer.events():
            shown = self._turn.take_event(event)
            if event["type"] == "error":
                await self._exchange.piece(encode(event), more=False)
                return False
            await self._give(shown)
            if event["type"] == "message_stop":
                return True
        self._turn.upstream_ended()
        return True

    async def _begin(self, headers: Headers) -> None:
        kept = {**headers, "content-type": _EVENT_STREAM, "cache-control": "no-store"}
        await self._exchange.start(200, kept, streaming=True)

    async def _give(self, events: Sequence[Event]) -> None:
        if events and not self._exchange.started:
            await self._begin({})
        if events:
            await self._exchange.piece(b"".join(encode(event) for event in events))

    async def _ping(self) -> None:
        """Signs of life, for as long as it is not cancelled."""
        while True:
            await anyio.sleep(self._exchange.config.ping_s)
            await self._give([PING])
