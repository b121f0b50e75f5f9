"""The text editor tools on the files of a sandbox: view, create, str_replace, insert.

Files are read and written by the sandbox's file API, so paths are those of the sandbox and need no shell quoting.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from podflare.errors import BadRequest, FileAccessError, FileMissing
from podflare.integrations.anthropic.blocks import MAX_TEXT_CHARS, bounded, field, text_input
from podflare.integrations.anthropic.steps import Steps

MAX_FILE_BYTES = 16 * 1024 * 1024
MAX_PATH_CHARS = 4096
_LISTED = 1000
"""Entries of a directory that are shown."""


@dataclass(frozen=True)
class Editor:
    """One of the two tools."""

    commands: tuple[str, ...]
    numbered: bool
    """Whether view puts a number before each line."""
    max_characters: int = MAX_TEXT_CHARS
    """Of what view shows of a file."""

    def steps(self, arguments: Any) -> Steps[str]:
        """Carry out the input of a call; its text.  Raises: BadRequest, FileAccessError that tell the model why not."""
        command = text_input(arguments, "command", what="one of " + ", ".join(self.commands))
        if command not in self.commands:
            raise BadRequest(f"input.command must be one of {', '.join(self.commands)}, got {command!r:.80}")
        path = text_input(arguments, "path", what="the path of a file")
        if not path or "\0" in path or len(path) > MAX_PATH_CHARS:
            raise BadRequest(f"input.path must be a path of 1 to {MAX_PATH_CHARS} characters without NUL")
        if command == "view":
            return (yield from self._view(path, arguments))
        if command == "create":
            return (yield from _create(path, arguments))
        if command == "str_replace":
            return (yield from _replace(path, arguments))
        return (yield from _insert(path, arguments))

    def _view(self, path: str, arguments: Any) -> Steps[str]:
        try:
            content = yield from _read(path)
        except FileMissing:
            raise
        except FileAccessError as exc:
            # Perhaps a directory; what else it could be, the error says.
            listing = yield from _list(path)
            if listing is None:
                raise exc
            return listing
        lines = _lines(content)
        first, last = _range(arguments, len(lines))
        chosen = lines[first - 1 : last]
        if self.numbered:
            text = "".join(f"{number:6}\t{line}" for number, line in enumerate(chosen, first))
        else:
            text = "".join(chosen)
        return bounded(text, self.max_characters) or "(the file is empty)"


def _read(path: str) -> Steps[str]:
    data = yield lambda sandbox: sandbox.download(path, max_bytes=MAX_FILE_BYTES)
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as exc:
        raise FileAccessError(f"{path} is not text in UTF-8: {exc.reason} at byte {exc.start}") from exc


def _write(path: str, text: str) -> Steps[None]:
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise BadRequest(f"the text has a character that UTF-8 has not, at {exc.start}") from exc
    if len(data) > MAX_FILE_BYTES:
        raise BadRequest(f"the file would have {len(data)} bytes, the editor's cap is {MAX_FILE_BYTES}")
    yield lambda sandbox: sandbox.upload(data, path)


def _list(path: str) -> Steps[str | None]:
    """The entries of a directory, two levels deep, without hidden ones; None if it is none."""
    # A name may begin with `-`, and ~ and relative paths start at home here as in the file API.
    place = shlex.quote(path) if not path.startswith("~/") else '"$HOME"/' + shlex.quote(path[2:])
    place = '"$HOME"' if path == "~" else place
    find = "find . -mindepth 1 -maxdepth 2 -not -path '*/.*' -printf '%P\\t%y\\n' | LC_ALL=C sort"
    script = f"cd -- {place} 2> /dev/null || exit 9; {find} | head -n {_LISTED + 1}"
    result = yield lambda sandbox: sandbox.run_code(script, "bash", timeout=30)
    if result.exit_code:
        return None
    found = [line.rpartition("\t") for line in result.stdout.split("\n") if line]
    entries = [name + ("/" if kind == "d" else "") for name, _, kind in found]
    shown = entries[:_LISTED]
    if len(entries) > _LISTED:
        shown.append(f"[only the first {_LISTED} entries are shown]")
    title = f"Files in {path}, two levels deep, without hidden ones:" if shown else f"{path} is an empty directory."
    return "\n".join([title, *shown])


def _lines(text: str) -> list[str]:
    """Lines with their newlines; only \\n ends one."""
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def _range(arguments: Any, count: int) -> tuple[int, int]:
    """First and last line to show, from 1.  Raises: BadRequest."""
    value = field(arguments, "view_range")
    if value is None:
        return 1, count
    numbers = list(value) if isinstance(value, (list, tuple)) else []
    if len(numbers) != 2 or not all(type(number) is int for number in numbers):
        raise BadRequest("input.view_range must be two line numbers, [first, last]; a last of -1 means the end")
    first, last = numbers
    if last == -1:
        last = count
    if not 1 <= first <= max(1, count) or (last < first and count):
        raise BadRequest(f"input.view_range {numbers} must be within the file's {count} lines, first before last")
    return first, min(last, count)


def _create(path: str, arguments: Any) -> Steps[str]:
    yield from _write(path, text_input(arguments, "file_text"))
    return f"{path} was written."


def _replace(path: str, arguments: Any) -> Steps[str]:
    old = text_input(arguments, "old_str")
    new = text_input(arguments, "new_str", default="")
    if not old:
        raise BadRequest("input.old_str must not be empty")
    text = yield from _read(path)
    count = _count(text, old)
    if count == 0:
        raise BadRequest(f"old_str was not found in {path}: it must match exactly, white space included")
    if count > 1:
        raise BadRequest(f"old_str was found {count} times in {path}: give more context, so that it is unique")
    yield from _write(path, text.replace(old, new, 1))
    first = text[: text.index(old)].count("\n") + 1
    return f"The text was replaced in {path}, at line {first}."


def _count(text: str, part: str) -> int:
    """Occurrences, those that overlap included: a replacement must be unambiguous."""
    found, start = 0, text.find(part)
    while start >= 0:
        found, start = found + 1, text.find(part, start + 1)
    return found


def _insert(path: str, arguments: Any) -> Steps[str]:
    line = field(arguments, "insert_line")
    inserted = text_input(arguments, "insert_text")
    if type(line) is not int:
        raise BadRequest("input.insert_line must be the number of a line, 0 for the beginning of the file")
    lines = _lines((yield from _read(path)))
    if not 0 <= line <= len(lines):
        raise BadRequest(f"input.insert_line must be from 0 to {len(lines)}, the number of lines of {path}, got {line}")
    before, after = lines[:line], lines[line:]
    if before and not before[-1].endswith("\n"):
        before[-1] += "\n"
    if not inserted.endswith("\n"):
        inserted += "\n"
    yield from _write(path, "".join([*before, inserted, *after]))
    return f"The text was inserted in {path}, after line {line}."
