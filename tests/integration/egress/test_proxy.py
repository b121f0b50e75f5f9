"""The HTTP proxy of a sandbox: CONNECT and whole URLs, refusals in plain words, hostile servers and clients."""

from __future__ import annotations

import worlds

ASK = """
def ask(request, until=None):
    return talk(PROXY, request.replace("\\n", "\\r\\n").encode("latin-1"), until=until)
"""


def test_what_is_allowed_goes_through(network, world):
    """Plain requests, TLS through CONNECT, chunks, uploads, several requests on one connection, upgrades: all arrive."""
    sandbox = network(["api.example.com", "other.example.com:7000"])
    told = sandbox.run(
        ASK
        + """
import http.client
use_proxy()
found = {
    "plain": fetch("http://api.example.com/echo?q=1"),
    "post": fetch("http://api.example.com/echo", data=b"x" * 300000),
    "tls": fetch("https://api.example.com/echo"),
    "chunked": fetch("http://api.example.com/chunked"),
    "big": len(fetch("http://api.example.com/big?bytes=5000000")[1]),
    "missing": fetch("http://api.example.com/echo", method="DELETE")[0],
}
proxy = http.client.HTTPConnection("198.18.0.1", 3128, timeout=10)
several = []
for number in range(5):
    proxy.request("GET", f"http://api.example.com/echo?n={number}", headers={"Proxy-Authorization": "Basic eDp5"})
    several.append(json.loads(proxy.getresponse().read()))
proxy.request("HEAD", "http://api.example.com/big?bytes=77")
found["head"] = proxy.getresponse().getheader("Content-Length")
proxy.close()
found["targets"] = [one["target"] for one in several]
found["headers"] = [name for name, _ in several[0]["headers"]]
def chunks():
    yield b"one"
    yield b"two"
request = http.client.HTTPConnection("198.18.0.1", 3128, timeout=10)
request.request("POST", "http://api.example.com/echo", body=chunks(), encode_chunked=True)
found["sent in chunks"] = json.loads(request.getresponse().read())["body"]
request.close()
found["tunnel"] = ask("CONNECT other.example.com:7000 HTTP/1.1\\nHost: x\\n\\nearly", until=b"early")
found["upgrade"] = ask("GET http://api.example.com/upgrade HTTP/1.1\\nHost: x\\nConnection: Upgrade\\nUpgrade: echo\\n\\nhello",
                       until=b"hello")
found["old"] = ask("GET http://api.example.com/chunked HTTP/1.0\\n\\n")
tell(found)"""
    )
    assert told["plain"][0] == told["tls"][0] == told["post"][0] == told["missing"] == 200
    assert '"target": "/echo?q=1"' in told["plain"][1] and '"size": 300000' in told["post"][1]
    assert '"scheme": "https"' in told["tls"][1] and told["chunked"] == [200, "onetwothree"]
    assert told["big"] == 5_000_000 and told["head"] == "77" and told["sent in chunks"] == "onetwo"
    assert told["targets"] == [f"/echo?n={number}" for number in range(5)]
    assert "host" in told["headers"] and "proxy-authorization" not in told["headers"]
    assert told["tunnel"].endswith("early") and told["tunnel"].startswith("HTTP/1.1 200 ")
    assert told["upgrade"].startswith("HTTP/1.1 101 ") and told["upgrade"].endswith("hello")
    assert told["old"].startswith("HTTP/1.1 200 ") and told["old"].endswith("onetwothree")
    counted = {(entry.protocol, entry.host): entry for entry in sandbox.journal()}
    assert counted["connect", "other.example.com"].bytes_out == 5
    assert counted["http", "api.example.com"].verdict == "allowed"


def test_refusals_say_why(network, world):
    """What is not allowed, not possible or not HTTP is refused with a status and a sentence, and nothing goes out."""
    sandbox = network(["api.example.com"])
    told = sandbox.run(
        ASK
        + """
tell({
    "connect": ask("CONNECT evil.example:443 HTTP/1.1\\nHost: x\\n\\n"),
    "port": ask("CONNECT api.example.com:22 HTTP/1.1\\nHost: x\\n\\n"),
    "get": ask("GET http://evil.example/ HTTP/1.1\\nHost: api.example.com\\n\\n"),
    "raw": ask("CONNECT 93.184.216.35:443 HTTP/1.1\\nHost: x\\n\\n"),
    "number": ask("CONNECT 2130706433:80 HTTP/1.1\\nHost: x\\n\\n"),
    "hex": ask("GET http://0x7f.1/ HTTP/1.1\\nHost: x\\n\\n"),
    "forgotten": ask("CONNECT 198.18.77.77:443 HTTP/1.1\\nHost: x\\n\\n"),
    "no port": ask("CONNECT api.example.com HTTP/1.1\\nHost: x\\n\\n"),
    "https": ask("GET https://api.example.com/ HTTP/1.1\\nHost: x\\n\\n"),
    "origin": ask("GET /etc HTTP/1.1\\nHost: x\\n\\n"),
    "user": ask("GET http://api.example.com@evil.example/ HTTP/1.1\\nHost: x\\n\\n"),
    "tab": ask("GET http://api.example.com\\t.evil.example/ HTTP/1.1\\nHost: x\\n\\n"),
    "junk": ask("\\x16\\x03\\x01 this is no HTTP\\n\\n"),
    "long": ask("GET http://api.example.com/ HTTP/1.1\\nHost: x\\nX: " + "y" * 300000 + "\\n\\n"),
    "smuggled": ask("POST http://api.example.com/ HTTP/1.1\\nHost: x\\nContent-Length: 5\\nContent-Length: 6\\n\\nhello"),
})"""
    )
    status = {name: answer.split()[1] if answer.startswith("HTTP/1.1 ") else answer for name, answer in told.items()}
    assert {name for name, code in status.items() if code == "403"} == {
        "connect", "port", "get", "raw", "forgotten", "number", "user",
    }  # fmt: skip
    assert {name for name, code in status.items() if code.startswith("4")} == set(told)
    reason = "egress to evil.example is not allowed for this sandbox: allowed are api.example.com"
    for answer in (told["connect"], told["get"]):
        line, _, rest = answer.partition("\r\n")
        assert line == f"HTTP/1.1 403 podflare egress: {reason}" and rest.endswith(f"\r\n\r\n{reason}\n"), answer
    assert all(answer.partition("\r\n")[0].isprintable() for answer in told.values())
    assert "not to its port 22" in told["port"] and "93.184.216.35" in told["raw"]
    assert world.requests() == [] and world.queries() == []


def test_hostile_servers_end_their_own_request_only(network):
    """Servers that speak nonsense, cut answers, send endless headers or TLS rubbish become errors, fast, one by one."""
    sandbox = network(True)
    told = sandbox.run(
        ASK
        + """
found = {}
for path in ("junk", "cut", "headers"):
    found[path] = attempt(ask, f"GET http://api.example.com/{path} HTTP/1.1\\nHost: x\\nConnection: close\\n\\n")
found["reset"] = attempt(ask, f"GET http://{WEB}:7004/ HTTP/1.1\\nHost: x\\n\\n")
found["closed"] = attempt(ask, f"CONNECT {WEB}:1 HTTP/1.1\\nHost: x\\n\\n")
found["unknown"] = attempt(ask, "GET http://missing.example.com/ HTTP/1.1\\nHost: x\\n\\n")
found["after"] = attempt(ask, "GET http://api.example.com/chunked HTTP/1.1\\nHost: x\\nConnection: close\\n\\n")
tell(found)""",
        WEB=worlds.WEB,
    )
    assert all(fast for _, fast in told.values()), told
    answers = {name: answer for name, (answer, _) in told.items()}
    assert all(answers[name].startswith("HTTP/1.1 502 ") for name in ("junk", "headers", "reset", "closed", "unknown"))
    assert answers["cut"].startswith("HTTP/1.1 200 ") and answers["cut"].endswith("short")
    assert "Connection refused" in answers["closed"] and "does not resolve" in answers["unknown"]
    assert answers["after"].startswith("HTTP/1.1 200 ")
