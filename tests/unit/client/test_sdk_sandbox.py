"""Sandbox and Client over a scripted daemon: what is sent, what is raised, what is cleaned up."""

from __future__ import annotations

import gc
import json
import warnings
from datetime import datetime, timezone
from pathlib import Path

import httpx
import pytest
from scripted_daemon import SANDBOX_ID, ScriptedDaemon, ndjson

from podflare import (
    Client,
    Conflict,
    ConnectionLost,
    DaemonUnreachable,
    DeadlineExceeded,
    NotBuilt,
    PodflareWarning,
    ProtocolError,
    Sandbox,
    SandboxEndingWarning,
    SandboxNotFound,
    Unauthorized,
)

DONE = ndjson({"type": "stdout", "data": "42"}, {"type": "exit", "data": 0})


def test_create_run_close(daemon: ScriptedDaemon, client: Client) -> None:
    """The three calls of a `with` block, with the body that the wire wants."""
    daemon.answer("POST", "/exec", 200, content=DONE)
    with Sandbox(client=client, template="python-datasci", egress=False) as sandbox:
        assert sandbox.id == SANDBOX_ID
        assert sandbox.run_code("print(42)", timeout=3).stdout == "42"
        assert sandbox.run_code("echo 42", "bash").ok
    assert daemon.calls == [
        "POST /v1/sandboxes",
        f"POST /v1/sandboxes/{SANDBOX_ID}/exec",
        f"POST /v1/sandboxes/{SANDBOX_ID}/exec",
        f"DELETE /v1/sandboxes/{SANDBOX_ID}",
    ]
    bodies = [json.loads(request.content) for request in daemon.requests[:3]]
    assert bodies == [
        {"template": "python-datasci", "egress": False},
        {"code": "print(42)", "language": "python", "timeout_seconds": 3},
        {"code": "echo 42", "language": "bash"},
    ]
    assert "content-type" not in daemon.requests[3].headers


def test_credentials_and_trace_context_go_with_every_request(daemon: ScriptedDaemon) -> None:
    """Bearer token and traceparent are headers of each request; no compression is asked for."""
    transport = httpx.MockTransport(daemon)
    client = Client("http://daemon.test/r/eu/", traceparent="00-a-b-01", api_key="pf_1", transport=transport)
    Sandbox(client=client).close()
    for request in daemon.requests:
        assert request.headers["authorization"] == "Bearer pf_1"
        assert request.headers["traceparent"] == "00-a-b-01"
        assert request.headers["accept-encoding"] == "identity"
        assert request.url.path.startswith("/r/eu/v1/")


def test_endpoint_of_the_answer_is_never_followed(
    daemon: ScriptedDaemon, client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An `endpoint` in the create answer neither moves the sandbox nor leaves a file that moves later ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    daemon.answer("POST", "/v1/sandboxes", 200, json={"id": SANDBOX_ID, "endpoint": "http://elsewhere.test"})
    Sandbox(client=client).close()
    assert {request.url.host for request in daemon.requests} == {"daemon.test"}
    assert list(tmp_path.iterdir()) == []


def test_stream_is_lazy_and_yields_every_event(daemon: ScriptedDaemon, client: Client) -> None:
    """Nothing is sent before the first event is asked for; unknown types are yielded too."""
    daemon.answer("POST", "/exec", 200, content=ndjson({"type": "new", "data": 1}) + b"\n\n" + DONE)
    sandbox = Sandbox(client=client)
    stream = sandbox.run_code_stream("print(42)")
    assert daemon.calls == ["POST /v1/sandboxes"]
    assert [event.type for event in stream] == ["new", "stdout", "exit"]


def test_leaving_a_stream_early_closes_its_request(daemon: ScriptedDaemon, client: Client) -> None:
    """Breaking out of the loop ends the request, so the daemon interrupts the cell."""
    closed = []

    class Endless(httpx.SyncByteStream):
        def __iter__(self):  # type: ignore[no-untyped-def]  # httpx's interface
            while True:
                yield DONE[: DONE.index(b"\n") + 1]

        def close(self) -> None:
            closed.append(True)

    daemon.on("POST", "/exec", lambda _: httpx.Response(200, stream=Endless()))
    for _event in Sandbox(client=client).run_code_stream("while True: print(42)"):
        break
    gc.collect()
    assert closed == [True]


def test_missing_sandbox_carries_the_daemons_reason(daemon: ScriptedDaemon, client: Client) -> None:
    """A sandbox that is gone says why, and is what users of a bare client catch."""
    reason = {"error": f"sandbox {SANDBOX_ID} is gone: idle for 300 s", "code": "sandbox_not_found"}
    daemon.answer("POST", "/exec", 404, json=reason)
    with pytest.raises(SandboxNotFound, match="idle for 300 s") as caught:
        Sandbox(client=client).run_code("1")
    assert isinstance(caught.value, httpx.HTTPStatusError)
    assert caught.value.response.status_code == 404


def test_bare_error_bodies_of_401(daemon: ScriptedDaemon, client: Client) -> None:
    """Both documented texts of a refused key arrive in the message."""
    for text in ("missing Authorization: Bearer <key>", "invalid api key"):
        daemon.answer("POST", "/v1/sandboxes", 401, json={"error": text})
        with pytest.raises(Unauthorized, match=text):
            Sandbox(client=client)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (httpx.ReadTimeout("silence"), DeadlineExceeded),
        (httpx.ConnectError("refused"), DaemonUnreachable),
        (httpx.RemoteProtocolError("cut"), ConnectionLost),
    ],
)
def test_failed_connection_while_running(
    daemon: ScriptedDaemon, client: Client, failure: Exception, expected: type[Exception]
) -> None:
    """Each kind of failure is ours and httpx's; a cell is never sent twice."""
    daemon.fail("POST", "/exec", failure)
    sandbox = Sandbox(client=client)
    with pytest.raises(expected) as caught:
        sandbox.run_code("1")
    assert isinstance(caught.value, type(failure))
    assert len([call for call in daemon.calls if call.endswith("/exec")]) == 1


def test_redirects_are_not_followed(daemon: ScriptedDaemon, client: Client) -> None:
    """A redirect is an error that names the status, so code never goes where nobody pointed it."""
    daemon.answer("POST", "/v1/sandboxes", 307, headers={"location": "http://elsewhere.test"})
    with pytest.raises(httpx.HTTPStatusError, match="307"):
        Sandbox(client=client)


def test_create_is_repeated_once_with_its_key(daemon: ScriptedDaemon, client: Client) -> None:
    """A create whose connection broke is asked again with the same Idempotency-Key, so none leaks."""

    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError("server disconnected")

    daemon.on("POST", "/v1/sandboxes", broken, lambda _: httpx.Response(201, json={"id": SANDBOX_ID}))
    assert Sandbox(client=client).id == SANDBOX_ID
    keys = [request.headers["idempotency-key"] for request in daemon.requests]
    assert len(keys) == 2 and keys[0] == keys[1]


def test_an_engine_that_an_old_daemon_does_not_heed(daemon: ScriptedDaemon, client: Client) -> None:
    """A sandbox of another engine than was asked for is closed at once, and the caller told."""
    daemon.answer("POST", "/v1/sandboxes", 200, json={"id": SANDBOX_ID, "engine": "process"})
    with pytest.raises(NotBuilt, match="older version"):
        Sandbox(client=client, engine="microvm")
    assert daemon.calls[-1] == f"DELETE /v1/sandboxes/{SANDBOX_ID}"
    with Sandbox(client=client, engine="process") as sandbox:
        assert json.loads(daemon.requests[-1].content) == {"engine": "process"}
        assert sandbox.id == SANDBOX_ID


def test_each_create_has_its_own_key(daemon: ScriptedDaemon, client: Client) -> None:
    """Two sandboxes are two creates."""
    Sandbox(client=client), Sandbox(client=client)
    assert len({request.headers["idempotency-key"] for request in daemon.requests}) == 2


def test_interrupted_create_leaves_no_sandbox(daemon: ScriptedDaemon, client: Client) -> None:
    """Ctrl-C during a create finds out by its key which sandbox that was, and closes it."""

    def interrupted(request: httpx.Request) -> httpx.Response:
        raise KeyboardInterrupt

    daemon.on("POST", "/v1/sandboxes", interrupted, lambda _: httpx.Response(200, json={"id": SANDBOX_ID}))
    with pytest.raises(KeyboardInterrupt):
        Sandbox(client=client)
    assert daemon.calls == ["POST /v1/sandboxes", "POST /v1/sandboxes", f"DELETE /v1/sandboxes/{SANDBOX_ID}"]


def test_warnings_of_the_daemon_reach_the_users_line(daemon: ScriptedDaemon, client: Client) -> None:
    """What was asked for and is not given is a PodflareWarning that points at this file."""
    answer = {"id": SANDBOX_ID, "warnings": ["ram_mib is not enforced"]}
    daemon.answer("POST", "/v1/sandboxes", 200, json=answer)
    with pytest.warns(PodflareWarning, match="not enforced") as caught:
        Sandbox(client=client)
    assert caught[0].filename == __file__


def test_warning_as_error_leaves_no_sandbox(daemon: ScriptedDaemon, client: Client) -> None:
    """Where warnings are errors, the sandbox that nobody gets is closed."""
    daemon.answer("POST", "/v1/sandboxes", 200, json={"id": SANDBOX_ID, "warnings": ["less"]})
    with warnings.catch_warnings(), pytest.raises(PodflareWarning):
        warnings.simplefilter("error")
        Sandbox(client=client)
    assert daemon.calls[-1] == f"DELETE /v1/sandboxes/{SANDBOX_ID}"


def test_the_near_end_is_a_warning_while_the_cell_runs(daemon: ScriptedDaemon, client: Client) -> None:
    """A warning event is a SandboxEndingWarning at the caller's line and in the result; a stream yields it as it is."""
    ending = {"kind": "ending", "message": "this sandbox ends in 60 s", "seconds_left": 60.0, "ends_at_ms": 1}
    daemon.answer("POST", "/exec", 200, content=ndjson({"type": "warning", "data": ending}) + DONE)
    sandbox = Sandbox(client=client)
    with pytest.warns(SandboxEndingWarning, match="ends in 60 s") as caught:
        result = sandbox.run_code("1")
    assert [one.filename for one in caught] == [__file__]
    assert (result.stdout, result.exit_code, result.warnings) == ("42", 0, ["this sandbox ends in 60 s"])
    with pytest.warns(SandboxEndingWarning, match="ends in 60 s"):
        assert sandbox.run_code("1", tools={"f": print}).warnings
    events = list(sandbox.run_code_stream("1"))
    assert (events[0].type, events[0].data) == ("warning", ending)


def test_info_tells_when_it_ends(daemon: ScriptedDaemon, client: Client) -> None:
    """`info().expires_at` is a time with a zone; older daemons and endless sandboxes give None."""
    sandbox = Sandbox(client=client)
    told = {"id": SANDBOX_ID, "expires_at_ms": 1_776_510_028_036, "seconds_left": 59, "idle_seconds_left": 1.5}
    daemon.answer("GET", SANDBOX_ID, 200, json=told)
    info = sandbox.info()
    assert info.expires_at == datetime(2026, 4, 18, 11, 0, 28, 36000, tzinfo=timezone.utc)
    assert (info.seconds_left, info.idle_seconds_left) == (59.0, 1.5)
    daemon.answer("GET", SANDBOX_ID, 200, json={"id": SANDBOX_ID})
    assert (sandbox.info().expires_at, sandbox.info().seconds_left) == (None, None)


def test_close_is_idempotent_and_gone_is_closed(daemon: ScriptedDaemon, client: Client) -> None:
    """Closing twice sends one request; a sandbox that was reaped meanwhile raises nothing."""
    daemon.answer("DELETE", SANDBOX_ID, 404, json={"error": "sandbox not found"})
    sandbox = Sandbox(client=client)
    sandbox.close()
    sandbox.close()
    assert [call for call in daemon.calls if call.startswith("DELETE")] == [f"DELETE /v1/sandboxes/{SANDBOX_ID}"]


def test_close_that_could_not_be_told_raises_and_can_be_repeated(daemon: ScriptedDaemon, client: Client) -> None:
    """Where a sandbox may live on, close says so, and works once the daemon answers again."""
    sandbox = Sandbox(client=client)
    daemon.fail("DELETE", SANDBOX_ID, httpx.ConnectError("refused"))
    with pytest.raises(DaemonUnreachable):
        sandbox.close()
    daemon.answer("DELETE", SANDBOX_ID, 204)
    sandbox.close()
    assert daemon.calls[-1].startswith("DELETE")


def test_with_never_masks_the_bodys_exception(daemon: ScriptedDaemon, client: Client) -> None:
    """A close that fails while an exception is under way leaves that exception the one to see."""
    daemon.fail("DELETE", SANDBOX_ID, httpx.ConnectError("refused"))
    with pytest.raises(KeyError, match="mine"), Sandbox(client=client):
        raise KeyError("mine")


def test_closed_sandbox_refuses_without_asking(daemon: ScriptedDaemon, client: Client) -> None:
    """Every use after close is a SandboxNotFound (an HTTPStatusError 404), file operations also an OSError."""
    sandbox = Sandbox(client=client)
    sandbox.close()
    sent = len(daemon.requests)
    with pytest.raises(httpx.HTTPStatusError, match="closed by this program"):
        sandbox.run_code("1")
    with pytest.raises(OSError, match="closed by this program"):
        sandbox.download("/x")
    with pytest.raises(SandboxNotFound):
        list(sandbox.run_code_stream("1"))
    assert len(daemon.requests) == sent


def test_closed_client_says_so(client: Client) -> None:
    """A client that was closed is not silently opened again."""
    client.close()
    with pytest.raises(Conflict, match="closed"):
        client.capacity()


def test_failed_create_closes_the_own_client() -> None:
    """A constructor that raises leaves nothing to close."""
    with pytest.raises(DaemonUnreachable, match="podflare serve"):
        Sandbox(host="http://127.0.0.1:9")


def test_connect_checks_the_id(daemon: ScriptedDaemon, client: Client) -> None:
    """`Sandbox.connect` reaches a living sandbox by id and fails at once for one that is gone."""
    daemon.answer("GET", SANDBOX_ID, 200, json={"id": SANDBOX_ID, "engine": "process"})
    assert Sandbox.connect(SANDBOX_ID, client=client).id == SANDBOX_ID
    with pytest.raises(SandboxNotFound):
        Sandbox.connect("sbx_gone", client=client)


def test_from_id_asks_nothing(daemon: ScriptedDaemon, client: Client) -> None:
    """The known way to reconnect works without a request, and leaves the client open."""
    sandbox = Sandbox._from_id(SANDBOX_ID, client)
    assert daemon.calls == []
    sandbox.close()
    assert client.healthz() is False


def test_list_and_info(daemon: ScriptedDaemon, client: Client) -> None:
    """The living sandboxes and one's effective values."""
    daemon.answer("GET", "/v1/sandboxes", 200, json={"sandboxes": [{"id": "a", "ram_mib": 512}]})
    daemon.answer("GET", SANDBOX_ID, 200, json={"id": SANDBOX_ID, "engine": "process", "isolation": ["seccomp"]})
    assert [(info.id, info.ram_mib) for info in Sandbox.list(client=client)] == [("a", 512)]
    assert Sandbox(client=client).info().isolation == ("seccomp",)


def test_healthz_tells_only_a_healthy_daemon(daemon: ScriptedDaemon, client: Client) -> None:
    """Status 200 and the text ok; anything else, a dead daemon included, is False."""
    daemon.answer("GET", "/v1/healthz", 200, content=b" ok\n")
    assert client.healthz() is True
    daemon.answer("GET", "/v1/healthz", 200, content=b"<html>")
    assert client.healthz() is False
    daemon.fail("GET", "/v1/healthz", httpx.ConnectError("refused"))
    assert client.healthz() is False


def test_replay_output_interrupt_capacity(daemon: ScriptedDaemon, client: Client) -> None:
    """The smaller calls send what the API wants and give back its values."""
    daemon.answer("GET", "/replay", 200, content=DONE)
    daemon.answer("GET", "/output", 200, content=b"whole\xff")
    daemon.answer("POST", "/interrupt", 200, json={"interrupted": True, "cell_id": "c1"})
    daemon.answer("GET", "/v1/capacity", 200, json={"sandboxes": 1})
    sandbox = Sandbox(client=client)
    assert [event.data for event in sandbox.replay()] == ["42", 0]
    assert sandbox.output("c/1", "stderr") == b"whole\xff"
    assert daemon.requests[-1].url.raw_path.endswith(b"/cells/c%2F1/output?stream=stderr")
    assert sandbox.interrupt() is True
    assert client.capacity() == {"sandboxes": 1}


def test_what_is_not_built_says_so(daemon: ScriptedDaemon, client: Client) -> None:
    """Spaces and terminals raise NotBuilt, which also is NotImplementedError."""
    daemon.answer("POST", "/resume", 501, json={"error": "spaces is not built yet", "code": "not_built"})
    sandbox = Sandbox(client=client)
    attempts = (
        lambda: Sandbox.resume("spc_1", client=client),
        lambda: sandbox.pty.create(cmd="bash"),
        lambda: sandbox.pty.attach("pty_1"),
        lambda: sandbox.pty.list(),
        lambda: client.pty_list(sandbox.id),
    )
    for attempt in attempts:
        with pytest.raises(NotImplementedError, match="not built yet") as caught:
            attempt()
        assert isinstance(caught.value, NotBuilt)
    with pytest.raises(ValueError, match="empty"):
        sandbox.pty.create(cmd=[])


def test_upload_takes_both_orders_and_every_kind_of_bytes(
    daemon: ScriptedDaemon, client: Client, tmp_path: Path
) -> None:
    """Source first or path first with bytes; bytes, bytearray, memoryview, str and PathLike sources."""
    daemon.answer("PUT", "/files", 204)
    local = tmp_path / "local.bin"
    local.write_bytes(b"from file")
    sandbox = Sandbox(client=client)
    sandbox.upload(b"one", "/data/x")
    sandbox.upload("/data/x", b"two")
    sandbox.upload(bytearray(b"three"), "/data/x")
    sandbox.upload(memoryview(b"four"), "/data/x")
    sandbox.upload(str(local), "/data/x")
    sandbox.upload(local, "/data/x")
    sandbox.upload_file(local, "/data/x")
    puts = [request for request in daemon.requests if request.method == "PUT"]
    assert [put.content for put in puts] == [b"one", b"two", b"three", b"four", *[b"from file"] * 3]
    assert all(put.url.params["path"] == "/data/x" for put in puts)
    assert [put.headers["content-length"] for put in puts] == ["3", "3", "5", "4", "9", "9", "9"]


def test_upload_of_what_cannot_be_meant(daemon: ScriptedDaemon, client: Client, tmp_path: Path) -> None:
    """Two contents, or numbers, are a TypeError; a missing local file a FileNotFoundError; nothing is sent."""
    sandbox = Sandbox(client=client)
    for first, second in ((b"a", b"b"), (1, "/x"), ("/x", 1)):
        with pytest.raises(TypeError, match="upload"):
            sandbox.upload(first, second)  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(FileNotFoundError):
        sandbox.upload(str(tmp_path / "none"), "/x")
    assert daemon.calls == ["POST /v1/sandboxes"]


def test_large_sources_are_sent_in_pieces(daemon: ScriptedDaemon, client: Client) -> None:
    """Content above a piece's size arrives whole and in order."""
    daemon.answer("PUT", "/files", 204)
    content = bytes(range(256)) * 12_000
    Sandbox(client=client).upload(content, "/x")
    assert daemon.requests[-1].content == content


def test_download_file_appears_whole_or_not_at_all(daemon: ScriptedDaemon, client: Client, tmp_path: Path) -> None:
    """A download that breaks leaves the old file and nothing beside it."""

    class Broken(httpx.SyncByteStream):
        def __iter__(self):  # type: ignore[no-untyped-def]  # httpx's interface
            yield b"half"
            raise httpx.RemoteProtocolError("peer closed connection")

    target = tmp_path / "out.bin"
    sandbox = Sandbox(client=client)
    daemon.answer("GET", "/files", 200, content=b"x" * 3_000_000)
    assert sandbox.download_file("/x", target) == 3_000_000
    daemon.on("GET", "/files", lambda _: httpx.Response(200, stream=Broken()))
    with pytest.raises(OSError, match="download failed"):
        sandbox.download_file("/x", target)
    with pytest.raises(ConnectionLost):
        sandbox.download("/x")
    assert target.stat().st_size == 3_000_000
    assert list(tmp_path.iterdir()) == [target]


def test_missing_file_in_the_sandbox(daemon: ScriptedDaemon, client: Client) -> None:
    """download of a path that is not there is an OSError with the daemon's text."""
    daemon.answer("GET", "/files", 404, json={"error": "/nope: no such file", "code": "file_missing"})
    with pytest.raises(OSError, match="download failed: /nope: no such file"):
        Sandbox(client=client).download("/nope")


def test_answer_that_is_no_create_answer(daemon: ScriptedDaemon, client: Client) -> None:
    """Some other server's 200 is a ProtocolError that asks whether this is a podflare daemon."""
    daemon.answer("POST", "/v1/sandboxes", 200, content=b"<html>")
    with pytest.raises(ProtocolError, match="podflare daemon"):
        Sandbox(client=client)


def test_endless_error_body_is_not_read_to_its_end(daemon: ScriptedDaemon, client: Client) -> None:
    """Of an error's body only the start is kept."""

    class Endless(httpx.SyncByteStream):
        def __iter__(self):  # type: ignore[no-untyped-def]  # httpx's interface
            while True:
                yield b"x" * 10_000

    daemon.on("POST", "/exec", lambda _: httpx.Response(500, stream=Endless()))
    with pytest.raises(httpx.HTTPStatusError, match="HTTP 500"):
        Sandbox(client=client).run_code("1")
