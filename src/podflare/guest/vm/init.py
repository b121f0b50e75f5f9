"""Process 1 of a virtual machine: `python -I -S BUNDLE vm`, started by the initramfs in the final root.

It stands between the agent and the hypervisor's ports, because those may lose their peer and get another one when
the machine is saved and restored, which the agent does not notice.  It carries out what the engine orders, reaps
what is orphaned, and ends the machine when the agent has ended.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from typing import Any, Dict, NoReturn, Optional, Set, Tuple

from podflare.guest.vm import confine, control, groups, manifest, ports, system

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
        channel, orders = ports.find(ports.CHANNEL), ports.find(ports.CONTROL)
        ours, agents = socket.socketpair()
        line, agents_line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        confine.start_agent(agents, agents_line)
        agents.close()
        agents_line.close()
        _Init(channel, orders, ours, line).serve()
    except BaseException as exc:  # noqa: BLE001  # the kernel would only say that process 1 is gone
        sys.stderr.write(f"podflare: {type(exc).__name__}: {exc}\n")
    system.stop()
    while True:
        signal.pause()


class _Init:
    """The loop."""

    def __init__(self, channel: ports.Port, orders: ports.Port, agent: socket.socket, line: socket.socket) -> None:
        agent.setblocking(False)
        line.settimeout(_AGENT_TIMEOUT_S)
        self._channel, self._orders, self._agent, self._line = channel, orders, agent, line
        self._lines = control.Lines()
        self._searching: Optional[control.TokenSearch] = None
        """In a restored machine: what the host sent to the former one is dropped."""
        self._comparing: Optional[manifest.Job] = None
        self._answers = b""
        # Read from one side and not yet taken by the other.
        self._to_agent = memoryview(b"")
        self._to_host = memoryview(b"")
        self._agents = 0
        """Sockets to the agent so far; the next one may have the same number."""
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
                self._pump_comparison()
                more = self._pump_in() | self._pump_out() | self._pump_orders()
                self._epoll.poll(0 if more else -1)
                self._reap()
        except EOFError:
            return

    def _watch(self) -> None:
        wanted = {(self._wake, 0), (self._agent.fileno(), self._agents)}
        if self._comparing is not None:
            wanted.add((self._comparing.fd, self._comparing.number))
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
                if self._searching is not None:
                    data = self._searching.feed(data)
                    if data is None:
                        continue
                    self._searching = None
                self._to_agent = memoryview(data)
                continue
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
                self._answers += self._obey(line)
        return True

    # What is ordered.

    def _obey(self, line: bytes) -> bytes:
        """Carry out one order; its answer, empty if that comes later."""
        number: Any = None
        try:
            order = json.loads(line)
            number = order["order"]
            if "mark" in order:
                self._ask_agent({"mark": True})
                return control.encode(number, {"marked": True})
            if "restored" in order:
                self._begin_anew(order["restored"])
                return control.encode(number, {"ready": True})
            if "limits" in order:
                groups.limit(int(order["limits"]["memory_bytes"]), int(order["limits"]["processes"]))
                return control.encode(number, {"limited": True})
            if "usage" in order:
                return control.encode(number, {"usage": groups.usage()})
            if "manifest" in order and self._comparing is None:
                self._comparing = manifest.Job(number, order["manifest"])
                return b""
            raise ValueError("unknown order, or one that waits for another one's end")
        except (ValueError, TypeError, KeyError, OSError) as exc:
            return control.encode(number, {"failed": f"{type(exc).__name__}: {exc}"})

    def _begin_anew(self, restored: Dict[str, Any]) -> None:
        """This machine goes on as a copy; what must differ between copies is made different."""
        system.set_clock(int(restored["time"]))
        system.add_entropy(bytes.fromhex(restored["seed"]))
        system.set_names(str(restored.get("hostname", "")), str(restored.get("machine_id", "")))
        token = bytes.fromhex(restored["token"])
        ours, agents = socket.socketpair()
        with agents:
            self._ask_agent({"renew": {"reseed": bool(restored.get("reseed", True))}}, (agents.fileno(),))
        ours.setblocking(False)
        self._agent.close()
        self._agent = ours
        self._agents += 1
        self._to_agent = memoryview(b"")
        self._to_host = memoryview(token)
        self._searching = control.TokenSearch(token)

    def _ask_agent(self, order: Dict[str, Any], fds: Tuple[int, ...] = ()) -> None:
        """Raises: OSError or ValueError if it did not do it.  User code may have got hold of it."""
        socket.send_fds(self._line, [json.dumps(order).encode()], fds)
        answer = json.loads(self._line.recv(4096))
        if not isinstance(answer, dict) or "failed" in answer:
            raise ValueError(f"the agent: {str(answer)[:500]}")

    def _pump_comparison(self) -> None:
        if self._comparing is not None:
            result = self._comparing.result()
            if result is not None:
                self._answers += control.encode(self._comparing.number, result)
                self._comparing = None

    def _reap(self) -> None:
        try:
            os.read(self._wake, 4096)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except (BlockingIOError, ChildProcessError):
            return
