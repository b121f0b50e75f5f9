"""The HTTP wire: the traps that the original's client sets, and answers to what is no proper request."""

from __future__ import annotations

import json

import anyio
import pytest

from hosting import events, text
from podflare.wire.messages import Exit
from scripted_guest import ScriptedGuest

pytestmark = pytest.mark.anyio


async def echo(guest: ScriptedGuest) -> None:
    await guest.ready()
    await guest.serve_cells()


async def test_healthz_is_exactly_ok_without_a_key(host):
    """The health check needs no key and answers two bytes."""
    async with host(key_digests=(b"x" * 32,)) as h:
        answer = await h.client.get("/v1/healthz")
        assert (answer.status_code, answer.content) == (200, b"ok")


async def test_create_without_body_or_content_type(scripted):
    """A POST with nothing in it creates a default sandbox, whose answer tells the effective values."""
    async with scripted(echo, idle_s=60, lifetime_s=600) as h:
        body = (await h.client.post("/v1/sandboxes")).json()
        assert body["id"].startswith("sbx_") and len(body["id"]) == 36
        assert body["state"] == "ready" and body["egress"] is False
        assert (body["ram_mib"], body["rootfs_gb"]) == (1024, 4)
        assert (body["timeout_seconds"], body["idle_timeout_seconds"]) == (600, 60)
        assert "endpoint" not in body and "region" not in body


async def test_region_and_endpoint_only_if_configured(scripted):
    """The keys that make the original's client move elsewhere appear only when an operator set them."""
    async with scripted(echo, region="eu", public_url="https://pods.example") as h:
        body = (await h.client.post("/v1/sandboxes")).json()
        assert (body["region"], body["endpoint"]) == ("eu", "https://pods.example")


async def test_every_event_has_the_four_keys_and_exit_is_last(host):
    """Events carry type, data, seq and ts, seq counts from 0, exit ends the stream and tells how it went."""
    async with host() as h:
        sandbox = await h.create()
        answer = await h.client.post(
            f"/v1/sandboxes/{sandbox}/exec", json={"code": "print(1)\nprint()\nprint(2)\n40+2"}
        )
        assert answer.headers["content-type"] == "application/x-ndjson"
        cell = events(answer.content)
        assert [event["seq"] for event in cell] == list(range(len(cell)))
        assert all({"type", "data", "seq", "ts"} <= event.keys() for event in cell)
        assert text(cell) == "1\n\n2"
        assert [event["data"] for event in cell if event["type"] == "result"] == [{"text/plain": "42"}]
        last = cell[-1]
        assert (last["type"], last["data"], last["reason"], last["restarted"]) == ("exit", 0, "ended", False)
        assert last["cell_id"] == answer.headers["x-podflare-cell-id"]
        assert last["stdout_dropped_bytes"] == last["stderr_dropped_bytes"] == 0 and last["duration_ms"] > 0


async def test_non_ascii_is_escaped_everywhere(host):
    """No byte above 127 is in a stream or a replay, so line separators of Unicode cannot cut a line."""
    async with host() as h:
        sandbox = await h.create()
        code = "print('a\\u2028b\\u2029c\\u0085d \\U0001f600 é'); 'é\\u2028'"
        raw = (await h.client.post(f"/v1/sandboxes/{sandbox}/exec", json={"code": code})).content
        again = (await h.client.get(f"/v1/sandboxes/{sandbox}/replay")).content
        assert raw.isascii() and raw == again
        assert text(events(raw)) == "a\u2028b\u2029c\u0085d \U0001f600 é"


async def test_three_megabyte_line_passes_whole(host):
    """A single line of 3 MB arrives as one event."""
    async with host() as h:
        sandbox = await h.create()
        cell = await h.exec(sandbox, "print('x' * 3_000_000)")
        assert [len(event["data"]) for event in cell if event["type"] == "stdout"] == [3_000_000]


async def test_output_without_final_newline_and_binary_junk(host):
    """An unfinished last line is an event too; bytes that are not UTF-8 are replaced, \\r stays."""
    async with host() as h:
        sandbox = await h.create()
        code = "import os, sys; sys.stdout.flush(); os.write(1, b'a\\r\\xff\\x00b\\nend')"
        assert text(await h.exec(sandbox, code)) == "a\r\ufffd\0b\nend"


async def test_silence_is_filled_with_empty_lines(scripted):
    """While a cell says nothing, an empty line comes every heartbeat interval, and none before the first silence."""
    more = anyio.Event()

    async def silent(guest: ScriptedGuest) -> None:
        await guest.ready()
        channel, _ = await guest.next_exec()
        await more.wait()
        await guest.output(channel, b"late\n")
        await guest.say(channel, Exit(0))

    async with scripted(silent, heartbeat_s=0.05) as h:
        sandbox = await h.create()
        got = b""
        async with h.client.stream("POST", f"/v1/sandboxes/{sandbox}/exec", json={"code": "1"}) as answer:
            async for piece in answer.aiter_raw():
                got += piece
                if got.count(b"\n") == 3:
                    more.set()
        assert got.startswith(b"\n\n\n") and text(events(got)) == "late"


async def test_waiting_cell_gets_headers_and_heartbeats_at_once(scripted):
    """A cell that waits in the queue has its headers and heartbeats before the one ahead of it ends."""
    go, busy = anyio.Event(), anyio.Event()

    async def held(guest: ScriptedGuest) -> None:
        await guest.ready()
        channel, _ = await guest.next_exec()
        busy.set()
        await go.wait()
        await guest.say(channel, Exit(0))
        await guest.serve_cells()

    async with scripted(held, heartbeat_s=0.05) as h:
        sandbox = await h.create()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(h.exec, sandbox, "first")
            await busy.wait()
            async with h.client.stream("POST", f"/v1/sandboxes/{sandbox}/exec", json={"code": "second"}) as answer:
                pieces = answer.aiter_raw()
                assert await anext(pieces) == b"\n"
                go.set()
                rest = b"".join([piece async for piece in pieces])
        assert text(events(rest)) == "second"


async def test_heartbeats_can_be_switched_off(scripted):
    """With heartbeat 0 a stream holds events only."""

    async def slow(guest: ScriptedGuest) -> None:
        await guest.ready()
        channel, _ = await guest.next_exec()
        await anyio.sleep(0.1)
        await guest.say(channel, Exit(0))

    async with scripted(slow, heartbeat_s=0) as h:
        sandbox = await h.create()
        answer = await h.client.post(f"/v1/sandboxes/{sandbox}/exec", json={"code": "1"})
        assert not answer.content.startswith(b"\n")


async def test_delete_is_204_with_no_body_byte(scripted):
    """After a 204 the next answer on the kept-alive connection starts at once: no stray byte between them."""
    async with scripted(echo) as h:
        sandbox = await h.create()
        request = f"DELETE /v1/sandboxes/{sandbox} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        last = b"GET /v1/healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        got = await h.raw(request + request + last)
        parts = got.split(b"HTTP/1.1 ")[1:]
        assert [part[:3] for part in parts] == [b"204", b"204", b"200"]
        assert all(part.endswith(b"\r\n\r\n") for part in parts[:2]) and parts[2].endswith(b"\r\n\r\nok")


async def test_delete_knows_every_id_ever_issued(scripted):
    """Deleting twice is a success, deleting what never was is 404."""
    async with scripted(echo) as h:
        sandbox = await h.create()
        codes = [(await h.client.delete(f"/v1/sandboxes/{sandbox}")).status_code for _ in range(3)]
        assert codes == [204, 204, 204]
        for unknown in ("sbx_" + "0" * 32, "sb_abc", "x" * 3000, "%00", "..%2f"):
            answer = await h.client.delete(f"/v1/sandboxes/{unknown}")
            assert answer.status_code == 404 and answer.json()["code"] in ("sandbox_not_found", "bad_request")


async def test_unknown_sandbox_is_an_error_before_the_stream(scripted):
    """An exec on an unknown id is a plain 404 in JSON, not a stream."""
    async with scripted(echo) as h:
        answer = await h.client.post(f"/v1/sandboxes/sbx_{'0' * 32}/exec", json={"code": "1"})
        assert answer.status_code == 404
        assert answer.json() == {"error": "sandbox not found", "code": "sandbox_not_found"}


async def test_gone_sandbox_says_why(scripted):
    """A 404 of a sandbox that was tells the cause."""
    async with scripted(echo) as h:
        sandbox = await h.create()
        await h.client.delete(f"/v1/sandboxes/{sandbox}")
        for method, path in (("POST", "/exec"), ("GET", ""), ("GET", "/replay"), ("PUT", "/files?path=x")):
            answer = await h.client.request(method, f"/v1/sandboxes/{sandbox}{path}", json={"code": "1"})
            assert answer.status_code == 404 and "it was closed" in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/sandboxes/", 404),
        ("POST", "/v1/sandboxes/", 404),
        ("GET", "/v1/nothing", 404),
        ("PUT", "/v1/sandboxes", 405),
        ("GET", "/v1/sandboxes/x/exec", 405),
        ("PATCH", "/v1/sandboxes/x/files?path=y", 405),
        ("POST", "/v1/sandboxes/x/fork", 404),
        ("POST", "/v1/sandboxes/x/merge_into/y", 404),
        ("GET", "/v1/sandboxes/x/diff/y", 404),
        ("POST", "/v1/sandboxes/x/pty", 501),
        ("POST", "/v1/sandboxes/x/freeze", 501),
        ("GET", "/v1/spaces", 501),
        ("POST", "/v1/spaces/x/resume", 501),
    ],
)
async def test_wrong_routes_are_json_errors_and_never_redirects(scripted, method, path, status):
    """Unknown routes, wrong methods and parts not built yet answer with the error body; nothing is a redirect."""
    async with scripted(echo) as h:
        answer = await h.client.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()) == {"error", "code"}
        if status == 405:
            assert answer.headers["allow"]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"code": 1}',
        b'{"code": null}',
        b"{}",
        b'{"code": "1", "language": "ruby"}',
        b'{"code": "1", "language": 3}',
        b'{"code": "1", "timeout_seconds": "3"}',
        b'{"code": "1", "timeout_seconds": 0}',
        b'{"code": "1", "timeout_seconds": NaN}',
        b'{"code": "1", "timeout_seconds": true}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
async def test_garbage_exec_body_is_400(scripted, body):
    """A body that is no exec request is refused with a sentence about what is wrong, and the sandbox works on."""
    async with scripted(echo) as h:
        sandbox = await h.create()
        answer = await h.client.post(f"/v1/sandboxes/{sandbox}/exec", content=body)
        assert answer.status_code == 400 and answer.json()["code"] == "bad_request" and answer.json()["error"]
        assert text(await h.exec(sandbox, "fine")) == "fine"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"template": "nope"}, 400, "unknown_template"),
        ({"template": 3}, 400, "bad_request"),
        ({"ram_mib": "lots"}, 400, "bad_request"),
        ({"ram_mib": 1}, 400, "bad_request"),
        ({"timeout_seconds": -1}, 400, "bad_request"),
        ({"metadata": {"a": 1}}, 400, "bad_request"),
        ({"egress": "yes"}, 400, "bad_request"),
        ({"egress": ["a.example", 3]}, 400, "bad_request"),
        ({"egress": ["no name"]}, 400, "bad_request"),
        ({"egress": ["10.0.0.1"]}, 400, "bad_request"),
        ({"egress": ["169.254.169.254"]}, 400, "bad_request"),
        ({"egress": False, "secrets": {"A": {"value": "v", "hosts": ["a.example"]}}}, 400, "bad_request"),
        ({"secrets": {"A": {"value": "hush", "hosts": []}}}, 400, "bad_request"),
        ({"secrets": {"A B": {"value": "hush", "hosts": ["a.example"]}}}, 400, "bad_request"),
        ({"secrets": {"https_proxy": {"value": "hush", "hosts": ["a.example"]}}}, 400, "bad_request"),
        ({"secrets": {"A": {"value": "hu\nsh", "hosts": ["a.example"]}}}, 400, "bad_request"),
        ({"secrets": {"A": {"value": "hush", "hosts": ["10.0.0.1"]}}}, 400, "bad_request"),
        ({"secrets": {"A": "hush"}}, 400, "bad_request"),
        ({"egress": True}, 503, "egress_unavailable"),
        ({"persistent": True}, 501, "not_built"),
    ],
)
async def test_wrong_create_body(scripted, body, status, code):
    """A create with a wrong or unbuilt field is refused and makes nothing."""
    async with scripted(echo) as h:
        answer = await h.client.post("/v1/sandboxes", json=body)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert "hush" not in answer.text, "a secret is never shown"
        assert (await h.client.get("/v1/sandboxes")).json() == {"sandboxes": []}
        assert h.engine.machines == []


async def test_what_is_asked_and_not_given_is_told(scripted):
    """Limits that are not in force are warnings in plain words; unasked ones are not."""
    async with scripted(echo) as h:
        body = (await h.client.post("/v1/sandboxes", json={"ram_mib": 2048})).json()
        assert any("ram_mib=2048" in warning for warning in body["warnings"])
        assert (await h.client.post("/v1/sandboxes", json={"egress": False})).json()["warnings"] == []


async def test_body_above_the_cap_is_refused_while_reading(scripted):
    """A body that grows past the cap is answered 413 before it ends, with and without an announced length."""
    async with scripted(echo) as h:
        sandbox = await h.create()
        announced = f"POST /v1/sandboxes/{sandbox}/exec HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
        reader, writer = await h.connect()
        writer.write(announced.encode())
        with anyio.fail_after(20):
            assert (await reader.readline()).startswith(b"HTTP/1.1 413")
        writer.transport.abort()

        async def endless():
            while True:
                yield b"x" * 1_000_000

        answer = await h.client.post(f"/v1/sandboxes/{sandbox}/exec", content=_limited(endless(), 40))
        assert answer.status_code == 413 and answer.json()["code"] == "too_large"


async def _limited(source, count):
    async for piece in source:
        yield piece
        count -= 1
        if not count:
            return


async def test_code_above_the_frame_cap_is_413(scripted):
    """Code that no frame to the guest holds is refused before the stream starts."""
    async with scripted(echo) as h:
        sandbox = await h.create()
        answer = await h.client.post(f"/v1/sandboxes/{sandbox}/exec", json={"code": "\u00e9" * 4_000_000})
        assert answer.status_code == 413


@pytest.mark.parametrize("drip", [False, True])
async def test_slow_body_is_given_up(scripted, drip):
    """A body that stops, or drips byte by byte, is refused after the body timeout."""
    async with scripted(echo, body_timeout_s=0.3) as h:
        reader, writer = await h.connect()
        writer.write(b"POST /v1/sandboxes HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                if drip:
                    tasks.start_soon(_drip, writer)
                assert (await reader.readline()).startswith(b"HTTP/1.1 400")
                tasks.cancel_scope.cancel()
        writer.transport.abort()


async def _drip(writer) -> None:
    while True:
        writer.write(b" ")
        await anyio.sleep(0.02)


async def test_endless_or_slow_headers_are_refused(scripted, monkeypatch):
    """A peer that never ends its headers is answered and cut off, before it has shown a key."""
    monkeypatch.setattr("podflare.host.httpserver.HEAD_S", 0.3)
    async with scripted(echo, key_digests=(b"x" * 32,)) as h:
        for start in (b"", b"GET /v1/sandboxes HTTP/1.1\r\nHost: x\r\n"):
            assert (await h.raw(start)).startswith(b"HTTP/1.1 400")
        endless = b"GET /v1/sandboxes HTTP/1.1\r\nHost: x\r\nX-Pad: " + b"a" * 400_000
        got = await h.raw(endless)
        assert got.startswith(b"HTTP/1.1 400") and b"above" in got
        # Between requests a kept-alive connection may rest.
        reader, writer = await h.connect()
        for _ in range(2):
            writer.write(b"GET /v1/healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            await anyio.sleep(0.5)
        writer.transport.abort()


async def test_what_is_no_http_is_a_json_400(scripted):
    """Bytes that are not HTTP get the error body, too."""
    async with scripted(echo) as h:
        got = await h.raw(b"\x16\x03\x01 hello\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 400") and json.loads(got.partition(b"\r\n\r\n")[2])["code"] == "bad_request"


async def test_list_and_get_tell_the_same(scripted):
    """A sandbox is listed for its owner with the object that get gives."""
    async with scripted(echo) as h:
        ids = [await h.create(metadata={"n": str(n)}) for n in range(3)]
        listed = (await h.client.get("/v1/sandboxes")).json()["sandboxes"]
        assert [one["id"] for one in listed] == ids
        one = (await h.client.get(f"/v1/sandboxes/{ids[1]}")).json()
        for body in (one, *listed):
            assert body.pop("seconds_left") > 0 < body.pop("idle_seconds_left")
        assert abs(one.pop("expires_at_ms") - listed[1].pop("expires_at_ms")) < 1000
        assert one == listed[1]
        assert listed[1]["metadata"] == {"n": "1"}


async def test_capacity_counts(scripted):
    """Capacity tells sandboxes, limit and pool."""
    async with scripted(echo, max_sandboxes=7) as h:
        await h.create()
        body = (await h.client.get("/v1/capacity")).json()
        assert (body["sandboxes"], body["max_sandboxes"], body["pool"]["misses"]) == (1, 7, 1)


async def test_openapi_describes_every_route(scripted):
    """The document names each built path with its methods, and the page and its files are served offline."""
    async with scripted(echo) as h:
        document = (await h.client.get("/openapi.json")).json()
        # Swagger UI 4, which works offline, shows 3.0 and an empty page for 3.1.
        assert document["openapi"].startswith("3.0")
        assert '"null"' not in json.dumps(document)
        assert '"const"' not in json.dumps(document)
        assert set(document["paths"]["/v1/sandboxes/{id}/files"]) == {"put", "get", "parameters"}
        assert "code" in document["components"]["schemas"]["ExecRequest"]["properties"]
        page = (await h.client.get("/docs")).text
        assert "http://" not in page and "https://" not in page
        for name in ("swagger-ui.css", "swagger-ui-bundle.js", "start.js"):
            assert f"/docs/{name}" in page
            assert (await h.client.get(f"/docs/{name}")).status_code == 200
        assert (await h.client.get("/docs/..%2f..%2fetc%2fpasswd")).status_code == 404


async def test_internal_error_hides_its_traceback(scripted, monkeypatch):
    """What nobody expected is a 500 with a request id, and no line of code in the body."""
    from podflare.host.daemon import Daemon

    def broken(self):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(Daemon, "capacity", broken)
    async with scripted(echo) as h:
        answer = await h.client.get("/v1/capacity")
        assert answer.status_code == 500 and "request id" in answer.json()["error"]
        assert "secret" not in answer.text and "Traceback" not in answer.text
