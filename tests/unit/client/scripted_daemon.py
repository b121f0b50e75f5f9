"""A scripted daemon behind the SDK's network seam, for tests of the SDK alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx

SANDBOX_ID = "sbx_" + "0" * 32


def ndjson(*events: dict[str, Any]) -> bytes:
    """Event lines with the four keys, `seq` and `ts` filled in."""
    lines = [{"seq": seq, "ts": 1, **event} for seq, event in enumerate(events)]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


class ScriptedDaemon:
    """Answers requests from a table (method, path ending) and remembers them."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answers: dict[tuple[str, str], list[Callable[[httpx.Request], httpx.Response]]] = {}
        self.on("POST", "/v1/sandboxes", lambda _: httpx.Response(200, json={"id": SANDBOX_ID, "state": "ready"}))
        self.on("DELETE", SANDBOX_ID, lambda _: httpx.Response(204))

    def on(self, method: str, ending: str, *answers: Callable[[httpx.Request], httpx.Response]) -> None:
        """Answer such requests with `answers`, one after the other; the last one stays."""
        self.answers[method, ending] = list(answers)

    def answer(self, method: str, ending: str, status: int, **content: Any) -> None:
        self.on(method, ending, lambda _: httpx.Response(status, **content))

    def fail(self, method: str, ending: str, exc: BaseException) -> None:
        def answer(request: httpx.Request) -> httpx.Response:
            raise exc

        self.on(method, ending, answer)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if "x-async" not in request.headers:
            request.read()
        self.requests.append(request)
        for (method, ending), answers in self.answers.items():
            if request.method == method and request.url.path.endswith(ending):
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                return answer(request)
        return httpx.Response(404, json={"error": "sandbox not found", "code": "sandbox_not_found"})

    @property
    def calls(self) -> list[str]:
        """Method and path of each request."""
        return [f"{request.method} {request.url.path}" for request in self.requests]
