"""Claude's calls of client tools, carried out in a podflare sandbox: `tool_use` blocks in, `tool_result` blocks out.

Works on the wire shapes of the Messages API (dicts, or the objects of any version of the `anthropic` package, which is
not imported).

    tools = [code_execution_tool(), bash_tool(), text_editor_tool()]
    ...
    while message.stop_reason == "tool_use":
        messages += [{"role": "assistant", "content": message.content}, run_tool_uses(message, sandbox)]
        ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from podflare.errors import BadRequest
from podflare.integrations.anthropic import blocks, definitions
from podflare.integrations.anthropic.blocks import MAX_TEXT_CHARS, cell_result, field, text_input
from podflare.integrations.anthropic.editor import Editor
from podflare.integrations.anthropic.shell import DEFAULT_TIMEOUT_S, shell_steps
from podflare.integrations.anthropic.steps import Steps, carry_out, carry_out_async

if TYPE_CHECKING:
    from podflare import AsyncSandbox, Sandbox

DEFAULT_NAME = definitions.CODE_EXECUTION


@dataclass(frozen=True)
class ToolOptions:
    """How calls are carried out; see `handle_code_execution_tool_use`."""

    name: str = DEFAULT_NAME
    rich: bool = False
    timeout: float | None = None
    max_characters: int | None = None

    def __post_init__(self) -> None:
        limit = self.max_characters
        if limit is not None and (type(limit) is not int or limit < 1):
            raise BadRequest(f"max_characters must be a positive integer, got {limit!r:.80}")


def handle_code_execution_tool_use(
    tool_use_block: Any,
    sandbox: Sandbox,
    *,
    name: str = DEFAULT_NAME,
    rich: bool = False,
    timeout: float | None = None,
    max_characters: int | None = None,
) -> dict[str, Any]:
    """Carry out a `tool_use` block; the `tool_result` block to send back.  Never raises an Exception for a block.

    Takes every tool of `definitions`, by name.  The text of `code_execution` and `bash_code_execution` is `stdout:`,
    `stderr:` and `exit_code:`, that of `bash` what the command printed; `is_error` tells an exit code other than 0.  A
    block that is none of ours, and a sandbox that fails, give a `tool_result` with `is_error` and a text that says what
    is wrong, so that the conversation can go on; a block without an id gives one with `tool_use_id` "".

    Args:
        tool_use_block: dict or SDK object with `id`, `name` and `input`.
        sandbox: where to run it.
        name: the name under which `code_execution_tool` was declared.
        rich: for Python code: add what the cell displayed, images as image blocks, and keep only head and tail of
            very long outputs, saying how much was left out, as the other tools always do.
        timeout: seconds for one call; None means no limit for code, 120 for shell commands.
        max_characters: what `view` shows of a file at most; None means 50,000.
    Raises: BadRequest for a max_characters that is none.
    """
    options = ToolOptions(name, rich, timeout, max_characters)
    return carry_out(_answer(tool_use_block, options), sandbox)


async def handle_code_execution_tool_use_async(
    tool_use_block: Any,
    sandbox: AsyncSandbox,
    *,
    name: str = DEFAULT_NAME,
    rich: bool = False,
    timeout: float | None = None,
    max_characters: int | None = None,
) -> dict[str, Any]:
    """As `handle_code_execution_tool_use`, for an AsyncSandbox."""
    options = ToolOptions(name, rich, timeout, max_characters)
    return await carry_out_async(_answer(tool_use_block, options), sandbox)


def run_tool_uses(
    response: Any,
    sandbox: Sandbox,
    *,
    name: str = DEFAULT_NAME,
    rich: bool = False,
    timeout: float | None = None,
    max_characters: int | None = None,
) -> dict[str, Any]:
    """Answer all `tool_use` blocks of a message, one after the other in order: the user message to send back.

    Args: as `handle_code_execution_tool_use`; `response` is a message, or its content.
    Raises: BadRequest if there is no `tool_use` block.
    """
    options = ToolOptions(name, rich, timeout, max_characters)
    return carry_out(_answer_all(response, options), sandbox)


async def run_tool_uses_async(
    response: Any,
    sandbox: AsyncSandbox,
    *,
    name: str = DEFAULT_NAME,
    rich: bool = False,
    timeout: float | None = None,
    max_characters: int | None = None,
) -> dict[str, Any]:
    """As `run_tool_uses`, for an AsyncSandbox."""
    options = ToolOptions(name, rich, timeout, max_characters)
    return await carry_out_async(_answer_all(response, options), sandbox)


def _answer_all(response: Any, options: ToolOptions) -> Steps[dict[str, Any]]:
    content = response if isinstance(response, (list, tuple)) else field(response, "content")
    found = [block for block in content or () if field(block, "type") == "tool_use"]
    if not found:
        raise BadRequest("the message has no tool_use block")
    results = []
    for block in found:
        results.append((yield from _answer(block, options)))
    return {"role": "user", "content": results}


def _answer(block: Any, options: ToolOptions) -> Steps[dict[str, Any]]:
    try:
        return (yield from call_steps(block, options))
    except Exception as exc:  # noqa: BLE001  # every tool_use needs a tool_result, or the API refuses the next turn
        return blocks.refusal(block, exc)


def call_steps(block: Any, options: ToolOptions) -> Steps[dict[str, Any]]:
    """Carry out one block.  Raises: BadRequest that tells the model what is wrong; what the sandbox raises."""
    kind = field(block, "type")
    if kind is not None and kind != "tool_use":
        raise BadRequest(f"expected a tool_use block, got one of type {kind!r:.80}")
    if not blocks.id_of(block):
        raise BadRequest("the tool_use block has no id")
    called = field(block, "name")
    arguments = field(block, "input")
    known = called is None or called == options.name or called in _TOOLS
    if not known:
        raise BadRequest(f"there is no tool {called!r:.80} here, only {options.name!r}")
    if arguments is None:
        raise BadRequest("the tool_use block has no input")
    if called is None or called == options.name:
        return (yield from _run_code(block, arguments, options))
    return (yield from _TOOLS[called](block, arguments, options))


def _run_code(block: Any, arguments: Any, options: ToolOptions) -> Steps[dict[str, Any]]:
    code = text_input(arguments, "code", what="a string of Python code")
    limit = {} if options.timeout is None else {"timeout": options.timeout}
    result = yield lambda sandbox: sandbox.run_code(code, **limit)
    return cell_result(block, result, cut=options.rich, rich=options.rich)


def _run_bash(block: Any, arguments: Any, options: ToolOptions) -> Steps[dict[str, Any]]:
    command = text_input(arguments, "command", what="a string with a shell script")
    if "\0" in command:
        raise BadRequest("input.command must not contain NUL")
    limit = DEFAULT_TIMEOUT_S if options.timeout is None else options.timeout
    result = yield lambda sandbox: sandbox.run_code(command, "bash", timeout=limit)
    return cell_result(block, result, cut=True, rich=False)


def _go_on_in_shell(block: Any, arguments: Any, options: ToolOptions) -> Steps[dict[str, Any]]:
    text, failed = yield from shell_steps(arguments, options.timeout)
    return blocks.text_result(block, text, is_error=failed)


def _edit(block: Any, arguments: Any, options: ToolOptions) -> Steps[dict[str, Any]]:
    limit = MAX_TEXT_CHARS if options.max_characters is None else options.max_characters
    editor = Editor(("view", "create", "str_replace", "insert"), numbered=True, max_characters=limit)
    return blocks.text_result(block, (yield from editor.steps(arguments)))


def _edit_as_hosted(block: Any, arguments: Any, options: ToolOptions) -> Steps[dict[str, Any]]:
    editor = Editor(("view", "create", "str_replace"), numbered=False)
    return blocks.text_result(block, (yield from editor.steps(arguments)))


_TOOLS = {
    definitions.BASH_CODE_EXECUTION: _run_bash,
    definitions.TEXT_EDITOR_CODE_EXECUTION: _edit_as_hosted,
    definitions.BASH: _go_on_in_shell,
    definitions.TEXT_EDITOR: _edit,
}
"""How the tools with a fixed name are carried out."""
