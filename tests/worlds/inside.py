"""A machine's side of the network: makes tun and listener, hands them out, then runs code that it is sent."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import traceback
from pathlib import Path

from podflare.guest import syscalls

TUNSETIFF, IFF_TUN, IFF_NO_PI, MS_BIND = 0x400454CA, 1, 0x1000, 4096


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, stdin=subprocess.DEVNULL)


def main(control: socket.socket, folder: str) -> None:
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", b"eth0", IFF_TUN | IFF_NO_PI))
    ip("link", "set", "lo", "up")
    Path("/proc/sys/net/ipv6/conf/eth0/disable_ipv6").write_text("1")
    ip("addr", "add", "198.18.0.2/32", "dev", "eth0")
    ip("link", "set", "eth0", "mtu", "65520", "up")
    ip("route", "add", "default", "dev", "eth0")
    listener = socket.create_server(("198.18.0.2", 0), backlog=256)
    syscalls.mount(f"{folder}/resolv.conf", "/etc/resolv.conf", None, MS_BIND)
    socket.send_fds(control, [b"ready"], [tun, listener.fileno()])
    os.close(tun)
    listener.close()
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1 << 20, 1)
        if not data:
            return
        code, timeout_s = json.loads(data)
        pid = os.fork()
        if pid == 0:
            execute(code, fds[0], timeout_s)
        os.close(fds[0])
        os.waitpid(pid, 0)
        control.send(b"done")


def execute(code: str, out: int, timeout_s: float) -> None:
    try:
        os.dup2(out, 1)
        os.dup2(out, 2)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)  # its default action ends the process
        exec(compile(code, "<inside>", "exec"), {"__name__": "__main__"})
    except BaseException:  # noqa: BLE001  # nothing may go on in the child as if it were the parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
