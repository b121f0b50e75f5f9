"""Runs `podflare gateway` as an operator does, and asks it in every way in which a program can."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic

from podflare.integrations.anthropic import AsyncLocalCodeExecution, LocalCodeExecution

START_S = 40.0
STOP_S = 20.0
KEY = "sk-client"


@dataclass
class ServedGateway:
    """A gateway that accepts connections at `url`."""

    url: str
    pid: int
    log: Path


@contextlib.contextmanager
def gateway(folder: Path, *words: str, env: Mapping[str, str] | None = None) -> Iterator[ServedGateway]:
    """Serve on a free port of loopback, with what it keeps under `folder`."""
    command = [sys.executable, "-m", "podflare", "gateway", "--port", "0", "--announce", "--data-dir", f"{folder}/g"]
    descriptor, name = tempfile.mkstemp(prefix="gatewaylog", dir=folder)
    with os.fdopen(descriptor, "wb") as stream:
        process = subprocess.Popen(
            [*command, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stream,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
    assert process.stdout is not None
    log = Path(name)
    try:
        assert select.select([process.stdout], [], [], START_S)[0], log.read_text()
        line = process.stdout.readline()
        assert line, log.read_text()
        yield ServedGateway(json.loads(line)["address"], process.pid, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()
    assert code == 0, log.read_text()


@dataclass
class Way:
    """One way to the hosted tool's look-alike: which client, streaming or not, through the gateway or middleware."""

    base_url: str
    middleware: LocalCodeExecution | AsyncLocalCodeExecution | None = None
    streaming: bool = False
    asynchronous: bool = False
    retries: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """For the constructor of a client."""
        options = {"api_key": KEY, "base_url": self.base_url, "max_retries": self.retries, "timeout": 60}
        return options if self.middleware is None else {**options, "middleware": [self.middleware]}

    def client(self) -> anthropic.Anthropic:
        """A client that does not wait; the caller closes it."""
        assert not self.asynchronous
        return anthropic.Anthropic(**self.options())

    def ask(self, messages: list[dict[str, Any]], **more: Any) -> anthropic.types.Message:
        """One request."""
        given: dict[str, Any] = {"model": "claude-scripted", "max_tokens": 100, "messages": messages, **more}
        if self.asynchronous:
            return asyncio.run(self._ask(given))
        with self.client() as client:
            if not self.streaming:
                return client.messages.create(**given)
            with client.messages.stream(**given) as stream:
                return stream.get_final_message()

    async def _ask(self, given: dict[str, Any]) -> anthropic.types.Message:
        async with anthropic.AsyncAnthropic(**self.options()) as client:
            if not self.streaming:
                return await client.messages.create(**given)
            async with client.messages.stream(**given) as stream:
                return await stream.get_final_message()
