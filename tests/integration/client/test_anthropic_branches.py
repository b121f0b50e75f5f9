"""Conversations that branch: forks of the sandbox with copies of the history, of which one is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from daemons import ServedDaemon
from podflare import AsyncSandbox, BadRequest, Conflict, Sandbox, SandboxNotFound
from podflare.integrations.anthropic import branch, branch_async, commit, commit_async

pytestmark = pytest.mark.timeout(90)


def history() -> list[Any]:
    return [
        {"role": "user", "content": "What is x?"},
        {"role": "assistant", "content": [SimpleNamespace(type="text", text="Let me see.")]},
    ]


def living(daemon: ServedDaemon) -> int:
    return len(Sandbox.list(host=daemon.url))


def test_each_branch_has_its_own_sandbox_and_history(sandbox: Sandbox, sdk_daemon: ServedDaemon) -> None:
    """What one branch does or says reaches neither the others nor the origin; the winner's becomes the origin's."""
    sandbox.run_code("x = 1")
    messages = history()
    with branch(sandbox, messages, 3) as branches:
        assert (len(branches), living(sdk_daemon)) == (3, 4)
        for number, one in enumerate(branches):
            own, said = one
            assert (own, said) == (one.sandbox, one.messages)
            own.run_code(f"x += {number}")
            said.append({"role": "user", "content": str(number)})
            said[1]["content"][0].text = f"changed by {number}"
        assert [one.sandbox.run_code("print(x)").stdout for one in branches] == ["1", "2", "3"]
        assert sandbox.run_code("print(x)").stdout == "1"
        assert messages == history()
        kept = commit(branches[2])
        assert living(sdk_daemon) == 1
    assert (kept[-1]["content"], kept[1]["content"][0].text) == ("2", "changed by 2")
    assert sandbox.run_code("print(x)").stdout == "3"


def test_branches_that_are_not_committed_are_closed(sandbox: Sandbox, sdk_daemon: ServedDaemon) -> None:
    """Leaving the block without a commit, also by an exception, leaves the origin as it was and nothing else."""
    sandbox.run_code("x = 1")
    with pytest.raises(ZeroDivisionError), branch(sandbox, [], 2) as branches:
        branches[0].sandbox.run_code("x = 2")
        raise ZeroDivisionError
    assert living(sdk_daemon) == 1
    assert sandbox.run_code("print(x)").stdout == "1"
    with pytest.raises(SandboxNotFound):
        branches[0].sandbox.run_code("1")
    with pytest.raises(Conflict):
        commit(branches[0])
    branches.close()


def test_one_commit_only(sandbox: Sandbox, sdk_daemon: ServedDaemon) -> None:
    """A second winner is refused, and a merge that fails closes nothing."""
    branches = branch(sandbox, [], 3)
    try:
        branches[0].sandbox.close()
        with pytest.raises(SandboxNotFound):
            commit(branches[0])
        assert living(sdk_daemon) == 3
        commit(branches[1])
        assert living(sdk_daemon) == 1
        with pytest.raises(Conflict):
            commit(branches[2])
    finally:
        branches.close()


def test_branches_of_branches(sandbox: Sandbox, sdk_daemon: ServedDaemon) -> None:
    """A branch can be branched again, and commits go up step by step."""
    sandbox.run_code("path = ''")
    with branch(sandbox, ["root"], 2) as outer:
        outer[1].sandbox.run_code("path += 'b'")
        with branch(outer[1].sandbox, outer[1].messages, 2) as inner:
            inner[0].sandbox.run_code("path += 'a'")
            inner[0].messages.append("leaf")
            outer[1].messages = commit(inner[0])
        assert commit(outer[1]) == ["root", "leaf"]
    assert sandbox.run_code("print(path)").stdout == "ba"
    assert living(sdk_daemon) == 1


def test_what_cannot_be_branched_or_committed(sandbox: Sandbox, sdk_daemon: ServedDaemon) -> None:
    """A wrong number, or a winner that is no branch, is told before anything is done."""
    for wrong in (0, 33, True, "2", None):
        with pytest.raises(BadRequest, match="1 to 32"):
            branch(sandbox, [], wrong)  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(BadRequest, match="branch"):
        commit((sandbox, []))  # type: ignore[arg-type]  # likewise
    assert living(sdk_daemon) == 1


@pytest.mark.anyio
async def test_the_same_with_async_sandboxes(sdk_daemon: ServedDaemon) -> None:
    """branch_async in `async with` or awaited, and commit_async, do the same."""
    async with AsyncSandbox(host=sdk_daemon.url) as sandbox:
        await sandbox.run_code("x = 1")
        async with branch_async(sandbox, history(), 2) as branches:
            await branches[1].sandbox.run_code("x = 2")
            branches[1].messages.append("kept")
            with pytest.raises(BadRequest, match="Branches"):
                commit(branches[1])  # type: ignore[arg-type]  # the point of the test
            assert (await commit_async(branches[1]))[-1] == "kept"
        assert (await sandbox.run_code("print(x)")).stdout == "2"
        opened = await branch_async(sandbox, [], 2)
        assert len(await AsyncSandbox.list(host=sdk_daemon.url)) == 3
        await opened.close()
        with pytest.raises(Conflict):
            await commit_async(opened[0])
        assert len(await AsyncSandbox.list(host=sdk_daemon.url)) == 1
