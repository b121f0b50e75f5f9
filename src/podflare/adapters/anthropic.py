"""The same as podflare.integrations.anthropic, under a path that documentation of the hosted service names."""

from podflare.integrations.anthropic import (
    code_execution_tool,
    handle_code_execution_tool_use,
    handle_code_execution_tool_use_async,
)

__all__ = ["code_execution_tool", "handle_code_execution_tool_use", "handle_code_execution_tool_use_async"]
