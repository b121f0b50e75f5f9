"""Definitions of the client tools, for the `tools` of a request: Claude then calls them by `tool_use` blocks.

`bash_tool` and `text_editor_tool` are types that Claude is trained on, and need no description.
"""

from __future__ import annotations

from typing import Any

from podflare.errors import BadRequest

CODE_EXECUTION = "code_execution"
BASH_CODE_EXECUTION = "bash_code_execution"
TEXT_EDITOR_CODE_EXECUTION = "text_editor_code_execution"
BASH = "bash"
TEXT_EDITOR = "str_replace_based_edit_tool"

_CODE = (
    "Runs Python code in an isolated Linux sandbox and returns what it printed to stdout and stderr, and its exit "
    "code. The code runs in one long-lived interpreter: variables, imports, functions, open files and the working "
    "directory stay from one call to the next, so build on earlier calls instead of repeating them. Only what is "
    "printed comes back: use print() for every value that you want to see, the value of a last expression is not "
    "shown. An exception ends the call with a traceback on stderr and a non-zero exit code, and leaves the state that "
    "was reached, so you can correct the code and go on. Files that you write stay in the sandbox, and shell commands "
    "can be run with the subprocess module. input() finds the end of its file at once, so never wait for a person."
)

_BASH = (
    "Runs a bash script in an isolated Linux sandbox and returns its stdout, its stderr and its exit code. Each call "
    "is a new shell that starts in the home directory: files stay from one call to the next, the working directory and "
    "variables do not, so change the directory in the script that needs it. Standard input is at its end. Processes "
    "that are started in the background go on running after the call."
)
_EDITOR = (
    "Reads and changes text files in an isolated Linux sandbox, the same one in which code and shell scripts run. "
    "`view` shows a file, or lists a directory. `create` writes `file_text` to a file, replacing one that is there. "
    "`str_replace` replaces `old_str`, which must match exactly one place of the file, white space included, by "
    "`new_str`. Relative paths start at the home directory."
)


def code_execution_tool(name: str = CODE_EXECUTION) -> dict[str, Any]:
    """The client tool definition that makes Claude answer with `tool_use` blocks of this name.

    Pass the same name to the handler.
    Raises: ValueError for a name that the Messages API refuses.
    """
    if not 1 <= len(name) <= 64 or not all(char.isascii() and (char.isalnum() or char in "_-") for char in name):
        raise BadRequest(f"a tool name has 1 to 64 letters, digits, _ or -, got {name!r:.80}")
    return _custom(name, _CODE, ["code"], code="Python source code. Print what you want to see.")


def bash_code_execution_tool() -> dict[str, Any]:
    """A new bash for each call, with stdout, stderr and exit code apart, as the hosted tool has it."""
    return _custom(BASH_CODE_EXECUTION, _BASH, ["command"], command="The script.")


def text_editor_code_execution_tool() -> dict[str, Any]:
    """View, create and str_replace, as the hosted tool has them."""
    definition = _custom(
        TEXT_EDITOR_CODE_EXECUTION,
        _EDITOR,
        ["command", "path"],
        command="What to do.",
        path="The file; for `view` also a directory.",
        file_text="For `create`: the whole content.",
        old_str="For `str_replace`: the text to replace.",
        new_str="For `str_replace`: what to put in its place.",
    )
    definition["input_schema"]["properties"]["command"]["enum"] = ["view", "create", "str_replace"]
    return definition


def bash_tool() -> dict[str, Any]:
    """The trained tool `bash`: one shell that goes on from call to call."""
    return {"type": "bash_20250124", "name": BASH}


def text_editor_tool(max_characters: int | None = None) -> dict[str, Any]:
    """The trained tool `str_replace_based_edit_tool`; pass the same `max_characters` to the handler."""
    definition: dict[str, Any] = {"type": "text_editor_20250728", "name": TEXT_EDITOR}
    if max_characters is not None:
        definition["max_characters"] = max_characters
    return definition


def _custom(name: str, description: str, required: list[str], **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": required}
    return {"name": name, "description": description, "input_schema": schema}
