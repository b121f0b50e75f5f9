"""Every setting of the daemon with its default and the reason for it; the daemon's only reader of the environment.

Knows nothing of engines or HTTP.  `Config.from_environment` reads, `check_start` decides whether to start at all.
"""

from __future__ import annotations

import ipaddress
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from podflare.egress.addresses import Network
from podflare.egress.policy import Policy, parse_private
from podflare.engines.base import Wall
from podflare.errors import BadRequest
from podflare.host.auth import digest, owner_of
from podflare.host.tiers import DEFAULT, PUBLISHED, Tier, read_keys, read_tiers
from podflare.wire.egress import Reach

MIB = 1024 * 1024
VMMS = ("auto", "qemu", "firecracker")
"""auto: what can work with KVM, of two QEMU; else QEMU that translates."""


@dataclass(frozen=True)
class Config:
    """Settings of one daemon life."""

    # Where it listens.
    host: str = "127.0.0.1"
    port: int = 7070
    uds: str | None = None
    """A Unix socket path instead of host and port; made with mode 0600."""
    key_digests: tuple[bytes, ...] = ()
    """SHA-256 of each API key; the keys themselves are not kept."""
    auth_disabled: bool = False
    tiers: Mapping[str, Tier] = field(default_factory=lambda: dict(PUBLISHED))
    """What the keys of each tier may have at most, by name."""
    key_tiers: Mapping[str, str] = field(default_factory=dict)
    """Owner -> name of its tier; owners that are not named are of the tier `default`."""

    # What it runs.
    engines: tuple[str, ...] = ("process",)
    """Those that make sandboxes, the first being the default.  If one of them cannot start, the daemon does not."""
    engines_on_request: bool = False
    """Sandboxes may ask for every other engine of this version, too; it is started then."""
    require: tuple[Wall, ...] = ()
    """Walls without which no sandbox is handed out."""
    data_dir: Path = Path("podflare-data")
    template_dir: Path | None = None
    """Where `podflare template build` puts templates; None for only the one that needs no building."""
    image_dir: Path | None = None
    """Where `podflare image build` puts what virtual machines boot; None for none."""
    vmm: str = "auto"
    """Which virtual machine monitor the microvm engine takes: one of VMMS."""
    firecracker: Path | None = None
    """The Firecracker to take; None for the one on the PATH."""
    disk_rate_mib: int = 0
    disk_rate_operations: int = 0
    """What each virtual machine may read from its disk and write to it in a second.  0, no limit: what is fair depends
    on the computer's disk and on how many machines use it at a time, and any number slows a machine that is alone."""
    pool_size: int | None = None
    """Warm sandboxes kept ready: a burst of this many creates costs no start-up.  None: as the engine finds worth its
    memory (Engine.pool_size)."""
    pool_templates: tuple[tuple[str, int], ...] = ()
    """Further pools, as (template, size): a template that preloads much starts more slowly than the default one.

    engine/template is one of another engine than the default.
    """

    # How it is started.
    embedded: bool = False
    """The private daemon of one SDK process: no keys, no lifetimes, nothing remembered after it."""
    parent_pid: int | None = None
    """End when this process ends."""
    announce: bool = False
    """Print one JSON line on stdout once connections are accepted."""
    log_format: str = "text"
    log_level: str = "info"
    region: str | None = None
    public_url: str | None = None
    """Told to clients as `endpoint`; the original's client then moves there, so only an operator sets it."""

    # The network of sandboxes.
    egress: Reach = False
    """What a sandbox may reach whose creator does not say: nothing, for code of a language model runs in it."""
    egress_private: tuple[Network, ...] = ()
    """Networks that are not public and that creators may name all the same."""
    egress_ca: Path | None = None
    """Certificates, besides the system's, that hosts of secrets may be signed by."""
    egress_resolvers: tuple[str, ...] = ()
    """Name servers; none: those of the computer."""

    # Lifetimes.  None: no limit unless the caller asks for one.
    lifetime_s: int | None = 86400
    idle_s: int | None = 3600
    """A forgotten sandbox costs memory; an hour outlives any thinking pause of an agent."""

    # Admission.
    max_sandboxes: int = 1000
    memory_reserve_mib: int | None = None
    disk_reserve_mib: int | None = None
    """What a new sandbox must leave free; None for a share of the machine (host/headroom.py), 0 for nothing."""
    max_waiting_cells: int = 64
    """Per sandbox; cells of one sandbox run one after the other, so a longer queue is a client's bug."""
    max_transfers: int = 16
    """Per sandbox; each holds up to WINDOW_BYTES in memory."""
    create_timeout_s: float = 25.0
    """Below the 30 s after which the original's client gives up on a silent create."""

    # Cells.
    heartbeat_s: float = 10.0
    """Silence after which an empty line is sent; the original's client gives up after 30 s.  0: never."""
    interrupt_grace_s: float = 2.0
    """From the interrupt to the kill: time for `except KeyboardInterrupt` and `finally` blocks."""
    kill_grace_s: float = 5.0
    """From the kill to closing the machine; the guest agent needs milliseconds unless it is broken."""
    stream_head_bytes: int = 4 * MIB
    stream_tail_bytes: int = 4 * MIB
    """Of each of stdout and stderr, the client gets the first and the last so many bytes."""
    output_rate_mib: int = 32
    """MiB a second that one sandbox may print in the long run (host/pace.py); its writes wait then.  0: no limit."""
    keep_cells: int = 8
    """Cells whose whole output stays fetchable, per sandbox."""
    keep_cell_bytes: int = 256 * MIB
    keep_sandbox_bytes: int = 512 * MIB
    keep_total_bytes: int = 4096 * MIB
    """Disk that kept output may take: of one cell, of one sandbox, of the daemon."""
    max_result_bytes: int = 32 * MIB
    """Rich results of one cell; beyond it they are dropped and counted, for they wait in memory."""
    replay_events: int = 1000
    replay_bytes: int = 4 * MIB
    client_stall_s: float = 300.0
    """A client that takes no byte of a waiting answer for so long is treated as gone."""
    body_timeout_s: float = 30.0
    """Silence within a request body after which the request is refused."""
    transfer_stall_s: float = 30.0
    """Silence of the guest within a file transfer after which it is given up."""
    idempotency_s: float = 600.0
    shutdown_s: float = 5.0

    @property
    def loopback(self) -> bool:
        """Whether only processes of this computer can connect."""
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def open_to_all(self) -> bool:
        """Whether requests are served without a key."""
        return self.embedded or self.auth_disabled or not self.key_digests

    def tier_of(self, owner: str) -> Tier:
        """What this owner may have."""
        return self.tiers[self.key_tiers.get(owner, DEFAULT)]

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], **given: Any) -> Config:
        """Defaults, then `environ`, then what was `given` (None counts as not given).

        Raises: BadRequest that names the variable and what it must be.
        """
        given = {key: value for key, value in given.items() if value is not None}
        embedded = bool(given.get("embedded", False))
        found = {} if embedded else _from_variables(environ)
        found.setdefault("data_dir", default_data_dir(environ))
        found["template_dir"] = default_template_dir(environ)
        found["image_dir"] = default_image_dir(environ)
        if embedded:
            # The socket's mode is the key, and the SDK process decides how long a sandbox lives.
            found.update(lifetime_s=None, idle_s=None, pool_size=2, log_level="warning", engines_on_request=True)
        if environ.get("PODFLARE_ENGINE"):
            found.update(engines=read_engines((environ["PODFLARE_ENGINE"],)), engines_on_request=False)
        if environ.get("PODFLARE_DATA_DIR"):
            found["data_dir"] = Path(environ["PODFLARE_DATA_DIR"])
        for setting in ("memory_reserve_mib", "disk_reserve_mib", "disk_rate_mib", "disk_rate_operations"):
            name = f"PODFLARE_{setting.upper()}"
            if environ.get(name):
                found[setting] = _whole(environ, name, 0)
        found.update(_egress(environ))
        found["require"] = _walls(environ.get("PODFLARE_REQUIRE", ""))
        found["vmm"], found["firecracker"] = vmm_of(environ)
        if "engines" in given:
            given["engines"] = read_engines(given["engines"])
        found.update(given)
        return cls(**found)


def check_start(config: Config) -> str:
    """Decide whether this daemon may start; return a warning to show, "" if there is none.

    Raises: BadRequest if it would serve other computers without a key and nobody asked for that.
    """
    if not config.open_to_all:
        return ""
    if config.auth_disabled and not config.embedded:
        return (
            "authentication is DISABLED (PODFLARE_AUTH_DISABLED): whoever can connect can run code here"
            if not config.loopback
            else "authentication is disabled (PODFLARE_AUTH_DISABLED)"
        )
    if not config.loopback:
        raise BadRequest(
            f"refusing to serve {config.host} without API keys: set PODFLARE_API_KEYS=key1,key2, "
            "or bind to 127.0.0.1, or set PODFLARE_AUTH_DISABLED=1 if another layer guards this address"
        )
    return ""


def default_data_dir(environ: Mapping[str, str]) -> Path:
    """Where instance directories live if nobody says otherwise: the user's state directory, else one in /tmp."""
    if os.geteuid() == 0 and not environ.get("XDG_STATE_HOME"):
        return Path("/var/lib/podflare")
    home = environ.get("XDG_STATE_HOME") or (environ["HOME"] + "/.local/state" if environ.get("HOME") else "")
    if home and _can_make(Path(home) / "podflare"):
        return Path(home) / "podflare"
    return Path(tempfile.gettempdir()) / f"podflare-{os.geteuid()}"


def default_template_dir(environ: Mapping[str, str]) -> Path:
    """Where built templates are if nobody says otherwise: the user's data directory, else one in /tmp."""
    return _default_store(environ, "PODFLARE_TEMPLATE_DIR", "templates")


def default_image_dir(environ: Mapping[str, str]) -> Path:
    """The same for images of virtual machines."""
    return _default_store(environ, "PODFLARE_IMAGE_DIR", "images")


def vmm_of(environ: Mapping[str, str]) -> tuple[str, Path | None]:
    """The virtual machine monitor that is wished for, and where Firecracker is.  Raises: BadRequest."""
    vmm = _one_of(environ, "PODFLARE_VMM", VMMS) if environ.get("PODFLARE_VMM") else VMMS[0]
    return vmm, Path(environ["PODFLARE_FIRECRACKER"]) if environ.get("PODFLARE_FIRECRACKER") else None


def _default_store(environ: Mapping[str, str], variable: str, name: str) -> Path:
    if environ.get(variable):
        return Path(environ[variable])
    if os.geteuid() == 0 and not environ.get("XDG_DATA_HOME"):
        return Path("/var/lib/podflare") / name
    home = environ.get("XDG_DATA_HOME") or (environ["HOME"] + "/.local/share" if environ.get("HOME") else "")
    if home and _can_make(Path(home) / "podflare"):
        return Path(home) / "podflare" / name
    return Path(tempfile.gettempdir()) / f"podflare-{os.geteuid()}" / name


def _can_make(path: Path) -> bool:
    while not path.exists():
        if path.parent == path:
            return False
        path = path.parent
    return os.access(path, os.W_OK | os.X_OK)


def _from_variables(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if environ.get("PODFLARE_HOSTD_ADDR"):
        found["host"], found["port"] = split_address(environ["PODFLARE_HOSTD_ADDR"])
    found["tiers"] = read_tiers(environ.get("PODFLARE_TIERS", ""), "PODFLARE_TIERS")
    keys = read_keys(environ.get("PODFLARE_API_KEYS", ""), found["tiers"], "PODFLARE_API_KEYS")
    found["key_digests"] = tuple(digest(key) for key, _ in keys)
    found["key_tiers"] = {owner_of(digest(key)): tier for key, tier in keys}
    found["auth_disabled"] = _flag(environ, "PODFLARE_AUTH_DISABLED")
    if environ.get("PODFLARE_LOG_FORMAT"):
        found["log_format"] = _one_of(environ, "PODFLARE_LOG_FORMAT", ("text", "json"))
    if environ.get("PODFLARE_LOG_LEVEL"):
        found["log_level"] = _one_of(environ, "PODFLARE_LOG_LEVEL", ("debug", "info", "warning", "error"))
    for setting, names, low in (
        ("pool_size", ("PODFLARE_POOL_SIZE", "PODFLARE_FC_POOL_SIZE"), 0),
        ("max_sandboxes", ("PODFLARE_MAX_SANDBOXES",), 1),
        ("output_rate_mib", ("PODFLARE_OUTPUT_RATE_MIB",), 0),
        ("lifetime_s", ("PODFLARE_LIFETIME_SECONDS",), 1),
        ("idle_s", ("PODFLARE_IDLE_SECONDS",), 1),
    ):
        for name in names:
            if environ.get(name):
                found[setting] = _whole(environ, name, low)
                break
    found["pool_templates"] = _pool_templates(environ.get("PODFLARE_POOL_TEMPLATES", ""))
    if environ.get("PODFLARE_HEARTBEAT_SECONDS"):
        found["heartbeat_s"] = _seconds(environ, "PODFLARE_HEARTBEAT_SECONDS")
    found["region"] = environ.get("PODFLARE_REGION") or None
    found["public_url"] = environ.get("PODFLARE_PUBLIC_URL") or None
    return found


def split_address(text: str) -> tuple[str, int]:
    """`host:port`, with brackets around an IPv6 host.  Raises: BadRequest."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise BadRequest(f"PODFLARE_HOSTD_ADDR must be host:port, got {text!r}")
    return host.strip("[]"), int(port)


def read_engines(words: Iterable[str]) -> tuple[str, ...]:
    """Names from words that may be comma-separated lists.  Raises: BadRequest if there is none."""
    names = tuple(dict.fromkeys(name.strip() for word in words for name in word.split(",") if name.strip()))
    if not names:
        raise BadRequest("no engine is named")
    return names


def _walls(text: str) -> tuple[Wall, ...]:
    known = get_args(Wall)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise BadRequest(f"PODFLARE_REQUIRE: unknown wall {name!r}; known: {', '.join(known)}")
    return tuple(name for name in known if name in names)


def _egress(environ: Mapping[str, str]) -> dict[str, Any]:
    """The embedded daemon has these, too: the network is that of whoever starts it."""
    private = parse_private(environ.get("PODFLARE_EGRESS_PRIVATE", ""))
    text = environ.get("PODFLARE_EGRESS", "").strip()
    names = tuple(filter(None, (name.strip() for name in text.split(","))))
    reach: Reach = names
    if text.lower() in _FLAGS:
        reach = _FLAGS[text.lower()]
    else:
        Policy.parse(names, private=private)
    resolvers = (server.strip() for server in environ.get("PODFLARE_EGRESS_RESOLVERS", "").split(","))
    return {
        "egress": reach,
        "egress_private": private,
        "egress_ca": Path(environ["PODFLARE_EGRESS_CA"]) if environ.get("PODFLARE_EGRESS_CA") else None,
        "egress_resolvers": tuple(filter(None, resolvers)),
    }


def _pool_templates(text: str) -> tuple[tuple[str, int], ...]:
    found = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (word.strip() for word in item.partition("="))
        if not name or not size.isascii() or not size.isdigit():
            raise BadRequest(f"PODFLARE_POOL_TEMPLATES must be TEMPLATE=NUMBER,..., got {item!r:.80}")
        found[name] = int(size)
    return tuple(found.items())


_FLAGS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("", "0", "false", "no", "off"), False),
}


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip().lower()
    if value not in _FLAGS:
        raise BadRequest(f"{name} must be 1 or 0, got {value!r}")
    return _FLAGS[value]


def _one_of(environ: Mapping[str, str], name: str, values: tuple[str, ...]) -> str:
    value = environ[name].strip().lower()
    if value not in values:
        raise BadRequest(f"{name} must be one of {', '.join(values)}, got {value!r}")
    return value


def _seconds(environ: Mapping[str, str], name: str) -> float:
    try:
        value = float(environ[name])
    except ValueError:
        value = -1.0
    if not 0 <= value < 86400:
        raise BadRequest(f"{name} must be a number of seconds from 0 up, got {environ[name]!r}")
    return value


def _whole(environ: Mapping[str, str], name: str, low: int) -> int:
    value = environ[name].strip()
    if not value.isascii() or not value.isdigit() or int(value) < low:
        raise BadRequest(f"{name} must be a whole number from {low} up, got {value!r}")
    return int(value)
