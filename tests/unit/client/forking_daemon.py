"""A daemon in memory whose sandboxes are dictionaries: enough to fork, run, merge and close, for tests of `explore`."""

from __future__ import annotations

import ast
import copy
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
from scripted_daemon import ndjson

from podflare.errors import BY_CODE


class ForkingDaemon:
    """Runs Python cells in this process; `alive` holds the globals of each living sandbox."""

    def __init__(self) -> None:
        self.alive: dict[str, dict[str, Any]] = {}
        self.forks: list[int] = []
        """Size of each fork call."""
        self.most_alive = 0
        self.refusal: dict[str, str] = {}
        """Code of the error to answer, by the last part of the path."""
        self.on_cell: Callable[[str], None] = lambda code: None
        """Called before a cell runs, outside the lock."""
        self._lock = threading.Lock()
        self._made = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        parts = request.url.path.strip("/").split("/")[2:]
        body = json.loads(request.content) if request.content else {}
        if code := self.refusal.get(parts[-1] if parts else "create"):
            return self._error(BY_CODE[code].status, code)
        if not parts:
            return httpx.Response(200, json={"id": self._add({})})
        if parts[0] not in self.alive and request.method != "DELETE":
            return self._error(404, "sandbox_not_found")
        if request.method == "DELETE":
            self.alive.pop(parts[0], None)
            return httpx.Response(204)
        return getattr(self, f"_{parts[1]}")(parts, body)

    @staticmethod
    def _error(status: int, code: str) -> httpx.Response:
        return httpx.Response(status, json={"error": f"told to answer {code}", "code": code})

    def _add(self, variables: dict[str, Any]) -> str:
        with self._lock:
            self._made += 1
            sandbox_id = f"sbx_{self._made}"
            self.alive[sandbox_id] = variables
            self.most_alive = max(self.most_alive, len(self.alive))
            return sandbox_id

    def _fork(self, parts: list[str], body: dict[str, Any]) -> httpx.Response:
        self.forks.append(body["n"])
        variables = {key: value for key, value in self.alive[parts[0]].items() if key != "__builtins__"}
        children = [self._add(copy.deepcopy(variables)) for _ in range(body["n"])]
        return httpx.Response(200, json={"children": children})

    def _merge_into(self, parts: list[str], body: dict[str, Any]) -> httpx.Response:
        if parts[2] not in self.alive:
            return self._error(404, "sandbox_not_found")
        self.alive[parts[0]] = self.alive.pop(parts[2])
        return httpx.Response(204)

    def _exec(self, parts: list[str], body: dict[str, Any]) -> httpx.Response:
        self.on_cell(body["code"])
        variables = self.alive.get(parts[0])
        if variables is None:
            return httpx.Response(200, content=ndjson({"type": "exit", "data": 137, "reason": "sandbox_failed"}))
        try:
            value = _run(body["code"], variables)
        except Exception as exc:  # noqa: BLE001  # what a REPL does
            error = {"name": type(exc).__name__, "value": str(exc), "traceback": ""}
            return httpx.Response(200, content=ndjson({"type": "error", "data": error}, {"type": "exit", "data": 1}))
        results = [] if value is None else [{"type": "result", "data": {"text/plain": repr(value)}}]
        return httpx.Response(200, content=ndjson(*results, {"type": "exit", "data": 0}))


def _run(code: str, variables: dict[str, Any]) -> Any:
    tree = ast.parse(code)
    last = tree.body.pop().value if tree.body and isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]  # an Expr
    exec(compile(tree, "cell", "exec"), variables)
    return None if last is None else eval(compile(ast.Expression(last), "cell", "eval"), variables)
