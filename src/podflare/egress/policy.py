"""What a sandbox may reach: an allow-list or everything public, parsed and asked.  Pure, standard library only.

Knows no sockets.  Whether an address is one of the daemon's own is told by who asks.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from podflare.egress.addresses import (
    Address,
    Network,
    is_synthetic,
    never,
    not_public,
    overlaps_never,
    overlaps_private,
    parse_address,
    plain,
)
from podflare.errors import BadRequest
from podflare.wire.egress import MAX_ALLOWED, MAX_SECRET_CHARS

WEB_PORTS = (80, 443)
"""What an entry without a port opens."""
TLS_PORT = 443
_MAX_NAME = 253
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_SECRET = re.compile(r"[\x20-\x7e]+")


@dataclass(frozen=True)
class NameRule:
    """`name` itself, or with `below` every name below it but not itself; on `port`, or with None on `WEB_PORTS`."""

    name: str
    below: bool
    port: int | None

    def covers(self, name: str) -> bool:
        return name.endswith("." + self.name) if self.below else name == self.name

    def opens(self, port: int) -> bool:
        return port in WEB_PORTS if self.port is None else port == self.port


@dataclass(frozen=True)
class NetworkRule:
    """Every address of `network`, on `port`, or with None on `WEB_PORTS`."""

    network: Network
    port: int | None

    def opens(self, port: int) -> bool:
        return port in WEB_PORTS if self.port is None else port == self.port


@dataclass(frozen=True)
class SecretSpec:
    """A value that only requests to `hosts` carry, put in outside of the sandbox.

    Raises: BadRequest, at construction, for a value or host that cannot be used.  No message shows the value.
    """

    value: str = field(repr=False)
    hosts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.value or len(self.value) > MAX_SECRET_CHARS or not _SECRET.fullmatch(self.value):
            raise BadRequest(f"a secret's value must be 1 to {MAX_SECRET_CHARS} printable ASCII characters")
        if self.value != self.value.strip():
            raise BadRequest("a secret's value must not begin or end with a space: HTTP drops it")
        if not self.hosts:
            raise BadRequest("a secret must name the hosts that may get it, like hosts=['api.example.com']")
        _ = self.rules

    @property
    def rules(self) -> tuple[NameRule, ...]:
        """Where TLS is ended to put the value in: a host without a port means 443."""
        return tuple(_secret_host(text) for text in self.hosts)


@dataclass(frozen=True)
class Policy:
    """What one sandbox may reach.  Make with `parse`; `entries` is True or the list that was asked for."""

    entries: bool | tuple[str, ...]
    names: tuple[NameRule, ...] = ()
    networks: tuple[NetworkRule, ...] = ()

    @classmethod
    def parse(cls, egress: bool | Sequence[str], *, private: Sequence[Network] = ()) -> Policy:
        """A policy from `egress` as users write it.

        Args:
            egress: True for every public address, or names, `*.` names, addresses and networks, also with `:port`.
            private: the networks that are not public and that this daemon's operator lets sandboxes ask for.
        Raises: BadRequest that says which entry is wrong and why.
        """
        if egress is True:
            return cls(True)
        if isinstance(egress, str) or not isinstance(egress, Sequence):
            raise BadRequest("egress must be True, False or a list of hosts like ['api.example.com', '*.example.org']")
        if len(egress) > MAX_ALLOWED:
            raise BadRequest(f"egress names {len(egress)} hosts, at most {MAX_ALLOWED} are possible")
        names: list[NameRule] = []
        networks: list[NetworkRule] = []
        for entry in egress:
            rule = _parse_entry(entry, private)
            if isinstance(rule, NameRule):
                names.append(rule)
            else:
                networks.append(rule)
        return cls(tuple(egress), tuple(names), tuple(networks))

    def with_secrets(self, secrets: Mapping[str, SecretSpec]) -> Policy:
        """This policy and the hosts of `secrets`, which would be of no use if they could not be reached."""
        if self.entries is True:
            return self
        return Policy(self.entries, self.names + tuple(r for s in secrets.values() for r in s.rules), self.networks)

    def knows_name(self, name: str) -> bool:
        """Whether a question for this (normal) name may be answered."""
        return self.entries is True or any(rule.covers(name) for rule in self.names)

    def refuses_name(self, name: str, port: int) -> str:
        """Why no connection to this (normal) name and port may be tried; "" if one may, as far as the name goes."""
        if self.entries is True:
            return ""
        covering = [rule for rule in self.names if rule.covers(name)]
        if not covering:
            return f"egress to {name} is not allowed for this sandbox: {self.describe()}"
        if not any(rule.opens(port) for rule in covering):
            return f"egress to {name} is allowed, but not to its port {port}: {self.describe()}"
        return ""

    def refuses_address(self, address: Address, port: int, *, named: bool = False) -> str:
        """Why `address`:`port` may not be dialled; "" if it may.  Whether it is the daemon's own comes besides.

        Args:
            named: it is what an allowed name resolves to, so it need only be public, or opened explicitly.
        """
        if is_synthetic(address):
            return f"{address} stands for no name that this sandbox has asked for"
        if why := never(address):
            return f"{address} {why}: no sandbox may reach it"
        bare = plain(address)
        if any(bare in rule.network and rule.opens(port) for rule in self.networks):
            return ""
        if why := not_public(address):
            return f"{address} {why}: sandboxes reach public addresses only"
        if named or self.entries is True:
            return ""
        return f"egress to {address} port {port} is not allowed for this sandbox: {self.describe()}"

    def describe(self) -> str:
        """What is allowed, for messages."""
        if self.entries is True:
            return "allowed is every public address"
        shown = [f"{'*.' if r.below else ''}{r.name}{'' if r.port is None else f':{r.port}'}" for r in self.names]
        shown += [f"{r.network}{'' if r.port is None else f' port {r.port}'}" for r in self.networks]
        shown = list(dict.fromkeys(shown))
        more = f" and {len(shown) - 10} more" if len(shown) > 10 else ""
        return f"allowed are {', '.join(shown[:10])}{more}" if shown else "nothing is allowed"


def parse_private(text: str) -> tuple[Network, ...]:
    """The networks of PODFLARE_EGRESS_PRIVATE, separated by commas.

    Raises: BadRequest for what is no network, or holds addresses that nothing may open.
    """
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        network = _parse_network(item)
        if network is None:
            raise BadRequest(f"PODFLARE_EGRESS_PRIVATE: {item!r} is not a network like 10.0.0.0/8")
        if overlaps_never(network):
            raise BadRequest(f"PODFLARE_EGRESS_PRIVATE: {item} holds loopback, link-local or metadata addresses")
        found.append(network)
    return tuple(found)


def normal_name(text: str) -> str:
    """A host name in lower case, ASCII, without the final dot.  Raises: BadRequest if it is none."""
    try:
        name = text if text.isascii() else text.encode("idna").decode("ascii")
    except UnicodeError as error:
        raise BadRequest(f"{text[:80]!r} is not a host name") from error
    name = name.lower().removesuffix(".")
    labels = name.split(".")
    # A last label of digits alone is how some programs write addresses (127.1, 0x7f000001), never a name's.
    if (
        len(name) > _MAX_NAME
        or not all(map(_LABEL.fullmatch, labels))
        or re.fullmatch("[0-9]+|0x[0-9a-f]*", labels[-1])
    ):
        raise BadRequest(f"{text[:80]!r} is not a host name")
    return name


def _parse_entry(entry: Any, private: Sequence[Network]) -> NameRule | NetworkRule:
    if not isinstance(entry, str):
        raise BadRequest(f"egress: each entry must be text, not {type(entry).__name__}")
    host, port = _split_port(entry.strip())
    network = _parse_network(host)
    if network is None:
        return _name_rule(host, port)
    if network.prefixlen == 0:
        raise BadRequest(f"egress: {entry} is everything: use egress=True")
    if overlaps_never(network):
        raise BadRequest(f"egress: {entry} holds loopback, link-local or metadata addresses, which nothing may open")
    inside = any(network.version == one.version and network.subnet_of(one) for one in private)  # type: ignore[arg-type]  # same version
    if not inside and overlaps_private(network):
        raise BadRequest(
            f"egress: {entry} holds addresses that are not public; the daemon's operator can let sandboxes ask for it "
            "(PODFLARE_EGRESS_PRIVATE)"
        )
    return NetworkRule(network, port)


def _split_port(text: str) -> tuple[str, int | None]:
    """host and port of `host`, `host:port`, `[v6]:port`, `v6`, `network/8:port`."""
    host, colon, tail = text.rpartition(":")
    if not colon or (":" in host and not host.endswith("]") and "/" not in host) or "]" in tail or "/" in tail:
        return text, None
    if not re.fullmatch("[0-9]{1,5}", tail) or not 0 < int(tail) < 65536:
        raise BadRequest(f"egress: {text[:300]!r} has no port that could be used (1 to 65535)")
    return host, int(tail)


def _parse_network(text: str) -> Network | None:
    address = parse_address(text)
    if address is not None:
        return ipaddress.ip_network(plain(address))
    base, slash, bits = text.partition("/")
    if not slash:
        return None
    start = parse_address(base)
    if start is None or not bits.isdecimal() or not bits.isascii():
        return None
    try:
        return ipaddress.ip_network((start, int(bits)))
    except ValueError as error:
        raise BadRequest(f"egress: {text[:80]!r} is not a network: {error}") from error


def _name_rule(host: str, port: int | None) -> NameRule:
    below = host.startswith("*.")
    try:
        name = normal_name(host.removeprefix("*."))
    except BadRequest:
        raise BadRequest(
            f"egress: {host[:300]!r} is not a host; write api.example.com, *.example.org, host:port or 93.184.216.0/24"
        ) from None
    return NameRule(name, below, port)


def _secret_host(text: Any) -> NameRule:
    if not isinstance(text, str):
        raise BadRequest("a secret's hosts must be names like 'api.example.com'")
    host, port = _split_port(text.strip())
    if _parse_network(host) is not None:
        raise BadRequest(f"a secret's host must be a name, because its certificate is checked, not {text[:300]!r}")
    return _name_rule(host, TLS_PORT if port is None else port)
