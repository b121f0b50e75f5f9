"""Tools: functions of the caller's program that code in a sandbox may call during one cell.  Names, bounds, JSON.

A call travels from the REPL to the caller as an event of its cell, its answer back by an HTTP call of its own.
"""

from __future__ import annotations

import keyword
from typing import Any, Dict, List, Tuple, Type

from podflare.errors import PodflareError
from podflare.wire.codec import encode_object

Tools = Dict[str, Tuple[str, ...]]
"""Name of each tool, and its parameters in order, so that code may give arguments by position."""

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


def read_tools(value: Any, *, error: Type[PodflareError]) -> Tools:
    """Tools of an exec request: a list of names, or an object with the parameters of each.  None means none.

    Raises: `error` that says what is wrong with which.
    """
    if value is None:
        return {}
    if isinstance(value, list):
        listed, value = value, {name: () for name in value if isinstance(name, str)}
        if len(value) < len(listed):
            raise error("'tools' must be different names")
    if not isinstance(value, dict) or len(value) > MAX_TOOLS:
        raise error(f"'tools' must be at most {MAX_TOOLS} names, or an object of names and their parameters")
    return {_name(name, error): _parameters(name, parameters, error) for name, parameters in value.items()}


def _parameters(tool: str, parameters: Any, error: Type[PodflareError]) -> Tuple[str, ...]:
    if not isinstance(parameters, (list, tuple)) or len(parameters) > MAX_PARAMETERS:
        raise error(f"the parameters of tool {tool!r:.80} must be a list of at most {MAX_PARAMETERS} names")
    return tuple(_name(parameter, error) for parameter in parameters)


def _name(word: Any, error: Type[PodflareError]) -> str:
    if not is_name(word):
        raise error(f"a tool and its parameters have names that Python can call, got {word!r:.80}")
    return str(word)


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
