"""What a sandbox may reach: what is sent for it, and the log of what it tried.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from podflare.client._calls import Call, parse_hosts, parse_object, parse_reach, sandbox_path
from podflare.errors import BadRequest, ProtocolError
from podflare.wire.egress import EgressEntry, EgressLog

Egress: TypeAlias = bool | Sequence[str]
"""True: every public address.  False: none.  Else names: "api.example.com", "*.example.org", "db.example.com:5432"."""


@dataclass(frozen=True)
class Secret:
    """A value that requests to these hosts carry, and that nothing in the sandbox ever has.

    In the sandbox the environment variable holds a placeholder.  Where it stands in a header or in the query of an
    HTTPS request to one of the hosts, the value takes its place outside of the sandbox.
    """

    value: str = field(repr=False)
    hosts: Sequence[str]


def reach(egress: object) -> bool | list[str] | None:
    """`egress` as it travels.  Raises: BadRequest if it is no flag and no list of names."""
    if egress is None or isinstance(egress, bool):
        return egress
    if isinstance(egress, str) or not isinstance(egress, Sequence) or not all(isinstance(one, str) for one in egress):
        raise BadRequest(
            f'egress must be True, False or a list of names such as ["api.example.com"], got {egress!r:.80}'
        )
    return list(egress)


def secrets(given: Mapping[str, Secret] | None) -> dict[str, Any] | None:
    """`secrets` as they travel.  Raises: BadRequest, which never shows a value."""
    if not given:
        return None
    for name, secret in given.items():
        if not isinstance(secret, Secret):
            raise BadRequest(f"secrets[{name!r}] must be a Secret(value, hosts=[...]), not a {type(secret).__name__}")
        if isinstance(secret.hosts, str):
            raise BadRequest(f"secrets[{name!r}]: hosts must be a list of names")
    return {name: {"value": secret.value, "hosts": list(secret.hosts)} for name, secret in given.items()}


def log(sandbox_id: str) -> Call:
    return Call("GET", sandbox_path(sandbox_id, "/egress"), "egress log", sandbox_id, repeatable=True)


def parse_log(call: Call, data: bytes) -> EgressLog:
    """Raises: ProtocolError if it is no log."""
    body = parse_object(call, data)
    entries = body.get("entries")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ProtocolError(f"{call.what}: the daemon's answer holds no entries")
    dropped = body.get("dropped")
    return EgressLog(
        parse_reach(body.get("egress")),
        parse_hosts(body.get("secrets")),
        tuple(_entry(entry) for entry in entries),
        dropped if isinstance(dropped, int) else 0,
    )


def _entry(entry: Mapping[str, Any]) -> EgressEntry:
    """Lenient: other versions know other keys; missing ones get neutral values."""
    neutral = {"int": 0, "str": ""}
    values: dict[str, Any] = {}
    for one in fields(EgressEntry):
        default = neutral[str(one.type)]
        value = entry.get(one.name)
        values[one.name] = value if type(value) is type(default) else default
    return EgressEntry(**values)
