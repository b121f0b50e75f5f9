"""Values as mime bundles: what a `Result` message carries.

Calls methods of user objects, which may raise, lie or never end; a form that fails is left out with a note.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from typing import Any, Callable, Dict, List, Tuple

from podflare.wire.frames import MAX_MESSAGE_BYTES
from podflare.wire.messages import MAX_MIME_TYPES, MAX_RICH_CHARS

MAX_PLAIN_CHARS = 1024 * 1024
_MAX_MIME_NAME_CHARS = 128
_FORM_METHODS: Tuple[Tuple[str, str], ...] = (
    ("_repr_html_", "text/html"),
    ("_repr_markdown_", "text/markdown"),
    ("_repr_svg_", "image/svg+xml"),
    ("_repr_png_", "image/png"),
    ("_repr_jpeg_", "image/jpeg"),
    ("_repr_latex_", "text/latex"),
    ("_repr_json_", "application/json"),
)
# An escaped character takes at most twelve bytes of JSON (a pair of \uXXXX), so below this no counting is needed.
_SURELY_FITS_CHARS = MAX_MESSAGE_BYTES // 16
_ENVELOPE_BYTES = 16 * 1024

Note = Callable[[str], None]


def mime_bundle(value: Any, note: Note) -> Dict[str, str]:
    """`text/plain` and the rich forms of `value`, within the caps of a Result.

    Args:
        note: told, in one line, of each form that could not be made.
    Raises: KeyboardInterrupt only.
    """
    data: Dict[str, str] = {}
    kind = type(value)
    if not isinstance(value, type):
        _add_own_bundle(value, kind, data, note)
        for method, mime in _FORM_METHODS:
            if mime not in data and hasattr(kind, method):
                _add(data, mime, _call(value, method, note), note)
        if "image/png" not in data and is_figure(value):
            _add(data, "image/png", _guarded(lambda: figure_png(value), "image of a figure", note), note)
    if "text/plain" not in data:
        data["text/plain"] = plain(value, note)
    return _fit(data)


def plain(value: Any, note: Note) -> str:
    """repr() that never fails and is never huge."""
    text = _guarded(lambda: repr(value), f"repr of {_type_name(value)}", note)
    if not isinstance(text, str):
        text = f"<{_type_name(value)} object whose repr failed>"
    return shorten(text, MAX_PLAIN_CHARS)


def shorten(text: str, limit: int) -> str:
    """`text`, or its head and tail with the number of characters left out between them."""
    if len(text) <= limit:
        return text
    half = (limit - 100) // 2
    return f"{text[:half]} ... [{len(text) - 2 * half} characters left out] ... {text[-half:]}"


def is_figure(value: Any) -> bool:
    module = sys.modules.get("matplotlib.figure")
    return module is not None and isinstance(value, getattr(module, "Figure", ()))


def figure_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def take_open_figures(note: Note) -> List[Dict[str, str]]:
    """Bundles of all open pyplot figures, in order of their numbers; closes them.  [] if pyplot was not imported."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None or not hasattr(pyplot, "get_fignums"):
        return []
    bundles: List[Dict[str, str]] = []
    numbers = _guarded(pyplot.get_fignums, "list of open figures", note)
    for number in numbers if isinstance(numbers, list) else ():
        figure = _guarded(lambda n=number: pyplot.figure(n), f"figure {number}", note)  # type: ignore[misc]
        data: Dict[str, str] = {}
        image = _guarded(lambda f=figure: figure_png(f), f"image of figure {number}", note)  # type: ignore[misc]
        _add(data, "image/png", image, note)
        if data:
            data["text/plain"] = plain(figure, note)
            bundles.append(_fit(data))
        _guarded(lambda n=number: pyplot.close(n), f"closing figure {number}", note)  # type: ignore[misc]
    return bundles


def _add_own_bundle(value: Any, kind: type, data: Dict[str, str], note: Note) -> None:
    if not hasattr(kind, "_repr_mimebundle_"):
        return
    bundle = _guarded(
        lambda: value._repr_mimebundle_(include=None, exclude=None),
        f"_repr_mimebundle_ of {_type_name(value)}",
        note,
    )
    if isinstance(bundle, tuple) and bundle:
        bundle = bundle[0]
    if isinstance(bundle, dict):
        for mime, content in list(bundle.items())[: MAX_MIME_TYPES - len(_FORM_METHODS) - 1]:
            _add(data, mime, content, note)


def _add(data: Dict[str, str], mime: Any, content: Any, note: Note) -> None:
    if isinstance(content, tuple) and content:
        content = content[0]  # (data, metadata): metadata has no place on the wire
    if content is None or not isinstance(mime, str) or len(mime) > _MAX_MIME_NAME_CHARS:
        return
    if isinstance(content, (bytes, bytearray)):
        data[mime] = base64.b64encode(content).decode("ascii")
    elif isinstance(content, str) and not mime.endswith("json"):
        data[mime] = str(content)
    else:
        text = _guarded(lambda: json.dumps(content), f"{mime} form", note)
        if isinstance(text, str):
            data[mime] = text


def _call(value: Any, method: str, note: Note) -> Any:
    return _guarded(lambda: getattr(value, method)(), f"{method} of {_type_name(value)}", note)


def _guarded(call: Callable[[], Any], what: str, note: Note) -> Any:
    """Result of `call`; None after a note if it raised anything but an interrupt."""
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # noqa: BLE001  # a display method may even raise SystemExit
        note(f"{what} failed: {_type_name(exc)}: {_first_line(exc)}")
        return None


def _first_line(exc: BaseException) -> str:
    try:
        return str(exc)[:500].partition("\n")[0]
    except Exception as failure:  # noqa: BLE001  # str() of a user's class may raise anything
        return f"<str() raised {_type_name(failure)}>"


def _type_name(value: Any) -> str:
    return type(value).__name__[:200]


def _fit(data: Dict[str, str]) -> Dict[str, str]:
    """Leave out the largest forms until the rest is within both caps of a Result; say so in text/plain."""
    if sum(map(len, data.values())) <= _SURELY_FITS_CHARS:
        return data
    sizes = {mime: len(json.dumps(content)) for mime, content in data.items()}
    note = ""
    while (
        sum(sizes.values()) > MAX_MESSAGE_BYTES - _ENVELOPE_BYTES
        or sum(map(len, data.values())) + len(note) > MAX_RICH_CHARS
    ):
        largest = max(sizes, key=lambda mime: (mime != "text/plain", sizes[mime]))
        if largest == "text/plain":
            break
        note += f"\n[{largest} of {len(data[largest])} characters left out: above the cap of {MAX_RICH_CHARS}]"
        del data[largest], sizes[largest]
    if note:
        data["text/plain"] = shorten(data.get("text/plain", ""), MAX_PLAIN_CHARS) + note
    return data
