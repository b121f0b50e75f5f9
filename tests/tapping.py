"""QEMU on the taps that Firecracker's machines have, in their namespaces, as the same user; also as a whole daemon.

`python tests/tapping.py serve ...` is `podflare serve ...` with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from pathlib import Path
from typing import Literal

from podflare.engines.microvm import probe, tap
from podflare.engines.microvm.confinement import Confinement
from podflare.engines.microvm.qemu import Qemu, QemuVm
from podflare.engines.microvm.tap import Entrance, Tap
from podflare.engines.microvm.vmm import BootSource, Drives, SavedVm, Shape
from podflare.errors import IsolationIncomplete

PROGRAM = (str(Path(__file__).resolve()),)
"""What Python is started with, in the place of `-m podflare`."""
_probe = probe.find


@dataclasses.dataclass(frozen=True)
class Entering(Confinement):
    """Starts one VMM on its tap."""

    there: Entrance | None = None

    def wrap(self, command: list[str], entrance: Entrance | None = None) -> list[str]:
        if self.there is None:
            return super().wrap(command, entrance)
        wire = command.index("-netdev") + 1
        command[wire] = f"tap,id=network,ifname={tap.NAME},script=no,downscript=no"
        return super().wrap(command, self.there)


class TappedQemu(Qemu):
    """See vmm.Vmm."""

    wire: Literal["socket", "tap"] = "tap"

    async def boot(self, directory: Path, shape: Shape, source: BootSource, drives: Drives) -> QemuVm:
        if not shape.network:
            return await super().boot(directory, shape, source, drives)
        with contextlib.closing(Tap(self._confinement.user_id)) as wire:
            return await _wired(await (await self._entering(wire)).boot(directory, shape, source, drives), wire)

    async def restore(self, directory: Path, shape: Shape, saved: SavedVm, drives: Drives) -> QemuVm:
        if not shape.network:
            return await super().restore(directory, shape, saved, drives)
        with contextlib.closing(Tap(self._confinement.user_id)) as wire:
            return await _wired(await (await self._entering(wire)).restore(directory, shape, saved, drives), wire)

    async def _entering(self, wire: Tap) -> Qemu:
        known = {field.name: getattr(self._confinement, field.name) for field in dataclasses.fields(Confinement)}
        return Qemu(self._binary, self.accelerator, Entering(**known, there=await wire.entrance()))


async def _wired(vm: QemuVm, wire: Tap) -> QemuVm:
    """The frames of the tap in the place of those of a socket that QEMU does not use."""
    assert vm.frames is not None
    vm.frames.close()
    vm.frames = await wire.frames()
    return vm


def find(wish: str = "qemu", firecracker: str = "") -> probe.Found:
    """As probe.find, for the engine."""
    found = _probe("qemu")
    if not isinstance(found.vmm, Qemu):
        raise IsolationIncomplete(found.detail)
    tapped = TappedQemu(found.vmm._binary, found.vmm.accelerator, found.confinement)
    # Guests see another kind of wire, so what was saved is good for it alone.
    return dataclasses.replace(found, vmm=tapped, machine_key=f"{found.machine_key}-tap")


if __name__ == "__main__":
    from podflare.cli import main

    probe.find = functools.partial(find)
    sys.exit(main())
