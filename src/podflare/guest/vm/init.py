"""Process 1 of a virtual machine: `python -I -S BUNDLE vm`, started by the initramfs in the final root.

It stands between the agent and the hypervisor's ports, because those may lose their peer and get another one when
the machine is saved and restored, which the agent does not notice.  It carries out what the engine orders, reaps
what is orphaned, and ends the machine when the agent has ended.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from typing import NoReturn, Set, Tuple

from podflare.guest.vm import confine, control, ports, system

_ROUNDS = 16
"""Reads of one direction before everything else gets its turn."""
_ALL = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


def main() -> NoReturn:
    """Run the machine until its agent ends.  Never returns."""
    try:
        system.raise_loopback()
        system.set_names("sandbox", "")
        channel, orders = ports.find(ports.CHANNEL), ports.find(ports.CONTROL)
        ours, agents = socket.socketpair()
        confine.start_agent(agents)
        agents.close()
        _Init(channel, orders, ours).serve()
    except BaseException as exc:  # noqa: BLE001  # the kernel would only say that process 1 is gone
        sys.stderr.write(f"podflare: {type(exc).__name__}: {exc}\n")
    system.stop()
    while True:
        signal.pause()


class _Init:
    """The loop."""

    def __init__(self, channel: ports.Port, orders: ports.Port, agent: socket.socket) -> None:
        agent.setblocking(False)
        self._channel, self._orders, self._agent = channel, orders, agent
        self._lines = control.Lines()
        self._answers = b""
        # Read from one side and not yet taken by the other.
        self._to_agent = memoryview(b"")
        self._to_host = memoryview(b"")
        self._epoll = select.epoll()
        self._watched: Set[Tuple[int, int]] = set()
        wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wake = wake_r
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Until the agent is gone."""
        try:
            while True:
                self._watch()
                more = self._pump_in() | self._pump_out() | self._pump_orders()
                self._epoll.poll(0 if more else -1)
                self._reap()
        except EOFError:
            return

    def _watch(self) -> None:
        wanted = {(self._wake, 0), (self._agent.fileno(), 0)}
        for port in (self._channel, self._orders):
            first, *others = port.descriptors()
            wanted |= {(first, 0), *((fd, port.peers) for fd in others)}
        for fd, _ in wanted - self._watched:
            self._epoll.register(fd, _ALL)
        self._watched = wanted  # epoll itself forgets what was closed

    def _pump_in(self) -> bool:
        """From the host to the agent.  True if there may be more right now."""
        for _ in range(_ROUNDS):
            if not self._to_agent:
                data = self._channel.receive()
                if not data:
                    return False
                self._to_agent = memoryview(data)
            try:
                self._to_agent = self._to_agent[self._agent.send(self._to_agent) :]
            except BlockingIOError:
                return False
            except OSError as exc:
                raise EOFError from exc
        return True

    def _pump_out(self) -> bool:
        """From the agent to the host.  Raises: EOFError once the agent has closed its end."""
        for _ in range(_ROUNDS):
            if not self._to_host:
                try:
                    data = self._agent.recv(ports.READ_BYTES)
                except BlockingIOError:
                    return False
                except OSError as exc:
                    raise EOFError from exc
                if not data:
                    raise EOFError
                self._to_host = memoryview(data)
            taken = self._channel.send(self._to_host)
            if not taken:
                return False
            self._to_host = self._to_host[taken:]
        return True

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
                self._answers += control.answer(line)
        return True

    def _reap(self) -> None:
        try:
            os.read(self._wake, 4096)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except (BlockingIOError, ChildProcessError):
            return
