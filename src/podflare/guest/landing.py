"""Where connections of a virtual machine's programs are accepted: a listener in a network namespace with nothing else.

The gate has the kernel do TCP for it, in the machine's network namespace (podflare.egress.reflector).  A virtual
machine's is in another kernel, so it gets one here: `python -I -S BUNDLE landing FD`, started in a new network
namespace, makes a tun and the listener, sends their descriptors to the socket FD and ends.  They keep the namespace.
"""

from __future__ import annotations

import socket
from typing import NoReturn

from podflare.guest import uplink


def main(fd: int) -> NoReturn:
    """Raises: OSError with what could not be made; SystemExit."""
    with socket.socket(fileno=fd) as control:
        tun = uplink.open_tun(uplink.DEVICE)
        uplink.bring_up()
        socket.send_fds(control, [b"."], [tun, uplink.listen()])
    raise SystemExit(0)
