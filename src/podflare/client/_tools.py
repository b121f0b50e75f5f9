"""Functions of the caller that code in a sandbox may call: how they are declared and called.  No I/O."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from podflare.errors import BadRequest
from podflare.wire.tools import MAX_RESULT_BYTES, Tools, check_json, is_name, read_tools

ToolFunctions = Mapping[str, Callable[..., Any]]
"""Name in the sandbox -> function here."""
ToolNames = Iterable[str] | Mapping[str, Iterable[str]]
"""Names, or names with the names of their parameters in order."""


def declare(names: ToolNames) -> Tools:
    """Tools as an exec request has them.

    Raises: BadRequest for a name that Python could not call; TypeError if these are no names.
    """
    if isinstance(names, str):
        raise TypeError("tools must be a list of names, or a mapping, got a str")
    if isinstance(names, Mapping):
        return read_tools({name: tuple(parameters) for name, parameters in names.items()}, error=BadRequest)
    return read_tools(list(names), error=BadRequest)


def declare_functions(functions: ToolFunctions, *, awaiting: bool) -> Tools:
    """Tools as an exec request has them, with the parameters that can be given by position.

    Args:
        awaiting: whether coroutine functions can be served.
    Raises: as `declare`; TypeError for what cannot be called here.
    """
    if not isinstance(functions, Mapping):
        raise TypeError(f"tools must be a mapping of names to functions, got {type(functions).__name__}")
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"tool {name!r:.80} must be a function, got {type(function).__name__}")
        if not awaiting and inspect.iscoroutinefunction(function):
            raise TypeError(f"tool {name!r:.80} is a coroutine function: AsyncSandbox serves those")
    return declare({name: _positional(function) for name, function in functions.items()})


def _positional(function: Callable[..., Any]) -> list[str]:
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []  # some functions written in C do not tell
    found = []
    for parameter in parameters:
        if parameter.kind not in by_position or not is_name(parameter.name):
            break
        found.append(parameter.name)
    return found


def invoke(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call it with arguments by name, also those that it takes by position only."""
    given = dict(arguments)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return function(**given)
    first = []
    for parameter in parameters:
        if parameter.kind is not inspect.Parameter.POSITIONAL_ONLY or parameter.name not in given:
            break
        first.append(given.pop(parameter.name))
    return function(*first, **given)


def answer(call_id: str, result: Any, error: Exception | Mapping[str, str] | None) -> dict[str, Any]:
    """Body of an answer.  Raises: BadRequest if the result is not JSON or is too large."""
    if error is None:
        check_json(result, max_bytes=MAX_RESULT_BYTES, error=BadRequest, what="a tool's result")
        return {"call_id": call_id, "result": result}
    if isinstance(error, Exception):
        error = {"type": type(error).__name__, "message": _message(error)}
    return {"call_id": call_id, "error": {"type": str(error["type"]), "message": str(error["message"])}}


def _message(error: Exception) -> str:
    try:
        # The text of a KeyError is the repr of its key, and would be wrapped again in the sandbox.
        return str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    except Exception as failure:  # noqa: BLE001  # the exception is the user's, and so is its text
        return f"its text could not be made: {type(failure).__name__}"
