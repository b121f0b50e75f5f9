"""The network of one machine, as the gate holds it.  Decides, with its policy, what becomes of every connection."""

from __future__ import annotations

import os
import socket
import struct
import sys
import traceback
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address
from typing import NamedTuple

import anyio
from anyio.abc import TaskGroup, TaskStatus

from podflare.egress.addresses import DNS_PORT, GATE
from podflare.egress.certificates import Authority
from podflare.egress.courses import TLS_S, ProxyCourse, SecretCourse, Surroundings
from podflare.egress.dial import Refused, Target, Unreachable
from podflare.egress.exchange import Exchange
from podflare.egress.flows import MAX_LIVE, Flow, Flows
from podflare.egress.questions import MAX_PENDING, Questions
from podflare.egress.reflector import Reflector
from podflare.egress.relay import relay, reset
from podflare.egress.streams import SocketStream
from podflare.errors import BadRequest
from podflare.wire.egress import ALLOWED, FAILED, REFUSED
from podflare.wire.uplink import PROXY_PORT

ACCEPT_S = 15.0
"""From the first packet passed on until the machine's kernel has the connection: it tries again after 1, 3 and 7 s."""
_QUESTIONS_S = 30.0
_INSIDE_BUFFER = 1024 * 1024
"""Towards a machine, which is no distance: what a program that does not read holds of the kernel's memory."""
_WEB_PORT = 80
_MAX_BUGS = 20


class Capacity:
    """Connections that the gate has descriptors for, all machines together."""

    def __init__(self, most: int) -> None:
        self.free = most


class Ends(NamedTuple):
    """Descriptors of one machine's network; see engines.base.UplinkEnds."""

    tun: int
    listener: int
    frames: int | None = None


class Outlet:
    """One machine's network.  `run` is its life; `close` may come at any time."""

    def __init__(
        self, around: Surroundings, questions: Questions, authority: Authority | None, capacity: Capacity
    ) -> None:
        self._around = around
        self._questions = questions
        self._authority = authority
        self._capacity = capacity
        self._asking = 0
        self._bugs = 0
        self._group: TaskGroup | None = None
        self._flows: Flows | None = None
        self._reflector: Reflector | None = None
        self.journal = around.journal

    async def run(self, ends: Ends, memory: int, *, again: bool, lost: bool, task_status: TaskStatus[None]) -> None:
        """Serve until `close`.  Owns the ends; `memory` stays the caller's until the status is reported.

        Args:
            again: a gate before this one served the machine.
            lost: it has connections, those of `memory`, that nobody carries any more.
        Raises: OSError if the descriptors are not what they should be.
        """
        inside = socket.socket(fileno=ends.listener)
        try:
            self._flows = Flows(inside.getsockname()[1], memory)
            self._reflector = Reflector(ends.tun, inside, ends.frames, self._flows, self)
            async with anyio.create_task_group() as self._group:
                if lost:
                    self._reflector.end_lost()
                if again:
                    self.journal.note("gate", FAILED, "the gate was started anew: open connections were ended")
                task_status.started()
                await anyio.sleep_forever()
        finally:
            if self._reflector is not None:
                self._reflector.close()
            else:
                inside.close()
                for fd in (ends.tun, ends.frames):
                    if fd is not None:
                        os.close(fd)
            if self._flows is not None:
                self._flows.close()

    def close(self) -> None:
        """End every connection at once.  Idempotent."""
        if self._reflector is not None:
            self._reflector.close()
        if self._group is not None:
            self._group.cancel_scope.cancel()

    # What the reflector asks

    def on_connection(self, flow: Flow) -> bool:
        _, number, port = flow.key
        address = IPv4Address(number)
        if address == GATE and port in (PROXY_PORT, DNS_PORT):
            serve = self._serve_proxy if port == PROXY_PORT else self._serve_names
            return self._start(flow, serve)
        target = Target(address, port)
        try:
            target = self._around.target(address, port)
            self._around.dialler.check(self._around.policy, target)
        except Refused as error:
            self.journal.note("tcp", REFUSED, str(error), host=target.name, address=target.address, port=port)
            return False
        return self._start(flow, lambda one: self._carry(one, target))

    def on_overflow(self, address: int, port: int) -> None:
        reason = f"more than {MAX_LIVE} connections at a time"
        self.journal.note("tcp", REFUSED, reason, address=str(IPv4Address(address)), port=port)

    def on_question(self, payload: bytes, source_port: int, address: int) -> None:
        if self._asking < 2 * MAX_PENDING and self._group is not None:
            self._asking += 1
            self._group.start_soon(self._answer, payload, source_port, address)

    def on_refused(self, protocol: str, address: int, port: int) -> None:
        reason = "sandboxes speak TCP, and ask for names, only"
        self.journal.note(protocol, REFUSED, reason, address=str(IPv4Address(address)), port=port)

    def on_broken(self) -> None:
        self.close()

    # Connections

    def _start(self, flow: Flow, serve: Callable[[Flow], Awaitable[None]]) -> bool:
        if self._capacity.free <= 0:
            self.journal.note("tcp", REFUSED, "the gate has as many connections as it can", port=flow.key[2])
            return False
        assert self._group is not None
        self._capacity.free -= 1
        self._group.start_soon(self._live, flow, serve)
        return True

    async def _live(self, flow: Flow, serve: Callable[[Flow], Awaitable[None]]) -> None:
        """The life of one connection, whatever it comes to."""
        try:
            await serve(flow)
        except Exception:  # noqa: BLE001  # a bug that one connection meets must not end all others
            self._tell_bug()
        finally:
            self._capacity.free += 1
            if flow.accepted.done() and not flow.accepted.cancelled():
                flow.accepted.result().close()
            flow.accepted.cancel()
            assert self._flows is not None
            self._flows.end(flow, anyio.current_time())

    def _tell_bug(self) -> None:
        self._bugs += 1
        if self._bugs <= _MAX_BUGS:
            traceback.print_exc(file=sys.stderr)

    async def _let_in(self, flow: Flow) -> socket.socket | None:
        """The machine's end of the connection; None if the program has given up."""
        assert self._reflector is not None
        self._reflector.let_in(flow)
        with anyio.move_on_after(ACCEPT_S):
            inside = await flow.accepted
            inside.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            inside.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _INSIDE_BUFFER)
            return inside
        return None

    async def _carry(self, flow: Flow, target: Target) -> None:
        assert self._reflector is not None
        try:
            outside, address = await self._around.dial("tcp", target)
        except Refused:
            self._reflector.refuse(flow, unreachable=False)
            return
        except Unreachable as error:
            self._reflector.refuse(flow, unreachable=not error.by_reset)
            return
        try:
            inside = await self._let_in(flow)
            if inside is not None:
                await self._join(inside, b"", "tcp", target, (outside, address))
        finally:
            outside.close()

    async def _join(
        self, inside: socket.socket, first: bytes, protocol: str, target: Target, there: tuple[socket.socket, str]
    ) -> None:
        """Both ends are there: look into what goes through only where a secret may be."""
        secrets = self._around.secrets
        if target.name and secrets.ends_tls(target.name, target.port):
            await self._end_tls(inside, first, target, there)
        elif target.name and target.port == _WEB_PORT and secrets.knows(target.name):
            await self._look(SocketStream(inside, first), target, there, secure=False)
        else:
            entry = self.journal.note(protocol, ALLOWED, host=target.name, address=there[1], port=target.port)
            await relay(inside, there[0], entry, first)

    async def _end_tls(
        self, inside: socket.socket, first: bytes, target: Target, there: tuple[socket.socket, str]
    ) -> None:
        assert self._authority is not None
        try:
            with anyio.fail_after(TLS_S):
                client = await self._authority.serve_tls(SocketStream(inside, first), target.name)
        except (OSError, anyio.BrokenResourceError, anyio.EndOfStream) as error:
            text = f"TLS failed: {error or type(error).__name__} (does the program trust the sandbox's authority?)"
            self.journal.note("tls", FAILED, text, host=target.name, address=there[1], port=target.port)
            reset(inside)
            return
        await self._look(client, target, there, secure=True)

    async def _look(
        self, client: anyio.abc.ByteStream, target: Target, there: tuple[socket.socket, str], *, secure: bool
    ) -> None:
        course = SecretCourse(self._around, target, there, secure=secure)
        try:
            exchange = Exchange(client, course)
            if await exchange.run() is not None:
                await exchange.refuse(405, "this is no proxy")
        finally:
            course.close()

    # The gate's own services

    async def _serve_proxy(self, flow: Flow) -> None:
        inside = await self._let_in(flow)
        if inside is None:
            return
        course = ProxyCourse(self._around)
        try:
            exchange = Exchange(SocketStream(inside), course)
            connect = await exchange.run()
        finally:
            course.close()
        if connect is not None:
            request, first = connect
            await self._tunnel(inside, exchange, request.target, first)

    async def _tunnel(self, inside: socket.socket, exchange: Exchange, wanted: bytes, first: bytes) -> None:
        host, _, port = wanted.decode("ascii", "replace").rpartition(":")
        if not port.isdecimal() or not 0 < int(port) < 65536:
            await exchange.refuse(400, "CONNECT needs host:port")
            return
        try:
            target = self._around.parse_target(host, int(port))
        except (BadRequest, Refused) as error:
            self.journal.note("connect", REFUSED, str(error), host=host, port=int(port))
            await exchange.refuse(403, str(error))
            return
        try:
            outside, address = await self._around.dial("connect", target)
        except Refused as error:
            await exchange.refuse(403, str(error))
            return
        except Unreachable as error:
            await exchange.refuse(502, str(error))
            return
        try:
            await SocketStream(inside).send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await self._join(inside, first, "connect", target, (outside, address))
        except anyio.BrokenResourceError:
            pass  # the program is gone
        finally:
            outside.close()

    async def _answer(self, payload: bytes, source_port: int, address: int) -> None:
        try:
            answer = await self._questions.answer(payload, stream=False)
            if answer is not None and self._reflector is not None:
                self._reflector.answer_question(answer, source_port, address)
        except Exception:  # noqa: BLE001  # as for connections
            self._tell_bug()
        finally:
            self._asking -= 1

    async def _serve_names(self, flow: Flow) -> None:
        """Questions over TCP, one after the other."""
        inside = await self._let_in(flow)
        if inside is None:
            return
        stream = SocketStream(inside)
        buffer = b""
        try:
            while True:
                while len(buffer) < 2 or len(buffer) < 2 + struct.unpack_from(">H", buffer)[0]:
                    with anyio.fail_after(_QUESTIONS_S):
                        buffer += await stream.receive(65536)
                (length,) = struct.unpack_from(">H", buffer)
                question, buffer = buffer[2 : 2 + length], buffer[2 + length :]
                answer = await self._questions.answer(question, stream=True)
                if answer is None:
                    return
                await stream.send(struct.pack(">H", len(answer)) + answer)
        except (OSError, anyio.BrokenResourceError, anyio.EndOfStream):
            pass  # the program has ended, or says nothing
