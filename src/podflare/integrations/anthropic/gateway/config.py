"""Settings of the gateway.  Its only reader of the environment."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from podflare.errors import BadRequest
from podflare.integrations.anthropic.containers.files import MAX_FILE_BYTES, MAX_OWNER_BYTES
from podflare.integrations.anthropic.containers.registry import CELL_S, IDLE_S

DEFAULT_UPSTREAM = "https://api.anthropic.com"
DEFAULT_PORT = 8080
MIB = 1024 * 1024


@dataclass(frozen=True)
class GatewayConfig:
    """All settings, checked."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    upstream: str = DEFAULT_UPSTREAM
    upstream_key: str | None = field(default=None, repr=False)
    """Sent to the model's API in place of the clients' own keys."""
    keys: frozenset[str] = field(default=frozenset(), repr=False)
    """Keys of clients; empty: every key is taken, and the model's API judges it."""
    open_to_all: bool = False
    """Whoever reaches the address is served, also without keys."""
    data_dir: Path = Path("/var/lib/podflare/gateway")
    idle_s: float = IDLE_S
    cell_s: float = CELL_S
    max_body_bytes: int = 32 * MIB
    max_file_bytes: int = MAX_FILE_BYTES
    max_owner_bytes: int = MAX_OWNER_BYTES
    ping_s: float = 10.0
    """Between two signs of life while code runs."""
    stall_s: float = 60.0
    """A client that takes or gives nothing for so long is gone."""
    upstream_silence_s: float = 600.0

    @property
    def loopback(self) -> bool:
        """Whether only this computer reaches the address."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or address to bind to is this computer's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def configure(
    environment: Mapping[str, str],
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    upstream: str | None = None,
    upstream_key_file: Path | None = None,
    data_dir: Path | None = None,
    idle_s: float = IDLE_S,
    cell_s: float = CELL_S,
) -> GatewayConfig:
    """Settings from options and environment, options first.

    Raises: BadRequest for what cannot work, or would be open to everybody without anybody having said so.
    """
    keys = frozenset(key.strip() for key in environment.get("PODFLARE_GATEWAY_KEYS", "").split(",") if key.strip())
    config = GatewayConfig(
        host=host,
        port=port,
        upstream=_url(upstream or environment.get("PODFLARE_GATEWAY_UPSTREAM", "") or DEFAULT_UPSTREAM),
        upstream_key=_upstream_key(environment, upstream_key_file),
        keys=keys,
        open_to_all=environment.get("PODFLARE_GATEWAY_AUTH_DISABLED") == "1",
        data_dir=(data_dir or _default_directory(environment)).absolute(),
        idle_s=_positive("--idle-timeout", idle_s),
        cell_s=_positive("--cell-timeout", cell_s),
        max_body_bytes=_mib(environment, "PODFLARE_GATEWAY_MAX_BODY_MIB", 32),
        max_file_bytes=_mib(environment, "PODFLARE_GATEWAY_MAX_FILE_MIB", MAX_FILE_BYTES // MIB),
        max_owner_bytes=_mib(environment, "PODFLARE_GATEWAY_MAX_OWNER_MIB", MAX_OWNER_BYTES // MIB),
        ping_s=_seconds(environment, "PODFLARE_GATEWAY_PING_SECONDS", 10.0),
        stall_s=_seconds(environment, "PODFLARE_GATEWAY_STALL_SECONDS", 60.0),
    )
    if keys and config.upstream_key is None:
        raise BadRequest(
            "PODFLARE_GATEWAY_KEYS are this gateway's own keys and mean nothing to the model's API: "
            "set PODFLARE_GATEWAY_UPSTREAM_KEY, or pass --upstream-key-file, too"
        )
    if not config.loopback and not keys and not config.open_to_all:
        raise BadRequest(
            f"{host} can be reached from other computers: set PODFLARE_GATEWAY_KEYS (comma-separated) to the keys "
            "that clients may use, or PODFLARE_GATEWAY_AUTH_DISABLED=1 if something else keeps strangers out"
        )
    return config


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise BadRequest(f"the upstream must be an http:// or https:// address, got {text!r:.200}")
    return text.rstrip("/")


def _upstream_key(environment: Mapping[str, str], path: Path | None) -> str | None:
    text = environment.get("PODFLARE_GATEWAY_UPSTREAM_KEY", "")
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise BadRequest(f"--upstream-key-file: {path} cannot be read: {type(exc).__name__}") from exc
    key = text.strip()
    if not key.isascii() or not key.isprintable():
        raise BadRequest("the upstream key holds characters that no header can carry")
    return key or None


def _default_directory(environment: Mapping[str, str]) -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/podflare/gateway")
    base = environment.get("XDG_DATA_HOME") or str(Path("~/.local/share").expanduser())
    return Path(base) / "podflare" / "gateway"


def _positive(name: str, value: float) -> float:
    if not 1 <= value <= 30 * 24 * 3600:
        raise BadRequest(f"{name} must be between 1 second and 30 days, got {value:g}")
    return value


def _seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        raise BadRequest(f"{name} must be a number of seconds, got {text!r:.60}") from None
    return _positive(name, value)


def _mib(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if text and (not text.isascii() or not text.isdigit() or int(text) < 1):
        raise BadRequest(f"{name} must be a whole number of MiB from 1 up, got {text!r:.60}")
    return int(text or default) * MIB
