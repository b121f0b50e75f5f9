"""`/v1/containers/{id}/fork`: what the hosted service does not have."""

from __future__ import annotations

from podflare.errors import BadRequest
from podflare.integrations.anthropic.containers.registry import Containers
from podflare.integrations.anthropic.gateway.exchange import Exchange

MAX_FORKS = 32


async def fork(exchange: Exchange, containers: Containers) -> None:
    """POST /v1/containers/{id}/fork with {"n": 1..32}: copies of a container, memory and files, under new ids."""
    raw = await exchange.body()
    n = (await exchange.parsed(raw)).get("n", 1) if raw.strip() else 1
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_FORKS:
        raise BadRequest(f"n: must be a whole number between 1 and {MAX_FORKS}")
    async with exchange.watched():
        made = await containers.fork(exchange.owner, exchange.scope["path_params"]["container_id"], n)
        await exchange.json(200, {"containers": [containers.described(each) for each in made]})
