"""The text editor of the hosted tool: view, create, str_replace, through the file calls of a sandbox."""

from __future__ import annotations

import base64
import posixpath
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from podflare.errors import FileMissing, PodflareError
from podflare.integrations.anthropic.hosted.blocks import EDITOR, FILE_NOT_FOUND, INVALID_INPUT, Block, error_content
from podflare.integrations.anthropic.hosted.uploads import INPUT_DIR

if TYPE_CHECKING:
    from podflare import AsyncSandbox

MAX_VIEW_CHARS = 100_000
MAX_PICTURE_BYTES = 5 * 1024 * 1024
MAX_PDF_BYTES = 20 * 1024 * 1024
_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8")
_LIST_DIRECTORY = 'cd -- "$1" && ls -1Ap | head -n 1000'


async def edit(sandbox: AsyncSandbox, arguments: Mapping[str, Any]) -> Block:
    """Do what `arguments` ask for; `content` of the result block.

    Raises: PodflareError if the sandbox fails.
    """
    path = arguments.get("path")
    if not isinstance(path, str) or not path or "\0" in path:
        return _refused("path must be a string")
    place = _absolute(path)
    command = arguments.get("command")
    try:
        if command == "view":
            return await _view(sandbox, place, arguments.get("view_range"))
        if command == "create":
            return await _create(sandbox, place, arguments.get("file_text"))
        if command == "str_replace":
            return await _replace(sandbox, place, arguments.get("old_str"), arguments.get("new_str"))
    except FileMissing:
        return error_content(EDITOR, FILE_NOT_FOUND, f"{path} does not exist")
    except OSError as exc:
        if isinstance(exc, PodflareError) and exc.fault != "caller":
            raise
        return _refused(str(exc))
    return _refused(f"unknown command {command!r:.60}: use view, create or str_replace")


def _refused(message: str) -> Block:
    return error_content(EDITOR, INVALID_INPUT, message)


def _absolute(path: str) -> str:
    for name, value in (("$INPUT_DIR", INPUT_DIR), ("${INPUT_DIR}", INPUT_DIR), ("$HOME", "/root"), ("~", "/root")):
        if path == name or path.startswith(name + "/"):
            path = value + path[len(name) :]
    return posixpath.normpath(posixpath.join("/root", path))


async def _view(sandbox: AsyncSandbox, path: str, view_range: object) -> Block:
    try:
        data = await sandbox.download(path)
    except FileMissing:
        raise
    except OSError:
        quoted = "'" + path.replace("'", "'\\''") + "'"
        listed = await sandbox.run_code(f"set -- {quoted}; {_LIST_DIRECTORY}", "bash", timeout=10)
        if listed.exit_code != 0:
            raise
        return _viewed(listed.stdout.split("\n"), 1, None)
    kind = _kind(data)
    if kind != "text":
        cap = MAX_PDF_BYTES if kind == "pdf" else MAX_PICTURE_BYTES
        if len(data) > cap:
            return _refused(f"the file has {len(data)} bytes; files of this kind can be viewed up to {cap}")
        content = base64.b64encode(data).decode("ascii")
        return _view_result(kind, content, None, None, None)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return _refused("the file is not UTF-8 text; look at it with a shell command")
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return _viewed(lines, *_bounds(view_range)) if view_range is not None else _viewed(lines, 1, None)


def _kind(data: bytes) -> str:
    if data.startswith(_PICTURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return "image"
    return "pdf" if data.startswith(b"%PDF-") else "text"


def _bounds(view_range: object) -> tuple[int, int | None]:
    """First and last line.  Raises: OSError, which tells the model what is wrong."""
    match view_range:
        case [int(first), int(last)] if first >= 1 and (last == -1 or last >= first):
            return first, None if last == -1 else last
    raise OSError("view_range must be two line numbers, the first from 1 on, the second not below it, or -1")


def _viewed(lines: list[str], first: int, last: int | None) -> Block:
    shown: list[str] = []
    size = 0
    for line in lines[first - 1 : last]:
        size += len(line) + 1
        if size > MAX_VIEW_CHARS:
            shown.append(f"[cut here: view shows {MAX_VIEW_CHARS} characters, use view_range for the rest]")
            break
        shown.append(line)
    return _view_result("text", "\n".join(shown), len(shown), first, len(lines))


def _view_result(kind: str, content: str, shown: int | None, first: int | None, total: int | None) -> Block:
    return {
        "type": f"{EDITOR}_view_result",
        "file_type": kind,
        "content": content,
        "num_lines": shown,
        "start_line": first,
        "total_lines": total,
    }


async def _create(sandbox: AsyncSandbox, path: str, text: object) -> Block:
    if not isinstance(text, str):
        return _refused("file_text must be a string")
    quoted = "'" + path.replace("'", "'\\''") + "'"
    was_there = (await sandbox.run_code(f"test -e {quoted}", "bash", timeout=10)).exit_code == 0
    await sandbox.upload(text.encode("utf-8", "replace"), path)
    return {"type": f"{EDITOR}_create_result", "is_file_update": was_there}


async def _replace(sandbox: AsyncSandbox, path: str, old: object, new: object) -> Block:
    if not isinstance(old, str) or not old:
        return _refused("old_str must be a string that is not empty")
    if new is not None and not isinstance(new, str):
        return _refused("new_str must be a string")
    try:
        text = (await sandbox.download(path)).decode("utf-8")
    except UnicodeDecodeError:
        return _refused("the file is not UTF-8 text")
    count = text.count(old)
    if count != 1:
        return _refused(f"old_str occurs {count} times in the file, it must occur exactly once")
    before, _, after = text.partition(old)
    await sandbox.upload((before + (new or "") + after).encode("utf-8", "replace"), path)
    line = before.count("\n") + 1
    head = before.rpartition("\n")[2]
    tail = after.partition("\n")[0]
    removed = f"{head}{old}{tail}".split("\n")
    added = f"{head}{new or ''}{tail}".split("\n")
    return {
        "type": f"{EDITOR}_str_replace_result",
        "old_start": line,
        "old_lines": len(removed),
        "new_start": line,
        "new_lines": len(added),
        "lines": [*(f"-{each}" for each in removed), *(f"+{each}" for each in added)],
    }
