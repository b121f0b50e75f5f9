"""`podflare gateway`: puts the gateway, the HTTP server and the sandboxes together, and ends them in order."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from podflare.errors import BadRequest, NotBuilt

if TYPE_CHECKING:
    from podflare.integrations.anthropic.gateway.config import GatewayConfig

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_KEY_FILE: Path | None = typer.Option(
    None, metavar="FILE", help="Key to send to it in place of the clients' own; default: PODFLARE_GATEWAY_UPSTREAM_KEY."
)
_DATA_DIR: Path | None = typer.Option(
    None, metavar="DIR", help="Where files are kept; default: /var/lib/podflare/gateway as root, else below ~."
)


def gateway(
    host: str = typer.Option("127.0.0.1", metavar="ADDRESS", help="Address to bind."),
    port: int = typer.Option(8080, metavar="PORT", min=0, max=65535, help="Port to bind, 0 for a free one."),
    upstream: str | None = typer.Option(
        None, metavar="URL", help="The model's API; default: PODFLARE_GATEWAY_UPSTREAM, else https://api.anthropic.com."
    ),
    upstream_key_file: Path | None = _KEY_FILE,
    data_dir: Path | None = _DATA_DIR,
    daemon: str | None = typer.Option(
        None, metavar="URL", help="Daemon that has the sandboxes; default: PODFLARE_HOSTD_URL, else a private one."
    ),
    template: str | None = typer.Option(None, help="What the sandboxes start from."),
    idle_timeout: float = typer.Option(3600.0, metavar="SECONDS", help="Life of a container after its last use."),
    cell_timeout: float = typer.Option(300.0, metavar="SECONDS", help="Longest time for one call."),
    announce: bool = typer.Option(False, "--announce", hidden=True),
) -> None:
    """Run Claude's code execution tool here: a server between Anthropic's client libraries and its API.

    Set ANTHROPIC_BASE_URL to its address; programs that declare the hosted code_execution tool stay as they are.

    On loopback every key is taken and passed on to the API, which judges it.  Any other address needs
    PODFLARE_GATEWAY_KEYS (comma-separated) with an upstream key, or PODFLARE_GATEWAY_AUTH_DISABLED=1.
    """
    import importlib.util

    from podflare.integrations.anthropic.gateway.config import configure

    if importlib.util.find_spec("python_multipart") is None:
        raise NotBuilt("the gateway needs the package python-multipart: pip install 'podflare[gateway]'")
    config = configure(
        os.environ,
        host=host,
        port=port,
        upstream=upstream,
        upstream_key_file=upstream_key_file,
        data_dir=data_dir,
        idle_s=idle_timeout,
        cell_s=cell_timeout,
    )
    sandbox: dict[str, Any] = {} if template is None else {"template": template}
    sock = _listen(config)
    try:
        import anyio

        anyio.run(functools.partial(_serve, config, sock, daemon, sandbox, announce), backend="asyncio")
    finally:
        sock.close()


def _listen(config: GatewayConfig) -> socket.socket:
    """Raises: BadRequest if the address cannot be bound."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, number)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Passed on to every connection: one whose client takes nothing would else hold its last bytes for hours.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(config.stall_s * 1000))
            sock.bind(address)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
    except OSError as exc:
        raise BadRequest(f"cannot listen on {config.host}:{config.port}: {exc}") from exc
    return sock


async def _serve(
    config: GatewayConfig, sock: socket.socket, daemon: str | None, sandbox: dict[str, Any], announce: bool
) -> None:
    import anyio

    from podflare.client import AsyncClient
    from podflare.host.httpserver import make_server
    from podflare.host.origin import check_origin
    from podflare.integrations.anthropic.gateway.app import gateway as opened

    def guard(host: str | None, origin: str | None, fetch_site: str | None) -> None:
        check_origin(host=host, origin=origin, fetch_site=fetch_site, loopback_names_only=config.loopback)

    name, port = sock.getsockname()[:2]
    address = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
    async with opened(config, AsyncClient(daemon), sandbox=sandbox, guard=guard) as app:
        server = make_server(app, keep_alive_s=_KEEP_ALIVE_S)
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(functools.partial(server.serve, sockets=[sock]))
                await server.accepting.wait()
                if announce:
                    print(json.dumps({"ready": True, "address": address, "pid": os.getpid()}), flush=True)
                else:
                    print(f"gateway ready: set ANTHROPIC_BASE_URL={address}", file=sys.stderr, flush=True)
                async for _ in signals:
                    break
                server.should_exit = True
