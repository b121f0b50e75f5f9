"""The gate's process: `python -m podflare.egress.gate FD`.  Obeys the daemon's orders until it is gone.

Owns the outlets of all machines of one daemon.  Knows no sandboxes, only keys.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import anyio

from podflare.egress import orders, privileges
from podflare.egress.outlet import Outlet
from podflare.errors import PodflareError


class Gate:
    """The orders and whom they concern."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._outlets: dict[str, Outlet] = {}

    async def run(self) -> None:
        """Obey until the daemon ends the conversation."""
        while True:
            await anyio.wait_readable(self._control)
            try:
                received = orders.receive(self._control)
            except BlockingIOError:
                continue
            if received is None:
                return
            number, body, fds = received
            await orders.send(self._control, number, self._obey(body, fds))

    def _obey(self, body: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        try:
            if body["op"] == "start":
                return {}
            if body["op"] == "attach":
                return self._attach(body, fds)
            if body["op"] == "detach":
                outlet = self._outlets.pop(body["key"], None)
                if outlet is not None:
                    outlet.close()
                return {}
            if body["op"] == "journal":
                journal = self._outlets[body["key"]].journal
                return {"entries": [entry.to_json() for entry in journal.entries()], "dropped": journal.dropped}
            raise KeyError(body["op"])
        except (PodflareError, OSError, LookupError, TypeError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            for fd in fds:
                os.close(fd)

    def _attach(self, body: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        if body["key"] not in self._outlets:
            tun, listener, table = fds
            fds.clear()  # the outlet's from here on
            self._outlets[body["key"]] = Outlet(tun, listener, table)
        return {}


def main(fd: int) -> None:
    """Serve the daemon at the other end of `fd`."""
    control = socket.socket(fileno=fd)
    control.setblocking(False)
    os.set_inheritable(fd, False)
    privileges.open_many_files()
    privileges.give_up()
    anyio.run(Gate(control).run, backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main(int(sys.argv[1]))
