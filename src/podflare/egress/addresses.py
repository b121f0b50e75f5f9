"""Which addresses a sandbox may ever reach, and which stand for names in it.  Pure.

Knows nothing of names and policies.  The tables are our own, besides `ipaddress`, because what that module counts as
global has changed between versions of Python.
"""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TypeAlias

from podflare.wire.uplink import CALLER_ADDRESS, GATE_ADDRESS, MACHINE_ADDRESS

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

GATE = IPv4Address(GATE_ADDRESS)
MACHINE = IPv4Address(MACHINE_ADDRESS)
CALLER = IPv4Address(CALLER_ADDRESS)
DNS_PORT = 53
SYNTHETIC_FIRST = int(IPv4Address("198.18.1.0"))
SYNTHETIC_COUNT = int(IPv4Address("198.20.0.0")) - SYNTHETIC_FIRST
"""Addresses that stand for names; nobody else has them (RFC 2544 keeps 198.18.0.0/15 for benchmarks)."""

# What nothing opens, a policy and an operator's word included.
_NEVER: tuple[tuple[Network, str], ...] = tuple(
    (ipaddress.ip_network(text), why)
    for text, why in (
        ("0.0.0.0/8", "is unspecified"),
        ("127.0.0.0/8", "is a loopback address"),
        ("169.254.0.0/16", "is a link-local address, as those of metadata services"),
        ("100.100.100.200/32", "is a metadata service"),
        ("168.63.129.16/32", "is a metadata service"),
        ("192.0.0.192/32", "is a metadata service"),
        ("198.18.0.0/15", "is an address of the sandbox's own network"),
        ("224.0.0.0/4", "is a multicast address"),
        ("240.0.0.0/4", "is a reserved address"),
        ("::/96", "is a loopback or deprecated address"),
        ("fe80::/10", "is a link-local address"),
        ("fec0::/10", "is a site-local address"),
        ("fd00:ec2::/32", "is a metadata service"),
        ("fd20:ce::/32", "is a metadata service"),
        ("ff00::/8", "is a multicast address"),
        ("2001::/32", "is a tunnel address (Teredo)"),
        ("2002::/16", "is a tunnel address (6to4)"),
        ("64:ff9b:1::/48", "is a local translation address"),
    )
)
_NOT_PUBLIC: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "10.0.0.0/8",
        "100.64.0.0/10",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "100::/64",
        "2001:db8::/32",
        "3fff::/20",
        "5f00::/16",
        "fc00::/7",
    )
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_MAPPED = IPv6Network("::ffff:0:0/96")
_NAT64 = IPv6Network("64:ff9b::/96")


def plain(address: Address) -> Address:
    """The IPv4 address within a mapped or translated IPv6 address, else `address` itself without its zone."""
    if isinstance(address, IPv6Address):
        if address in _MAPPED or address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
        return IPv6Address(int(address))
    return address


def never(address: Address) -> str:
    """Why no sandbox may reach this address, whatever was configured; "" if one may.

    The daemon's own addresses, which only its kernel knows, come besides.
    """
    address = plain(address)
    return next((why for network, why in _NEVER if address in network), "")


def not_public(address: Address) -> str:
    """Why this is not an address of the public internet; "" if it is one."""
    if why := never(address):
        return why
    address = plain(address)
    if any(address in network for network in _NOT_PUBLIC) or not address.is_global:
        return "is a private address"
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return "is not a public address"
    return ""


def overlaps_never(network: Network) -> bool:
    """Whether any address of `network` is one that nothing opens."""
    return network.overlaps(_MAPPED) or network.overlaps(_NAT64) or any(network.overlaps(bad) for bad, _ in _NEVER)


def overlaps_private(network: Network) -> bool:
    """Whether any address of `network` is not one of the public internet."""
    if isinstance(network, IPv6Network) and not network.subnet_of(_GLOBAL_UNICAST):
        return True
    return overlaps_never(network) or any(network.overlaps(other) for other in _NOT_PUBLIC)


def is_synthetic(address: Address) -> bool:
    return isinstance(address, IPv4Address) and 0 <= int(address) - SYNTHETIC_FIRST < SYNTHETIC_COUNT


def parse_address(text: str) -> Address | None:
    """The address that `text` spells, brackets allowed; None for anything else, `127.1` and `0x7f000001` included."""
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
