"""Tools: the hosted definition is taken out, client tools that do the same are put in its place.

What is written here goes into every prompt: it must stay the same from one request to the next.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from podflare.errors import BadRequest
from podflare.integrations.anthropic.hosted.blocks import BASH, CODE, EDITOR

Tool = dict[str, Any]

LEGACY = "code_execution_20250522"
VERSIONS = (LEGACY, "code_execution_20250825", "code_execution_20260120", "code_execution_20260521")
_PROGRAMMATIC_SINCE = 20250825
_WEB = re.compile(r"web_(?:search|fetch)_(\d{8})")
_WEB_RUNS_CODE_SINCE = 20260209
_OWN_BETAS = ("code-execution-", "files-api-")
MAX_FUNCTIONS = 64

_PLACES = (
    "The sandbox is an isolated Linux machine without network access. Files stay from one call to the next. Files that "
    "the user uploaded are in $INPUT_DIR. "
)
_BASH_TEXT = (
    "Runs a shell command with bash in a sandbox and returns stdout, stderr and the return code. Each call is a new "
    "shell that starts in the home directory; variables and the working directory of an earlier call are gone, files "
    "stay. " + _PLACES + "Each call has a new empty directory $OUTPUT_DIR: files that lie directly in it when the call "
    "ends are handed to the user, so copy finished results there and list the directory in the same command. Run "
    "Python by writing a file and calling python3 on it, or with python3 - and a here-document."
)
_EDITOR_TEXT = (
    "Views, creates and edits text files in the same sandbox as " + BASH + ". `view` gives the content of a file, "
    "optionally of a range of lines, or lists a directory. `create` writes a new file, or replaces the whole of an "
    "existing one; missing directories are made. `str_replace` replaces text that must occur exactly once in the "
    "file. Paths may begin with $INPUT_DIR or ~. " + _PLACES
)
_CODE_TEXT = (
    "Runs Python code in a sandbox and returns what it printed to stdout and stderr, and a return code. The code runs "
    "in one live interpreter: variables, imports and functions stay from one call to the next. Top-level await works. "
    "Print what you want to see. " + _PLACES + "Files that lie directly in $OUTPUT_DIR (os.environ['OUTPUT_DIR'], "
    "new and empty for each call) when the call ends are handed to the user."
)
_FUNCTIONS_TEXT = (
    "\n\nThese async functions are defined in the code. Each takes one dict with the arguments and returns a string: "
    "call them as `await name({...})`, several at a time with asyncio.gather. Their results go to the code only, so "
    "filter and combine them there and print what matters. A call of this tool may run for 90 seconds of its own, "
    "waiting for functions not counted.\n"
)


def _tool(name: str, description: str, properties: Mapping[str, Any], required: Sequence[str]) -> Tool:
    schema = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    return {"name": name, "description": description, "input_schema": schema}


def _bash() -> Tool:
    return _tool(BASH, _BASH_TEXT, {"command": {"type": "string", "description": "The command line."}}, ["command"])


def _editor() -> Tool:
    properties = {
        "command": {"type": "string", "enum": ["view", "create", "str_replace"]},
        "path": {"type": "string", "description": "Of the file, absolute or from the home directory."},
        "file_text": {"type": "string", "description": "For create: the whole content."},
        "old_str": {"type": "string", "description": "For str_replace: what to replace; occurs exactly once."},
        "new_str": {"type": "string", "description": "For str_replace: what to put there; empty if left out."},
        "view_range": {
            "type": "array",
            "items": {"type": "integer"},
            "description": "For view: first and last line, counted from 1; -1 is the last line.",
        },
    }
    return _tool(EDITOR, _EDITOR_TEXT, properties, ["command", "path"])


def _code(functions: Sequence[Tool]) -> Tool:
    text = _CODE_TEXT
    if functions:
        text += _FUNCTIONS_TEXT + "\n".join(_described(each) for each in functions)
    return _tool(CODE, text, {"code": {"type": "string", "description": "Python source code."}}, ["code"])


def _described(tool: Tool) -> str:
    schema = json.dumps(tool.get("input_schema", {}), ensure_ascii=False)
    text = f"- {tool['name']}: {tool.get('description', '')}\n  arguments: {schema}"
    if tool.get("input_examples"):
        text += f"\n  examples: {json.dumps(tool['input_examples'], ensure_ascii=False)}"
    return text


@dataclass(frozen=True)
class Toolset:
    """The tools of one request."""

    version: str | None
    """Type of the hosted tool; None if the request does not declare it."""
    upstream: tuple[Tool, ...]
    names: frozenset[str]
    """Tools that are run in the sandbox."""
    functions: tuple[str, ...]
    """Client tools that code in the sandbox can call."""
    hidden: frozenset[str]
    """Those of them that the model cannot call itself."""


def is_hosted(tool: object) -> bool:
    """Whether this is a definition of the hosted code execution tool, of whatever version."""
    return isinstance(tool, Mapping) and str(tool.get("type")).startswith("code_execution_")


def rewrite_tools(tools: Sequence[Any]) -> Toolset:
    """Definitions for the model's API, at the places of the client's.

    Raises: BadRequest for what the hosted tool refuses, too.
    """
    declared = [tool for tool in tools if is_hosted(tool)]
    if len(declared) > 1:
        raise BadRequest("tools: there is more than one code_execution tool")
    version = _version(declared[0]) if declared else None
    functions = [tool for tool in tools if not is_hosted(tool) and _callable_from_code(tool)]
    if functions:
        _check_functions(functions, version)
    own = _own_tools(declared[0], functions) if declared else []
    names = frozenset(tool["name"] for tool in own)
    upstream: list[Tool] = []
    hidden: set[str] = set()
    for index, tool in enumerate(tools):
        if is_hosted(tool):
            upstream += own
            continue
        if not isinstance(tool, dict):
            raise BadRequest(f"tools.{index}: must be an object")
        if tool.get("name") in names:
            raise BadRequest(f"tools: Tool names must be unique; {tool['name']!r} is one of the code execution tool's")
        direct = _direct(tool)
        if direct is None:
            hidden.add(tool["name"])
        else:
            upstream.append(direct)
    called = tuple(str(tool["name"]) for tool in functions)
    return Toolset(version, tuple(upstream), names, called, frozenset(hidden))


def _version(tool: Mapping[str, Any]) -> str:
    version = str(tool["type"])
    if version not in VERSIONS:
        raise BadRequest(f"tools: {version:.80} is not supported here; use one of {', '.join(VERSIONS)}")
    if tool.get("name") != CODE:
        raise BadRequest(f"tools: the name of a {version} tool must be {CODE!r}")
    return version


def _own_tools(hosted: Mapping[str, Any], functions: Sequence[Tool]) -> list[Tool]:
    if hosted["type"] == LEGACY:
        own = [_code([])]
    else:
        own = [_bash(), _editor()]
        if functions:
            own.append(_code(functions))
    if hosted.get("defer_loading"):
        own = [{**tool, "defer_loading": True} for tool in own]
    if hosted.get("cache_control") is not None:
        own[-1] = {**own[-1], "cache_control": hosted["cache_control"]}
    return own


def _callers(tool: object) -> list[str]:
    callers = tool.get("allowed_callers") if isinstance(tool, Mapping) else None
    return [str(each) for each in callers] if isinstance(callers, list) else []


def _callable_from_code(tool: object) -> bool:
    # Web tools run at the API itself; code here cannot reach them.
    return any(each.startswith("code_execution_") for each in _callers(tool)) and not _web_version(tool)


def _check_functions(functions: Sequence[Tool], version: str | None) -> None:
    if version is None or int(version.rpartition("_")[2]) < _PROGRAMMATIC_SINCE:
        raise BadRequest("tools: `allowed_callers` names code execution, which needs a code_execution tool that has it")
    if len(functions) > MAX_FUNCTIONS:
        raise BadRequest(f"tools: at most {MAX_FUNCTIONS} tools may be called from code")
    for tool in functions:
        name = tool.get("name")
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise BadRequest(f"tools: {name!r:.80} cannot be called from code: its name is no Python name")
        if tool.get("strict"):
            raise BadRequest(f"tools: {name!r:.80} has `strict`, which cannot be combined with programmatic calling")
        if tool.get("type", "custom") not in (None, "custom"):
            raise BadRequest(f"tools: {name!r:.80} of type {tool['type']!r:.60} cannot be called from code")


def _web_version(tool: object) -> int:
    found = _WEB.fullmatch(str(tool.get("type"))) if isinstance(tool, Mapping) else None
    return int(found.group(1)) if found else 0


def _direct(tool: Tool) -> Tool | None:
    """The tool as the model may call it; None if only code may."""
    if _web_version(tool) >= _WEB_RUNS_CODE_SINCE:
        return {**tool, "allowed_callers": ["direct"]}  # else the API brings a sandbox of its own
    callers = _callers(tool)
    if not any(each.startswith("code_execution_") for each in callers):
        return tool
    if "direct" not in callers:
        return None
    return {key: value for key, value in tool.items() if key != "allowed_callers"}


def rewrite_choice(choice: Any, toolset: Toolset) -> Any:
    """`tool_choice` for the first sampling of a turn.

    Raises: BadRequest for a choice that the hosted tool refuses, too.
    """
    if not isinstance(choice, Mapping):
        return choice
    if toolset.functions and choice.get("disable_parallel_tool_use"):
        raise BadRequest("tool_choice: `disable_parallel_tool_use` cannot be combined with programmatic calling")
    name = choice.get("name")
    if choice.get("type") != "tool":
        return choice
    if name in toolset.hidden:
        raise BadRequest(f"tool_choice: {name!r:.80} cannot be forced: its `allowed_callers` has no 'direct'")
    if name == CODE and toolset.version is not None and CODE not in toolset.names:
        return {**choice, "name": BASH}
    return choice


def relaxed_choice(choice: Any) -> Any:
    """`tool_choice` once a forced call was made: with the same one the turn would never end."""
    if isinstance(choice, Mapping) and choice.get("type") in ("tool", "any"):
        return {key: "auto" if key == "type" else value for key, value in choice.items() if key != "name"}
    return choice


def forward_betas(header: str | None) -> str | None:
    """The anthropic-beta header for the model's API: without what is done here; None if nothing is left."""
    kept = [beta.strip() for beta in (header or "").split(",")]
    kept = [beta for beta in kept if beta and not beta.startswith(_OWN_BETAS)]
    return ",".join(kept) or None
