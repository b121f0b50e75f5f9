"""merge over a scripted daemon: what is sent, how conflicts are told, and how a rule decides them."""

from __future__ import annotations

import json
import pickle
from typing import Any

import httpx
import pytest
from scripted_daemon import SANDBOX_ID, ScriptedDaemon

from podflare import (
    AsyncClient,
    AsyncSandbox,
    Client,
    ConflictInfo,
    ConnectionLost,
    MergeConflict,
    MergeReport,
    MergeSide,
    NotTransferable,
    ProtocolError,
    Sandbox,
)
from podflare.client import _config

CONFLICT = {
    "kind": "file",
    "name": "/root/f",
    "why": "both changed the same lines",
    "ours": {"type": "file", "size": 3},
    "theirs": None,
    "version": "v1",
    "resolution": None,
}
DONE = {
    "merged": {"files": ["/root/f"], "variables": ["x"]},
    "conflicts": [],
    "not_transferable": [{"kind": "variable", "name": "g", "type": "generator", "why": "it is running"}],
    "applied": True,
}


def refused(*conflicts: dict[str, Any]) -> dict[str, Any]:
    return {**DONE, "applied": False, "conflicts": list(conflicts)}


@pytest.fixture
def pair(client: Client) -> tuple[Sandbox, Sandbox]:
    """Two sandboxes of the scripted daemon."""
    return Sandbox(client=client), Sandbox._from_id("sbx_b", client)


def sent(daemon: ScriptedDaemon) -> list[dict[str, Any]]:
    return [json.loads(request.content) for request in daemon.requests if "/merge/" in request.url.path]


def test_report_of_a_merge(daemon: ScriptedDaemon, pair: tuple[Sandbox, Sandbox]) -> None:
    """The daemon's report comes back as frozen values, for the whole and for what is named."""
    daemon.answer("POST", "/merge/sbx_b", 200, json=DONE)
    report = pair[0].merge(pair[1])
    assert report == MergeReport(
        applied=True,
        files=("/root/f",),
        variables=("x",),
        not_transferable=(NotTransferable("variable", "g", "generator", "it is running"),),
    )
    assert daemon.requests[-1].url.path == f"/v1/sandboxes/{SANDBOX_ID}/merge/sbx_b"
    assert daemon.requests[-1].extensions["timeout"]["read"] == _config.FORK_TIMEOUT_S
    pair[0].merge(pair[1], ["/root"], ["x"], "theirs", timeout=100)
    assert daemon.requests[-1].extensions["timeout"]["read"] > 100
    assert sent(daemon) == [
        {"files": True, "variables": True, "on_conflict": "error"},
        {"files": ["/root"], "variables": ["x"], "on_conflict": "theirs", "timeout_seconds": 100},
    ]


def test_conflicts_raise_with_the_report(daemon: ScriptedDaemon, pair: tuple[Sandbox, Sandbox]) -> None:
    """A merge that was not applied is a MergeConflict that names each conflict, and survives pickling."""
    daemon.answer("POST", "/merge/sbx_b", 200, json=refused(CONFLICT))
    with pytest.raises(MergeConflict, match=r"a conflict, nothing has changed.*'/root/f': both changed") as caught:
        pair[0].merge(pair[1])
    (item,) = caught.value.report.unresolved
    assert item == ConflictInfo("file", "/root/f", CONFLICT["why"], MergeSide("file", 3), None, "v1")
    assert pickle.loads(pickle.dumps(caught.value)).report == caught.value.report


def test_a_rule_is_asked_about_each_conflict_once(daemon: ScriptedDaemon, pair: tuple[Sandbox, Sandbox]) -> None:
    """Its answers are sent for exactly what it saw; what changed meanwhile it is asked again."""
    other = {**CONFLICT, "kind": "variable", "name": "x", "version": "v7"}
    decided = {**CONFLICT, "resolution": "theirs"}
    answers = [refused(CONFLICT, other), refused(decided, {**other, "version": "v8"}), DONE]
    daemon.on("POST", "/merge/sbx_b", lambda request: httpx.Response(200, json=answers.pop(0)))
    asked = []

    def rule(item: ConflictInfo) -> str:
        asked.append((item.name, item.version))
        return "theirs" if item.kind == "file" else "ours"

    assert pair[0].merge(pair[1], on_conflict=rule).applied
    assert asked == [("/root/f", "v1"), ("x", "v7"), ("x", "v8")]
    assert [body.get("resolutions") for body in sent(daemon)] == [
        None,
        [
            {"kind": "file", "name": "/root/f", "resolution": "theirs", "version": "v1"},
            {"kind": "variable", "name": "x", "resolution": "ours", "version": "v7"},
        ],
        [
            {"kind": "file", "name": "/root/f", "resolution": "theirs", "version": "v1"},
            {"kind": "variable", "name": "x", "resolution": "ours", "version": "v8"},
        ],
    ]


def test_a_rule_that_fails_or_never_ends_the_conflict(daemon: ScriptedDaemon, pair: tuple[Sandbox, Sandbox]) -> None:
    """What it raises comes out; an answer that is no side is a ValueError; endless conflicts end as MergeConflict."""
    daemon.answer("POST", "/merge/sbx_b", 200, json=refused(CONFLICT))
    with pytest.raises(ZeroDivisionError):
        pair[0].merge(pair[1], on_conflict=lambda item: 1 / 0)
    with pytest.raises(ValueError, match="must return"):
        pair[0].merge(pair[1], on_conflict=lambda item: None)
    with pytest.raises(MergeConflict):
        pair[0].merge(pair[1], on_conflict=lambda item: "ours")


@pytest.mark.anyio
async def test_a_rule_may_be_a_coroutine_function(daemon: ScriptedDaemon, async_client: AsyncClient) -> None:
    """In an AsyncSandbox."""
    answers = [refused(CONFLICT), DONE]
    daemon.on("POST", "/merge/sbx_b", lambda request: httpx.Response(200, json=answers.pop(0)))

    async def rule(item: ConflictInfo) -> str:
        return "ours"

    sandbox = await AsyncSandbox.create(client=async_client)
    assert (await sandbox.merge(AsyncSandbox._from_id("sbx_b", async_client), on_conflict=rule)).applied


def test_arguments_are_checked_before_anything_is_sent(daemon: ScriptedDaemon, pair: tuple[Sandbox, Sandbox]) -> None:
    """Itself, texts in the place of lists, and unknown words are refused."""
    for arguments in (
        {"other": pair[0]},
        {"files": "/root"},
        {"files": []},
        {"variables": [1]},
        {"on_conflict": "mine"},
        {"timeout": 0},
    ):
        with pytest.raises((ValueError, TypeError)):
            pair[0].merge(**{"other": pair[1], **arguments})
    assert sent(daemon) == []


def test_lost_and_odd_answers(daemon: ScriptedDaemon, pair: tuple[Sandbox, Sandbox]) -> None:
    """A lost answer is not asked for again; one that is no report is a ProtocolError."""
    daemon.fail("POST", "/merge/sbx_b", httpx.RemoteProtocolError("server disconnected"))
    with pytest.raises(ConnectionLost, match="not known"):
        pair[0].merge(pair[1])
    assert len(sent(daemon)) == 1
    for odd in ({}, {"merged": 1}, {**DONE, "conflicts": [1]}):
        daemon.answer("POST", "/merge/sbx_b", 200, json=odd)
        with pytest.raises(ProtocolError, match="no report"):
            pair[0].merge(pair[1])
