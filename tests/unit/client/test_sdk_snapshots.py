"""Snapshot calls of the SDK: what is sent, what is read, what is never repeated."""

from __future__ import annotations

import json

import httpx
import pytest
from scripted_daemon import SANDBOX_ID, ScriptedDaemon

from podflare import Client, ConnectionLost, NotBuilt, ProtocolError, Sandbox, SnapshotInfo, SnapshotNotFound

KEPT = {
    "name": "a.b",
    "engine": "microvm",
    "template": "default",
    "ram_mib": 1024,
    "rootfs_gb": 4,
    "created_at_ms": 5,
    "size_bytes": 6,
    "sandbox_id": SANDBOX_ID,
}


def test_take_list_delete_and_go_on(daemon: ScriptedDaemon, client: Client) -> None:
    """Each operation is one request, and its answer is the value that its user gets."""
    daemon.answer("POST", "/snapshots", 200, json=KEPT)
    daemon.answer("GET", "/v1/snapshots", 200, json={"snapshots": [KEPT]})
    daemon.answer("DELETE", "/snapshots/a.b", 204)
    with Sandbox(client=client) as sandbox:
        assert sandbox.snapshot("a.b", timeout=5) == SnapshotInfo(**KEPT)
        assert json.loads(daemon.requests[-1].content) == {"name": "a.b", "timeout_seconds": 5}
    assert client.snapshots() == [SnapshotInfo(**KEPT)]
    client.delete_snapshot("a.b")
    assert daemon.calls[-1] == "DELETE /v1/snapshots/a.b"
    with pytest.raises(SnapshotNotFound):
        daemon.answer("DELETE", "/snapshots/../..", 404, json={"error": "no snapshot", "code": "snapshot_not_found"})
        client.delete_snapshot("../..")
    assert daemon.requests[-1].url.raw_path == b"/v1/snapshots/..%2F.."
    daemon.answer("POST", "/v1/sandboxes", 200, json={"id": SANDBOX_ID, "snapshot": "a.b"})
    with Sandbox(client=client, snapshot="a.b"):
        assert json.loads(daemon.requests[-1].content) == {"snapshot": "a.b"}


def test_a_daemon_that_knows_no_snapshots(daemon: ScriptedDaemon, client: Client) -> None:
    """A fresh sandbox in the place of the kept one is closed, and the caller told; so is an answer that is none."""
    with pytest.raises(NotBuilt, match="older version"):
        Sandbox(client=client, snapshot="a.b")
    assert daemon.calls[-1].startswith("DELETE")
    daemon.answer("GET", "/v1/snapshots", 200, json={"snapshots": "none"})
    with pytest.raises(ProtocolError):
        client.snapshots()


def test_a_lost_answer_is_not_asked_for_again(daemon: ScriptedDaemon, client: Client) -> None:
    """A snapshot may have been taken when its answer is lost: the SDK does not take it twice."""
    daemon.fail("POST", "/snapshots", httpx.ReadError("gone"))
    with Sandbox(client=client) as sandbox:
        with pytest.raises(ConnectionLost):
            sandbox.snapshot("a.b")
        assert daemon.calls.count(f"POST /v1/sandboxes/{SANDBOX_ID}/snapshots") == 1
        with pytest.raises(TypeError):
            sandbox.snapshot(7)  # type: ignore[arg-type]  # what is to be refused
