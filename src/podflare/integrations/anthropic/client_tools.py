"""Claude runs code in a podflare sandbox: the tool definition and the answer to its tool calls.

Works on the wire shapes of the Messages API (dicts, or the objects of any version of the `anthropic`
package, which is not imported).  Needs only an object with `run_code`.

    tools = [code_execution_tool()]
    ...
    results = [handle_code_execution_tool_use(block, sandbox) for block in message.content if block.type == "tool_use"]
    messages.append({"role": "user", "content": results})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from podflare.errors import BadRequest

if TYPE_CHECKING:
    from podflare import AsyncSandbox, ExecResult, Sandbox

DEFAULT_NAME = "code_execution"

_DESCRIPTION = (
    "Runs Python code in an isolated Linux sandbox and returns what it printed to stdout and stderr, and its exit "
    "code. The code runs in one long-lived interpreter: variables, imports, functions, open files and the working "
    "directory stay from one call to the next, so build on earlier calls instead of repeating them. Only what is "
    "printed comes back: use print() for every value that you want to see, the value of a last expression is not "
    "shown. An exception ends the call with a traceback on stderr and a non-zero exit code, and leaves the state that "
    "was reached, so you can correct the code and go on. Files that you write stay in the sandbox, and shell commands "
    "can be run with the subprocess module. input() finds the end of its file at once, so never wait for a person."
)


def code_execution_tool(name: str = DEFAULT_NAME) -> dict[str, Any]:
    """The client tool definition that makes Claude answer with `tool_use` blocks of this name.

    Pass the same name to the handler.
    Raises: ValueError for a name that the Messages API refuses.
    """
    if not 1 <= len(name) <= 64 or not all(char.isascii() and (char.isalnum() or char in "_-") for char in name):
        raise BadRequest(f"a tool name has 1 to 64 letters, digits, _ or -, got {name!r:.80}")
    code = {"type": "string", "description": "Python source code. Print what you want to see."}
    return {
        "name": name,
        "description": _DESCRIPTION,
        "input_schema": {"type": "object", "properties": {"code": code}, "required": ["code"]},
    }


def handle_code_execution_tool_use(
    tool_use_block: Any, sandbox: Sandbox, *, name: str = DEFAULT_NAME, rich: bool = False
) -> dict[str, Any]:
    """Run the code of a `tool_use` block; the `tool_result` block to send back.  Never raises an Exception.

    Its text is `stdout:`, `stderr:` and `exit_code:`; `is_error` tells an exit code other than 0.  A block that
    is none of ours, and a sandbox that fails, give a `tool_result` with `is_error` and a text that says what is
    wrong, so that the conversation can go on; a block without an id gives one with `tool_use_id` "".

    Args:
        tool_use_block: dict or SDK object with `id` and `input.code`.
        sandbox: where to run it.
        name: the tool name that was declared.
        rich: add what the cell displayed: the text of values, and images as image blocks.
    """
    try:
        code = _code_of(tool_use_block, name)
        return _answer(tool_use_block, sandbox.run_code(code), rich)
    except Exception as exc:  # noqa: BLE001  # every tool_use needs a tool_result, or the API refuses the next turn
        return _refusal(tool_use_block, exc)


async def handle_code_execution_tool_use_async(
    tool_use_block: Any, sandbox: AsyncSandbox, *, name: str = DEFAULT_NAME, rich: bool = False
) -> dict[str, Any]:
    """As `handle_code_execution_tool_use`, for an AsyncSandbox."""
    try:
        code = _code_of(tool_use_block, name)
        return _answer(tool_use_block, await sandbox.run_code(code), rich)
    except Exception as exc:  # noqa: BLE001  # as above
        return _refusal(tool_use_block, exc)


def _field(block: Any, key: str) -> Any:
    """A field of a dict or of an SDK object; None if it has none."""
    return block.get(key) if isinstance(block, Mapping) else getattr(block, key, None)


def _code_of(block: Any, name: str) -> str:
    """Raises: BadRequest that tells the model what is wrong with its call."""
    kind = _field(block, "type")
    if kind is not None and kind != "tool_use":
        raise BadRequest(f"expected a tool_use block, got one of type {kind!r:.80}")
    if not _id_of(block):
        raise BadRequest("the tool_use block has no id")
    called = _field(block, "name")
    if called is not None and called != name:
        raise BadRequest(f"there is no tool {called!r:.80} here, only {name!r}")
    arguments = _field(block, "input")
    if arguments is None:
        raise BadRequest("the tool_use block has no input")
    code = _field(arguments, "code")
    if not isinstance(code, str):
        found = "nothing" if code is None else type(code).__name__
        raise BadRequest(f"input.code must be a string of Python code, got {found}")
    return code


def _id_of(block: Any) -> str:
    try:
        value = _field(block, "id")
    except Exception:  # noqa: BLE001  # an object whose attributes raise has no id that we could name
        return ""
    return value if isinstance(value, str) else ""


def _answer(block: Any, result: ExecResult, rich: bool) -> dict[str, Any]:
    text = f"stdout:\n{result.stdout}\nstderr:\n{result.stderr}\nexit_code: {result.exit_code}"
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if rich:
        content += _rich_content(result)
    return _tool_result(block, content, is_error=result.exit_code != 0)


def _rich_content(result: ExecResult) -> list[dict[str, Any]]:
    """Blocks for what the cell showed besides its output."""
    blocks: list[dict[str, Any]] = []
    for shown in result.results:
        for mime in ("image/png", "image/jpeg"):
            if isinstance(data := shown.data.get(mime), str):
                source = {"type": "base64", "media_type": mime, "data": data}
                blocks.append({"type": "image", "source": source})
                break
        else:
            if shown.text:
                blocks.append({"type": "text", "text": f"{shown.kind}:\n{shown.text}"})
    return blocks


def _refusal(block: Any, exc: Exception) -> dict[str, Any]:
    text = f"error: {exc}" if str(exc) else f"error: {type(exc).__name__}"
    return _tool_result(block, [{"type": "text", "text": text}], is_error=True)


def _tool_result(block: Any, content: list[dict[str, Any]], *, is_error: bool) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": _id_of(block), "content": content, "is_error": is_error}
