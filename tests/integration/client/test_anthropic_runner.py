"""The real `anthropic` package drives the tools: its tool runner, and the plain loop, against a scripted API."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from anthropic_upstream import MODEL, Upstream, script
from daemons import ServedDaemon
from podflare import AsyncSandbox, Sandbox
from podflare.integrations.anthropic import (
    AsyncBashTool,
    AsyncCodeExecutionTool,
    AsyncTextEditorTool,
    BashTool,
    CodeExecutionTool,
    TextEditorTool,
    bash_code_execution_tool,
    bash_tool,
    code_execution_tool,
    run_tool_uses,
    text_editor_code_execution_tool,
    text_editor_tool,
)

pytestmark = pytest.mark.timeout(90)

ROUNDS = (
    [
        {"text": "First."},
        {"tool": "bash", "input": {"command": "cd /tmp; printf 'a\\nb\\n' > f; pwd"}},
        {"tool": "code_execution", "input": {"code": "x = open('/tmp/f').read()\nprint(len(x))"}},
    ],
    [
        {"tool": "str_replace_based_edit_tool", "input": {"command": "insert", "path": "/tmp/f", "insert_line": 1,
                                                          "insert_text": "c"}},
        {"tool": "bash", "input": {"command": "cat f; false"}},
        {"tool": "code_execution", "input": {"code": "print(x.count('a'))\n1 / 0"}},
    ],
    [{"echo": True}],
)  # fmt: skip


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    """The scripted API."""
    with Upstream() as upstream:
        yield upstream


@pytest.fixture
def client(upstream: Upstream) -> Iterator[anthropic.Anthropic]:
    """The SDK's client of it."""
    http = anthropic.DefaultHttpxClient(trust_env=False)
    with anthropic.Anthropic(base_url=upstream.url, api_key="k", max_retries=0, http_client=http) as client:
        yield client


def check_last_results(told: str) -> None:
    """What the model was told of the last round."""
    inserted, shell, code = json.loads(told)
    assert "after line 1" in inserted[0]["text"]
    assert shell[0]["text"] == "a\nc\nb\nexit_code: 1"
    assert code[0]["text"].startswith("stdout:\n1\n") and "ZeroDivisionError" in code[0]["text"]


def test_the_tool_runner_runs_our_tools(
    client: anthropic.Anthropic, upstream: Upstream, sdk_daemon: ServedDaemon
) -> None:
    """The SDK's runner declares the tools, calls them, and tells the model results and failures."""
    with Sandbox(host=sdk_daemon.url) as sandbox:
        tools = [CodeExecutionTool(sandbox), BashTool(sandbox), TextEditorTool(sandbox, max_characters=1000)]
        runner = client.beta.messages.tool_runner(
            model=MODEL,
            max_tokens=100,
            tools=tools,
            thread=False,
            messages=[{"role": "user", "content": script(*ROUNDS)}],
        )
        last = runner.until_done()
        for tool in tools:
            tool.close()
        assert sandbox.run_code("print(x)").stdout == "a\nb\n", "it was given, so it is not closed"
    check_last_results(last.content[0].text)
    sent = upstream.requests[-1]
    assert sent["tools"] == [code_execution_tool(), bash_tool(), text_editor_tool(1000)]
    assert [result.get("is_error", False) for result in sent["messages"][-1]["content"]] == [False, True, True]


@pytest.mark.anyio
async def test_the_asynchronous_runner_does_so_too(upstream: Upstream, sdk_daemon: ServedDaemon) -> None:
    """The same conversation with the asynchronous client and an AsyncSandbox."""
    http = anthropic.DefaultAsyncHttpxClient(trust_env=False)
    async with (
        anthropic.AsyncAnthropic(base_url=upstream.url, api_key="k", max_retries=0, http_client=http) as client,
        AsyncSandbox(host=sdk_daemon.url) as sandbox,
    ):
        runner = client.beta.messages.tool_runner(
            model=MODEL,
            max_tokens=100,
            tools=[AsyncCodeExecutionTool(sandbox), AsyncBashTool(sandbox), AsyncTextEditorTool(sandbox)],
            messages=[{"role": "user", "content": script(*ROUNDS)}],
            thread=False,
        )
        last = await runner.until_done()
    check_last_results(last.content[0].text)


def test_the_plain_loop(client: anthropic.Anthropic, sdk_daemon: ServedDaemon) -> None:
    """create, run_tool_uses, create, ...: every request is one that the API takes, all five definitions included."""
    rounds = [*ROUNDS[:2], [{"bash": "echo apart >&2"}, {"edit": {"command": "view", "path": "/tmp/f"}}], *ROUNDS[2:]]
    tools: Any = [
        code_execution_tool(),
        bash_tool(),
        text_editor_tool(),
        bash_code_execution_tool(),
        text_editor_code_execution_tool(),
    ]
    messages: list[Any] = [{"role": "user", "content": script(*rounds)}]
    with Sandbox(host=sdk_daemon.url) as sandbox:
        while True:
            reply = client.messages.create(model=MODEL, max_tokens=100, tools=tools, messages=messages)
            if reply.stop_reason != "tool_use":
                break
            messages.append({"role": "assistant", "content": reply.content})
            messages.append(run_tool_uses(reply, sandbox))
    apart, viewed = json.loads(reply.content[0].text)
    assert apart[0]["text"] == "stdout:\n\nstderr:\napart\nexit_code: 0"
    assert viewed[0]["text"] == "a\nc\nb\n"


def test_a_tool_without_a_sandbox_makes_and_ends_its_own(
    client: anthropic.Anthropic, sdk_daemon: ServedDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sandbox comes with the first call, stays for the next ones, and goes with close, which may come twice."""
    monkeypatch.setenv("PODFLARE_HOST", sdk_daemon.url)
    rounds = [[{"tool": "bash", "input": {"command": "x=1"}}], [{"tool": "bash", "input": {"command": "echo $x"}}]]
    with BashTool() as tool:
        assert Sandbox.list() == []
        runner = client.beta.messages.tool_runner(
            model=MODEL,
            max_tokens=100,
            tools=[tool],
            messages=[{"role": "user", "content": script(*rounds, [{"echo": True}])}],
            thread=False,
        )
        assert json.loads(runner.until_done().content[0].text)[0][0]["text"] == "1"
        assert len(Sandbox.list()) == 1
    assert Sandbox.list() == []
    tool.close()


@pytest.mark.anyio
async def test_an_asynchronous_tool_makes_only_one_sandbox(
    sdk_daemon: ServedDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls at a time share the sandbox that the first of them makes, and close ends it."""
    import anyio

    monkeypatch.setenv("PODFLARE_HOST", sdk_daemon.url)
    async with AsyncCodeExecutionTool() as tool, anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(tool.call, {"code": "print(1)"})
    assert await AsyncSandbox.list() == []
    assert tool.name == "code_execution"


def test_without_the_sdk_only_its_tools_are_missing() -> None:
    """Where `anthropic` is not installed everything else works, and the runner's tools say what to install."""
    program = """
import sys
sys.modules["anthropic"] = None
import podflare.anthropic as other
from podflare.integrations import anthropic as home
from podflare.integrations.anthropic import run_tool_uses, branch
assert other.run_tool_uses is run_tool_uses and other.__all__ == home.__all__
try:
    other.BashTool
except NotImplementedError as error:
    print(error)
try:
    home.nonsense
except AttributeError as error:
    print("no nonsense")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "podflare[anthropic]" in done.stdout and "no nonsense" in done.stdout
