"""Programs that use Claude run its code in podflare sandboxes.  The `anthropic` package itself is not imported here."""

from podflare.integrations.anthropic.client_tools import (
    code_execution_tool,
    handle_code_execution_tool_use,
    handle_code_execution_tool_use_async,
)

__all__ = ["code_execution_tool", "handle_code_execution_tool_use", "handle_code_execution_tool_use_async"]
