"""The routes, and what they share from the gateway's start to its end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from podflare.client import AsyncClient
from podflare.integrations.anthropic.containers.files import FileStore
from podflare.integrations.anthropic.containers.index import Index
from podflare.integrations.anthropic.containers.registry import Containers, Settings
from podflare.integrations.anthropic.gateway import forks, messages, uploads
from podflare.integrations.anthropic.gateway.config import GatewayConfig
from podflare.integrations.anthropic.gateway.exchange import Exchange, Guard, guarded
from podflare.integrations.anthropic.gateway.upstream import Upstream

Work = Callable[[Exchange], Awaitable[None]]


@asynccontextmanager
async def gateway(
    config: GatewayConfig, client: AsyncClient, *, sandbox: dict[str, Any] | None = None, guard: Guard | None = None
) -> AsyncIterator[ASGIApp]:
    """The application, served as long as the block lasts.

    Args:
        client: makes the sandboxes; closed at the end.
        sandbox: options of AsyncSandbox for each container.
        guard: turns web pages away where no keys are asked for.
    """
    config.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    index = Index(config.data_dir / "gateway.sqlite")
    store = FileStore(
        config.data_dir / "files",
        index,
        max_file_bytes=config.max_file_bytes,
        max_owner_bytes=config.max_owner_bytes,
    )
    settings = Settings(idle_s=config.idle_s, cell_s=config.cell_s, sandbox=sandbox)
    upstream = Upstream(config.upstream, config.upstream_key, config.upstream_silence_s)
    try:
        async with Containers(client, store, index, settings) as containers:
            yield _application(config, guard, upstream, containers, store)
    finally:
        await upstream.aclose()
        index.close()


class _Endpoint:
    """One route on bare ASGI, for Starlette wraps only functions."""

    def __init__(self, config: GatewayConfig, guard: Guard | None, work: Work) -> None:
        self._config = config
        self._guard = guard
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._config)

        async def admitted() -> None:
            exchange.admit(self._guard)
            await self._work(exchange)

        await guarded(exchange, admitted)


def _application(
    config: GatewayConfig, guard: Guard | None, upstream: Upstream, containers: Containers, store: FileStore
) -> ASGIApp:
    def route(path: str, method: str, work: Work) -> Route:
        return Route(path, _Endpoint(config, guard, work), methods=[method])

    async def proxied(exchange: Exchange) -> None:
        async with exchange.watched():
            await messages.pass_through(exchange, upstream, None)

    async def batches(exchange: Exchange) -> None:
        await exchange.refuse(
            400,
            {
                "type": "invalid_request_error",
                "message": "message batches run at the API itself, where code execution cannot be taken over: "
                "send them to its own address",
            },
        )

    routes = [
        route("/v1/messages", "POST", lambda exchange: messages.create_message(exchange, upstream, containers)),
        route(
            "/v1/messages/count_tokens", "POST", lambda exchange: messages.count_tokens(exchange, upstream, containers)
        ),
        *(
            route(f"/v1/messages/batches{tail}", method, batches)
            for tail in ("", "/{rest:path}")
            for method in _METHODS
        ),
        route("/v1/models", "GET", proxied),
        route("/v1/models/{model}", "GET", proxied),
        route("/v1/files", "POST", lambda exchange: uploads.upload(exchange, store)),
        route("/v1/files", "GET", lambda exchange: uploads.page(exchange, store)),
        route("/v1/files/{file_id}", "GET", lambda exchange: uploads.metadata(exchange, store)),
        route("/v1/files/{file_id}", "DELETE", lambda exchange: uploads.delete(exchange, store)),
        route("/v1/files/{file_id}/content", "GET", lambda exchange: uploads.content(exchange, store)),
        route("/v1/containers/{container_id}/fork", "POST", lambda exchange: forks.fork(exchange, containers)),
        Route("/healthz", _health, methods=["GET"]),
    ]
    app = Starlette(routes=routes)
    app.router.redirect_slashes = False
    app.router.default = _Endpoint(config, guard, _nothing_here)
    return app


_METHODS = ("GET", "POST", "DELETE")


async def _nothing_here(exchange: Exchange) -> None:
    path = exchange.scope["path"]
    await exchange.refuse(404, {"type": "not_found_error", "message": f"Not found: {path:.200}"})


class _Health:
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"ok\n"})


_health = _Health()
