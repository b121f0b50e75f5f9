"""What a template is to be: a TOML file and its limits.  Touches no file system but to read that file.

Trusted as far as whoever may build templates is, yet checked: a mistake should be told before anything is downloaded.
"""

from __future__ import annotations

import math
import posixpath
import re
import sys
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from podflare.errors import BadRequest
from podflare.wire.api import DEFAULT_RAM_MIB, DEFAULT_ROOTFS_GB, DEFAULT_TEMPLATE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_DEFINITION_BYTES = 256 * 1024
MAX_ITEMS = 500
"""Of each list and table."""
MAX_FILES = 100
MAX_PATH_CHARS = 400
HOME_OF_TEMPLATE = "/opt/template"
"""Where a machine has what its template brings; packages are in PACKAGES."""
PACKAGES = f"{HOME_OF_TEMPLATE}/packages"

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
_REQUIREMENT = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"  # name
    r"(?:\s*\[[A-Za-z0-9._,\s-]*\])?"  # extras
    r"(?:\s*(?:===|==|~=|!=|<=|>=|<|>)\s*[A-Za-z0-9.*+!_-]+\s*,?)*"  # versions
    r"(?:\s*;[\w\s.'\"<>=!~()+-]*)?"  # markers
)
_MODULE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VERSION = re.compile(r"3\.\d{1,2}")
_PROGRAM = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]*(?:\|[A-Za-z0-9][A-Za-z0-9+._-]*)*")

_OWN_VARIABLES = ("HOME", "PATH", "PYTHONPATH", "PYTHONHOME", "USER", "LOGNAME", "SHELL")
"""What the engine sets itself."""
_CLOSED = ("bin", "dev", "empty", "lib", "lib32", "lib64", "libx32", "lower", "machines", "new", "proc", "sbin", "skel")
_CLOSED_FOLDERS = frozenset((*(f"/{name}" for name in _CLOSED), "/sys", "/usr", HOME_OF_TEMPLATE))
"""Top-level names that are the machine's, the kernel's or the zygote's stage's."""

_LISTS_AND_TABLES = {"packages", "preload", "environment", "files", "programs", "limits"}
_KEYS = {"name", "description", "python", "network"} | _LISTS_AND_TABLES
_LIMITS = {"ram_mib", "rootfs_gb", "cpus"}


@dataclass(frozen=True)
class Definition:
    """One template as its file says."""

    name: str
    description: str = ""
    python: str = ""
    """A version as 3.11, an absolute path of an interpreter, or empty for the one that runs the daemon."""
    packages: tuple[str, ...] = ()
    """Requirements as pip reads them, names from an index only."""
    preload: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    """(path in a machine, file or directory to copy, relative to the definition)."""
    programs: tuple[tuple[str, str], ...] = ()
    """(name, or names in order of preference between |; package of a Linux distribution that has it)."""
    ram_mib: int = DEFAULT_RAM_MIB
    rootfs_gb: int = DEFAULT_ROOTFS_GB
    cpus: float | None = None
    folder: Path = field(default=Path(), compare=False)
    """What `files` are relative to."""


def shipped() -> tuple[str, ...]:
    """Names of the definitions that come with podflare."""
    folder = resources.files(__package__) / "definitions"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load(wanted: str) -> Definition:
    """The definition in the file `wanted` (a path that ends in .toml), or the shipped one of that name.

    Raises: BadRequest that names what is wrong.
    """
    if wanted.endswith(".toml") or "/" in wanted:
        path = Path(wanted)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_DEFINITION_BYTES + 1)
        except OSError as exc:
            raise BadRequest(f"cannot read the definition {wanted}: {exc.strerror or exc}") from exc
        return parse(data, path.resolve().parent)
    if wanted not in shipped():
        raise BadRequest(f"{wanted!r:.80} is neither a .toml file nor a shipped template: {', '.join(shipped())}")
    return parse((resources.files(__package__) / "definitions" / f"{wanted}.toml").read_bytes(), Path())


def check_name(name: str) -> str:
    """`name`, if a template can be called so.  Raises: BadRequest."""
    if not _NAME.fullmatch(name):
        raise BadRequest(
            f"{name!r:.80} is no name for a template: 1 to 63 of a-z 0-9 . _ -, with a letter or digit at both ends"
        )
    if name == DEFAULT_TEMPLATE:
        raise BadRequest(f"{DEFAULT_TEMPLATE!r} is the template that needs no building; choose another name")
    return name


def parse(data: bytes, folder: Path) -> Definition:
    """The definition that `data` is.  Raises: BadRequest that names the key and what it must be."""
    if len(data) > MAX_DEFINITION_BYTES:
        raise _wrong(f"it is larger than {MAX_DEFINITION_BYTES} bytes")
    try:
        body = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise _wrong(f"not TOML: {exc}") from exc
    _only(body, _KEYS, "")
    if "name" not in body:
        raise _wrong("'name' is missing")
    if body.get("network", False) is not False:
        raise _wrong("'network' can only be false: sandboxes of this version have no network")
    limits = body.get("limits", {})
    if not isinstance(limits, dict):
        raise _wrong("'limits' must be a table")
    _only(limits, _LIMITS, "limits.")
    return Definition(
        name=check_name(_text(body, "name", 64)),
        description=_text(body, "description", 1000),
        python=_python(_text(body, "python", 4096)),
        packages=_texts(body, "packages", _REQUIREMENT, "a requirement such as 'numpy>=2', from an index"),
        preload=_texts(body, "preload", _MODULE, "a module's name"),
        environment=_environment(body),
        files=_files(body),
        programs=_table(body, "programs", _PROGRAM, "a program's name"),
        ram_mib=_whole(limits, "ram_mib", 64, 1024 * 1024, DEFAULT_RAM_MIB),
        rootfs_gb=_whole(limits, "rootfs_gb", 1, 4096, DEFAULT_ROOTFS_GB),
        cpus=_cpus(limits),
        folder=folder,
    )


def _wrong(what: str) -> BadRequest:
    return BadRequest(f"template definition: {what}")


def _only(table: dict[str, Any], known: set[str], prefix: str) -> None:
    for key in table:
        if key not in known:
            raise _wrong(f"unknown key {prefix + key!r:.80}; known: {', '.join(sorted(known))}")


def _text(table: dict[str, Any], key: str, max_chars: int) -> str:
    value = table.get(key, "")
    if not isinstance(value, str) or len(value) > max_chars or "\0" in value:
        raise _wrong(f"{key!r} must be text of at most {max_chars} characters, got {value!r:.60}")
    return value


def _texts(table: dict[str, Any], key: str, pattern: re.Pattern[str], what: str) -> tuple[str, ...]:
    value = table.get(key, [])
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        raise _wrong(f"{key!r} must be a list of at most {MAX_ITEMS} texts, got {value!r:.60}")
    for item in value:
        if not isinstance(item, str) or len(item) > 500 or not pattern.fullmatch(item):
            raise _wrong(f"{key!r}: {item!r:.80} is not {what}")
    return tuple(value)


def _table(table: dict[str, Any], key: str, pattern: re.Pattern[str], what: str) -> tuple[tuple[str, str], ...]:
    value = table.get(key, {})
    if not isinstance(value, dict) or len(value) > MAX_ITEMS:
        raise _wrong(f"{key!r} must be a table of at most {MAX_ITEMS} entries")
    for name, text in value.items():
        if len(name) > 500 or not pattern.fullmatch(name):
            raise _wrong(f"{key!r}: {name!r:.80} is not {what}")
        if not isinstance(text, str) or len(text) > 32768 or "\0" in text:
            raise _wrong(f"{key!r}: the value of {name} must be text of at most 32768 characters")
    return tuple(value.items())


def _environment(body: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    found = _table(body, "environment", _VARIABLE, "a variable's name")
    for name, _ in found:
        if name in _OWN_VARIABLES:
            raise _wrong(f"'environment': {name} is podflare's to set")
    return found


def _files(body: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    found = _table(body, "files", re.compile(r"/.+", re.DOTALL), "an absolute path")
    if len(found) > MAX_FILES:
        raise _wrong(f"'files' has {len(found)} entries, the cap is {MAX_FILES}: a directory counts as one")
    for target, source in found:
        if "\0" in target or posixpath.normpath(target) != target or target.startswith("//"):
            raise _wrong(f"'files': {target!r:.80} must be a plain absolute path, without . and ..")
        if any(target == folder or target.startswith(f"{folder}/") for folder in _CLOSED_FOLDERS):
            raise _wrong(f"'files': {target!r:.80} lies where a template cannot put files")
        if len(target) > MAX_PATH_CHARS:
            raise _wrong(f"'files': {target!r:.80} is longer than {MAX_PATH_CHARS} characters")
        if not source:
            raise _wrong(f"'files': {target!r:.80} has no file to be copied from")
    targets = {target for target, _ in found}
    for target in targets:
        above = next((folder for folder in PurePosixPath(target).parents if str(folder) in targets), None)
        if above is not None:
            raise _wrong(f"'files': {target!r:.80} lies inside {str(above)!r:.80}")
    return found


def _python(text: str) -> str:
    if text and not _VERSION.fullmatch(text) and not text.startswith("/"):
        raise _wrong(f"'python' must be a version such as '3.11' or the path of an interpreter, got {text!r:.60}")
    return text


def _whole(table: dict[str, Any], key: str, low: int, high: int, default: int) -> int:
    value = table.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _wrong(f"'limits.{key}' must be a whole number from {low} to {high}, got {value!r:.60}")
    return value


def _cpus(table: dict[str, Any]) -> float | None:
    value = table.get("cpus")
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise _wrong(f"'limits.cpus' must be a number, got {value!r:.60}")
    if not 0.01 <= value <= 1024:
        raise _wrong(f"'limits.cpus' must be from 0.01 to 1024, got {value!r:.60}")
    return float(value)
