"""What `podflare gateway` adds to a request and to a streamed event, and many streams at a time through it.

The model's API is the scripted one of the tests, in this process; the same server asked directly is the peer, in turns
with the gateway.  It ends each of its connections, so the gateway's own to it is made anew for each request, too.
The gateway works on one piece of a stream while the API makes the next, so that it adds less time than it takes: its
processor time per event is a figure of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx

from benchmarks.daemon import Daemon
from benchmarks.series import Series, interleaved
from podflare import Client

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from anthropic_upstream import Upstream, script
from gateways import ServedGateway, gateway

HEADERS = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
TOOL = {"type": "code_execution_20260521", "name": "code_execution"}
BLOCKS = 10
"""Of text in the long stream, some hundred events each."""
DIRECT = "the same request at the API itself"
DIRECT_STREAM = "the same stream from the API itself"


def measure(full: bool) -> list[Series]:
    with tempfile.TemporaryDirectory(prefix="podflare-bench-") as folder, Daemon() as daemon, Upstream() as upstream:
        words = ("--upstream", upstream.url, "--daemon", daemon.url)
        with gateway(Path(folder), *words) as running:
            alone = _alone(running.url, upstream.url, 200 if full else 60)
            alone.append(_processor_time(running, 100 if full else 40))
            streams = 200 if full else 50
            taken = asyncio.run(_all_at_once(running.url, streams))
        with Client(daemon.url) as client:
            made = len(client.list_sandboxes())
        assert made == streams and not upstream.rejected, (made, upstream.rejected[:1])
    note = "each runs a command in a container of its own; markers checked"
    return [*alone, Series(f"{streams} streams at a time through the gateway, all of it", "s", (taken,), note=note)]


def _alone(gateway_url: str, api_url: str, rounds: int) -> list[Series]:
    """One request after the other."""
    short = _body([{"text": "Nothing to run."}])
    long = _long()
    with httpx.Client(headers=HEADERS, timeout=60, trust_env=False) as http:
        events = _ask(http, gateway_url, {**long, "tools": [TOOL]})
        assert events > 100 * BLOCKS and _ask(http, api_url, long) == events
        taken = interleaved(
            rounds,
            {
                "plain": lambda: _ask(http, gateway_url, {**short, "tools": [TOOL]}),
                "plain direct": lambda: _ask(http, api_url, short),
                "stream": lambda: _ask(http, gateway_url, {**long, "tools": [TOOL]}),
                "stream direct": lambda: _ask(http, api_url, long),
            },
        )
    return [
        Series("request through the gateway, tool declared and not used", "ms", taken["plain"], peer=DIRECT),
        Series(DIRECT, "ms", taken["plain direct"]),
        Series("what the gateway adds to it", "ms", _differences(taken["plain"], taken["plain direct"])),
        Series(f"stream of {events} events through the gateway", "ms", taken["stream"], peer=DIRECT_STREAM),
        Series(DIRECT_STREAM, "ms", taken["stream direct"]),
        Series(
            "what the gateway adds to an event",
            "us",
            tuple(more * 1000 / events for more in _differences(taken["stream"], taken["stream direct"])),
            note="what it adds to the stream, by its events",
        ),
    ]


def _processor_time(running: ServedGateway, count: int) -> Series:
    body = {**_long(), "tools": [TOOL]}
    with httpx.Client(headers=HEADERS, timeout=60, trust_env=False) as http:
        before = _used_us(running.pid)
        events = sum(_ask(http, running.url, body) for _ in range(count))
        used = _used_us(running.pid) - before
    return Series("processor time of the gateway per event", "us", (used / events,), note=f"{count} streams")


def _used_us(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1e6 / os.sysconf("SC_CLK_TCK")


def _long() -> dict[str, Any]:
    """The request for the long stream."""
    return _body([{"text": "word " * 2000} for _ in range(BLOCKS)], stream=True)


def _differences(ours: tuple[float, ...], theirs: tuple[float, ...]) -> tuple[float, ...]:
    """Round by round."""
    return tuple(one - other for one, other in zip(ours, theirs, strict=True))


def _body(*rounds: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": script(*rounds)}], **more}


def _ask(http: httpx.Client, url: str, body: dict[str, Any]) -> int:
    """How many events came; 0 for an answer in one piece."""
    answer = http.post(f"{url}/v1/messages", json=body)
    answer.raise_for_status()
    return answer.text.count("\nevent: ") + 1 if body.get("stream") else 0


async def _all_at_once(url: str, streams: int) -> float:
    """Seconds from the first request to the last end."""

    async def one(http: httpx.AsyncClient, number: int) -> str:
        command = f"echo marker {number} > /tmp/mine; cat /tmp/mine"
        body = _body([{"bash": command}], [{"echo": True}], stream=True, tools=[TOOL])
        return (await http.post(f"{url}/v1/messages", json=body)).raise_for_status().text

    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(headers=HEADERS, timeout=300, limits=limits, trust_env=False) as http:
        started = perf_counter()
        texts = await asyncio.gather(*(one(http, number) for number in range(streams)))
        taken = perf_counter() - started
    for number, text in enumerate(texts):
        assert _outputs(text) == [f"marker {number}"], f"stream {number} has the output of others: {text[:500]}"
    return taken


def _outputs(text: str) -> list[str]:
    """What the commands of a stream printed."""
    events = [json.loads(line[len("data: ") :]) for line in text.splitlines() if line.startswith("data: ")]
    contents = [event.get("content_block", {}).get("content") for event in events]
    return [content["stdout"] for content in contents if isinstance(content, dict)]
