"""Bounds first, then decode: checked reads from JSON that somebody else wrote.

One rejection error per border: the caller names the class (`ProtocolError` for a guest, `BadRequest`
for an HTTP body), so hostile input can never surface as a KeyError or RecursionError.
"""

from __future__ import annotations

import json
from typing import Any, Dict, Optional, Type

from podflare.errors import PodflareError


def decode_object(
    data: bytes, *, error: Type[PodflareError], what: str, max_values: Optional[int] = None
) -> Dict[str, Any]:
    """Parse `data` (UTF-8 JSON) into an object.

    Args: max_values: refuse more values than this before they are made: 16 MiB of `[],` become 350 MB of lists.
    Raises: `error` if it is not JSON, not an object, nested deeper than the parser can follow, or has NaN/Infinity.
    """
    if max_values is not None and _has_more_values(data, max_values):
        raise error(f"{what}: more than {max_values} values")
    try:
        value = _DECODER.decode(data.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise error(f"{what}: not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise error(f"{what}: expected a JSON object, got {type(value).__name__}")
    return value


def _has_more_values(data: bytes, most: int) -> bool:
    """Whether a JSON text holds more values, counted by what separates and opens them outside of its strings."""
    if _separators(data) <= most:
        return False
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")  # no escaped quote is left: what quotes are there are ends
    if bare.count(b'"') > 4 * most:
        return True
    return _separators(b"".join(bare.split(b'"')[::2])) > most


def _separators(data: bytes) -> int:
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (_INFINITY, -_INFINITY):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


_INFINITY = float("inf")


# Made once: json.loads and json.dumps would make new ones at each call, which is half of a small message's cost.
_DECODER = json.JSONDecoder(parse_constant=_no_constants, parse_float=_finite)
_ENCODER = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), allow_nan=False)


def encode_object(value: Dict[str, Any]) -> bytes:
    """Compact ASCII JSON.  ASCII because the real client cuts lines at U+2028, U+2029 and U+0085 (spec A.0)."""
    return _ENCODER.encode(value).encode("ascii")


class Fields:
    """Checked access to the keys of one decoded object.  Each `raises` names the key and what was expected."""

    def __init__(self, value: Dict[str, Any], *, error: Type[PodflareError], what: str) -> None:
        self._value = value
        self._error = error
        self._what = what

    def _get(self, key: str) -> Any:
        return self._value.get(key)

    def value(self, key: str) -> Any:
        """As it is, for the caller to check; None when absent."""
        return self._get(key)

    def fail(self, key: str, expected: str) -> PodflareError:
        """The error for `key`, ready to raise."""
        got = self._value.get(key)
        shown = "nothing" if got is None else f"{type(got).__name__} {got!r:.60}"
        return self._error(f"{self._what}: {key!r} must be {expected}, got {shown}")

    def text(self, key: str, *, max_chars: int, default: Optional[str] = None) -> str:
        value = self._get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, "a string")
        if len(value) > max_chars:
            raise self._error(f"{self._what}: {key!r} has {len(value)} characters, the cap is {max_chars}")
        return value

    def optional_text(self, key: str, *, max_chars: int) -> Optional[str]:
        return None if self._get(key) is None else self.text(key, max_chars=max_chars)

    def integer(self, key: str, *, low: int, high: int, default: Optional[int] = None) -> int:
        value = self._get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, f"an integer from {low} to {high}")
        return value

    def optional_integer(self, key: str, *, low: int, high: int) -> Optional[int]:
        return None if self._get(key) is None else self.integer(key, low=low, high=high)

    def optional_number(self, key: str, *, low: float, high: float) -> Optional[float]:
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def text_map(self, key: str, *, max_items: int, max_chars: int) -> Dict[str, str]:
        """A string-to-string object; {} when absent."""
        value = self._get(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise self.fail(key, "an object of strings")
        if len(value) > max_items or any(len(k) + len(v) > max_chars for k, v in value.items()):
            raise self._error(
                f"{self._what}: {key!r} is too large (caps: {max_items} items, {max_chars} characters each)"
            )
        return value
