"""Promise: a machine has a network interface if its sandbox has a network, and is told what it has at each birth."""

from __future__ import annotations

from podflare.engines.base import Limits, MachineSpec
from podflare.engines.microvm.birth import network_order
from podflare.engines.microvm.engine import shape_of
from podflare.wire.uplink import Uplink, uplink_from_dict

LIMITS = Limits(memory_bytes=512 << 20, disk_bytes=1 << 30)
LINKED = MachineSpec("default", LIMITS, uplink=Uplink((("TOKEN", "podflare-secret-00"),), "PEM"))


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
