"""Bash and Python calls of the hosted tool as cells of a sandbox, and the files that they hand out."""

from __future__ import annotations

import base64
import binascii
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from podflare.errors import BadRequest, PodflareError, TooLarge
from podflare.integrations.anthropic.containers.files import FileStore
from podflare.integrations.anthropic.hosted.blocks import (
    BASH,
    INVALID_INPUT,
    OUTPUT_TOO_LARGE,
    TIMED_OUT,
    UNAVAILABLE,
    Block,
    Call,
    error_content,
    output_content,
)
from podflare.integrations.anthropic.hosted.uploads import INPUT_DIR

if TYPE_CHECKING:
    from podflare import AsyncSandbox, ExecResult

OUTPUT_ROOT = "/tmp/outputs"
MAX_OUTPUT_CHARS = 100_000
"""Of each stream.  The model has to read it."""
MAX_OUTPUT_FILES = 64
_SIDE_TIMEOUT_S = 30.0
"""Of the cells that only look after the directories."""
_LIST = (
    "shopt -s nullglob dotglob; cd -- {directory} && n=0 && for f in *; do "
    '[ -f "$f" ] && [ ! -L "$f" ] && [ $((n += 1)) -le {most} ] && printf \'%s %s\\0\' "$(stat -c %s -- "$f")" "$f"; '
    "done | base64 -w0"
)


@dataclass(frozen=True)
class Place:
    """Where a call's files go, and to whom."""

    owner: str
    directory: str
    store: FileStore


def bash_script(command: str, directory: str) -> str:
    """The command with its directories.  All on its first line, so that bash counts lines as the model does."""
    return f"export INPUT_DIR={INPUT_DIR} OUTPUT_DIR={directory}; mkdir -p {INPUT_DIR} {directory}; {command}"


def python_preparation(directory: str) -> str:
    """A cell that sets the directories for the next one, and leaves no name behind."""
    return (
        f"__import__('os').makedirs({directory!r}, exist_ok=True); __import__('os').makedirs({INPUT_DIR!r}, "
        f"exist_ok=True); __import__('os').environ.update(INPUT_DIR={INPUT_DIR!r}, OUTPUT_DIR={directory!r})"
    )


async def prepare_python(sandbox: AsyncSandbox, place: Place) -> None:
    """Set the directories for the Python cell to come."""
    await sandbox.run_code(python_preparation(place.directory), timeout=_SIDE_TIMEOUT_S)


async def run_bash(sandbox: AsyncSandbox, call: Call, place: Place, timeout_s: float) -> Block:
    """Run a `bash_code_execution`; `content` of its result.  Raises: PodflareError if the sandbox fails."""
    command = call.input.get("command")
    if not isinstance(command, str) or not command.strip() or "\0" in command:
        return error_content(BASH, INVALID_INPUT)
    try:
        done = await sandbox.run_code(bash_script(command, place.directory), "bash", timeout=timeout_s)
    except (TooLarge, BadRequest):
        return error_content(BASH, INVALID_INPUT)
    return await finished(sandbox, call.name, done, place)


async def run_python(sandbox: AsyncSandbox, call: Call, place: Place, timeout_s: float) -> Block:
    """Run a `code_execution`.  As run_bash."""
    code = call.input.get("code")
    if not isinstance(code, str):
        return error_content(call.name, INVALID_INPUT)
    await prepare_python(sandbox, place)
    try:
        done = await sandbox.run_code(code, timeout=timeout_s)
    except (TooLarge, BadRequest):
        return error_content(call.name, INVALID_INPUT)
    return await finished(sandbox, call.name, done, place)


async def finished(
    sandbox: AsyncSandbox, name: str, done: ExecResult, place: Place, *, limit_told: bool = False
) -> Block:
    """`content` of the result for a cell that is over, its files kept.

    Args:
        limit_told: the model was told of the time limit, so running into it is a result like any other.
    """
    if done.reason == "timed_out" and limit_told:
        text = f"{_bounded(done.stderr)}\ndetection_timeout: the code was ended at its time limit".lstrip()
        return output_content(name, _bounded(done.stdout), text, done.exit_code, [])
    if done.reason == "timed_out":
        return error_content(name, TIMED_OUT)
    if done.reason in ("sandbox_failed", "incomplete"):
        return error_content(name, UNAVAILABLE)
    kept, too_large = await _keep_files(sandbox, place)
    if too_large and name == BASH:
        return error_content(name, OUTPUT_TOO_LARGE)
    return output_content(name, _bounded(done.stdout), _bounded(done.stderr), done.exit_code, kept)


def _bounded(text: str) -> str:
    if len(text) <= MAX_OUTPUT_CHARS:
        return text
    half = MAX_OUTPUT_CHARS // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out here]\n{text[-half:]}"


async def _keep_files(sandbox: AsyncSandbox, place: Place) -> tuple[list[str], bool]:
    """Ids of the files in the output directory, and whether one was above the cap."""
    listing = _LIST.format(directory=shlex.quote(place.directory), most=MAX_OUTPUT_FILES)
    listed = await sandbox.run_code(listing, "bash", timeout=_SIDE_TIMEOUT_S)
    ids: list[str] = []
    for entry in _decoded(listed.stdout).split(b"\0"):
        size, _, name = entry.partition(b" ")
        if not size.isdigit() or not name or b"/" in name:
            continue
        if int(size) > place.store.max_file_bytes:
            return ids, True
        filename = name.decode("utf-8", "surrogateescape")
        path = place.store.new_path()
        try:
            await sandbox.download_file(f"{place.directory}/{filename}", path)
            ids.append(await anyio.to_thread.run_sync(_keep, place, path, filename))
        except PodflareError as exc:
            if exc.fault != "caller":
                raise
            # gone meanwhile, or no more room: the call itself has succeeded
        finally:
            path.unlink(missing_ok=True)
    return ids, False


def _keep(place: Place, path: Path, filename: str) -> str:
    return place.store.keep(place.owner, path, filename, downloadable=True).id


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text)
    except (binascii.Error, ValueError):
        return b""
