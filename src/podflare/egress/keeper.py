"""The daemon's side of the gate: starts it, tells it about machines, starts it again if it died.

Knows machines only by a key and some descriptors.  Keeps what a new gate needs, secrets and keys included, in memory.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import secrets as randomness
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from podflare.egress import orders
from podflare.egress.addresses import Network
from podflare.egress.flows import MEMORY_BYTES
from podflare.egress.journal import KEPT_ENTRIES, entry_from_json
from podflare.egress.policy import Policy, SecretSpec
from podflare.errors import DeadlineExceeded, EgressUnavailable, MachineFailed, ProtocolError
from podflare.wire.egress import EgressEntry

_BACKOFF_S = (0.0, 0.1, 0.5, 2.0, 5.0)
"""Before each further start of a gate that keeps dying; the last one again and again."""
_JOURNAL_TRIES = 3
_STABLE_S = 30.0
"""A gate that lived so long did not die of its start."""
_MAX_CA_BYTES = 4 * 1024 * 1024
_log = logging.getLogger("podflare.egress")


@dataclass(frozen=True)
class GateSettings:
    """What the daemon's operator decides about the network of sandboxes.

    Attributes:
        private: networks that are not public and that policies may name all the same.
        resolvers: name servers, each `address` or `address:port` (`[v6]:port`); none: those of /etc/resolv.conf.
        ca_file: certificates, in PEM, that upstream TLS of secrets' hosts may be signed by, besides the system's.
        command: what starts the gate; the number of its control descriptor is added.
        answer_timeout_s: a gate that answers no order within it is killed and replaced; holds its imports, on a busy
            machine.
        look_every_s: so often it is asked whether it answers, for one that hangs while nobody wants anything of it.
    """

    private: tuple[Network, ...] = ()
    resolvers: tuple[str, ...] = ()
    ca_file: Path | None = None
    command: tuple[str, ...] = (sys.executable, "-m", "podflare.egress.gate")
    answer_timeout_s: float = 20.0
    look_every_s: float = 10.0


@dataclass(frozen=True)
class Attached:
    """What a machine's environment needs.

    Attributes:
        ca_pem: the authority that the machine's programs must trust; None without secrets.
        placeholders: variable -> what stands for its value inside.
    """

    ca_pem: bytes | None
    placeholders: dict[str, str]


@dataclass(frozen=True)
class _Family:
    """What a machine and all its forks have in common."""

    name: str
    policy: Policy
    secrets: Mapping[str, SecretSpec] = field(repr=False)
    placeholders: dict[str, str]
    ca_pem: bytes
    ca_key: bytes = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "egress": self.policy.entries,
            "secrets": [[self.placeholders[n], s.value, s.hosts] for n, s in self.secrets.items()],
            "ca": self.ca_pem.decode(),
            "ca_key": self.ca_key.decode(),
        }


@dataclass
class _Machine:
    family: _Family
    fds: list[int] = field(default_factory=list)
    """Memory of open connections, tun, listener and, of a virtual machine, frames; empty before the attachment."""
    inherited: bool = False
    """Its memory names connections that were its parent's when it was copied: nobody carries them."""

    def take(self, tun: int, listener: int, frames: int | None) -> None:
        """Duplicate its descriptors."""
        self.fds = [os.memfd_create("podflare-connections")]
        self.fds += [os.dup(fd) for fd in (tun, listener, frames) if fd is not None]

    def inherit(self, parent: _Machine) -> None:
        """Take over which connections the parent has open."""
        memory = parent.fds[0]
        os.pwrite(self.fds[0], os.pread(memory, MEMORY_BYTES, 0), 0)
        self.inherited = True

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


def what_is_missing() -> str:
    """Which packages a gate lacks here, and what to do; empty if none."""
    if all(importlib.util.find_spec(name) is not None for name in ("dns", "cryptography", "h11")):
        return ""
    return "egress needs packages that are not installed: pip install 'podflare[egress]'"


class GateKeeper:
    """One per daemon.  `aclose` ends the gate; attached descriptors are copies and closed with it."""

    def __init__(self, settings: GateSettings) -> None:
        self._settings = settings
        self._machines: dict[str, _Machine] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._starting = asyncio.Lock()
        self._reviving: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._deaths = 0
        self._started_at = 0.0
        self._closed = False

    @property
    def gate_pid(self) -> int | None:
        """The gate's process id; None while none runs."""
        return self._process.pid if self._process is not None else None

    async def prepare(self, key: str, policy: Policy, secrets: Mapping[str, SecretSpec]) -> Attached:
        """Make what the machine `key` needs in its environment before it exists.

        Raises: EgressUnavailable if the packages of the extra `egress` are missing; MachineFailed if the key is in use.
        """
        if missing := what_is_missing():
            raise EgressUnavailable(missing)
        if key in self._machines:
            raise MachineFailed(f"the network {key} exists already")
        placeholders = {name: f"podflare-secret-{randomness.token_hex(16)}" for name in secrets}
        self._machines[key] = machine = _Machine(_Family(key, policy, dict(secrets), placeholders, b"", b""))
        if secrets:
            try:
                ca_pem, ca_key = await anyio.to_thread.run_sync(_make_authority)
            except BaseException:
                del self._machines[key]
                raise
            machine.family = _Family(key, policy, dict(secrets), placeholders, ca_pem, ca_key)
        return Attached(machine.family.ca_pem or None, dict(placeholders))

    async def attach(self, key: str, tun_fd: int, listener_fd: int, frames_fd: int | None = None) -> None:
        """Give the prepared machine `key` its network.  The descriptors are duplicated.

        Args: frames_fd: of a virtual machine's interface, each packet a frame; its tun leads to its listener alone.
        Raises: EgressUnavailable if the gate does not start; DeadlineExceeded if it does not answer; MachineFailed.
            Then, and if cancelled, the key is prepared as before.
        """
        machine = self._machines.get(key)
        if machine is None or machine.fds:
            raise MachineFailed(f"the network {key} was not prepared, or has a machine already")
        machine.take(tun_fd, listener_fd, frames_fd)
        await self._introduce(key, machine)

    async def _introduce(self, key: str, machine: _Machine) -> None:
        try:
            while True:
                if await self._ensure():
                    return  # a gate that has just started was told about every machine
                try:
                    await self._attach(key, machine, again=False)
                    return
                except ConnectionError:
                    continue  # died meanwhile; a gate that cannot be started at all ends this
        except BaseException:
            machine.close()
            raise

    async def branch(self, key: str, like: str, tun_fd: int, listener_fd: int, frames_fd: int | None = None) -> None:
        """Give a fork of the machine `like` its network: same policy, secrets, placeholders, authority and names.

        A virtual machine's fork has its parent's connections in its kernel; they end, for nobody is at their other end.
        Raises: as `attach`; then, and if cancelled, nothing of `key` is kept.  `like` must not be detached yet.
        """
        source = self._machines.get(like)
        if source is None or key in self._machines:
            raise MachineFailed(f"the network {like} has ended, or {key} exists already")
        self._machines[key] = machine = _Machine(source.family)
        try:
            machine.take(tun_fd, listener_fd, frames_fd)
            if frames_fd is not None and source.fds:
                machine.inherit(source)
            await self._introduce(key, machine)
        except BaseException:
            self._machines.pop(key, None)
            raise

    async def detach(self, key: str) -> None:
        """End the machine's network; its connections die at once.  Idempotent, and undoes a mere `prepare`."""
        machine = self._machines.pop(key, None)
        if machine is None:
            return
        told = bool(machine.fds)
        machine.close()
        if told and self._control is not None:
            try:
                await self._order({"op": "detach", "key": key})
            except (ConnectionError, DeadlineExceeded) as error:
                _log.warning("the gate was not told that %s ended: %s", key, error)  # one that died needs not be told

    async def journal(self, key: str) -> tuple[list[EgressEntry], int]:
        """What the machine tried, oldest first, and how many older entries were dropped.

        Raises: MachineFailed if `key` has no network; DeadlineExceeded, ProtocolError by the gate's fault.
        """
        machine = self._machines.get(key)
        if machine is None:
            raise MachineFailed(f"there is no network {key}")
        if not machine.fds:
            return [], 0
        answer = await self._ask_for_journal(key)
        entries, dropped = answer.get("entries"), answer.get("dropped")
        if not isinstance(entries, list) or len(entries) > KEPT_ENTRIES or not isinstance(dropped, int):
            raise ProtocolError("the gate's journal is none")
        try:
            return [entry_from_json(one) for one in entries], dropped
        except ValueError as error:
            raise ProtocolError("the gate's journal is none") from error

    async def _ask_for_journal(self, key: str) -> dict[str, Any]:
        for _ in range(_JOURNAL_TRIES):
            await self._ensure()
            try:
                return await self._order({"op": "journal", "key": key})
            except ConnectionError:
                continue  # the next gate has it, too
        raise MachineFailed("the gate dies again and again; what sandboxes tried cannot be told now")

    async def aclose(self) -> None:
        """End the gate and with it every connection.  Idempotent."""
        self._closed = True
        for task in (self._reviving, self._watching):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        self._drop_gate()
        for machine in self._machines.values():
            machine.close()
        self._machines.clear()

    # The process

    async def _ensure(self) -> bool:
        """Have a gate that knows every machine.  Returns whether it was started for this.

        Raises: EgressUnavailable if it cannot be started; DeadlineExceeded.  If raised or cancelled none runs.
        """
        async with self._starting:
            if self._control is not None:
                return False
            if self._closed:
                raise EgressUnavailable("the gate is closed")
            loop = asyncio.get_running_loop()
            await asyncio.sleep(_BACKOFF_S[min(self._deaths, len(_BACKOFF_S) - 1)])
            authorities = await anyio.to_thread.run_sync(_read_authorities, self._settings.ca_file)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
            ours.setblocking(False)
            with theirs:
                try:
                    self._process = _start(self._settings.command, theirs)
                except OSError as error:
                    ours.close()
                    raise EgressUnavailable(f"the gate could not be started: {error}") from error
            self._control, self._started_at = ours, loop.time()
            loop.add_reader(ours, self._on_answer, ours)
            start = {
                "op": "start",
                "private": [str(network) for network in self._settings.private],
                "resolvers": list(self._settings.resolvers),
                "authorities": authorities,
            }
            try:
                await self._order(start)
                for key, machine in list(self._machines.items()):
                    if machine.fds:
                        await self._attach(key, machine, again=self._deaths > 0)
                if self._watching is None:
                    self._watching = loop.create_task(self._watch())
            except BaseException as error:
                self._drop_gate()
                self._deaths += 1
                if isinstance(error, ConnectionError):
                    raise EgressUnavailable(
                        "the gate died while it started; its last words are in the daemon's log"
                    ) from error
                raise
            return True

    async def _watch(self) -> None:
        """Ask each gate now and then whether it answers; an order that fails has it replaced."""
        while True:
            await asyncio.sleep(self._settings.look_every_s)
            try:
                await self._order({"op": "alive"})
            except (ConnectionError, DeadlineExceeded) as error:
                _log.info("a look at the gate: %s", error)

    async def _revive(self) -> None:
        """Start a gate again for machines that have lost theirs, for as long as it takes."""
        while any(machine.fds for machine in self._machines.values()):
            try:
                await self._ensure()
                return
            except (EgressUnavailable, MachineFailed, DeadlineExceeded, OSError) as error:
                _log.error("the gate does not start again: %s", error)

    async def _attach(self, key: str, machine: _Machine, *, again: bool) -> None:
        lost = again or machine.inherited
        body = {"op": "attach", "key": key, "family": machine.family.to_json(), "again": again, "lost": lost}
        await self._order(body, machine.fds)
        machine.inherited = False

    async def _order(self, body: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """Raises: ConnectionError if the gate dies first; MachineFailed if it refuses; DeadlineExceeded."""
        control = self._control
        if control is None:
            raise ConnectionError("no gate")
        self._number += 1
        number = self._number
        answer = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            with anyio.fail_after(self._settings.answer_timeout_s):
                await orders.send(control, number, body, fds)
                result: dict[str, Any] = await answer
        except TimeoutError as error:
            if control is self._control:
                self._on_death()
            raise DeadlineExceeded(f"the gate did not answer within {self._settings.answer_timeout_s:g} s") from error
        except OSError as error:
            self._answers.pop(number, None)  # nobody waits for it
            if control is self._control:
                self._on_death()  # sending finds it sooner than the loop does, and who tries again is to get a new one
            raise ConnectionError("the gate is gone") from error
        finally:
            self._answers.pop(number, None)
        if "error" in result:
            raise MachineFailed(f"the gate refused: {str(result['error'])[:300]}")
        return result

    def _on_answer(self, control: socket.socket) -> None:
        try:
            received = orders.receive(control)
        except BlockingIOError:
            return
        except ProtocolError as error:
            _log.error("the gate is ended: %s", error)
            received = None
        if received is None:
            self._on_death()
            return
        number, body, fds = received
        for fd in fds:
            os.close(fd)
        answer = self._answers.get(number)
        if answer is not None and not answer.done():
            answer.set_result(body)

    def _on_death(self) -> None:
        stable = asyncio.get_running_loop().time() - self._started_at > _STABLE_S
        self._drop_gate()
        self._deaths = 1 if stable else self._deaths + 1
        if not self._closed and (self._reviving is None or self._reviving.done()):
            _log.error("the gate has ended; it starts again")
            self._reviving = asyncio.get_running_loop().create_task(self._revive())

    def _drop_gate(self) -> None:
        control, self._control = self._control, None
        process, self._process = self._process, None
        if control is not None:
            asyncio.get_running_loop().remove_reader(control)
            control.close()
        if process is not None:
            process.kill()  # it holds nothing that must be saved
            process.wait(10)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionError("the gate died"))


def _start(command: tuple[str, ...], control: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*command, str(control.fileno())],
        pass_fds=[control.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={name: os.environ[name] for name in ("PATH", "PYTHONPATH", "PYTHONHOME", "LANG") if name in os.environ},
        cwd="/",
    )


def _make_authority() -> tuple[bytes, bytes]:
    # Imported here: only secrets need it, and the daemon starts without the extra.
    from podflare.egress.certificates import make_authority

    return make_authority()


def _read_authorities(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CA_BYTES + 1)
        if len(data) > _MAX_CA_BYTES:
            raise ValueError("too large")
        return data.decode("ascii")
    except (OSError, ValueError) as error:
        raise EgressUnavailable(f"PODFLARE_EGRESS_CA: {path} cannot be used: {error}") from error
