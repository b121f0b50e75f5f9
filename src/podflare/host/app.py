"""The HTTP API: each route decodes, calls, encodes.  No logic: that is the daemon's and the sandbox's.

Plain ASGI endpoints on Starlette's router, because a hot cell may cost no more than a bare echo plus a millisecond.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import anyio
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from podflare.errors import BadRequest, NotBuilt, PodflareError
from podflare.host import http, telemetry
from podflare.host.auth import LOCAL, Keyring
from podflare.host.cells import Cell
from podflare.host.config import Config
from podflare.host.daemon import Daemon
from podflare.host.origin import check_origin
from podflare.host.sandbox import Sandbox
from podflare.host.telemetry import current_trace, parse_traceparent
from podflare.wire.api import (
    MAX_ANSWER_VALUES,
    MAX_BODY_VALUES,
    CreateRequest,
    DiffRequest,
    ExecRequest,
    ForkRequest,
    LifetimesRequest,
    SandboxUsage,
    SnapshotRequest,
    ToolAnswer,
    error_body,
)
from podflare.wire.events import STDERR, STDOUT
from podflare.wire.merges import MergeRequest

NDJSON = b"application/x-ndjson"
BYTES = b"application/octet-stream"
MAX_KEY_CHARS = 256

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]
Result = TypeVar("Result")

NOT_BUILT = {
    "pty": [
        ("GET", "/v1/sandboxes/{id}/pty"),
        ("POST", "/v1/sandboxes/{id}/pty"),
        ("GET", "/v1/sandboxes/{id}/pty/{pty}/attach"),
        ("POST", "/v1/sandboxes/{id}/pty/{pty}/input"),
        ("POST", "/v1/sandboxes/{id}/pty/{pty}/resize"),
        ("POST", "/v1/sandboxes/{id}/pty/{pty}/kill"),
        ("POST", "/v1/sandboxes/{id}/pty/{pty}/read"),
    ],
    "freeze": [("POST", "/v1/sandboxes/{id}/freeze")],
    "spaces": [
        ("GET", "/v1/spaces"),
        ("GET", "/v1/spaces/{space}"),
        ("DELETE", "/v1/spaces/{space}"),
        ("POST", "/v1/spaces/{space}/resume"),
    ],
}
"""Routes of the API that this version answers with 501."""


class _ByMethod:
    """The handlers of one path.  An object, because Starlette calls objects as ASGI and wraps functions."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        await self.handlers["GET" if method == "HEAD" else method](scope, receive, send)


class App:
    """The ASGI application of one daemon."""

    def __init__(self, daemon: Daemon, config: Config) -> None:
        self._daemon = daemon
        self._config = config
        self._keys = Keyring(() if config.open_to_all else config.key_digests)
        self._guarded = config.open_to_all
        self._loopback_tcp = config.loopback and config.uds is None
        self._router = Router(self._routes(), redirect_slashes=False)

    def _routes(self) -> list[Route]:
        one = "/v1/sandboxes/{id}"
        table: list[tuple[str, str, Handler]] = [
            ("POST", f"{one}/exec", self._exec),
            ("POST", "/v1/sandboxes", self._create),
            ("GET", "/v1/sandboxes", self._list),
            ("GET", one, self._get),
            ("PATCH", one, self._patch),
            ("DELETE", one, self._delete),
            ("POST", f"{one}/fork", self._fork),
            ("POST", f"{one}/merge_into/{{winner}}", self._merge),
            ("POST", f"{one}/merge/{{other}}", self._merge_changes),
            ("GET", f"{one}/diff/{{other}}", self._diff),
            ("POST", f"{one}/snapshots", self._take_snapshot),
            ("GET", "/v1/snapshots", self._list_snapshots),
            ("GET", "/v1/snapshots/{name}", self._get_snapshot),
            ("DELETE", "/v1/snapshots/{name}", self._remove_snapshot),
            ("POST", f"{one}/interrupt", self._interrupt),
            ("POST", f"{one}/cells/{{cell}}/tool_results", self._answer_tool_call),
            ("GET", f"{one}/replay", self._replay),
            ("GET", f"{one}/egress", self._egress),
            ("PUT", f"{one}/files", self._upload),
            ("GET", f"{one}/files", self._download),
            ("GET", f"{one}/cells/{{cell}}/output", self._output),
            ("GET", "/v1/healthz", self._healthz),
            ("GET", "/v1/capacity", self._capacity),
            ("GET", "/v1/templates", self._templates),
            ("GET", "/openapi.json", self._openapi),
            ("GET", "/docs", self._docs),
            ("GET", "/docs/{file}", self._docs),
        ]
        for what, paths in NOT_BUILT.items():
            table += [(method, path, _not_built(what)) for method, path in paths]
        by_path: dict[str, _ByMethod] = {}
        for method, path, handler in table:
            by_path.setdefault(path, _ByMethod()).handlers[method] = handler
        return [Route(path, endpoint, methods=list(endpoint.handlers)) for path, endpoint in by_path.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            return
        start = time.monotonic()
        trace = parse_traceparent(http.header(scope, b"traceparent"))
        token = current_trace.set(trace)
        status = 0

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            scope["app"] = self
            self._admit(scope)
            await self._router(scope, receive, watched_send)
        except http.ClientGone:
            status = status or 499
        except PodflareError as exc:
            await self._fail(watched_send, status, type(exc).status, error_body(exc.code, str(exc)), exc)
        except HTTPException as exc:
            text = "no such route" if exc.status_code == 404 else exc.detail
            body = error_body("bad_request", f"{text}: {scope['method']} {scope['path']!r:.200}")
            extra = [(key.lower().encode(), value.encode()) for key, value in (exc.headers or {}).items()]
            await http.send_json(watched_send, exc.status_code, body, extra)
        except Exception as exc:  # noqa: BLE001  # the last border: the client gets a number, the log the rest
            request_id = secrets.token_hex(8)
            telemetry.problem("request failed", exc_info=True, request_id=request_id, path=scope["path"])
            body = error_body("podflare_error", f"internal error; request id {request_id}")
            await self._fail(watched_send, status, 500, body, exc)
        finally:
            telemetry.event(
                "http_request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                ms=round((time.monotonic() - start) * 1000, 3),
            )
            current_trace.reset(token)

    @staticmethod
    async def _fail(send: Send, started: int, status: int, body: dict[str, Any], exc: Exception) -> None:
        if started:
            # Without the end of the body the server cuts the connection, so that the client sees it is not whole.
            telemetry.problem("answer broken off", error=exc)
            return
        extra = [(b"www-authenticate", b"Bearer")] if status == 401 else []
        await http.send_json(send, status, body, extra)

    def _admit(self, scope: Scope) -> None:
        """Who asks?  Raises: Forbidden, Unauthorized."""
        if self._guarded:
            check_origin(
                host=http.header(scope, b"host"),
                origin=http.header(scope, b"origin"),
                fetch_site=http.header(scope, b"sec-fetch-site"),
                loopback_names_only=self._loopback_tcp,
            )
        path = scope["path"]
        if path.startswith("/v1/") and path != "/v1/healthz":
            scope["owner"] = self._keys.owner(http.header(scope, b"authorization"))
        else:
            scope["owner"] = LOCAL

    async def _sandbox(self, scope: Scope) -> Sandbox:
        sandbox_id = scope["path_params"]["id"]
        # The registry's own look-up first: only ids that are gone ask the store.
        return self._daemon.registry.live(sandbox_id, scope["owner"]) or await self._daemon.registry.get(
            sandbox_id, scope["owner"]
        )

    async def _object(
        self, scope: Scope, receive: Receive, what: str, max_values: int = MAX_BODY_VALUES
    ) -> dict[str, Any]:
        silence_s = self._config.body_timeout_s
        return await http.read_object(scope, receive, what=what, silence_s=silence_s, max_values=max_values)

    # Sandboxes.

    async def _create(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = CreateRequest.from_json(await self._object(scope, receive, "create request"))
        key = http.header(scope, b"idempotency-key")
        if key is not None and not 0 < len(key) <= MAX_KEY_CHARS:
            raise BadRequest(f"Idempotency-Key must have 1 to {MAX_KEY_CHARS} characters")
        if key is not None:
            # Whoever asks again with the key must find it, so it is made even if this client goes away.
            sandbox = await self._daemon.create(request, scope["owner"], key)
        else:
            sandbox = await while_connected(receive, self._daemon.create(request, scope["owner"]))
        await self._daemon.registry.recorded()  # before anybody is told of it
        await http.send_json(send, 200, self._describe(sandbox))

    def _describe(self, sandbox: Sandbox, usage: SandboxUsage | None = None) -> dict[str, Any]:
        body = self._daemon.describe(sandbox, usage).to_json()
        if self._config.region is not None:
            body["region"] = self._config.region
        if self._config.public_url is not None:
            body["endpoint"] = self._config.public_url
        return body

    async def _list(self, scope: Scope, receive: Receive, send: Send) -> None:
        owned = self._daemon.registry.owned_by(scope["owner"])
        usages = await self._usages(scope, receive, owned)
        bodies = [self._describe(sandbox, usages.get(sandbox.id)) for sandbox in owned]
        await http.send_json(send, 200, {"sandboxes": bodies})

    async def _get(self, scope: Scope, receive: Receive, send: Send) -> None:
        sandbox = await self._sandbox(scope)
        sandbox.touch()
        usages = await self._usages(scope, receive, [sandbox])
        await http.send_json(send, 200, self._describe(sandbox, usages.get(sandbox.id)))

    async def _patch(self, scope: Scope, receive: Receive, send: Send) -> None:
        sandbox = await self._sandbox(scope)
        sandbox.set_lifetimes(LifetimesRequest.from_json(await self._object(scope, receive, "lifetimes")))
        await http.send_json(send, 200, self._describe(sandbox))

    async def _usages(self, scope: Scope, receive: Receive, sandboxes: list[Sandbox]) -> dict[str, SandboxUsage]:
        if not http.flag(scope, "usage"):
            return {}
        return await while_connected(receive, self._daemon.measure(sandboxes))

    async def _delete(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._daemon.close(scope["path_params"]["id"], scope["owner"])
        await http.send_nothing(send)

    # Branches.

    async def _fork(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = ForkRequest.from_json(await self._object(scope, receive, "fork request"))
        forking = self._daemon.branches.fork(scope["path_params"]["id"], scope["owner"], request)
        children = await while_connected(receive, forking)
        await self._daemon.registry.recorded()
        await http.send_json(send, 200, {"children": [child.id for child in children]})

    async def _merge(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._object(scope, receive, "merge request")
        names = scope["path_params"]
        await while_connected(receive, self._daemon.branches.merge(names["id"], names["winner"], scope["owner"]))
        await http.send_nothing(send)

    async def _merge_changes(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = MergeRequest.from_json(await self._object(scope, receive, "merge request"))
        names = scope["path_params"]
        merging = self._daemon.branches.merge_changes(names["id"], names["other"], scope["owner"], request)
        report = await while_connected(receive, merging)
        await http.send_json(send, 200, report.to_json())

    async def _diff(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = DiffRequest.from_query(http.query_fields(scope))
        names = scope["path_params"]
        comparing = self._daemon.branches.diff(names["id"], names["other"], scope["owner"], request)
        found = await while_connected(receive, comparing)
        await http.send_json(send, 200, found.to_json())

    # Snapshots.

    async def _take_snapshot(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = SnapshotRequest.from_json(await self._object(scope, receive, "snapshot request"))
        taking = self._daemon.snapshots.take(scope["path_params"]["id"], scope["owner"], request)
        await http.send_json(send, 200, (await while_connected(receive, taking)).to_json())

    async def _list_snapshots(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = await self._daemon.snapshots.owned_by(scope["owner"])
        await http.send_json(send, 200, {"snapshots": [one.to_json() for one in found]})

    async def _get_snapshot(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = await self._daemon.snapshots.get(scope["path_params"]["name"], scope["owner"])
        await http.send_json(send, 200, found.to_json())

    async def _remove_snapshot(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._daemon.snapshots.remove(scope["path_params"]["name"], scope["owner"])
        await http.send_nothing(send)

    # Cells.

    async def _exec(self, scope: Scope, receive: Receive, send: Send) -> None:
        sandbox = await self._sandbox(scope)
        request = ExecRequest.from_json(await self._object(scope, receive, "exec request"))
        await sandbox.settled()
        cell = sandbox.submit(request)
        answer = http.Answer(send, self._config.client_stall_s)
        try:
            await answer.start(NDJSON, [(b"x-podflare-cell-id", cell.id.encode("ascii"))])
            await while_connected(receive, _stream(cell, answer))
        finally:
            sandbox.leave(cell)

    async def _interrupt(self, scope: Scope, receive: Receive, send: Send) -> None:
        sandbox = await self._sandbox(scope)
        body = await self._object(scope, receive, "interrupt request")
        cell_id = body.get("cell_id")
        if cell_id is not None and not isinstance(cell_id, str):
            raise BadRequest("interrupt request: 'cell_id' must be a string")
        told = sandbox.interrupt(cell_id)
        await http.send_json(send, 200, {"interrupted": told is not None, "cell_id": told})

    async def _answer_tool_call(self, scope: Scope, receive: Receive, send: Send) -> None:
        sandbox = await self._sandbox(scope)
        answer = ToolAnswer.from_json(await self._object(scope, receive, "tool result", MAX_ANSWER_VALUES))
        sandbox.answer(scope["path_params"]["cell"], answer)
        await http.send_nothing(send)

    async def _replay(self, scope: Scope, receive: Receive, send: Send) -> None:
        sandbox = await self._sandbox(scope)
        sandbox.touch()
        lines = sandbox.replay.lines()
        answer = http.Answer(send, self._config.client_stall_s)
        await answer.start(NDJSON, [])
        for start in range(0, len(lines), 100):
            await answer.piece(b"".join(lines[start : start + 100]))
        await answer.piece(b"", last=True)

    async def _egress(self, scope: Scope, receive: Receive, send: Send) -> None:
        sandbox = await self._sandbox(scope)
        sandbox.touch()
        log = await while_connected(receive, sandbox.egress_log())
        await http.send_json(send, 200, log.to_json())

    async def _output(self, scope: Scope, receive: Receive, send: Send) -> None:
        sandbox = await self._sandbox(scope)
        stream = http.query(scope, "stream") or STDOUT
        if stream not in (STDOUT, STDERR):
            raise BadRequest(f"stream must be {STDOUT} or {STDERR}, got {stream!r:.60}")
        kept = sandbox.output(scope["path_params"]["cell"], stream)
        answer = http.Answer(send, self._config.client_stall_s)
        await answer.start(BYTES, [(b"x-podflare-cut", b"1" if kept.cut else b"0")])
        await _pump(kept.read(), answer)

    # Files.

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        sandbox = await self._sandbox(scope)
        path = http.query(scope, "path") or ""
        chunks = http.body_chunks(receive, silence_s=self._config.body_timeout_s)
        size = await sandbox.upload(path, chunks, http.content_length(scope))
        await http.send_json(send, 200, {"path": path, "size": size})

    async def _download(self, scope: Scope, receive: Receive, send: Send) -> None:
        sandbox = await self._sandbox(scope)
        download = await sandbox.download(http.query(scope, "path") or "")
        answer = http.Answer(send, self._config.client_stall_s)
        try:
            # No content-length: a file that changes while it is read would break it.
            await answer.start(BYTES, [(b"x-podflare-file-size", b"%d" % download.size)])
            await while_connected(receive, _pump(download.chunks(), answer))
        finally:
            download.close()

    # The daemon.

    async def _healthz(self, scope: Scope, receive: Receive, send: Send) -> None:
        await http.send_whole(send, 200, b"ok", [(b"content-type", b"text/plain; charset=utf-8")])

    async def _capacity(self, scope: Scope, receive: Receive, send: Send) -> None:
        await http.send_json(send, 200, self._daemon.capacity())

    async def _templates(self, scope: Scope, receive: Receive, send: Send) -> None:
        await http.send_json(send, 200, {"templates": [info.to_json() for info in self._daemon.templates()]})

    async def _openapi(self, scope: Scope, receive: Receive, send: Send) -> None:
        from podflare.host import openapi

        await http.send_json(send, 200, openapi.document())

    async def _docs(self, scope: Scope, receive: Receive, send: Send) -> None:
        from podflare.host import openapi

        page = openapi.page(scope["path_params"].get("file", ""))
        await http.send_whole(send, page.status, page.body, [(b"content-type", page.content_type)])


def _not_built(what: str) -> Handler:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        raise NotBuilt(f"{what} is not built yet in this version of podflare")

    return answer


async def _stream(cell: Cell, answer: http.Answer) -> None:
    last = False
    while not last:
        chunk, last = await cell.next_chunk()
        await answer.piece(chunk, last=last)


async def _pump(pieces: AsyncIterator[bytes], answer: http.Answer) -> None:
    async for piece in pieces:
        await answer.piece(piece)
    await answer.piece(b"", last=True)


async def while_connected(receive: Receive, work: Awaitable[Result]) -> Result:
    """Await `work`, but cancel it when the client closes its connection.  The request body must have been read.

    Raises: http.ClientGone; what `work` raises.
    """
    outcome: list[Result] = []
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_when_gone, receive, tasks.cancel_scope.cancel)
        try:
            outcome.append(await work)
        except Exception as exc:  # noqa: BLE001  # raised below, outside the group, which would wrap it
            failure = exc
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if not outcome:
        raise http.ClientGone
    return outcome[0]


async def _when_gone(receive: Receive, act: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    act()
