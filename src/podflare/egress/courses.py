"""Where requests go: through the proxy to the host that each names, or on a secret's host's own connection.

Here requests meet policy and secrets.  What was refused is in the journal, and told to the client in plain words.
"""

from __future__ import annotations

import select
import socket
import ssl
from dataclasses import dataclass
from ipaddress import IPv4Address
from urllib.parse import urlsplit

import anyio
import h11
from anyio.abc import ByteStream
from anyio.streams.tls import TLSStream

from podflare.egress.addresses import Address, is_synthetic, parse_address
from podflare.egress.dial import Dialler, Refused, Target, Unreachable
from podflare.egress.exchange import Denied
from podflare.egress.journal import Journal
from podflare.egress.names import NameTable
from podflare.egress.policy import Policy, normal_name
from podflare.egress.streams import Counted, SocketStream
from podflare.egress.substitution import Headers, Substitution
from podflare.errors import BadRequest
from podflare.wire.egress import ALLOWED, FAILED, REFUSED

TLS_S = 15.0
"""For one side's handshake."""
_HTTP_PORT = 80
_PROXY_HEADERS = (b"proxy-authorization", b"proxy-connection", b"proxy-authenticate", b"host")


@dataclass(frozen=True)
class Surroundings:
    """What a machine's connections have in common."""

    policy: Policy
    names: NameTable
    secrets: Substitution
    dialler: Dialler
    journal: Journal
    upstream_tls: ssl.SSLContext

    def target(self, address: Address, port: int) -> Target:
        """What a connection to this address means.  Raises: Refused if it stood for a name that is forgotten."""
        if isinstance(address, IPv4Address) and is_synthetic(address):
            name = self.names.name_of(address)
            if name is None:
                raise Refused(f"{address} stands for no name that this sandbox has asked for")
            return Target(name, port)
        return Target(address, port)

    def parse_target(self, host: str, port: int) -> Target:
        """What a request for this host means.  Raises: Refused, BadRequest."""
        address = parse_address(host)
        return Target(normal_name(host), port) if address is None else self.target(address, port)

    async def dial(self, protocol: str, target: Target) -> tuple[socket.socket, str]:
        """A connection and the address at its other end; what does not come about is in the journal.

        Raises: Refused, Unreachable.
        """
        try:
            upstream, address = await self.dialler.dial(self.policy, target)
        except Refused as error:
            self.journal.note(protocol, REFUSED, str(error), host=target.name, address=target.address, port=target.port)
            raise
        except Unreachable as error:
            self.journal.note(protocol, FAILED, str(error), host=target.name, address=error.address, port=target.port)
            raise
        return upstream, str(address)


class _Upstream:
    """The connection to the outside that the requests of one client connection use one after the other."""

    def __init__(self) -> None:
        self.target: Target | None = None
        self.stream: ByteStream | None = None
        self._socket: socket.socket | None = None

    def usable(self, target: Target) -> bool:
        """Whether it leads to `target` and has not ended meanwhile (nor said something out of turn)."""
        if self._socket is None or self.target != target:
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def set(self, target: Target, sock: socket.socket, stream: ByteStream) -> ByteStream:
        self.target, self._socket, self.stream = target, sock, stream
        return stream

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self.target, self._socket, self.stream = None, None, None


class ProxyCourse:
    """Requests with a whole URL, as clients send them to a proxy."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._upstream = _Upstream()

    async def open(self, request: h11.Request) -> tuple[h11.Request, ByteStream]:
        target, path, authority = self._parse(request.target)
        headers = [(n, v) for n, v in request.headers.raw_items() if n.lower() not in _PROXY_HEADERS]
        if self._around.secrets.misplaced(request.target, headers, target.name, target.port, secure=False):
            raise _unsafe(self._around.journal, "http", target)
        sent = h11.Request(method=request.method, target=path, headers=[(b"Host", authority), *headers])
        if self._upstream.usable(target):
            assert self._upstream.stream is not None
            return sent, self._upstream.stream
        self._upstream.close()
        try:
            sock, address = await self._around.dial("http", target)
        except Refused as error:
            raise Denied(403, str(error)) from error
        except Unreachable as error:
            raise Denied(502, str(error)) from error
        entry = self._around.journal.note("http", ALLOWED, host=target.name, address=address, port=target.port)
        return sent, self._upstream.set(target, sock, Counted(SocketStream(sock), entry))

    def _parse(self, url: bytes) -> tuple[Target, bytes, bytes]:
        """Where a URL leads: target, path and query, and what its Host header is."""
        try:
            parts = urlsplit(url.decode("ascii"))
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise Denied(400, "the URL of this request cannot be read") from error
        if parts.scheme != "http" or not host:
            raise Denied(400, "this is the proxy of a sandbox: it takes http:// URLs and CONNECT")
        try:
            target = self._around.parse_target(host, _HTTP_PORT if port is None else port)
        except BadRequest as error:
            raise Denied(400, str(error)) from error
        except Refused as error:
            self._around.journal.note("http", REFUSED, str(error), address=host, port=port or _HTTP_PORT)
            raise Denied(403, str(error)) from error
        path = parts.path or "/"
        authority = parts.netloc.rpartition("@")[2]
        return target, (f"{path}?{parts.query}" if parts.query else path).encode(), authority.encode()

    def answered(self, headers: Headers) -> Headers:
        return headers

    async def done(self, *, reusable: bool) -> None:
        if not reusable:
            self._upstream.close()

    def close(self) -> None:
        self._upstream.close()


class SecretCourse:
    """Requests on a connection to a secret's host, each of which may carry placeholders.

    `secure`: over TLS, ended at the gate on both sides; only then values are put in.
    """

    def __init__(
        self, around: Surroundings, target: Target, connected: tuple[socket.socket, str], *, secure: bool
    ) -> None:
        """`connected`: a connection to `target` that was made already, and the address at its other end."""
        self._around = around
        self._target = target
        self._connected: tuple[socket.socket, str] | None = connected
        self._secure = secure
        self._upstream = _Upstream()

    async def open(self, request: h11.Request) -> tuple[h11.Request, ByteStream]:
        around, name, port = self._around, self._target.name, self._target.port
        headers = list(request.headers.raw_items())
        self._check(request)
        if _host(request) is None:
            headers.insert(0, (b"Host", name.encode()))  # HTTP/1.0 does without, and 1.1 is what is sent
        misplaced = around.secrets.misplaced(request.target, headers, name, port, secure=self._secure)
        if misplaced and not self._secure:
            raise _unsafe(around.journal, "http", self._target)
        if misplaced:
            text = "a placeholder stays one: its secret does not go to this host"
            around.journal.note("tls", REFUSED, text, host=name, port=port)
        target = request.target
        if self._secure:
            target, headers = around.secrets.fill(target, headers, name, port)
        try:
            sent = h11.Request(method=request.method, target=target, headers=headers)
        except h11.LocalProtocolError:
            # Not with the library's words: they may quote the value.
            raise Denied(400, "this request cannot be sent with its secrets") from None
        if self._upstream.usable(self._target):
            assert self._upstream.stream is not None
            return sent, self._upstream.stream
        return sent, await self._connect()

    def _check(self, request: h11.Request) -> None:
        """A server with many tenants goes by the Host header, so it must be the one that the value is for."""
        if not self._secure:
            return
        if request.method == b"TRACE":
            raise Denied(405, "TRACE is not possible here: its answer is the request, secrets included")
        if not request.target.startswith(b"/") and request.target != b"*":
            raise Denied(400, "the target of a request must begin with /")
        expected = self._target.name.encode()
        host = _host(request)
        if host is not None and host.lower() not in (expected, b"%s:%d" % (expected, self._target.port)):
            text = f"this connection is for {self._target.name}, and the Host header says otherwise"
            self._around.journal.note("tls", REFUSED, text, host=self._target.name, port=self._target.port)
            raise Denied(421, text)

    async def _connect(self) -> ByteStream:
        self._upstream.close()
        around, target = self._around, self._target
        connected, self._connected = self._connected, None
        if connected is None:
            try:
                connected = await around.dial("tls", target)
            except Refused as error:
                raise Denied(403, str(error)) from error
            except Unreachable as error:
                raise Denied(502, str(error)) from error
        sock, address = connected
        stream: ByteStream = SocketStream(sock)
        self._upstream.set(target, sock, stream)
        if self._secure:
            try:
                with anyio.fail_after(TLS_S):
                    stream = await TLSStream.wrap(
                        stream, hostname=target.name, ssl_context=around.upstream_tls, standard_compatible=False
                    )
            except (OSError, anyio.BrokenResourceError, anyio.EndOfStream) as error:
                self._upstream.close()
                text = f"TLS with {target.name} failed: {_tls_failure(error)}"
                around.journal.note("tls", FAILED, text, host=target.name, address=address, port=target.port)
                raise Denied(502, text) from error
        entry = around.journal.note("tls", ALLOWED, host=target.name, address=address, port=target.port)
        return self._upstream.set(target, sock, Counted(stream, entry))

    def answered(self, headers: Headers) -> Headers:
        return self._around.secrets.hide(headers)

    async def done(self, *, reusable: bool) -> None:
        if not reusable:
            self._upstream.close()

    def close(self) -> None:
        self._upstream.close()
        if self._connected is not None:
            self._connected[0].close()
            self._connected = None


def _host(request: h11.Request) -> bytes | None:
    """The Host header; h11 lets at most one through."""
    return next((value for name, value in request.headers if name == b"host"), None)


def _unsafe(journal: Journal, protocol: str, target: Target) -> Denied:
    text = f"a secret's placeholder was about to go to {target.host} without TLS: use https"
    journal.note(protocol, REFUSED, text, host=target.name, address=target.address, port=target.port)
    return Denied(403, text)


def _tls_failure(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
        if isinstance(cause, ssl.SSLError) and cause.reason:
            return cause.reason
        cause = cause.__cause__
    return str(error) or type(error).__name__
