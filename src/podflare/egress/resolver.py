"""Asks the host's name servers.  Knows no policy: what comes back is checked by whoever uses it."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import anyio
import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.resolver

from podflare.egress.addresses import Address, parse_address

_TRY_S = 2.0
_TOTAL_S = 6.0
_CONFIGURATION = Path("/etc/resolv.conf")
_MAX_SERVERS = 3
_MAX_ADDRESSES = 8
_MAX_ALIASES = 16


class Unresolved(Exception):
    """No answer, or not one with an address.  The text says which."""


class Resolver:
    """The given name servers, or those of the machine, whose file is read again when it changes."""

    def __init__(self, servers: tuple[str, ...]) -> None:
        """Raises: ValueError for a server that is not `address`, `address:port` or `[v6]:port`."""
        self._given = tuple(_server(text) for text in servers)
        self._read: tuple[tuple[str, int], ...] = ()
        self._read_at = -1

    async def addresses(self, name: str) -> list[Address]:
        """What `name` resolves to, IPv4 first.  Raises: Unresolved."""
        found: dict[dns.rdatatype.RdataType, list[Address]] = {}
        failures: list[Unresolved] = []

        async def one(kind: dns.rdatatype.RdataType) -> None:
            try:
                found[kind] = _addresses(await self.ask(dns.name.from_text(name), kind), kind)
            except Unresolved as error:
                failures.append(error)
            except dns.exception.DNSException as error:
                failures.append(Unresolved(f"{name} cannot be asked for: {type(error).__name__}"))

        async with anyio.create_task_group() as group:
            group.start_soon(one, dns.rdatatype.A)
            group.start_soon(one, dns.rdatatype.AAAA)
        together = found.get(dns.rdatatype.A, []) + found.get(dns.rdatatype.AAAA, [])
        if not together:
            raise failures[0] if failures else Unresolved(f"{name} does not resolve to an address")
        return together[:_MAX_ADDRESSES]

    async def ask(self, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> dns.message.Message:
        """The first server's answer, whatever it says.  Raises: Unresolved if none answers."""
        servers = self._servers()
        if not servers:
            raise Unresolved("this machine has no name server (/etc/resolv.conf)")
        query = dns.message.make_query(name, kind, use_edns=0, payload=1232)
        failure = f"no name server answered for {name.to_text(omit_final_dot=True)}"
        with anyio.move_on_after(_TOTAL_S):
            for address, port in servers:
                try:
                    message, _ = await dns.asyncquery.udp_with_fallback(query, address, timeout=_TRY_S, port=port)
                except (dns.exception.DNSException, OSError, EOFError):
                    continue
                if message.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                    return message
                failure = f"the name server says {dns.rcode.to_text(message.rcode())} for {name}"
        raise Unresolved(failure)

    def _servers(self) -> tuple[tuple[str, int], ...]:
        if self._given:
            return self._given
        try:
            changed = _CONFIGURATION.stat().st_mtime_ns
            if changed != self._read_at:
                configured = dns.resolver.Resolver(str(_CONFIGURATION)).nameservers
                self._read = tuple((str(server), 53) for server in configured[:_MAX_SERVERS])
                self._read_at = changed
        except (OSError, dns.exception.DNSException):
            return ()
        return self._read


def _addresses(message: dns.message.Message, kind: dns.rdatatype.RdataType) -> list[Address]:
    """The addresses at the end of the answer's chain of aliases."""
    name = message.question[0].name
    for _ in range(_MAX_ALIASES):
        for rrset in message.answer:
            if rrset.name == name and rrset.rdtype == kind:
                return [ipaddress.ip_address(item.address) for item in rrset]
        alias = next((r for r in message.answer if r.name == name and r.rdtype == dns.rdatatype.CNAME), None)
        if alias is None:
            break
        name = alias[0].target
    return []


def _server(text: str) -> tuple[str, int]:
    address = parse_address(text)
    if address is not None:
        return str(address), 53
    host, _, port = text.rpartition(":")
    address = parse_address(host)
    if address is None or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not a name server like 10.0.0.53 or 10.0.0.53:5353")
    return str(address), int(port)
