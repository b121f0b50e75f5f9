"""What sandboxes may reach and what they tried to, as it travels: part of a create request, and the log of a sandbox.

Which entries a policy may have, and what they allow, is podflare.egress's matter.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, Mapping, Optional, Tuple, Union

from podflare.errors import BadRequest
from podflare.wire.uplink import CA_VARIABLES, NO_PROXY_VARIABLES, PROXY_VARIABLES

Reach = Union[bool, Tuple[str, ...]]
"""False: nothing but the own loopback.  True: every public address.  Else what is named, and nothing else."""

MAX_ALLOWED = 256
MAX_ALLOWED_CHARS = 300
"""A name has up to 253 characters, then a port."""
MAX_SECRETS = 32
MAX_SECRET_HOSTS = 32
MAX_SECRET_CHARS = 8192
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}\Z")
_WAY_OUT = frozenset((*PROXY_VARIABLES, *NO_PROXY_VARIABLES, "ALL_PROXY", "all_proxy", *CA_VARIABLES, "SSL_CERT_DIR"))
_OWN = frozenset(("HOME", "PATH", "PWD", "SHELL", "USER", "LOGNAME", "LANG", "TERM", "MPLBACKEND"))
_STARTUP = re.compile(
    r"(?:LD_\w+|GLIBC_TUNABLES|LC_\w+|PYTHON[A-Z]\w*|BASH_ENV|ENV|IFS|SHELLOPTS|BASHOPTS)\Z", re.ASCII
)
"""What the dynamic linker, the C library, the interpreter and the shell obey before a program's first line."""

ALLOWED, REFUSED, FAILED = "allowed", "refused", "failed"
"""Verdicts; what failed was allowed, and the other side could not be reached."""


@dataclass(frozen=True)
class SecretGrant:
    """A value that requests to these hosts get and nothing in the sandbox ever has."""

    value: str = field(repr=False)
    hosts: Tuple[str, ...]


def read_reach(value: Any) -> Optional[Reach]:
    """`egress` of a request; None: not said.  Raises: BadRequest that says what it must be."""
    if value is None or isinstance(value, bool):
        return value
    wanted = "create request: 'egress' must be true, false or a list of names such as \"api.example.com\""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise BadRequest(f"{wanted}, got {type(value).__name__} {value!r:.60}")
    if len(value) > MAX_ALLOWED or any(len(one) > MAX_ALLOWED_CHARS for one in value):
        raise BadRequest(f"{wanted}, at most {MAX_ALLOWED} of at most {MAX_ALLOWED_CHARS} characters")
    return tuple(value)


def read_secrets(value: Any) -> Dict[str, SecretGrant]:
    """`secrets` of a request.  Raises: BadRequest, which never shows a value."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_SECRETS:
        raise BadRequest(f"create request: 'secrets' must be an object of at most {MAX_SECRETS} secrets")
    return {name: _read_secret(name, body) for name, body in value.items()}


def _read_secret(name: str, body: Any) -> SecretGrant:
    what = f"create request: secret {name!r:.140}"
    if not _VARIABLE.match(name):
        raise BadRequest(f"{what}: its name must be that of an environment variable")
    if why := _why_not(name):
        raise BadRequest(f"{what}: the variable {name} {why}, and a secret's holds a placeholder; take another name")
    if not isinstance(body, dict):
        raise BadRequest(f"{what} must be an object with 'value' and 'hosts'")
    text, hosts = body.get("value"), body.get("hosts")
    if not isinstance(text, str) or not 0 < len(text) <= MAX_SECRET_CHARS or not text.isprintable():
        raise BadRequest(f"{what}: 'value' must be a string of 1 to {MAX_SECRET_CHARS} printable characters")
    if not isinstance(hosts, list) or not 0 < len(hosts) <= MAX_SECRET_HOSTS:
        raise BadRequest(f"{what}: 'hosts' must be a list of 1 to {MAX_SECRET_HOSTS} names")
    if not all(isinstance(host, str) and 0 < len(host) <= MAX_ALLOWED_CHARS for host in hosts):
        raise BadRequest(f"{what}: 'hosts' must be a list of names such as \"api.example.com\"")
    return SecretGrant(text, tuple(hosts))


def _why_not(name: str) -> str:
    """Why a sandbox cannot have a placeholder in this variable; empty if it can."""
    if name in _WAY_OUT:
        return "leads programs to the network"
    if name in _OWN:
        return "is set in every sandbox"
    return "changes how programs start" if _STARTUP.match(name) else ""


@dataclass(frozen=True)
class EgressEntry:
    """One thing that a sandbox tried to reach, or several alike within a moment."""

    time_ms: int
    """When it began, since 1970."""
    protocol: str
    """tcp, connect or http (the proxy), tls (a host of secrets), dns, udp, icmp, other, gate."""
    host: str
    """The name, where one is known; else empty.  Printable ASCII."""
    address: str
    """Empty where none was dialled."""
    port: int
    verdict: str
    """ALLOWED, REFUSED or FAILED."""
    reason: str = ""
    """Why not, in plain words."""
    bytes_in: int = 0
    """From there into the sandbox, so far."""
    bytes_out: int = 0
    count: int = 1


@dataclass(frozen=True)
class EgressLog:
    """Answer of GET /v1/sandboxes/{id}/egress."""

    egress: Reach
    secrets: Mapping[str, Tuple[str, ...]]
    """Name of the variable -> hosts that get the value."""
    entries: Tuple[EgressEntry, ...] = ()
    """Oldest first."""
    dropped: int = 0
    """Older ones that are not kept any more."""

    def to_json(self) -> Dict[str, Any]:
        return asdict(self)
