"""Programs that use Claude run its code in podflare sandboxes.  The `anthropic` package itself is not imported here.

What needs that package (`AsyncBashTool`, `LocalCodeExecution`, ...) is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from podflare.integrations.anthropic.branches import (
    AsyncBranches,
    Branch,
    Branches,
    branch,
    branch_async,
    commit,
    commit_async,
)
from podflare.integrations.anthropic.client_tools import (
    handle_code_execution_tool_use,
    handle_code_execution_tool_use_async,
    run_tool_uses,
    run_tool_uses_async,
)
from podflare.integrations.anthropic.definitions import (
    bash_code_execution_tool,
    bash_tool,
    code_execution_tool,
    text_editor_code_execution_tool,
    text_editor_tool,
)

if TYPE_CHECKING:
    from podflare.integrations.anthropic.middleware import AsyncLocalCodeExecution, LocalCodeExecution
    from podflare.integrations.anthropic.runner_tools import (
        AsyncBashTool,
        AsyncCodeExecutionTool,
        AsyncTextEditorTool,
        BashTool,
        CodeExecutionTool,
        TextEditorTool,
    )

_MIDDLEWARE = ("AsyncLocalCodeExecution", "LocalCodeExecution")
_RUNNER_TOOLS = (
    "AsyncBashTool",
    "AsyncCodeExecutionTool",
    "AsyncTextEditorTool",
    "BashTool",
    "CodeExecutionTool",
    "TextEditorTool",
)

__all__ = [
    "AsyncBashTool",
    "AsyncBranches",
    "AsyncCodeExecutionTool",
    "AsyncLocalCodeExecution",
    "AsyncTextEditorTool",
    "BashTool",
    "Branch",
    "Branches",
    "CodeExecutionTool",
    "LocalCodeExecution",
    "TextEditorTool",
    "bash_code_execution_tool",
    "bash_tool",
    "branch",
    "branch_async",
    "code_execution_tool",
    "commit",
    "commit_async",
    "handle_code_execution_tool_use",
    "handle_code_execution_tool_use_async",
    "run_tool_uses",
    "run_tool_uses_async",
    "text_editor_code_execution_tool",
    "text_editor_tool",
]


def __getattr__(name: str) -> Any:
    if name in _MIDDLEWARE:
        from podflare.integrations.anthropic import middleware

        return getattr(middleware, name)
    if name not in _RUNNER_TOOLS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from podflare.integrations.anthropic import runner_tools

    return getattr(runner_tools, name)
