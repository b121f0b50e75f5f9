"""Promise: a machine that cannot have the network that it is to have is not made, and whoever asked is told why."""

from __future__ import annotations

from pathlib import Path

import pytest

from podflare.engines.base import EngineOptions, Limits, MachineSpec
from podflare.engines.microvm.birth import network_order
from podflare.engines.microvm.confinement import Confinement
from podflare.engines.microvm.engine import MicrovmEngine, shape_of
from podflare.engines.microvm.firecracker import Firecracker, Programs
from podflare.engines.microvm.probe import Found
from podflare.errors import EgressUnavailable
from podflare.wire.uplink import Uplink, uplink_from_dict

LIMITS = Limits(memory_bytes=512 << 20, disk_bytes=1 << 30)
LINKED = MachineSpec("default", LIMITS, uplink=Uplink((("TOKEN", "podflare-secret-00"),), "PEM"))


@pytest.mark.anyio
async def test_a_hypervisor_that_gives_no_network_yet(data_dir: Path) -> None:
    """On Firecracker a machine with a way out is refused before anything is made, and told which hypervisor has one."""
    confinement = Confinement(None)
    found = Found(Firecracker(Programs("/nowhere", None, "1.12"), confinement), confinement, "key")
    engine = MicrovmEngine(EngineOptions(str(data_dir), data_dir.name), lambda: found)
    await engine.start()
    try:
        with pytest.raises(EgressUnavailable, match=r"Firecracker have no network yet.*--vmm qemu"):
            await engine.create(LINKED, timeout_s=10)
        assert list((data_dir / "machines").iterdir()) == []
    finally:
        await engine.aclose()


def test_only_machines_with_a_way_out_have_an_interface() -> None:
    """The shape without one is that of every other machine, so that it is saved and restored apart."""
    assert not shape_of(LIMITS, cpus=1).network
    assert shape_of(LIMITS, cpus=1, network=True) != shape_of(LIMITS, cpus=1)


def test_what_a_machine_is_told_of_its_network() -> None:
    """A new one gets all of its way out, a fork that it keeps its parent's, any other that it has none."""
    told = network_order(LINKED, forked=False)
    assert told["is"] == "new" and uplink_from_dict(told["uplink"]) == LINKED.uplink
    assert network_order(LINKED, forked=True) == {"is": "kept"}
    for forked in (False, True):
        assert network_order(MachineSpec("default", LIMITS), forked=forked) == {"is": "none"}
