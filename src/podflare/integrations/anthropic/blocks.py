"""Blocks of the Messages API: reading those of a message, dicts or objects of any SDK version, and making answers.

The `anthropic` package is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from podflare.errors import BadRequest

if TYPE_CHECKING:
    from podflare import ExecResult

MAX_TEXT_CHARS = 50_000
"""Of one output that is shown with bounds: about 15,000 tokens."""
MAX_IMAGE_CHARS = 5 * 1024 * 1024
"""Of an image in base64; the API takes no larger one."""
_IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")


def field(block: Any, key: str) -> Any:
    """A field of a dict or of an SDK object; None if it has none."""
    return block.get(key) if isinstance(block, Mapping) else getattr(block, key, None)


def id_of(block: Any) -> str:
    """The block's id; "" if it has none that is one."""
    try:
        value = field(block, "id")
    except Exception:  # noqa: BLE001  # an object whose attributes raise has no id that we could name
        return ""
    return value if isinstance(value, str) else ""


def text_input(arguments: Any, key: str, *, what: str = "a string", default: str | None = None) -> str:
    """A string of a call's input.  Raises: BadRequest that tells the model what is wrong with its call."""
    value = field(arguments, key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        found = "nothing" if value is None else type(value).__name__
        raise BadRequest(f"input.{key} must be {what}, got {found}")
    return value


def bounded(text: str, limit: int = MAX_TEXT_CHARS) -> str:
    """Head and tail of a text that is too long, and between them how much was left out."""
    if len(text) <= limit:
        return text
    head, tail = limit - limit // 2, limit // 2
    left_out = len(text) - head - tail
    return f"{text[:head]}\n[{left_out} characters left out here]\n{text[len(text) - tail :]}"


def tool_result(block: Any, content: list[dict[str, Any]], *, is_error: bool) -> dict[str, Any]:
    """The answer to a `tool_use` block."""
    return {"type": "tool_result", "tool_use_id": id_of(block), "content": content, "is_error": is_error}


def text_result(block: Any, text: str, *, is_error: bool = False) -> dict[str, Any]:
    """An answer of one text."""
    return tool_result(block, [{"type": "text", "text": text}], is_error=is_error)


def refusal(block: Any, exc: Exception) -> dict[str, Any]:
    """The answer that says what went wrong."""
    return text_result(block, f"error: {exc}" if str(exc) else f"error: {type(exc).__name__}", is_error=True)


def cell_result(block: Any, result: ExecResult, *, cut: bool, rich: bool) -> dict[str, Any]:
    """The answer that tells how a cell ended: `stdout:`, `stderr:`, `exit_code:`.

    Args:
        cut: keep only head and tail of very long outputs.
        rich: add `rich_content`.
    """
    out, err = result.stdout, result.stderr
    if cut:
        out, err = bounded(out), bounded(err)
    text = f"stdout:\n{out}\nstderr:\n{err}\nexit_code: {result.exit_code}"
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if rich:
        content += rich_content(result)
    return tool_result(block, content, is_error=result.exit_code != 0)


def rich_content(result: ExecResult) -> list[dict[str, Any]]:
    """Blocks for what the cell showed besides its output: images, and the text of other values."""
    blocks: list[dict[str, Any]] = []
    for shown in result.results:
        found = next((mime for mime in _IMAGES if isinstance(shown.data.get(mime), str)), None)
        if found is not None and len(data := shown.data[found]) <= MAX_IMAGE_CHARS:
            source = {"type": "base64", "media_type": found, "data": data.replace("\n", "")}
            blocks.append({"type": "image", "source": source})
        elif found is not None:
            text = f"[an image of {len(shown.data[found])} characters was left out: the cap is {MAX_IMAGE_CHARS}]"
            blocks.append({"type": "text", "text": f"{shown.kind}:\n{text}"})
        elif shown.text:
            blocks.append({"type": "text", "text": f"{shown.kind}:\n{bounded(shown.text)}"})
    return blocks
