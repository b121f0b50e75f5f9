"""integrations/anthropic.py: every tool_use gets a well-formed tool_result, whatever it is and whatever happens."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from podflare import CellError, DaemonUnreachable, ExecResult, Result, SandboxNotFound
from podflare.integrations.anthropic import (
    code_execution_tool,
    handle_code_execution_tool_use,
    handle_code_execution_tool_use_async,
)


class Runs:
    """A thing with `run_code` that gives or raises what it is told."""

    def __init__(self, outcome: ExecResult | Exception) -> None:
        self.outcome = outcome
        self.seen: list[str] = []

    def run_code(self, code: str) -> ExecResult:
        self.seen.append(code)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class RunsLater(Runs):
    async def run_code(self, code: str) -> ExecResult:  # type: ignore[override]  # the asynchronous face
        return super().run_code(code)


OK = ExecResult("out", "err", 0)
BLOCK = {"type": "tool_use", "id": "toolu_1", "name": "code_execution", "input": {"code": "print(1)"}}


def assert_well_formed(result: dict[str, Any], tool_use_id: str = "toolu_1") -> str:
    """The shape that the Messages API takes; its text."""
    assert set(result) == {"type", "tool_use_id", "content", "is_error"}
    assert (result["type"], result["tool_use_id"]) == ("tool_result", tool_use_id)
    assert isinstance(result["is_error"], bool)
    assert result["content"][0]["type"] == "text"
    return str(result["content"][0]["text"])


@pytest.mark.parametrize("kind", ["dict", "object", "object with dict input"])
def test_good_blocks(kind: str) -> None:
    """Dicts and SDK objects run their code; the text has the three labelled parts."""
    block: Any = BLOCK
    if kind != "dict":
        arguments: Any = {"code": "print(1)"} if "dict" in kind else SimpleNamespace(code="print(1)")
        block = SimpleNamespace(type="tool_use", id="toolu_1", name="code_execution", input=arguments)
    sandbox = Runs(OK)
    result = handle_code_execution_tool_use(block, sandbox)  # type: ignore[arg-type]  # has what is needed
    assert assert_well_formed(result) == "stdout:\nout\nstderr:\nerr\nexit_code: 0"
    assert (result["is_error"], sandbox.seen) == (False, ["print(1)"])


def test_real_sdk_block() -> None:
    """A block as the anthropic package makes it is understood."""
    types = pytest.importorskip("anthropic.types", reason="the anthropic package is not installed")
    block = types.ToolUseBlock.model_validate(BLOCK)
    result = handle_code_execution_tool_use(block, Runs(OK))  # type: ignore[arg-type]  # has what is needed
    assert_well_formed(result)


def test_nonzero_exit_is_an_error_with_the_full_text() -> None:
    """The model sees output and traceback of a failed cell, marked as an error."""
    failed = ExecResult("before", "Traceback", 1, error=CellError("ValueError", "no", "Traceback"))
    result = handle_code_execution_tool_use(BLOCK, Runs(failed))  # type: ignore[arg-type]  # has what is needed
    assert assert_well_formed(result) == "stdout:\nbefore\nstderr:\nTraceback\nexit_code: 1"
    assert result["is_error"] is True


class Nasty:
    """An object whose attributes raise."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} for you")


BAD = [
    ({**BLOCK, "id": None}, "", "no id"),
    ({key: value for key, value in BLOCK.items() if key != "id"}, "", "no id"),
    ({**BLOCK, "id": 5}, "", "no id"),
    ({key: value for key, value in BLOCK.items() if key != "input"}, "toolu_1", "no input"),
    ({**BLOCK, "input": None}, "toolu_1", "no input"),
    ({**BLOCK, "input": {}}, "toolu_1", "got nothing"),
    ({**BLOCK, "input": {"code": 5}}, "toolu_1", "got int"),
    ({**BLOCK, "input": {"code": None}}, "toolu_1", "got nothing"),
    ({**BLOCK, "input": "print(1)"}, "toolu_1", "got nothing"),
    ({**BLOCK, "name": "get_weather"}, "toolu_1", "get_weather"),
    ({**BLOCK, "type": "server_tool_use"}, "toolu_1", "server_tool_use"),
    (None, "", "no id"),
    ("text", "", "no id"),
    (42, "", "no id"),
    ([], "", "no id"),
    (Nasty(), "", "for you"),
]


@pytest.mark.parametrize(("block", "tool_use_id", "reason"), BAD, ids=range(len(BAD)))
def test_bad_blocks_never_crash_the_loop(block: Any, tool_use_id: str, reason: str) -> None:
    """A block that is none of ours gives an error tool_result that says what is wrong, and runs nothing."""
    sandbox = Runs(OK)
    result = handle_code_execution_tool_use(block, sandbox)  # type: ignore[arg-type]  # has what is needed
    assert reason in assert_well_formed(result, tool_use_id)
    assert (result["is_error"], sandbox.seen) == (True, [])


@pytest.mark.parametrize(
    "failure",
    [SandboxNotFound("it is gone: idle"), DaemonUnreachable("no daemon"), TimeoutError(), ZeroDivisionError("x")],
)
def test_failing_sandbox_never_crashes_the_loop(failure: Exception) -> None:
    """A dead sandbox, a dead daemon, silence: an error tool_result with the reason."""
    result = handle_code_execution_tool_use(BLOCK, Runs(failure))  # type: ignore[arg-type]  # has what is needed
    assert (str(failure) or type(failure).__name__) in assert_well_formed(result)
    assert result["is_error"] is True


@pytest.mark.anyio
@pytest.mark.parametrize("block", [BLOCK, {**BLOCK, "input": None}, None])
async def test_async_twin_agrees(block: Any) -> None:
    """The asynchronous handler gives the same results."""
    for outcome in (OK, SandboxNotFound("gone")):
        now = handle_code_execution_tool_use(block, Runs(outcome))  # type: ignore[arg-type]  # has what is needed
        later = await handle_code_execution_tool_use_async(block, RunsLater(outcome))  # type: ignore[arg-type]  # as above
        assert now == later


def test_another_tool_name() -> None:
    """A tool declared under another name is served under it only."""
    assert code_execution_tool("run_python")["name"] == "run_python"
    block = {**BLOCK, "name": "run_python"}
    assert handle_code_execution_tool_use(block, Runs(OK), name="run_python")["is_error"] is False  # type: ignore[arg-type]  # as above
    assert handle_code_execution_tool_use(block, Runs(OK))["is_error"] is True  # type: ignore[arg-type]  # as above


def test_rich_results_on_request() -> None:
    """With rich=True values and images follow the text, as blocks that the API takes."""
    shown = ExecResult(
        "", "", 0, [Result({"text/plain": "42"}), Result({"image/png": "AAEC", "text/plain": "<Figure>"})]
    )
    plain = handle_code_execution_tool_use(BLOCK, Runs(shown))  # type: ignore[arg-type]  # has what is needed
    rich = handle_code_execution_tool_use(BLOCK, Runs(shown), rich=True)  # type: ignore[arg-type]  # as above
    assert plain["content"] == rich["content"][:1]
    assert rich["content"][1:] == [
        {"type": "text", "text": "value:\n42"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAEC"}},
    ]


def test_tool_definition() -> None:
    """A client tool: input schema with the code, and a description that says that state stays."""
    tool = code_execution_tool()
    assert set(tool) == {"name", "description", "input_schema"}
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", tool["name"])
    assert tool["input_schema"]["required"] == ["code"]
    assert tool["input_schema"]["properties"]["code"]["type"] == "string"
    assert tool["description"].count(". ") >= 4
    assert "variables" in tool["description"] and "stay" in tool["description"]
    for name in ("", "x" * 65, "run code", "ü"):
        with pytest.raises(ValueError, match="tool name"):
            code_execution_tool(name)


def test_the_framework_is_not_imported() -> None:
    """The integration loads without the anthropic package, and does not load it where it is."""
    program = "import sys, podflare.integrations.anthropic\nprint('anthropic' in sys.modules, 'httpx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "False False"
    assert importlib.util.find_spec("podflare.integrations.anthropic") is not None
