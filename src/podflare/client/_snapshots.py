"""Calls about snapshots as build-request / parse-reply.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from podflare.client._calls import Call, json_body, parse_object, sandbox_path, seconds
from podflare.errors import ProtocolError
from podflare.wire.api import SnapshotInfo


def take(sandbox_id: str, name: str, timeout_s: float | None) -> Call:
    """Not repeatable: one whose answer is lost may have been taken, and its name with it.

    Raises: TypeError if `name` is not a str; BadRequest for a timeout that is not a positive number.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a snapshot must be a str, got {type(name).__name__}")
    body: dict[str, Any] = {"name": name}
    if timeout_s is not None:
        body["timeout_seconds"] = seconds(timeout_s)
    return Call("POST", sandbox_path(sandbox_id, "/snapshots"), "snapshot", sandbox_id, body=json_body(body))


def listing() -> Call:
    return Call("GET", "/v1/snapshots", "list of snapshots", repeatable=True)


def remove(name: str) -> Call:
    """Not repeatable: what is removed is not there."""
    return Call("DELETE", f"/v1/snapshots/{quote(name, safe='')}", f"removal of snapshot {name!r:.80}")


def parse(value: Mapping[str, Any]) -> SnapshotInfo:
    """Lenient: missing keys get neutral values."""

    def text(key: str) -> str:
        return str(value.get(key, ""))

    def whole(key: str) -> int:
        return value[key] if isinstance(value.get(key), int) else 0

    return SnapshotInfo(
        name=text("name"),
        engine=text("engine"),
        template=text("template"),
        ram_mib=whole("ram_mib"),
        rootfs_gb=whole("rootfs_gb"),
        created_at_ms=whole("created_at_ms"),
        size_bytes=whole("size_bytes"),
        sandbox_id=text("sandbox_id"),
    )


def parse_list(call: Call, body: bytes) -> list[SnapshotInfo]:
    """Raises: ProtocolError if it is no list."""
    found = parse_object(call, body).get("snapshots")
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ProtocolError(f"{call.what}: the answer has no list of snapshots")
    return [parse(one) for one in found]
