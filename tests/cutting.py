"""A QEMU that ends the connections of a VM that is saved, as Firecracker does, and connects them anew over QMP."""

from __future__ import annotations

import dataclasses
import itertools
import os
import socket
from collections.abc import Awaitable, Callable

import anyio

from podflare.engines.microvm import probe
from podflare.engines.microvm.confinement import Confinement
from podflare.engines.microvm.qemu import Qemu, QemuVm
from podflare.engines.microvm.vmm import CHANNEL_NAME, CONTROL_NAME, SavedVm

FALSE_STARTS = 1
"""So many connections after each capture are ended at once, as by a guest that hears late of the end of the former."""


class CutVm(QemuVm):
    """See vmm.Vm.  The channels are cut while the VM stands still, and again as soon as they were first opened."""

    channels_survive = False
    _to_cut = 0
    _names = itertools.count()

    async def connect(self, monitor: socket.socket) -> None:
        self._line = os.dup(monitor.fileno())
        await super().connect(monitor)

    async def _close(self) -> None:
        await super()._close()
        os.close(self._line)

    async def _capture(self, to: SavedVm, while_paused: Callable[[], Awaitable[None]]) -> float:
        async def cut() -> None:
            self.cut()
            await while_paused()

        self._to_cut = FALSE_STARTS
        return await super()._capture(to, cut)

    def cut(self) -> None:
        """End both channels, also for who holds a copy of our end."""
        for sock in (self.channel, self.control):
            sock.shutdown(socket.SHUT_RDWR)

    async def open_channels(self, *, timeout_s: float) -> None:
        with anyio.fail_after(timeout_s):
            self.channel.close()
            self.channel = await self._connected(CHANNEL_NAME)
            self.control.close()
            self.control = await self._connected(CONTROL_NAME)
        if self._to_cut:
            self._to_cut -= 1
            self.cut()

    async def _connected(self, port: str) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            name = f"fd{next(self._names)}"
            # Beside the monitor's own stream: QEMU keeps a descriptor that arrived until an order takes it.
            with socket.socket(fileno=os.dup(self._line)) as line:
                socket.send_fds(line, [b" "], [theirs.fileno()])
            await self._order("getfd", fdname=name)
        backend = {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": name}}, "server": False}}
        await self._order("chardev-change", id=port, backend=backend)
        ours.setblocking(False)
        return ours


def find() -> probe.Found:
    """As probe.find, for the engine."""
    found = probe.find("qemu")
    if not isinstance(found.vmm, Qemu):
        return found
    confinement = Confinement.detect(kvm=found.vmm.accelerator == "kvm")
    binary = found.vmm._binary
    return dataclasses.replace(found, vmm=Qemu(binary, found.vmm.accelerator, confinement, CutVm))
