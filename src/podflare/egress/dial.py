"""Opens connections to the outside: every address is looked at by the policy and the kernel, then dialled as such."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from dataclasses import dataclass

import anyio

from podflare.egress.addresses import Address, plain
from podflare.egress.policy import Policy
from podflare.egress.resolver import Resolver, Unresolved
from podflare.egress.routes import Routes

TRY_S = 5.0
TOTAL_S = 12.0
"""Below the time after which most clients give up by themselves."""
_MAX_TRIES = 4
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 20), (socket.TCP_KEEPCNT, 6))


@dataclass(frozen=True)
class Target:
    """Where a connection is to go: to a name or an address."""

    host: str | Address
    port: int

    @property
    def name(self) -> str:
        return self.host if isinstance(self.host, str) else ""

    @property
    def address(self) -> str:
        return "" if isinstance(self.host, str) else str(self.host)


class Refused(Exception):
    """The policy does not allow it.  The text is for the user."""


class Unreachable(Exception):
    """It is allowed, but the other side does not answer.

    Attributes:
        by_reset: it, or a machine on the way, said no, rather than nothing.
        address: what was tried.
    """

    def __init__(self, text: str, *, by_reset: bool = False, address: str = "") -> None:
        super().__init__(text)
        self.by_reset = by_reset
        self.address = address


class Dialler:
    """Opens connections for all machines."""

    def __init__(self, resolver: Resolver, routes: Routes) -> None:
        self._resolver = resolver
        self._routes = routes

    def check(self, policy: Policy, target: Target) -> None:
        """What can be said before anything is asked.  Raises: Refused."""
        if isinstance(target.host, str):
            why = policy.refuses_name(target.host, target.port)
        else:
            why = self._refuses(policy, target.host, target.port, named=False)
        if why:
            raise Refused(why)

    async def dial(self, policy: Policy, target: Target) -> tuple[socket.socket, Address]:
        """A connected socket, the caller's, and the address at its other end.

        Raises: Refused, Unreachable.  If cancelled: nothing is open.
        """
        self.check(policy, target)
        try:
            with anyio.fail_after(TOTAL_S):
                if not isinstance(target.host, str):
                    return await self._try([target.host], target.port), target.host
                return await self._dial_name(policy, target.host, target.port)
        except TimeoutError as error:
            raise Unreachable(f"no answer within {TOTAL_S:g} s", address=target.address) from error

    async def _dial_name(self, policy: Policy, name: str, port: int) -> tuple[socket.socket, Address]:
        try:
            found = await self._resolver.addresses(name)
        except Unresolved as error:
            raise Unreachable(str(error)) from error
        refusals = [self._refuses(policy, address, port, named=True) for address in found]
        allowed = [address for address, why in zip(found, refusals, strict=True) if not why]
        if not allowed:
            raise Refused(f"{name} resolves to what is not allowed: {refusals[0]}")
        failure: Unreachable | None = None
        for address in allowed[:_MAX_TRIES]:
            try:
                return await self._try([address], port), address
            except Unreachable as error:
                failure = failure or error
        assert failure is not None
        raise failure

    def _refuses(self, policy: Policy, address: Address, port: int, *, named: bool) -> str:
        if why := policy.refuses_address(address, port, named=named):
            return why
        try:
            # Of an address within an address the kernel's tables know nothing, and deliver to it all the same.
            own = self._routes.is_own(address) or self._routes.is_own(plain(address))
        except OSError as error:
            return f"{address} could not be checked: {error}"
        return f"{address} is an address of the daemon's machine: no sandbox may reach it" if own else ""

    async def _try(self, addresses: list[Address], port: int) -> socket.socket:
        (address,) = addresses
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
            with anyio.fail_after(TRY_S):
                await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
        except TimeoutError as error:
            sock.close()
            raise Unreachable(f"{address} port {port} does not answer", address=str(address)) from error
        except OSError as error:
            sock.close()
            text = f"{address} port {port}: {os.strerror(error.errno or errno.EIO)}"
            by_reset = error.errno in (errno.ECONNREFUSED, errno.ECONNRESET)
            raise Unreachable(text, by_reset=by_reset, address=str(address)) from error
        except BaseException:
            sock.close()
            raise
        return sock
