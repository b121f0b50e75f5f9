"""Tokens of several samplings as the usage of one message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Usage = dict[str, Any]

_OF_DELTA = (
    "input_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
    "output_tokens",
    "output_tokens_details",
    "server_tool_use",
    "iterations",
)
"""Keys that the closing event of a stream has."""

NONE: Mapping[str, int] = {
    "input_tokens": 0,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "output_tokens": 0,
}


def add(total: Mapping[str, Any], more: Mapping[str, Any]) -> Usage:
    """Numbers are summed, also in nested objects, lists are joined; of anything else the newer value counts."""
    summed: Usage = dict(total)
    for key, value in more.items():
        there = summed.get(key)
        if value is None:
            summed.setdefault(key, None)
        elif _is_number(value) and _is_number(there):
            summed[key] = there + value
        elif isinstance(value, Mapping) and isinstance(there, Mapping):
            summed[key] = add(there, value)
        elif isinstance(value, list) and isinstance(there, list):
            summed[key] = [*there, *value]
        else:
            summed[key] = value
    return summed


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def of_round(start: Mapping[str, Any], end: Mapping[str, Any]) -> Usage:
    """What one streamed sampling used: the closing event is cumulative and stronger than the opening one."""
    return {**start, **{key: value for key, value in end.items() if value is not None}}


def shown(total: Mapping[str, Any]) -> Usage:
    """For a whole message: with the counters that every hosted answer has."""
    counters = total.get("server_tool_use")
    none = {"web_search_requests": 0, "web_fetch_requests": 0}
    return {**total, "server_tool_use": {**none, **counters} if isinstance(counters, Mapping) else none}


def of_delta(total: Mapping[str, Any]) -> Usage:
    """For the closing event of a stream."""
    return {key: value for key, value in shown(total).items() if key in _OF_DELTA}
