"""Where the SDK's settings come from: arguments first, then the environment.  The SDK's only reader of it.

No address is built in: with none configured the SDK starts its own daemon on this machine, so code never
leaves for a server that nobody named.  Knows no HTTP.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from podflare.errors import BadRequest, UnknownRegionError

HOST_VARIABLES = ("PODFLARE_HOSTD_URL", "PODFLARE_HOST", "PODFLARE_API_URL")
"""Names of the address variables, strongest first."""

CONNECT_TIMEOUT_S = 2.5
READ_TIMEOUT_S = 30.0
"""Between two bytes.  The daemon's heartbeats keep a silent cell below it."""
WRITE_TIMEOUT_S = 10.0
POOL_TIMEOUT_S = 30.0
FORK_TIMEOUT_S = 60.0
"""Of fork, merge_into and diff, which wait for running cells and have no heartbeat."""
FORK_ANSWER_S = 10.0
"""How much later than its own time limit a fork's answer may come."""

_UNIX = "unix:"


@dataclass(frozen=True)
class Address:
    """One daemon: `base_url` without trailing slash, and the Unix socket to reach it by, if any."""

    base_url: str
    uds: str | None = None
    embedded: bool = False

    def __str__(self) -> str:
        return f"{_UNIX}{self.uds}" if self.uds else self.base_url


def parse_address(text: str) -> Address:
    """`http://...`, `https://...` or `unix:/path/to/socket`.

    Raises: BadRequest for anything else.
    """
    text = text.strip()
    if text.startswith(_UNIX):
        path = "/" + text[len(_UNIX) :].lstrip("/")
        return Address("http://localhost", uds=path)
    if not text.startswith(("http://", "https://")):
        raise BadRequest(f"the daemon's address must start with http://, https:// or unix:, got {text!r:.200}")
    return Address(text.rstrip("/"))


def find_address(host: str | None, region: str | None) -> Address | None:
    """The daemon to use; None means the private one of this process.

    Order: `region` in the configured table, `host`, then the variables of HOST_VARIABLES.
    Raises: UnknownRegionError if `region` is not in PODFLARE_REGIONS; BadRequest for an address that is none.
    """
    if region is not None and region.strip():
        return parse_address(region_url(region))
    if host is not None and host.strip():
        return parse_address(host)
    for name in HOST_VARIABLES:
        if value := os.environ.get(name, "").strip():
            try:
                return parse_address(value)
            except BadRequest as exc:
                raise BadRequest(f"{name}: {exc}") from exc
    return None


def region_table() -> dict[str, Mapping[str, Any]]:
    """PODFLARE_REGIONS: a JSON object, name -> URL or {"url", "lat", "lon"}; {} when not set.

    Raises: BadRequest if the variable is not such an object.
    """
    text = os.environ.get("PODFLARE_REGIONS", "").strip()
    if not text:
        return {}
    wrong = 'PODFLARE_REGIONS must be a JSON object such as {"eu": "https://eu.example.com"}'
    try:
        table = json.loads(text)
    except ValueError as exc:
        raise BadRequest(f"{wrong}: {exc}") from exc
    if not isinstance(table, dict):
        raise BadRequest(wrong)
    entries: dict[str, Mapping[str, Any]] = {}
    for name, value in table.items():
        entry = {"url": value} if isinstance(value, str) else value
        if not isinstance(entry, dict) or not isinstance(entry.get("url"), str):
            raise BadRequest(f"{wrong}; the entry {name!r} has no URL")
        entries[name.strip().lower()] = entry
    return entries


def region_url(region: str) -> str:
    """Raises: UnknownRegionError that says how to configure one."""
    table = region_table()
    entry = table.get(region.strip().lower())
    if entry is None:
        known = ", ".join(sorted(table)) or "none"
        raise UnknownRegionError(
            f"region {region!r} is not configured (configured: {known}). Pass host= instead of region=, "
            'or set PODFLARE_REGIONS to a JSON object such as {"eu": "https://eu.example.com"}'
        )
    return str(entry["url"])


def find_api_key(explicit: str | None) -> str | None:
    return _header("the API key", explicit if explicit is not None else os.environ.get("PODFLARE_API_KEY"))


def find_traceparent(explicit: str | None) -> str | None:
    return _header("traceparent", explicit if explicit is not None else os.environ.get("PODFLARE_TRACEPARENT"))


def _header(what: str, value: str | None) -> str | None:
    value = (value or "").strip()
    if not all(" " <= char <= "~" for char in value):
        raise BadRequest(f"{what} has characters that no HTTP header can carry")
    return value or None


def local_timezone() -> str | None:
    """The TZ variable, for the guess of the nearest region."""
    return os.environ.get("TZ", "").lstrip(":") or None


def runtime_directories() -> Iterator[str]:
    """Places for the private daemon's socket, best first."""
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield runtime
    yield tempfile.gettempdir()
    yield "/tmp"


_PASSED_ON = frozenset(("PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "TEMP", "TMP", "LD_LIBRARY_PATH"))
_PASSED_ON_PREFIXES = ("LC_", "XDG_", "PYTHON", "PODFLARE_", "SSL_CERT_")
_SERVER_ONLY = frozenset(
    ("PODFLARE_API_KEY", "PODFLARE_API_KEYS", "PODFLARE_AUTH_DISABLED", "PODFLARE_HOSTD_ADDR", "PODFLARE_PUBLIC_URL")
)


def daemon_environment(package_root: Path) -> dict[str, str]:
    """Environment of the private daemon: an allow-list.

    Secrets of the user's process stay out of the process that runs hostile code, and settings meant for a
    shared daemon (its keys, its address) do not change the private one.
    """
    env = {
        key: value
        for key, value in os.environ.items()
        if (key in _PASSED_ON or key.startswith(_PASSED_ON_PREFIXES)) and key not in _SERVER_ONLY
    }
    # The daemon must be this very podflare, also where only sys.path of this process knows it.  A
    # site-packages directory is found by the interpreter itself and must not come before the standard library.
    if package_root.name not in ("site-packages", "dist-packages"):
        inherited = env.get("PYTHONPATH")
        env["PYTHONPATH"] = f"{package_root}{os.pathsep}{inherited}" if inherited else str(package_root)
    env["PYTHONSAFEPATH"] = "1"
    return env
