"""Process 1 of a virtual machine: `python -I -S BUNDLE vm`, started by the initramfs in the final root.

It opens the ports to the hypervisor, gives the agent the one of the conversation with the host, and carries out what
the engine orders over the other: above all what a machine has to do that was saved and restored.  It reaps what is
orphaned, and ends the machine when the agent has ended.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from typing import Any, Dict, NoReturn, Optional, Set, Tuple

from podflare.guest.link import Descriptor
from podflare.guest.vm import confine, control, groups, manifest, merging, network, ports, system

_ROUNDS = 16
"""Reads of one direction before everything else gets its turn."""
_AGENT_TIMEOUT_S = 20.0
"""For an order that the agent carries out at once, or after the REPL's short part in it."""
_ALL = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


def main() -> NoReturn:
    """Run the machine until its agent ends.  Never returns."""
    try:
        system.raise_loopback()
        system.set_names("sandbox", "")
        groups.make()
        # Before all that runs in the sandbox, however busy that is; what it starts has no part in this.
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
        channel, orders = ports.find(ports.CHANNEL), ports.find(ports.CONTROL)
        line, agents_line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        confine.start_agent(Descriptor(channel.peer()), agents_line)
        agents_line.close()
        _Init(channel, orders, line).serve()
    except BaseException as exc:  # noqa: BLE001  # the kernel would only say that process 1 is gone
        sys.stderr.write(f"podflare: {type(exc).__name__}: {exc}\n")
    system.stop()
    while True:
        signal.pause()


class _Init:
    """The loop."""

    def __init__(self, channel: ports.Port, orders: ports.Port, line: socket.socket) -> None:
        line.setblocking(False)
        self._channel, self._orders, self._line = channel, orders, line
        self._lines = control.Lines()
        self._answers = b""
        self._comparing: Optional[manifest.Job] = None
        self._merging: Optional[merging.Job] = None
        self._epoll = select.epoll()
        self._watched: Set[Tuple[int, int]] = set()
        wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wake = wake_r
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Until the agent is gone."""
        while self._agent_lives():
            self._pump_comparison()
            self._pump_merge()
            more = self._pump_orders()
            self._watch()
            self._epoll.poll(0 if more else -1)
            self._reap()

    def _agent_lives(self) -> bool:
        """Nothing comes from it unasked, but the end of the line with its own."""
        try:
            return bool(self._line.recv(1))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _watch(self) -> None:
        wanted = {(self._wake, 0), (self._line.fileno(), 0)}
        if self._comparing is not None:
            wanted.add((self._comparing.fd, self._comparing.number))
        if self._merging is not None:
            wanted.add((self._merging.fileno(), -self._merging.number))
        first, *others = self._orders.descriptors()
        wanted |= {(first, 0), *((fd, self._orders.peers) for fd in others)}
        for fd, _ in wanted - self._watched:
            self._epoll.register(fd, _ALL)
        self._watched = wanted  # epoll itself forgets what was closed

    def _pump_orders(self) -> bool:
        for _ in range(_ROUNDS):
            if self._answers:
                taken = self._orders.send(memoryview(self._answers))
                if not taken:
                    return False
                self._answers = self._answers[taken:]
            data = self._orders.receive()
            if not data:
                if data == b"":
                    self._lines.forget()
                return False
            for line in self._lines.feed(data):
                self._answers += self._obey(line)
        return True

    # What is ordered.

    def _obey(self, line: bytes) -> bytes:
        """Carry out one order; its answer, empty if that comes later."""
        number: Any = None
        try:
            if line.startswith(control.MERGE):
                number = control.number_of(line)
                self._pass_on(number, line)
                return b""
            order = json.loads(line)
            number = order["order"]
            if "mark" in order:
                if system.files_are_mapped():
                    os.sync()  # from here on what is written through memory changes a file's times (manifest.py)
                self._ask_agent({"mark": True})
                return control.encode(number, {"marked": True})
            if "restored" in order:
                self._begin_anew(order["restored"])
                return control.encode(number, {"ready": True})
            if "clock" in order:
                system.correct_clock(int(order["clock"]))
                return control.encode(number, {"corrected": True})
            if "rejoined" in order:
                self._renew_channel(order["rejoined"]["token"], reseed=False)
                return control.encode(number, {"ready": True})
            if "limits" in order:
                groups.limit(int(order["limits"]["memory_bytes"]), int(order["limits"]["processes"]))
                return control.encode(number, {"limited": True})
            if "usage" in order:
                return control.encode(number, {"usage": groups.usage()})
            if "freeze" in order:
                groups.freeze()
                return control.encode(number, {"frozen": True})
            if "manifest" in order:
                if self._comparing is not None:
                    self._comparing.give_up()  # who asked for that one waits no more, or would not ask again
                self._comparing = manifest.Job(number, order["manifest"])
                return b""
            raise ValueError("unknown order")
        except (ValueError, TypeError, KeyError, OSError) as exc:
            return control.encode(number, {"failed": f"{type(exc).__name__}: {exc}"})

    def _pass_on(self, number: int, line: bytes) -> None:
        """Have an order of a merge carried out.  It may be long, and is not looked into here."""
        if self._merging is None:
            self._merging = merging.Job()
        self._merging.tell(number, line, last=line.startswith(control.END_OF_MERGE))

    def _begin_anew(self, restored: Dict[str, Any]) -> None:
        """This machine goes on as a copy; what must differ between copies is made different."""
        system.set_clock(int(restored["time"]))
        system.add_entropy(bytes.fromhex(restored["seed"]))
        system.set_names(str(restored.get("hostname", "")), str(restored.get("machine_id", "")))
        environment = network.renew(restored["network"])
        self._renew_channel(restored["token"], reseed=bool(restored.get("reseed", True)), environment=environment)

    def _renew_channel(self, token: str, *, reseed: bool, environment: Optional[Dict[str, str]] = None) -> None:
        """The agent's conversation begins anew with who is at the other end of the port now."""
        renew = {"reseed": reseed, "token": token, "environment": environment or {}}
        self._ask_agent({"renew": renew}, (self._channel.peer(),))

    def _ask_agent(self, order: Dict[str, Any], fds: Tuple[int, ...] = ()) -> None:
        """Raises: OSError or ValueError if it did not do it.  User code may have got hold of it."""
        socket.send_fds(self._line, [json.dumps(order).encode()], fds)
        select.select([self._line], [], [], _AGENT_TIMEOUT_S)
        answer = json.loads(self._line.recv(4096))
        if not isinstance(answer, dict) or "failed" in answer:
            raise ValueError(f"the agent: {str(answer)[:500]}")

    def _pump_comparison(self) -> None:
        if self._comparing is not None:
            result = self._comparing.result()
            if result is not None:
                self._answers += result
                self._comparing = None

    def _pump_merge(self) -> None:
        while self._merging is not None:
            answers = self._merging.hear()
            if answers is None:
                return
            self._answers += answers
            if self._merging.ended:
                self._merging = None

    def _reap(self) -> None:
        try:
            os.read(self._wake, 4096)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except (BlockingIOError, ChildProcessError):
            return
