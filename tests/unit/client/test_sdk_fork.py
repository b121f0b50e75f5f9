"""fork, merge_into and diff over a scripted daemon: what is sent, shared, and ended."""

from __future__ import annotations

import json

import httpx
import pytest
from scripted_daemon import SANDBOX_ID, ScriptedDaemon

from podflare import AsyncClient, AsyncSandbox, Client, Conflict, ConnectionLost, Sandbox, SandboxNotFound
from podflare.client import _config

DIFF = {"added": ["/root/new"], "removed": [], "modified": ["/tmp/f"]}


@pytest.fixture
def parent(daemon: ScriptedDaemon, client: Client) -> Sandbox:
    """A sandbox whose daemon forks into sbx_a and sbx_b."""
    daemon.answer("POST", "/fork", 200, json={"children": ["sbx_a", "sbx_b"]})
    daemon.answer("POST", "/merge_into/sbx_a", 204)
    daemon.answer("DELETE", "/sbx_a", 204)
    daemon.answer("DELETE", "/sbx_b", 204)
    return Sandbox(client=client)


def test_children_use_the_parents_client(daemon: ScriptedDaemon, client: Client, parent: Sandbox) -> None:
    """Fork gives sandboxes of the answered ids that talk through the very same client."""
    children = parent.fork(2, reseed=False, timeout=5)
    assert [child.id for child in children] == ["sbx_a", "sbx_b"]
    assert all(child._maybe_client is client for child in children)
    assert json.loads(daemon.requests[-1].content) == {"n": 2, "reseed": False, "timeout_seconds": 5}


def test_answer_is_waited_for_longer_than_the_fork_may_take(daemon: ScriptedDaemon, parent: Sandbox) -> None:
    """The read timeout lies above the daemon's own time limit, given or not, so that its error arrives."""
    parent.fork(2)
    assert daemon.requests[-1].extensions["timeout"]["read"] == _config.FORK_TIMEOUT_S > 50
    parent.fork(2, timeout=100)
    assert daemon.requests[-1].extensions["timeout"]["read"] > 100


@pytest.mark.parametrize("n", [0, 33, -1, 2.0])
def test_range_is_checked_before_anything_is_sent(daemon: ScriptedDaemon, parent: Sandbox, n: int) -> None:
    """n outside of 1..32 is a ValueError that names the range."""
    sent = len(daemon.requests)
    with pytest.raises(ValueError, match="1 to 32"):
        parent.fork(n)
    assert len(daemon.requests) == sent


def test_lost_answer_is_not_asked_for_again(daemon: ScriptedDaemon, parent: Sandbox) -> None:
    """A fork, or a merge, whose connection breaks may have happened: one request, and the error says so."""
    daemon.fail("POST", "/fork", httpx.RemoteProtocolError("server disconnected"))
    daemon.fail("POST", "/merge_into/sbx_a", httpx.RemoteProtocolError("server disconnected"))
    winner = Sandbox._from_id("sbx_a", parent._maybe_client)
    for call in (lambda: parent.fork(2), lambda: parent.merge_into(winner)):
        sent = len(daemon.requests)
        with pytest.raises(ConnectionLost, match="not known"):
            call()
        assert len(daemon.requests) == sent + 1
    winner.close()
    assert daemon.calls[-1] == "DELETE /v1/sandboxes/sbx_a"  # it may be there still


def test_merged_away_winner_is_silent(daemon: ScriptedDaemon, parent: Sandbox) -> None:
    """After the merge, closing the winner sends nothing and using it says what became of it."""
    winner, sibling = parent.fork(2)
    parent.merge_into(winner)
    assert daemon.calls[-1] == f"POST /v1/sandboxes/{SANDBOX_ID}/merge_into/sbx_a"
    assert "content-type" not in daemon.requests[-1].headers and daemon.requests[-1].content == b""
    sent = len(daemon.requests)
    with winner:
        pass
    winner.close()
    for use in (lambda: winner.run_code("1"), lambda: parent.merge_into(winner), lambda: parent.diff(winner)):
        with pytest.raises(SandboxNotFound, match=f"merged into {SANDBOX_ID}"):
            use()
    assert len(daemon.requests) == sent
    assert "merged into" in repr(winner)
    sibling.close()
    assert daemon.calls[-1] == "DELETE /v1/sandboxes/sbx_b"


def test_merge_into_itself(daemon: ScriptedDaemon, client: Client, parent: Sandbox) -> None:
    """The same sandbox, also by another object, is a ValueError and no request."""
    sent = len(daemon.requests)
    for same in (parent, Sandbox._from_id(SANDBOX_ID, client)):
        with pytest.raises(ValueError, match="itself"):
            parent.merge_into(same)
    assert len(daemon.requests) == sent


def test_refused_merge_leaves_the_winner_open(daemon: ScriptedDaemon, parent: Sandbox) -> None:
    """What the daemon refuses changes nothing: the winner still answers to `close`."""
    winner, _ = parent.fork(2)
    daemon.answer("POST", "/merge_into/sbx_a", 409, json={"error": "another engine", "code": "conflict"})
    with pytest.raises(Conflict, match="another engine"):
        parent.merge_into(winner)
    winner.close()
    assert daemon.calls[-1] == "DELETE /v1/sandboxes/sbx_a"


def test_diff(daemon: ScriptedDaemon, client: Client, parent: Sandbox) -> None:
    """The documented result as it is; paths and detail are asked for where wanted."""
    daemon.answer("GET", "/diff/sbx_o", 200, json=DIFF)
    other = Sandbox._from_id("sbx_o", client)
    assert parent.diff(other) == DIFF
    assert daemon.requests[-1].url.query == b""
    assert parent.diff(other, ["/data", "/etc"], detail=True) == DIFF
    assert daemon.requests[-1].url.params.get_list("paths") == ["/data", "/etc"]
    assert daemon.requests[-1].url.params["detail"] == "true"


def test_owned_client_closes_with_its_last_sandbox(
    daemon: ScriptedDaemon, monkeypatch: pytest.MonkeyPatch, parent: Sandbox
) -> None:
    """A client that the SDK made for a sandbox serves its forks after that one's end, and not longer than them.

    A winner needs no close for that.
    """
    monkeypatch.setattr(parent, "_owns_client", True)  # as if the constructor had made it
    client = parent._maybe_client
    assert client is not None
    first, second = parent.fork(2)
    winner, third = parent.fork(2)
    parent.merge_into(winner)
    parent.close()
    parent.close()
    second.close()
    third.close()
    daemon.answer("GET", "/replay", 200)
    assert first.replay() == []
    first.close()
    with pytest.raises(Conflict, match="closed"):
        client.capacity()


@pytest.mark.anyio
async def test_asynchronous_twins(daemon: ScriptedDaemon, async_client: AsyncClient) -> None:
    """fork, merge_into and diff are awaited and do the same."""
    daemon.answer("POST", "/fork", 200, json={"children": ["sbx_a", "sbx_b"]})
    daemon.answer("POST", "/merge_into/sbx_a", 204)
    daemon.answer("GET", "/diff/sbx_b", 200, json=DIFF)
    async with AsyncSandbox(client=async_client) as parent:
        winner, other = await parent.fork(2, reseed=False)
        assert await parent.diff(other) == DIFF
        await parent.merge_into(winner)
        sent = len(daemon.requests)
        await winner.close()
        assert len(daemon.requests) == sent
        with pytest.raises(ValueError, match="1 to 32"):
            await parent.fork(33)
