"""Claude's code execution tool, run here by one line: middleware for the clients of the `anthropic` package.

    client = Anthropic(middleware=[LocalCodeExecution()])
    client = AsyncAnthropic(middleware=[AsyncLocalCodeExecution()])

Requests that declare a hosted `code_execution_*` tool have it executed in sandboxes of podflare; the caller sees the
blocks of the hosted tool, streaming included, and sends them back unchanged.  Files that are uploaded stay here, too.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from podflare.errors import PodflareError
from podflare.integrations.anthropic import sdk_files
from podflare.integrations.anthropic import sdk_messages as sdk
from podflare.integrations.anthropic.containers.home import Home
from podflare.integrations.anthropic.containers.lease import Lease
from podflare.integrations.anthropic.containers.registry import CELL_S, IDLE_S, Containers, Settings
from podflare.integrations.anthropic.hosted import course, refusals
from podflare.integrations.anthropic.hosted.request import (
    Files,
    HostedRequest,
    concerns_sandbox,
    parse,
    thread_refusal,
)
from podflare.integrations.anthropic.hosted.rounds import Turn

CallNext = Callable[[Any], Any]
AsyncCallNext = Callable[[Any], Awaitable[Any]]

_OWNER = "this program"
_MESSAGES = "/v1/messages"
_COUNT = "/v1/messages/count_tokens"


@dataclass
class _Talk:
    """One request of the caller on its way."""

    asked: Any
    turn: Turn
    lease: Lease
    like: Any = None
    """The first response of the API: its client and headers are those of the answer."""
    open: course.Reply | None = None
    pieces: Any = None
    """Iterator over the body of the open reply."""
    refused: course.Reply | None = None
    """What the API said instead of beginning."""


class _Execution:
    """What both kinds of middleware have."""

    _asynchronous: bool

    def __init__(
        self,
        *,
        host: str | None = None,
        data_dir: str | Path | None = None,
        idle_timeout: float = IDLE_S,
        cell_timeout: float = CELL_S,
        uploads: bool = True,
        **sandbox: Any,
    ) -> None:
        """Nothing is started before the first use.

        Args:
            host: daemon that has the sandboxes; None means the environment's, else a private one.
            data_dir: where files and the names of containers are kept; None forgets them at the end.
            idle_timeout: seconds that a container lives after its last use.
            cell_timeout: longest time for one call, in seconds.
            uploads: keep what is uploaded with `client.files` here, where code can read it. False leaves uploads to
                the API, whose files code here cannot read.
            sandbox: further options of AsyncSandbox, such as `template` or `ram_mib`.
        """
        settings = Settings(idle_s=idle_timeout, cell_s=cell_timeout, sandbox=sandbox)
        self._home = Home(host, None if data_dir is None else Path(data_dir), settings)
        self._uploads = uploads
        self._client: Any = None

    def close(self) -> None:
        """End the containers.  Idempotent; happens at the end of the program, too."""
        self._home.close()

    def _concerned(self, asked: Any) -> bool:
        if str(asked.method).lower() != "post" or sdk.path_of(asked) not in (_MESSAGES, _COUNT):
            return False
        return concerns_sandbox(sdk.body_of(asked))

    def _refused(self, asked: Any, status: int, error: Mapping[str, Any]) -> Any:
        body = refusals.body(error, f"req_local_{secrets.token_hex(12)}")
        return sdk.json_response(asked, status, body, asynchronous=self._asynchronous)

    def _failed(self, asked: Any, exc: PodflareError) -> Any:
        status, kind = refusals.classified(exc)
        return self._refused(asked, status, {"type": kind, "message": str(exc)})

    def _file_answer(self, asked: Any) -> Any:
        """Blocking."""
        try:
            return sdk_files.answer(
                asked, self._home.files, _OWNER, asynchronous=self._asynchronous, client=self._client
            )
        except PodflareError as exc:
            return self._failed(asked, exc)

    def _parsed(self, asked: Any) -> HostedRequest:
        """Raises: PodflareError for a request that cannot be served."""
        return parse(sdk.body_of(asked))

    @staticmethod
    def _counted(asked: Any, parsed: HostedRequest, files: Files) -> Any:
        """The request for a count of what the model would get."""
        return sdk.with_body(asked, parsed.upstream_body([], files, relaxed=False))

    @staticmethod
    def _talk(asked: Any, parsed: HostedRequest, lease: Lease, files: Files) -> _Talk:
        return _Talk(asked, Turn(parsed, files, f"msg_local_{secrets.token_hex(12)}"), lease)

    def _reply(self, talk: _Talk, response: Any) -> course.Reply:
        raw = response.http_response
        if raw.is_success and talk.like is None:
            talk.like, self._client = response, sdk.client_of(response)
        return course.Reply(raw.status_code, raw.headers.get("retry-after"), response)

    def _whole(self, talk: _Talk, message: bytes) -> Any:
        return sdk.json_response(
            talk.asked, 200, message, asynchronous=self._asynchronous, client=self._client, like=talk.like
        )

    def _stream(self, talk: _Talk, frames: Any) -> Any:
        return sdk.stream_response(
            talk.asked, frames, asynchronous=self._asynchronous, client=self._client, like=talk.like
        )


async def _begin(containers: Containers, parsed: HostedRequest) -> tuple[Lease, Files]:
    return await Lease.begin(containers, _OWNER, parsed)


async def _end(lease: Lease) -> None:
    lease.end()


async def _fork(containers: Containers, container_id: str, n: int) -> list[str]:
    return [container.id for container in await containers.fork(_OWNER, container_id, n)]


class LocalCodeExecution(_Execution):
    """For `Anthropic(middleware=[LocalCodeExecution()])`.  Usable by many threads at a time."""

    _asynchronous = False

    def fork_container(self, container_id: str, n: int = 1) -> list[str]:
        """Ids of n copies of a container, memory and files, for requests that go on from here in several ways.

        Raises: BadRequest for an unknown or expired id; Conflict while its code waits for tools.
        """
        return self._home.call(_fork, self._home.containers, container_id, n)

    def __call__(self, request: Any, call_next: CallNext) -> Any:
        """The middleware: see the package's own documentation of it."""
        if sdk_files.concerns(request, uploads=self._uploads):
            found = self._file_answer(request)
            return call_next(request) if found is None else found
        if not self._concerned(request):
            return call_next(request)
        refusal = thread_refusal(sdk.body_of(request))
        if refusal is not None:
            return self._refused(request, 400, refusal)
        try:
            parsed = self._parsed(request)
            lease, files = self._home.call(_begin, self._home.containers, parsed)
        except PodflareError as exc:
            return self._failed(request, exc)
        if sdk.path_of(request) == _COUNT:
            self._home.post(_end, lease)
            return call_next(self._counted(request, parsed, files))
        talk = self._talk(request, parsed, lease, files)
        return self._converse(talk, call_next, streaming=parsed.streaming)

    def _converse(self, talk: _Talk, call_next: CallNext, *, streaming: bool) -> Any:
        effects = (course.streamed if streaming else course.in_one_piece)(talk.turn, talk.lease.described)
        frames = self._frames(talk, call_next, effects)
        early: list[bytes] = []
        try:
            # Until the API has answered there is no response to put anything into.
            while talk.like is None or not streaming:
                early.append(next(frames))
        except StopIteration:
            if talk.refused is not None:
                return talk.refused.response
            return self._stream(talk, _chained(early, None)) if streaming else self._whole(talk, early[0])
        except PodflareError as exc:
            return self._failed(talk.asked, exc)
        return self._stream(talk, _chained(early, frames))

    def _frames(self, talk: _Talk, call_next: CallNext, effects: course.Course) -> Generator[bytes, None, None]:
        """Do what the turn wants done; gives what is to be shown."""
        outcome: Any = None
        try:
            while True:
                try:
                    effect = effects.send(outcome)
                except StopIteration as end:
                    talk.refused = end.value
                    return
                outcome = None
                if isinstance(effect, course.Emit):
                    yield effect.data
                else:
                    outcome = self._done(talk, call_next, effect)
        finally:
            effects.close()
            self._home.post(_end, talk.lease)
            if talk.open is not None and talk.refused is None:
                talk.open.response.http_response.close()

    def _done(self, talk: _Talk, call_next: CallNext, effect: course.Effect) -> Any:
        if isinstance(effect, course.Perform):
            return self._home.call(talk.lease.run, effect.call)
        if isinstance(effect, course.Send):
            try:
                talk.open = self._reply(talk, call_next(sdk.with_body(talk.asked, effect.body)))
            except sdk.connection_error():
                if effect.first:
                    raise
                return course.Reply(None, None, None)
            talk.pieces = talk.open.response.http_response.iter_bytes()
            return talk.open
        if isinstance(effect, course.Wait):
            time.sleep(effect.seconds)
        elif isinstance(effect, course.Read):
            try:
                return next(talk.pieces, b"")
            except sdk.broken_connection():
                return b""
        elif isinstance(effect, course.ReadAll):
            return effect.reply.response.http_response.read()
        elif isinstance(effect, course.Close):
            effect.reply.response.http_response.close()
        return None


class AsyncLocalCodeExecution(_Execution):
    """For `AsyncAnthropic(middleware=[AsyncLocalCodeExecution()])`, in asyncio."""

    _asynchronous = True

    async def fork_container(self, container_id: str, n: int = 1) -> list[str]:
        """As LocalCodeExecution.fork_container."""
        return await self._home.ask(_fork, self._home.containers, container_id, n)

    async def __call__(self, request: Any, call_next: AsyncCallNext) -> Any:
        """The middleware: see the package's own documentation of it."""
        if sdk_files.concerns(request, uploads=self._uploads):
            found = await anyio.to_thread.run_sync(self._file_answer, request)
            return await call_next(request) if found is None else found
        if not self._concerned(request):
            return await call_next(request)
        refusal = thread_refusal(sdk.body_of(request))
        if refusal is not None:
            return self._refused(request, 400, refusal)
        try:
            parsed = self._parsed(request)
            lease, files = await self._home.ask(_begin, self._home.containers, parsed)
        except PodflareError as exc:
            return self._failed(request, exc)
        if sdk.path_of(request) == _COUNT:
            self._home.post(_end, lease)
            return await call_next(self._counted(request, parsed, files))
        talk = self._talk(request, parsed, lease, files)
        return await self._converse(talk, call_next, streaming=parsed.streaming)

    async def _converse(self, talk: _Talk, call_next: AsyncCallNext, *, streaming: bool) -> Any:
        effects = (course.streamed if streaming else course.in_one_piece)(talk.turn, talk.lease.described)
        frames = self._frames(talk, call_next, effects)
        early: list[bytes] = []
        try:
            while talk.like is None or not streaming:  # as in LocalCodeExecution
                early.append(await anext(frames))
        except StopAsyncIteration:
            if talk.refused is not None:
                return talk.refused.response
            return self._stream(talk, _chained_async(early, None)) if streaming else self._whole(talk, early[0])
        except PodflareError as exc:
            return self._failed(talk.asked, exc)
        return self._stream(talk, _chained_async(early, frames))

    async def _frames(
        self, talk: _Talk, call_next: AsyncCallNext, effects: course.Course
    ) -> AsyncGenerator[bytes, None]:
        outcome: Any = None
        try:
            while True:
                try:
                    effect = effects.send(outcome)
                except StopIteration as end:
                    talk.refused = end.value
                    return
                outcome = None
                if isinstance(effect, course.Emit):
                    yield effect.data
                else:
                    outcome = await self._done(talk, call_next, effect)
        finally:
            effects.close()
            self._home.post(_end, talk.lease)
            if talk.open is not None and talk.refused is None:
                with anyio.CancelScope(shield=True):
                    await talk.open.response.http_response.aclose()

    async def _done(self, talk: _Talk, call_next: AsyncCallNext, effect: course.Effect) -> Any:
        if isinstance(effect, course.Perform):
            return await self._home.ask(talk.lease.run, effect.call)
        if isinstance(effect, course.Send):
            try:
                talk.open = self._reply(talk, await call_next(sdk.with_body(talk.asked, effect.body)))
            except sdk.connection_error():
                if effect.first:
                    raise
                return course.Reply(None, None, None)
            talk.pieces = talk.open.response.http_response.aiter_bytes()
            return talk.open
        if isinstance(effect, course.Wait):
            await anyio.sleep(effect.seconds)
        elif isinstance(effect, course.Read):
            try:
                return await anext(talk.pieces, b"")
            except sdk.broken_connection():
                return b""
        elif isinstance(effect, course.ReadAll):
            return await effect.reply.response.http_response.aread()
        elif isinstance(effect, course.Close):
            await effect.reply.response.http_response.aclose()
        return None


def _chained(early: list[bytes], rest: Generator[bytes, None, None] | None) -> Generator[bytes, None, None]:
    """A body that begins with what there is already; closing it closes the rest."""
    try:
        yield from early
        if rest is not None:
            yield from rest
    finally:
        if rest is not None:
            rest.close()


async def _chained_async(early: list[bytes], rest: AsyncGenerator[bytes, None] | None) -> AsyncGenerator[bytes, None]:
    try:
        for data in early:
            yield data
        if rest is not None:
            async for data in rest:
                yield data
    finally:
        if rest is not None:
            await rest.aclose()
