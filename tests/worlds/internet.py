"""The internet of a world: name servers, web servers and odd servers, at the addresses of `worlds`.

Odd TCP ports, on every address: 7000 echoes, 7001 reads and never answers, 7002 sends without end, 7003 sends `N`
bytes for a line `N`, 7004 resets at the first byte, 7005 answers TLS with nonsense, 7006 says at
the other side's end how much it got.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

import worlds
from podflare.egress.certificates import Authority

QUERIES: list[str] = []
REQUESTS: list[dict[str, Any]] = []
_turn = itertools.count()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, stdin=subprocess.DEVNULL)


def answer_name(wire: bytes) -> bytes | None:
    query = dns.message.from_wire(wire)
    question = query.question[0]
    name = question.name.to_text(omit_final_dot=True).lower()
    QUERIES.append(name)
    if name.startswith("mute."):
        return None
    addresses = worlds.ZONE.get(name)
    if name.startswith("rebind.") and question.rdtype == dns.rdatatype.A:
        addresses = [worlds.WEB if next(_turn) % 2 == 0 else worlds.PRIVATE]
    answer = dns.message.make_response(query)
    if addresses is None:
        answer.set_rcode(dns.rcode.NXDOMAIN)
        return answer.to_wire()
    for kind, matches in (("A", lambda text: ":" not in text), ("AAAA", lambda text: ":" in text)):
        fitting = [text for text in addresses if matches(text)]
        if fitting and question.rdtype == dns.rdatatype.from_text(kind):
            answer.answer.append(dns.rrset.from_text(question.name, 1, "IN", kind, *fitting))
    if question.rdtype == dns.rdatatype.TXT:
        answer.answer.append(
            dns.rrset.from_text(question.name, 1, "IN", "TXT", *[f'"{number}{"x" * 200}"' for number in range(10)])
        )
    return answer.to_wire(prefer_truncation=True)


def serve_names() -> None:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((worlds.RESOLVER, 53))

    def datagrams() -> None:
        while True:
            wire, peer = udp.recvfrom(4096)
            with contextlib.suppress(Exception):
                if (answer := answer_name(wire)) is not None:
                    udp.sendto(answer, peer)

    def stream(sock: socket.socket) -> None:
        with sock.makefile("rb") as file:
            while head := file.read(2):
                wire = file.read(struct.unpack("!H", head)[0])
                # Everything fits into a stream.
                query = dns.message.from_wire(wire)
                query.use_edns(payload=65535)
                answer = answer_name(query.to_wire())
                if answer is not None:
                    sock.sendall(struct.pack("!H", len(answer)) + answer)

    threading.Thread(target=datagrams, daemon=True).start()
    serve_tcp(53, stream, worlds.RESOLVER)


class Web(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    scheme = "http"

    def _respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        seen = {
            "scheme": self.scheme,
            "method": self.command,
            "target": self.path,
            "headers": [[name.lower(), value] for name, value in self.headers.items()],
            "body": body[:1000].decode("latin-1"),
            "size": len(body),
            "address": self.connection.getsockname()[0],
        }
        REQUESTS.append(seen)
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        published = Path(sys.argv[1], "www", url.path.strip("/"))
        if published.is_dir():
            published /= "index"
        if published.is_file():
            kind = "application/octet-stream" if published.suffix else "text/html"
            self._send(200, published.read_bytes(), ("Content-Type", kind))
            return
        action: Callable[..., None] = getattr(self, "act_" + url.path.strip("/"), self.act_echo)
        action(seen, query)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do_TRACE = _respond

    def _send(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def act_echo(self, seen: dict[str, Any], query: dict[str, str]) -> None:
        self._send(200, json.dumps(seen).encode())

    def act_redirect(self, seen: dict[str, Any], query: dict[str, str]) -> None:
        self._send(302, b"", ("Location", unquote(query["to"])))

    def act_big(self, seen: dict[str, Any], query: dict[str, str]) -> None:
        size = int(query["bytes"])
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        block = bytes(1 << 20)
        while size:
            size -= self.connection.send(block[:size])

    def act_chunked(self, seen: dict[str, Any], query: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in (b"one", b"two", b"three"):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def act_hang(self, seen: dict[str, Any], query: dict[str, str]) -> None:
        time.sleep(60)

    def act_junk(self, seen: dict[str, Any], query: dict[str, str]) -> None:
        self.wfile.write(b"\x00\x01 this is no HTTP\r\n\r\n" * 100)
        self.close_connection = True

    def act_headers(self, seen: dict[str, Any], query: dict[str, str]) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        with contextlib.suppress(OSError):
            for _ in range(100_000):
                self.wfile.write(b"X-Endless: " + b"y" * 1000 + b"\r\n")
        self.close_connection = True

    def act_cut(self, seen: dict[str, Any], query: dict[str, str]) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort")
        self.close_connection = True

    def act_upgrade(self, seen: dict[str, Any], query: dict[str, str]) -> None:
        self.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n")
        while data := self.connection.recv(65536):
            self.wfile.write(data)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class SecureWeb(Web):
    scheme = "https"


class WebServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    context: ssl.SSLContext | None = None

    def __init__(self, address: tuple[str, int], handler: type[Web]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:  # the library's would look its own name up
        socketserver.TCPServer.server_bind(self)

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.context is not None:
            request.settimeout(20)
            request = self.context.wrap_socket(request, server_side=True)
        super().finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def serve_web(folder: Path) -> None:
    authority = Authority((folder / "world-ca.pem").read_bytes(), (folder / "world-ca.key").read_bytes())
    contexts = {"": authority.server_context("unnamed.example")}

    def choose(sock: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        if name and name not in contexts:
            contexts[name] = authority.server_context("api.example.com" if name == "wrong.example.com" else name)
        sock.context = contexts[name or ""]

    contexts[""].sni_callback = choose
    for address in ("0.0.0.0", worlds.WEB6):
        for port, context in ((80, None), (443, contexts[""]), (8443, contexts[""])):
            server = WebServer((address, port), Web if context is None else SecureWeb)
            server.context = context
            threading.Thread(target=server.serve_forever, daemon=True).start()


def serve_tcp(port: int, handle: Callable[[socket.socket], None], address: str = "0.0.0.0") -> None:
    listener = socket.create_server((address, port), backlog=512)

    def one(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, ValueError):
            handle(sock)

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=one, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def echo(sock: socket.socket) -> None:
    while data := sock.recv(1 << 16):
        sock.sendall(data)


def endless(sock: socket.socket) -> None:
    while True:
        sock.sendall(bytes(1 << 16))


def measured(sock: socket.socket) -> None:
    left = int(sock.makefile("rb").readline())
    block = memoryview(bytes(1 << 20))
    while left:
        left -= sock.send(block[:left])


def reset(sock: socket.socket) -> None:
    sock.recv(1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def nonsense(sock: socket.socket) -> None:
    sock.recv(10)
    sock.sendall(b"\x16\x03\x01 nonsense" * 50)


def afterwards(sock: socket.socket) -> None:
    size = 0
    while data := sock.recv(1 << 16):
        size += len(data)
    sock.sendall(b"%d" % size)


def main(folder: str) -> None:
    print("namespace", flush=True)
    assert sys.stdin.buffer.readline() == b"linked\n"
    ip("link", "set", "lo", "up")
    ip("addr", "add", "93.184.216.1/24", "dev", "net0")
    ip("-6", "addr", "add", "2606:2800:220:1::1/64", "dev", "net0", "nodad")
    ip("link", "set", "net0", "up")
    for address in (worlds.WEB, worlds.OTHER_WEB, worlds.RESOLVER, worlds.PRIVATE, worlds.METADATA):
        ip("addr", "add", f"{address}/32", "dev", "lo")
    ip("-6", "addr", "add", f"{worlds.WEB6}/128", "dev", "lo", "nodad")
    serve_names()
    serve_web(Path(folder))
    serve_tcp(7000, echo)
    serve_tcp(7001, lambda sock: time.sleep(60))
    serve_tcp(7002, endless)
    serve_tcp(7003, measured)
    serve_tcp(7004, reset)
    serve_tcp(7005, nonsense)
    serve_tcp(7006, afterwards)
    print('"ready"', flush=True)
    for line in sys.stdin.buffer:
        seen = {"queries": QUERIES, "requests": REQUESTS}[json.loads(line)["op"]]
        answer, seen[:] = list(seen), []
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
