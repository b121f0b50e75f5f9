"""The process that holds the middle's namespaces: links it to the internet, passes orders on, ends with its stdin."""

from __future__ import annotations

import socket
import socketserver
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import worlds
from podflare.guest import syscalls

MS_BIND = 4096


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, stdin=subprocess.DEVNULL)


class OwnService(BaseHTTPRequestHandler):
    """What runs on the daemon's machine and concerns no sandbox."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"own")

    def log_message(self, *_: object) -> None:
        pass


class OwnServer(ThreadingHTTPServer):
    def __init__(self, address: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, worlds.OWN_PORT), OwnService)

    def server_bind(self) -> None:  # the library's would look its own name up
        socketserver.TCPServer.server_bind(self)


def main(folder: str) -> None:
    ip("link", "set", "lo", "up")
    internet = subprocess.Popen(
        ["unshare", "--net", sys.executable, str(worlds.FOLDER / "internet.py"), folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert internet.stdin is not None and internet.stdout is not None
    try:
        assert internet.stdout.readline() == b"namespace\n"
        ip("link", "add", "up0", "mtu", "65535", "type", "veth", "peer", "name", "net0", "netns", str(internet.pid))
        ip("addr", "add", f"{worlds.OWN}/24", "dev", "up0")
        ip("addr", "add", "93.184.216.3/24", "dev", "up0")
        ip("-6", "addr", "add", f"{worlds.OWN6}/64", "dev", "up0", "nodad")
        ip("link", "set", "up0", "up")
        ip("route", "add", "default", "via", "93.184.216.1")
        ip("-6", "route", "add", "default", "via", "2606:2800:220:1::1")
        resolv = Path(folder, "resolv.conf")
        resolv.write_text(f"nameserver {worlds.RESOLVER}\n")
        syscalls.mount(str(resolv), "/etc/resolv.conf", None, MS_BIND)
        internet.stdin.write(b"linked\n")
        internet.stdin.flush()
        for address in ("0.0.0.0", "::1", worlds.OWN6):
            threading.Thread(target=OwnServer(address).serve_forever, daemon=True).start()
        sys.stdout.buffer.write(internet.stdout.readline())
        sys.stdout.flush()
        for line in sys.stdin.buffer:
            internet.stdin.write(line)
            internet.stdin.flush()
            sys.stdout.buffer.write(internet.stdout.readline())
            sys.stdout.flush()
    finally:
        internet.kill()
        internet.wait()


if __name__ == "__main__":
    main(sys.argv[1])
