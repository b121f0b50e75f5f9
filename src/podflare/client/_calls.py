"""Each operation of the wire as build-request / parse-reply.  Pure: no I/O, no clock, no randomness."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeGuard
from urllib.parse import quote, urlencode

from podflare.client import _tools
from podflare.client._types import (
    INCOMPLETE,
    CellError,
    Diff,
    Event,
    ExecResult,
    PathChange,
    Result,
    ToolCallEvent,
    VariableChange,
    VariablesDiff,
    VariableState,
)
from podflare.errors import BadRequest, ProtocolError
from podflare.wire import events
from podflare.wire.api import MAX_FORKS, ForkReport, SandboxInfo, SandboxUsage
from podflare.wire.codec import encode_object
from podflare.wire.egress import Reach
from podflare.wire.tools import Tools

MAX_LINE_BYTES = 256 * 1024 * 1024
"""Cap of one NDJSON line: far above what a daemon sends, and a bound on what a broken one can make us keep."""


@dataclass(frozen=True)
class Call:
    """One HTTP request, and how to talk about it."""

    method: str
    path: str
    """With query, to be put behind the base URL."""
    what: str
    """The operation's name in messages."""
    sandbox_id: str = ""
    """Of the sandbox, or the two of them, in messages."""
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = False
    """Doing it twice equals doing it once, so a lost connection may be answered by one more try."""
    is_file: bool = False
    """A failure is also an OSError, as users of file operations expect."""


def sandbox_path(sandbox_id: str, rest: str = "") -> str:
    if not isinstance(sandbox_id, str) or not sandbox_id:
        raise BadRequest(f"a sandbox id is a non-empty string, got {sandbox_id!r:.80}")
    return f"/v1/sandboxes/{quote(sandbox_id, safe='')}{rest}"


def json_body(body: Mapping[str, Any]) -> bytes:
    try:
        return encode_object(dict(body))
    except (TypeError, ValueError) as exc:
        raise BadRequest(f"an argument cannot be sent as JSON: {exc}") from exc


def healthz() -> Call:
    return Call("GET", "/v1/healthz", "health check", repeatable=True)


def capacity() -> Call:
    return Call("GET", "/v1/capacity", "capacity", repeatable=True)


def create(options: Mapping[str, Any], idempotency_key: str) -> Call:
    """`options`: keys of wire.api.CreateRequest; those that are None are left out, an empty template too."""
    body = {key: value for key, value in options.items() if value is not None}
    if not body.get("template"):
        body.pop("template", None)
    # With the key, a repeated create gives the same sandbox instead of a second one.
    headers = {"idempotency-key": idempotency_key}
    return Call("POST", "/v1/sandboxes", "create", body=json_body(body), headers=headers, repeatable=True)


_WITH_USAGE = {False: "", True: "?usage=true"}


def list_sandboxes(*, usage: bool = False) -> Call:
    return Call("GET", "/v1/sandboxes" + _WITH_USAGE[bool(usage)], "list", repeatable=True)


def get(sandbox_id: str, *, usage: bool = False) -> Call:
    path = sandbox_path(sandbox_id, _WITH_USAGE[bool(usage)])
    return Call("GET", path, "look-up", sandbox_id, repeatable=True)


def destroy(sandbox_id: str) -> Call:
    return Call("DELETE", sandbox_path(sandbox_id), "close", sandbox_id, repeatable=True)


def execute(
    sandbox_id: str,
    code: str,
    language: str,
    timeout_s: float | None,
    tools: Tools | None = None,
    tool_timeout_s: float | None = None,
) -> Call:
    """Raises: TypeError if `code` is not a str; BadRequest for a timeout that is not a positive number."""
    if not isinstance(code, str):
        raise TypeError(f"code must be a str, got {type(code).__name__}")
    body: dict[str, Any] = {"code": code, "language": language}
    if timeout_s is not None:
        body["timeout_seconds"] = seconds(timeout_s)
    if tools:
        body["tools"] = tools
    if tool_timeout_s is not None:
        body["tool_timeout_seconds"] = seconds(tool_timeout_s)
    return Call("POST", sandbox_path(sandbox_id, "/exec"), "run_code", sandbox_id, body=json_body(body))


def seconds(timeout_s: object) -> float:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        raise BadRequest(f"timeout must be a positive number of seconds, got {timeout_s!r:.80}")
    return timeout_s


def answer_tool_call(
    sandbox_id: str, cell_id: str, call_id: str, result: Any, error: Exception | Mapping[str, str] | None
) -> Call:
    """Repeatable: a second answer to one call is refused.  Raises: BadRequest if the result is not JSON."""
    body = json_body(_tools.answer(call_id, result, error))
    path = sandbox_path(sandbox_id, f"/cells/{quote(cell_id, safe='')}/tool_results")
    return Call("POST", path, "answer to a tool call", sandbox_id, body=body, repeatable=True)


def interrupt(sandbox_id: str, cell_id: str | None) -> Call:
    body = None if cell_id is None else json_body({"cell_id": cell_id})
    return Call("POST", sandbox_path(sandbox_id, "/interrupt"), "interrupt", sandbox_id, body=body)


def replay(sandbox_id: str) -> Call:
    return Call("GET", sandbox_path(sandbox_id, "/replay"), "replay", sandbox_id, repeatable=True)


def output(sandbox_id: str, cell_id: str, stream: str) -> Call:
    rest = f"/cells/{quote(cell_id, safe='')}/output?{urlencode({'stream': stream})}"
    return Call("GET", sandbox_path(sandbox_id, rest), "output", sandbox_id, repeatable=True)


def upload(sandbox_id: str, remote_path: str, size_bytes: int | None) -> Call:
    headers = {"content-type": "application/octet-stream"}
    if size_bytes is not None:
        headers["content-length"] = str(size_bytes)
    return Call("PUT", _file_path(sandbox_id, remote_path), "upload", sandbox_id, headers=headers, is_file=True)


def download(sandbox_id: str, remote_path: str) -> Call:
    return Call("GET", _file_path(sandbox_id, remote_path), "download", sandbox_id, is_file=True)


def _file_path(sandbox_id: str, remote_path: str) -> str:
    if not isinstance(remote_path, str):
        raise TypeError(f"the path in the sandbox must be a str, got {type(remote_path).__name__}")
    return sandbox_path(sandbox_id, "/files?path=" + quote(remote_path, safe="", errors="surrogateescape"))


def fork(sandbox_id: str, n: int, reseed: bool, timeout_s: float | None) -> Call:
    """Not repeatable: a fork whose answer is lost may have been made.

    Raises: ValueError (BadRequest) if n is not in 1..32 or the timeout is not a positive number.
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_FORKS:
        raise BadRequest(f"fork(n): n must be an integer from 1 to {MAX_FORKS}, got {n!r:.80}")
    body: dict[str, Any] = {"n": n}
    if not reseed:
        body["reseed"] = False
    if timeout_s is not None:
        body["timeout_seconds"] = seconds(timeout_s)
    return Call("POST", sandbox_path(sandbox_id, "/fork"), "fork", sandbox_id, body=json_body(body))


def merge(parent_id: str, winner_id: str) -> Call:
    """Raises: ValueError (BadRequest) if both are the same sandbox."""
    if parent_id == winner_id:
        raise BadRequest(f"merge_into: {parent_id} cannot be merged into itself")
    rest = f"/merge_into/{quote(winner_id, safe='')}"
    return Call("POST", sandbox_path(parent_id, rest), "merge_into", f"{parent_id}, winner {winner_id}")


def diff(sandbox_id: str, other_id: str, paths: Iterable[str] | None, detail: bool, variables: bool = False) -> Call:
    """Raises: TypeError if `paths` is not a list of str; BadRequest if it is empty."""
    query: list[tuple[str, str]] = []
    if paths is not None:
        listed = [] if isinstance(paths, str) else list(paths)
        if isinstance(paths, str) or not all(isinstance(path, str) for path in listed):
            raise TypeError(f"diff: paths must be a list of str, got {paths!r:.80}")
        if not listed:
            raise BadRequest("diff: paths must name at least one directory or file, or be None")
        query += [("paths", path) for path in listed]
    if detail:
        query.append(("detail", "true"))
    if variables:
        query.append(("variables", "true"))
    rest = f"/diff/{quote(other_id, safe='')}"
    if query:
        rest += "?" + urlencode(query, errors="surrogateescape")
    return Call("GET", sandbox_path(sandbox_id, rest), "diff", f"{sandbox_id}, other {other_id}", repeatable=True)


def set_lifetimes(sandbox_id: str, timeout_s: int | None, idle_timeout_s: int | None) -> Call:
    """Raises: ValueError if neither is given."""
    given = {"timeout_seconds": timeout_s, "idle_timeout_seconds": idle_timeout_s}
    body = {key: value for key, value in given.items() if value is not None}
    if not body:
        raise BadRequest("extend: give timeout_seconds or idle_timeout_seconds")
    return Call("PATCH", sandbox_path(sandbox_id), "extend", sandbox_id, body=json_body(body))


def resume(space_id: str, options: Mapping[str, Any]) -> Call:
    body = {key: value for key, value in options.items() if value is not None}
    return Call("POST", f"/v1/spaces/{quote(space_id, safe='')}/resume", "resume", body=json_body(body))


def delete_space(space_id: str) -> Call:
    return Call("DELETE", f"/v1/spaces/{quote(space_id, safe='')}", "delete space", repeatable=True)


def parse_object(call: Call, body: bytes) -> dict[str, Any]:
    """Raises: ProtocolError if the daemon's answer is not a JSON object."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"{call.what}: the answer is not JSON ({exc}): is the address a podflare daemon?") from exc
    if not isinstance(value, dict):
        raise ProtocolError(f"{call.what}: the answer is not a JSON object: {value!r:.200}")
    return value


def parse_created(call: Call, body: bytes) -> dict[str, Any]:
    """The create answer; its `id` is sure to be a string."""
    value = parse_object(call, body)
    if not isinstance(value.get("id"), str) or not value["id"]:
        raise ProtocolError(f"{call.what}: the answer has no sandbox id: {value!r:.200}")
    return value


def ignored(options: Mapping[str, Any], created: Mapping[str, Any]) -> str:
    """What decides about the walls and the daemon did not heed, because it is too old to know it; "" if nothing."""
    for key in ("engine", "snapshot"):
        asked = options.get(key)
        if asked is not None and created.get(key) != asked:
            return f"the daemon does not know {key}={asked!r:.80}: it is of an older version"
    return ""


def parse_children(call: Call, body: bytes, n: int) -> list[str]:
    """Raises: ProtocolError if these are not n ids."""
    children = parse_object(call, body).get("children")
    if not _is_texts(children) or len(children) != n:
        raise ProtocolError(f"{call.what}: the answer has no list of {n} children")
    return list(children)


def parse_diff(call: Call, body: bytes) -> Diff:
    """Raises: ProtocolError if one of the three lists is missing.  Odd details are left out."""
    value = parse_object(call, body)
    added, removed, modified = (value.get(key) for key in ("added", "removed", "modified"))
    if not (_is_texts(added) and _is_texts(removed) and _is_texts(modified)):
        raise ProtocolError(f"{call.what}: the answer has no lists of added, removed and modified paths")
    found = Diff(added=sorted(added), removed=sorted(removed), modified=sorted(modified))
    detail = value.get("detail")
    if isinstance(detail, dict):
        found["detail"] = {path: _path_change(entry) for path, entry in detail.items() if isinstance(entry, dict)}
    if "variables" in value:
        found["variables"] = _variables_diff(call, value["variables"])
    return found


def _variables_diff(call: Call, value: Any) -> VariablesDiff:
    parts: dict[str, Any] = {}
    for key, keys in _VARIABLE_KEYS.items():
        part = value.get(key) if isinstance(value, dict) else None
        if not isinstance(part, dict) or not all(isinstance(one, dict) and keys <= set(one) for one in part.values()):
            raise ProtocolError(f"{call.what}: the answer tells no {key} variables")
        parts[key] = {name: part[name] for name in sorted(part)}
    unread = value.get("unread")
    if not isinstance(unread, dict):
        raise ProtocolError(f"{call.what}: the answer tells no unread variables")
    return VariablesDiff(
        added=parts["added"], removed=parts["removed"], changed=parts["changed"], unread=dict(sorted(unread.items()))
    )


_VARIABLE_KEYS: Mapping[str, frozenset[str]] = {
    "added": VariableState.__required_keys__,
    "removed": VariableState.__required_keys__,
    "changed": VariableChange.__required_keys__,
}


def _path_change(entry: Mapping[str, Any]) -> PathChange:
    sizes = (entry.get("size_before"), entry.get("size_after"))
    before, after = (size if isinstance(size, int) else None for size in sizes)
    change = PathChange(kind=str(entry.get("kind", "")), size_before=before, size_after=after)
    if isinstance(entry.get("patch"), str):
        change["patch"] = entry["patch"]
    return change


def _is_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def parse_info(value: Mapping[str, Any]) -> SandboxInfo:
    """What the daemon says of a sandbox.  Lenient: other versions know other keys; missing ones get neutral values."""

    def whole(key: str) -> int:
        return value[key] if isinstance(value.get(key), int) else 0

    def optional(key: str) -> int | None:
        return value[key] if isinstance(value.get(key), int) else None

    def seconds(key: str) -> float | None:
        return float(value[key]) if isinstance(value.get(key), (int, float)) else None

    metadata = value.get("metadata")
    return SandboxInfo(
        id=str(value.get("id", "")),
        state=str(value.get("state", "")),
        template=str(value.get("template", "")),
        engine=str(value.get("engine", "")),
        isolation=parse_texts(value.get("isolation")),
        egress=parse_reach(value.get("egress", False)),
        ram_mib=whole("ram_mib"),
        rootfs_gb=whole("rootfs_gb"),
        timeout_seconds=optional("timeout_seconds"),
        idle_timeout_seconds=optional("idle_timeout_seconds"),
        persistent=value.get("persistent") is True,
        created_at_ms=whole("created_at_ms"),
        metadata=dict(metadata) if isinstance(metadata, dict) else {},
        warnings=parse_texts(value.get("warnings")),
        parent_id=value["parent_id"] if isinstance(value.get("parent_id"), str) else None,
        generation=whole("generation"),
        children=parse_texts(value.get("children")),
        fork_report=_fork_report(value.get("fork_report")),
        snapshot=value["snapshot"] if isinstance(value.get("snapshot"), str) else None,
        secrets=parse_hosts(value.get("secrets")),
        usage=_usage(value.get("usage")),
        expires_at_ms=optional("expires_at_ms"),
        seconds_left=seconds("seconds_left"),
        idle_seconds_left=seconds("idle_seconds_left"),
    )


def _usage(value: Any) -> SandboxUsage | None:
    if not isinstance(value, dict):
        return None
    keys = [item.name for item in fields(SandboxUsage)]
    return SandboxUsage(**{key: value[key] if isinstance(value.get(key), int) else 0 for key in keys})


def _fork_report(value: Any) -> ForkReport | None:
    if not isinstance(value, dict):
        return None
    counts = {key: value.get(key) for key in ("processes", "sockets", "pipes", "terminals")}
    known = {key: count for key, count in counts.items() if isinstance(count, int)}
    return ForkReport(threads=parse_texts(value.get("threads")), **known)


def parse_texts(value: Any) -> tuple[str, ...]:
    return tuple(str(item) for item in value) if isinstance(value, list) else ()


def parse_reach(value: Any) -> Reach:
    return value if isinstance(value, bool) else parse_texts(value)


def parse_hosts(value: Any) -> dict[str, tuple[str, ...]]:
    return {name: parse_texts(hosts) for name, hosts in value.items()} if isinstance(value, dict) else {}


def parse_list(call: Call, body: bytes) -> tuple[SandboxInfo, ...]:
    sandboxes = parse_object(call, body).get("sandboxes")
    if not isinstance(sandboxes, list) or not all(isinstance(item, dict) for item in sandboxes):
        raise ProtocolError(f"{call.what}: the answer has no list of sandboxes")
    return tuple(parse_info(item) for item in sandboxes)


class EventReader:
    """Bytes of an NDJSON stream, cut anywhere -> events.  Empty lines are heartbeats."""

    def __init__(self) -> None:
        self._partial: list[bytes] = []
        self._held = 0

    def feed(self, data: bytes) -> list[Event]:
        """Events completed by `data`.

        Raises: ProtocolError for a line that is no event, or one above MAX_LINE_BYTES.
        """
        head, newline, rest = data.partition(b"\n")
        if not newline:
            self._hold(data)
            return []
        if self._partial:
            self._hold(head)
            head = b"".join(self._partial)
            self._partial, self._held = [], 0
        lines = [head, *rest.split(b"\n")]
        if tail := lines.pop():
            self._hold(tail)
        return [self._event(line) for line in lines if line and line != b"\r"]

    def finish(self) -> list[Event]:
        """The event of a last line without newline, if there is one."""
        line = b"".join(self._partial)
        self._partial, self._held = [], 0
        return [self._event(line)] if line.strip() else []

    def _hold(self, data: bytes) -> None:
        self._held += len(data)
        if self._held > MAX_LINE_BYTES:
            raise ProtocolError(f"the daemon sent a line above {MAX_LINE_BYTES} bytes")
        self._partial.append(data)

    @staticmethod
    def _event(line: bytes) -> Event:
        try:
            body = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise ProtocolError(f"the daemon sent a line that is not JSON: {line!r:.200}") from exc
        event = Event.from_json(body)
        if event.type != events.TOOL_CALL:
            return event
        data = event.data
        if not isinstance(data, dict) or not isinstance(data.get("input"), dict) or not {"call_id", "name"} <= {*data}:
            raise ProtocolError(f"the daemon sent a tool call without call_id, name and input: {line!r:.200}")
        return ToolCallEvent.from_json(body)


class ResultBuilder:
    """Events of one cell, in order -> its ExecResult.  Unknown event types are ignored (newer daemons)."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {events.STDOUT: [], events.STDERR: []}
        self._results: list[Result] = []
        self._error: CellError | None = None
        self._exit: Event | None = None
        self._warnings: list[str] = []

    def add(self, new: Iterable[Event]) -> list[str]:
        """Take in events; returns the daemon's warnings among them."""
        told = len(self._warnings)
        for event in new:
            if event.type in self._lines:
                self._lines[event.type].append(str(event.data))
            elif event.type == events.EXIT:
                self._exit = event
            elif event.type == events.RESULT and isinstance(event.data, dict):
                self._results.append(Result(event.data, str(event.extra.get("kind", "value"))))
            elif event.type == events.ERROR and isinstance(event.data, dict):
                texts = (str(event.data.get(key, "")) for key in ("name", "value", "traceback"))
                self._error = CellError(*texts)
            elif event.type == events.WARNING and isinstance(event.data, dict):
                self._warnings.append(str(event.data.get("message", "")))
        return self._warnings[told:]

    def build(self) -> ExecResult:
        """A stream that ended without an exit event gives exit code -1 and reason "incomplete"."""
        extra: Mapping[str, Any] = self._exit.extra if self._exit else {"reason": INCOMPLETE}
        return ExecResult(
            stdout="\n".join(self._lines[events.STDOUT]),
            stderr="\n".join(self._lines[events.STDERR]),
            exit_code=_exit_code(self._exit),
            results=self._results,
            error=self._error,
            duration=_number(extra, "duration_ms") / 1000,
            cell_id=str(extra.get("cell_id", "")),
            reason=str(extra.get("reason", "ended")),
            restarted=extra.get("restarted") is True,
            stdout_dropped_bytes=int(_number(extra, "stdout_dropped_bytes")),
            stderr_dropped_bytes=int(_number(extra, "stderr_dropped_bytes")),
            warnings=self._warnings,
        )


def _exit_code(event: Event | None) -> int:
    if event is None:
        return -1
    try:
        return int(event.data)
    except (TypeError, ValueError, OverflowError) as exc:
        raise ProtocolError(f"the daemon sent the exit code {event.data!r:.80}") from exc


def _number(extra: Mapping[str, Any], key: str) -> float:
    value = extra.get(key)
    return value if isinstance(value, (int, float)) else 0
