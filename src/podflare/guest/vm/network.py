"""The network interface of a virtual machine, where it has one: what becomes of it when the machine goes on.

The machine may have been saved with a way out that its copy does not get, so each copy is told what it has.
"""

from __future__ import annotations

import os
from typing import Any, Dict

from podflare.guest import uplink
from podflare.wire.uplink import INTERFACE, uplink_from_dict

NONE, NEW, KEPT = "none", "new", "kept"
"""No way out; one that it did not have before; one like the one of the machine that it is a copy of."""


def renew(order: Dict[str, Any]) -> Dict[str, str]:
    """Obey {"is": NONE | NEW | KEPT, ...}; with NEW come the fields of an Uplink.

    Returns: variables for programs.
    Raises: OSError, ValueError, KeyError.
    """
    if order["is"] == NEW:
        uplink.without_ipv6(INTERFACE)
        uplink.without_offload(INTERFACE)
        uplink.bring_up()
        return uplink.tell_programs(uplink_from_dict(order["uplink"]), files=True)
    if order["is"] == NONE and os.path.exists(f"/sys/class/net/{INTERFACE}"):
        uplink.take_down()
    return {}
