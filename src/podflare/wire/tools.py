"""Tools: functions of the caller's program that code in a sandbox may call during one cell.  Names, bounds, JSON.

A call travels from the REPL to the caller as an event of its cell, its answer back by an HTTP call of its own.
"""

from __future__ import annotations

import keyword
from dataclasses import dataclass
from typing import Any, Dict, List, Tuple, Type

from podflare.errors import PodflareError
from podflare.wire.codec import encode_object

MAX_TOOLS = 128
MAX_PARAMETERS = 64
MAX_NAME_CHARS = 64
MAX_PENDING_CALLS = 128
"""Calls of one cell that wait for their answers at a time; further ones wait in the sandbox for a place."""
MAX_INPUT_BYTES = 1024 * 1024
"""Of the JSON of one call's input."""
MAX_PENDING_BYTES = 16 * 1024 * 1024
"""Of the inputs of all calls of a cell that wait."""
MAX_RESULT_BYTES = 8 * 1024 * 1024
"""Of the JSON of one result."""
MAX_ERROR_CHARS = 64 * 1024
MAX_DEPTH = 100
"""Of arrays and objects in one another."""
DEFAULT_TIMEOUT_S = 270.0
"""After which a call that nobody answered raises TimeoutError in the code."""


@dataclass(frozen=True)
class Tool:
    """What the sandbox knows of a function: its name, and how to name arguments that are given by position."""

    name: str
    parameters: Tuple[str, ...] = ()

    def to_json(self) -> Dict[str, Any]:
        return {"name": self.name, "parameters": list(self.parameters)}


def read_tools(value: Any, *, error: Type[PodflareError]) -> Tuple[Tool, ...]:
    """Tools of an exec request: each a name, or an object with `name` and `parameters`.  None means none.

    Raises: `error` that says what is wrong with which.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise error(f"'tools' must be a list of at most {MAX_TOOLS} tools")
    tools = tuple(_read_tool(item, error) for item in value)
    if len({tool.name for tool in tools}) < len(tools):
        raise error("'tools' has the same name twice")
    return tools


def _read_tool(item: Any, error: Type[PodflareError]) -> Tool:
    if isinstance(item, str):
        item = {"name": item}
    if not isinstance(item, dict):
        raise error(f"a tool is a name or an object with a name, got {item!r:.80}")
    name, parameters = item.get("name"), item.get("parameters") or []
    if not isinstance(parameters, list) or len(parameters) > MAX_PARAMETERS:
        raise error(f"tool {name!r:.80}: 'parameters' must be a list of at most {MAX_PARAMETERS} names")
    for word in (name, *parameters):
        if not is_name(word):
            raise error(f"a tool and its parameters have names that Python can call, got {word!r:.80}")
    return Tool(name, tuple(parameters))


def is_name(word: Any) -> bool:
    """Whether a tool may have this name: an ASCII identifier that is no keyword and does not begin with `__`."""
    return (
        isinstance(word, str)
        and word.isascii()
        and word.isidentifier()
        and len(word) <= MAX_NAME_CHARS
        and not keyword.iskeyword(word)
        and not word.startswith("__")
    )


def check_json(value: Any, *, max_bytes: int, error: Type[Exception], what: str) -> int:
    """Size of `value` as JSON.

    Raises: `error` if it is not JSON, nested deeper than MAX_DEPTH or above `max_bytes`.
    """
    try:
        size = len(encode_object({"": value})) - len('{"":}')
    except (TypeError, ValueError, RecursionError) as exc:
        raise error(f"{what} is not JSON: {exc}") from exc
    _check_depth(value, error, what)
    if size > max_bytes:
        raise error(f"{what} has {size} bytes as JSON, the cap is {max_bytes}; pass large data in files")
    return size


def _check_depth(value: Any, error: Type[Exception], what: str) -> None:
    level: List[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: List[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, (list, tuple)):
                inner.extend(item)
        if not inner:
            return
        level = inner
    raise error(f"{what} is nested deeper than {MAX_DEPTH}")
