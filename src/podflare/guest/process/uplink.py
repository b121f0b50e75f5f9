"""The machine's end of its way out: one interface, all of whose packets come out of a descriptor, and one listener.

Runs in the future pid 1 of a machine.  Both descriptors leave the machine before any user code runs in it: the packets
and the connections are the gate's.  Whatever is done in the machine, there is no other way that a packet could take.
"""

from __future__ import annotations

import os
from typing import List

from podflare.guest import uplink
from podflare.wire.plan import MachinePlan

DEVICE = "/tun"
"""On the stage; no machine's root has it."""


def open_interface(plan: MachinePlan) -> List[int]:
    """If planned, a new interface in the network namespace of this process: the descriptor that packets come out of.

    Precondition: on the stage; the device belongs to the namespace in which it is opened.  Needs CAP_NET_ADMIN.
    """
    return [] if plan.uplink is None else [uplink.open_tun(DEVICE)]


def bring_up(plan: MachinePlan) -> List[int]:
    """If planned, give the interface its address, send everything through it, listen, and tell the machine's programs.

    Precondition: in the machine's root.  Needs CAP_NET_ADMIN.
    Returns: the descriptor of the listening socket.
    """
    if plan.uplink is None:
        return []
    os.environ.update(uplink.tell_programs(plan.uplink, files=not plan.layers))
    uplink.bring_up()
    return [uplink.listen()]
