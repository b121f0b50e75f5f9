"""Tools for the `anthropic` package's own tool runner, of its own base classes: needs that package (1.0 or later).

    with BashTool() as bash:
        client.beta.messages.tool_runner(model=..., max_tokens=..., messages=..., tools=[bash]).until_done()

A tool that is given no sandbox makes one at its first call, and ends it with `close`.  The runner for Messages does not
call `close`, so use `with`; those for sessions do.
"""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

import anyio

from podflare.errors import NotBuilt
from podflare.integrations.anthropic import definitions
from podflare.integrations.anthropic.blocks import refusal
from podflare.integrations.anthropic.client_tools import ToolOptions, call_steps
from podflare.integrations.anthropic.steps import carry_out, carry_out_async

try:
    from anthropic.lib.tools import BetaAsyncBuiltinFunctionTool, BetaBuiltinFunctionTool, ToolError
except ImportError as exc:
    raise NotBuilt(
        "tools for the tool runner need the package anthropic with its tool base classes: "
        "pip install -U 'podflare[anthropic]'"
    ) from exc

if TYPE_CHECKING:
    from podflare import AsyncSandbox, Sandbox

_numbers = itertools.count(1)


def _block(definition: dict[str, Any], arguments: object) -> dict[str, Any]:
    """The call as the block that it came in; the runner keeps its id to itself."""
    return {"type": "tool_use", "id": f"toolu_{next(_numbers)}", "name": definition["name"], "input": arguments}


def _content(result: dict[str, Any]) -> Any:
    """Raises: ToolError for a result that is an error."""
    if result["is_error"]:
        raise ToolError(result["content"])
    return result["content"]


class _SandboxTool(BetaBuiltinFunctionTool):
    """What the three have in common."""

    def __init__(self, definition: dict[str, Any], sandbox: Sandbox | None, options: ToolOptions) -> None:
        self._definition = definition
        self._options = options
        self._own = sandbox is None
        self._sandbox = sandbox
        self._making = threading.Lock()

    def to_dict(self) -> Any:
        """The definition for a request."""
        return dict(self._definition)

    def call(self, input: object) -> Any:
        """Carry out one call.  Raises: ToolError with what went wrong."""
        block = _block(self._definition, input)
        try:
            # A runner may call before the last call is over.
            with self._making:
                if self._sandbox is None:
                    from podflare import Sandbox

                    self._sandbox = Sandbox()
            result = carry_out(call_steps(block, self._options), self._sandbox)
        except Exception as exc:  # noqa: BLE001  # it becomes the text that the model gets
            result = refusal(block, exc)
        return _content(result)

    def close(self) -> None:
        """End the sandbox if it is the tool's own; the next call would make another one.  Idempotent."""
        if self._own and self._sandbox is not None:
            sandbox, self._sandbox = self._sandbox, None
            sandbox.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class CodeExecutionTool(_SandboxTool):
    """Python code in the sandbox's live interpreter."""

    def __init__(
        self,
        sandbox: Sandbox | None = None,
        *,
        name: str = definitions.CODE_EXECUTION,
        rich: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Arguments as `handle_code_execution_tool_use`; `sandbox` None means one of the tool's own."""
        super().__init__(definitions.code_execution_tool(name), sandbox, ToolOptions(name, rich, timeout))


class BashTool(_SandboxTool):
    """The trained tool `bash`: a shell that goes on from call to call."""

    def __init__(self, sandbox: Sandbox | None = None, *, timeout: float | None = None) -> None:
        """Arguments as `CodeExecutionTool`; `timeout` None means 120 s for a command."""
        super().__init__(definitions.bash_tool(), sandbox, ToolOptions(timeout=timeout))


class TextEditorTool(_SandboxTool):
    """The trained tool `str_replace_based_edit_tool`."""

    def __init__(self, sandbox: Sandbox | None = None, *, max_characters: int | None = None) -> None:
        """Arguments as `handle_code_execution_tool_use`; `sandbox` None means one of the tool's own."""
        options = ToolOptions(max_characters=max_characters)
        super().__init__(definitions.text_editor_tool(max_characters), sandbox, options)


class _AsyncSandboxTool(BetaAsyncBuiltinFunctionTool):
    """The same on AsyncSandbox."""

    def __init__(self, definition: dict[str, Any], sandbox: AsyncSandbox | None, options: ToolOptions) -> None:
        self._definition = definition
        self._options = options
        self._own = sandbox is None
        self._sandbox = sandbox
        self._making = anyio.Lock()

    def to_dict(self) -> Any:
        """The definition for a request."""
        return dict(self._definition)

    async def call(self, input: object) -> Any:
        """Carry out one call.  Raises: ToolError with what went wrong."""
        block = _block(self._definition, input)
        try:
            async with self._making:
                if self._sandbox is None:
                    from podflare import AsyncSandbox

                    self._sandbox = await AsyncSandbox.create()
            result = await carry_out_async(call_steps(block, self._options), self._sandbox)
        except Exception as exc:  # noqa: BLE001  # it becomes the text that the model gets
            result = refusal(block, exc)
        return _content(result)

    async def close(self) -> None:
        """End the sandbox if it is the tool's own; the next call would make another one.  Idempotent."""
        if self._own and self._sandbox is not None:
            sandbox, self._sandbox = self._sandbox, None
            await sandbox.close()

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


class AsyncCodeExecutionTool(_AsyncSandboxTool):
    """As CodeExecutionTool, for the asynchronous client."""

    def __init__(
        self,
        sandbox: AsyncSandbox | None = None,
        *,
        name: str = definitions.CODE_EXECUTION,
        rich: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Arguments as CodeExecutionTool."""
        super().__init__(definitions.code_execution_tool(name), sandbox, ToolOptions(name, rich, timeout))


class AsyncBashTool(_AsyncSandboxTool):
    """As BashTool, for the asynchronous client."""

    def __init__(self, sandbox: AsyncSandbox | None = None, *, timeout: float | None = None) -> None:
        """Arguments as BashTool."""
        super().__init__(definitions.bash_tool(), sandbox, ToolOptions(timeout=timeout))


class AsyncTextEditorTool(_AsyncSandboxTool):
    """As TextEditorTool, for the asynchronous client."""

    def __init__(self, sandbox: AsyncSandbox | None = None, *, max_characters: int | None = None) -> None:
        """Arguments as TextEditorTool."""
        options = ToolOptions(max_characters=max_characters)
        super().__init__(definitions.text_editor_tool(max_characters), sandbox, options)
