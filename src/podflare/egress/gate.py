"""The gate's process: `python -m podflare.egress.gate FD`.  Obeys the daemon's orders until it is gone.

Owns the outlets of all machines of one daemon.  Knows no sandboxes, only keys.
"""

from __future__ import annotations

import ipaddress
import mmap
import os
import signal
import socket
import ssl
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import anyio
import dns.rdata
from anyio.abc import TaskGroup

from podflare.egress import flows, orders, privileges
from podflare.egress import journal as journals
from podflare.egress.certificates import Authority
from podflare.egress.courses import Surroundings
from podflare.egress.dial import Dialler
from podflare.egress.journal import Journal
from podflare.egress.names import NameTable
from podflare.egress.outlet import Capacity, Ends, Outlet
from podflare.egress.policy import Policy, SecretSpec
from podflare.egress.questions import Questions
from podflare.egress.resolver import Resolver
from podflare.egress.routes import Routes
from podflare.egress.substitution import Substitution
from podflare.errors import PodflareError

_DESCRIPTORS_A_CONNECTION = 2
_OTHER_DESCRIPTORS = 200


@dataclass(eq=False)
class _Family:
    """What a machine and its forks share.  Lives as long as one of their outlets."""

    names: NameTable
    secrets: Substitution
    authority: Authority | None


class Gate:
    """The orders and whom they concern."""

    def __init__(self, control: socket.socket, most_files: int) -> None:
        self._control = control
        self._outlets: dict[str, tuple[Outlet, _Family]] = {}
        self._families: WeakValueDictionary[str, _Family] = WeakValueDictionary()
        self._capacity = Capacity(max(most_files - _OTHER_DESCRIPTORS, 0) // _DESCRIPTORS_A_CONNECTION)
        self._tls = ssl.create_default_context()
        self._tls.set_alpn_protocols(["http/1.1"])
        self._private: tuple[Any, ...] = ()
        self._resolver = Resolver(())
        self._dialler = Dialler(self._resolver, Routes())

    async def run(self) -> None:
        """Obey until the daemon ends the conversation."""
        async with anyio.create_task_group() as group:
            while True:
                await anyio.wait_readable(self._control)
                try:
                    received = orders.receive(self._control)
                except BlockingIOError:
                    continue
                if received is None:
                    group.cancel_scope.cancel()
                    return
                number, body, fds = received
                try:
                    await orders.send(self._control, number, await self._obey(group, body, fds))
                except OSError:
                    pass  # the daemon is gone, which the next look tells

    async def _obey(self, group: TaskGroup, body: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        try:
            if body["op"] == "start":
                self._start(body)
            elif body["op"] == "attach":
                await self._attach(group, body, fds)
            elif body["op"] == "detach":
                found = self._outlets.pop(body["key"], None)
                if found is not None:
                    found[0].close()
            elif body["op"] == "journal":
                journal = self._outlets[body["key"]][0].journal
                return {"entries": [entry.to_json() for entry in journal.entries()], "dropped": journal.dropped}
            elif body["op"] != "alive":
                raise KeyError(body["op"])
            return {}
        except (PodflareError, OSError, LookupError, TypeError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            for fd in fds:
                os.close(fd)

    def _start(self, body: dict[str, Any]) -> None:
        self._private = tuple(ipaddress.ip_network(text) for text in body["private"])
        self._resolver = Resolver(tuple(body["resolvers"]))
        self._dialler = Dialler(self._resolver, Routes())
        if body["authorities"]:
            self._tls.load_verify_locations(cadata=body["authorities"])

    async def _attach(self, group: TaskGroup, body: dict[str, Any], fds: list[int]) -> None:
        key = body["key"]
        if key in self._outlets:
            return  # told twice: once for all machines at a start, once for this one
        told = body["family"]
        secrets = {name: SecretSpec(value, tuple(hosts)) for name, value, hosts in told["secrets"]}
        egress = told["egress"] if told["egress"] is True else tuple(told["egress"])
        policy = Policy.parse(egress, private=self._private).with_secrets(secrets)
        family = self._families.get(told["name"])
        if family is None:
            authority = Authority(told["ca"].encode(), told["ca_key"].encode()) if told["ca"] else None
            family = _Family(NameTable(told["name"]), Substitution(list(secrets.items())), authority)
            self._families[told["name"]] = family
        journal = Journal(time.time, _journal_memory(fds[0]))
        around = Surroundings(policy, family.names, family.secrets, self._dialler, journal, self._tls)
        questions = Questions(policy, family.names, family.secrets, self._resolver, journal)
        outlet = Outlet(around, questions, family.authority, self._capacity)
        memory, *ends = fds
        fds[:] = [memory]  # the others are the outlet's from here on
        run = partial(outlet.run, Ends(*ends), memory, again=bool(body["again"]), lost=bool(body["lost"]))
        await group.start(run)
        self._outlets[key] = outlet, family


def _journal_memory(memory_fd: int) -> memoryview:
    """Where a machine's journal lies: behind its connections."""
    os.ftruncate(memory_fd, flows.MEMORY_BYTES + journals.MEMORY_BYTES)
    return memoryview(mmap.mmap(memory_fd, journals.MEMORY_BYTES, offset=flows.MEMORY_BYTES))


def main(fd: int) -> None:
    """Serve the daemon at the other end of `fd`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to the daemon, too, which ends the gate
    control = socket.socket(fileno=fd)
    control.setblocking(False)
    os.set_inheritable(fd, False)
    # What is imported late could be out of reach of the id that the gate takes.
    dns.rdata.load_all_types()  # type: ignore[no-untyped-call]  # the library's has no annotation
    most_files = privileges.open_many_files()
    privileges.give_up()
    anyio.run(Gate(control, most_files).run, backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main(int(sys.argv[1]))
