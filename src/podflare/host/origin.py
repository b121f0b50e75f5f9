"""Keeps web pages away from a daemon that asks for no key: DNS rebinding and requests of other origins.  Pure.

A browser on this computer can reach loopback; what it cannot do is hide the page's Origin or send another Host.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from podflare.errors import Forbidden


def check_origin(*, host: str | None, origin: str | None, fetch_site: str | None, loopback_names_only: bool) -> None:
    """Refuse what only a web page of another origin would send.

    Args:
        host, origin, fetch_site: the headers Host, Origin, Sec-Fetch-Site.
        loopback_names_only: the daemon listens on loopback TCP, so that any other Host is a rebound name.

    Raises: Forbidden.
    """
    if loopback_names_only and host is not None and not is_loopback_name(host):
        raise Forbidden(f"Host {host!r:.100} is not a loopback name: this daemon serves only this computer")
    if origin is not None and (host is None or urlsplit_or_none(origin) != host.lower()):
        raise Forbidden(f"requests of the web origin {origin!r:.100} are refused: this daemon asks for no key")
    if fetch_site is not None and fetch_site.lower() not in ("same-origin", "none"):
        raise Forbidden("requests from another site's page are refused: this daemon asks for no key")


def urlsplit_or_none(origin: str) -> str | None:
    """host:port of an http origin, None for anything else (`null` among it)."""
    try:
        parts = urlsplit(origin.strip().lower())
    except ValueError:
        return None
    return parts.netloc if parts.scheme in ("http", "https") else None


def is_loopback_name(host: str) -> bool:
    """Whether a Host header names this computer."""
    name = host.strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    if name in ("localhost", "localhost.") or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
