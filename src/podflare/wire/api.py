"""HTTP bodies as frozen dataclasses, with their decoders (spec part A) and every limit on them."""

from __future__ import annotations

import posixpath
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any, Dict, Iterable, Mapping, Optional, Tuple

from podflare.errors import BadRequest
from podflare.wire.codec import Fields
from podflare.wire.egress import Reach, SecretGrant, read_reach, read_secrets
from podflare.wire.messages import LANGUAGES, MAX_CODE_CHARS, MAX_PATH_CHARS
from podflare.wire.tools import (
    DEFAULT_TIMEOUT_S,
    MAX_ERROR_CHARS,
    MAX_RESULT_BYTES,
    Tools,
    check_json,
    read_tools,
)

DEFAULT_TEMPLATE = "default"
DEFAULT_RAM_MIB = 1024
DEFAULT_ROOTFS_GB = 4
MAX_BODY_BYTES = 32 * 1024 * 1024
"""Cap of a JSON request body: MAX_CODE_CHARS characters, escaped."""
MAX_BODY_VALUES = 1_000_000
"""Of JSON in a request body: more than the resolutions of a merge are."""
MAX_ANSWER_VALUES = MAX_RESULT_BYTES // 2
"""In the body of an answer to a tool call, whose result is the caller's own JSON."""
MAX_LIFETIME_S = 366 * 86400
MAX_METADATA_ITEMS = 32
MAX_FORKS = 32
"""Children of one fork call."""
DEFAULT_FORK_TIMEOUT_S = 50.0
"""Below the 60 s after which the original's client gives up on a silent fork."""
MAX_SNAPSHOT_CHARS = 64
_SNAPSHOT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z", re.ASCII)
MAX_DIFF_PATHS = 64
DIFF_PATHS = ("/root", "/tmp")
"""What a diff compares unless it is told."""


@dataclass(frozen=True)
class CreateRequest:
    """Body of POST /v1/sandboxes.  None means the daemon's default."""

    template: str = DEFAULT_TEMPLATE
    engine: Optional[str] = None
    snapshot: Optional[str] = None
    """Go on from a snapshot, which has template and limits; then `template` means nothing."""
    timeout_seconds: Optional[int] = None
    idle_timeout_seconds: Optional[int] = None
    ram_mib: Optional[int] = None
    """None means the template's."""
    rootfs_gb: Optional[int] = None
    persistent: bool = False
    egress: Optional[Reach] = None
    secrets: Mapping[str, SecretGrant] = field(default_factory=dict)
    """By the name of the environment variable that holds a placeholder."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, body: Dict[str, Any]) -> "CreateRequest":
        """Raises: BadRequest that names the key and what it must be.  Unknown keys are ignored (newer clients)."""
        read = Fields(body, error=BadRequest, what="create request")
        snapshot = read.optional_text("snapshot", max_chars=MAX_SNAPSHOT_CHARS) or None
        if snapshot is not None:
            _check_snapshot_alone(body)
        return cls(
            template=read.text("template", max_chars=128, default=DEFAULT_TEMPLATE) or DEFAULT_TEMPLATE,
            engine=read.optional_text("engine", max_chars=64) or None,
            snapshot=snapshot,
            timeout_seconds=read.optional_integer("timeout_seconds", low=1, high=MAX_LIFETIME_S),
            idle_timeout_seconds=read.optional_integer("idle_timeout_seconds", low=1, high=MAX_LIFETIME_S),
            ram_mib=read.optional_integer("ram_mib", low=64, high=1024 * 1024),
            rootfs_gb=read.optional_integer("rootfs_gb", low=1, high=4096),
            persistent=read.flag("persistent", default=False),
            egress=read_reach(body.get("egress")),
            secrets=read_secrets(body.get("secrets")),
            metadata=read.text_map("metadata", max_items=MAX_METADATA_ITEMS, max_chars=1024),
        )


def _check_snapshot_alone(body: Mapping[str, Any]) -> None:
    """Raises: BadRequest if more is asked for than a snapshot allows."""
    for key in ("template", "ram_mib", "rootfs_gb"):
        if body.get(key) is not None:
            raise BadRequest(f"create request: {key!r} cannot be given with 'snapshot', which has its own")
    for key in ("egress", "secrets"):
        if body.get(key):
            raise BadRequest(f"create request: {key!r} cannot be given with 'snapshot': it goes on without a network")


@dataclass(frozen=True)
class SnapshotRequest:
    """Body of POST /v1/sandboxes/{id}/snapshots."""

    name: str
    timeout_seconds: float = DEFAULT_FORK_TIMEOUT_S
    """For all of it: waiting for a running cell, and writing."""

    @classmethod
    def from_json(cls, body: Dict[str, Any]) -> "SnapshotRequest":
        """Raises: BadRequest that names the key and what it must be."""
        read = Fields(body, error=BadRequest, what="snapshot request")
        name = read.text("name", max_chars=MAX_SNAPSHOT_CHARS)
        if not _SNAPSHOT_NAME.match(name):
            raise read.fail("name", "letters, digits, '_', '.' and '-', no sign first")
        timeout = read.optional_number("timeout_seconds", low=0.001, high=MAX_LIFETIME_S)
        return cls(name, DEFAULT_FORK_TIMEOUT_S if timeout is None else timeout)


@dataclass(frozen=True)
class SnapshotInfo:
    """A sandbox kept on disk.  Answer of POST .../snapshots and GET /v1/snapshots."""

    name: str
    engine: str
    template: str
    ram_mib: int
    rootfs_gb: int
    created_at_ms: int
    size_bytes: int
    """On disk."""
    sandbox_id: str
    """Of the sandbox that was kept, which may be gone by now."""

    def to_json(self) -> Dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ExecRequest:
    """Body of POST /v1/sandboxes/{id}/exec."""

    code: str
    language: str = "python"
    timeout_seconds: Optional[float] = None
    """Of running; the time in which the cell waits for tools does not count."""
    tools: Tools = field(default_factory=dict)
    tool_timeout_seconds: float = DEFAULT_TIMEOUT_S

    @classmethod
    def from_json(cls, body: Dict[str, Any]) -> "ExecRequest":
        """Raises: BadRequest that names the key and what it must be."""
        read = Fields(body, error=BadRequest, what="exec request")
        language = read.text("language", max_chars=32, default="python")
        if language not in LANGUAGES:
            raise read.fail("language", "one of " + ", ".join(LANGUAGES))
        tools = read_tools(body.get("tools"), error=BadRequest)
        if tools and language != "python":
            raise BadRequest("exec request: only Python code can call 'tools'")
        tool_timeout = read.optional_number("tool_timeout_seconds", low=0.001, high=MAX_LIFETIME_S)
        return cls(
            code=read.text("code", max_chars=MAX_CODE_CHARS),
            language=language,
            timeout_seconds=read.optional_number("timeout_seconds", low=0.001, high=MAX_LIFETIME_S),
            tools=tools,
            tool_timeout_seconds=DEFAULT_TIMEOUT_S if tool_timeout is None else tool_timeout,
        )


@dataclass(frozen=True)
class ToolAnswer:
    """Body of POST /v1/sandboxes/{id}/cells/{cell}/tool_results: `result` or `error`."""

    call_id: str
    result: Any = None
    error_type: str = ""
    """Name of the exception to raise in the code; empty if there is a result."""
    error_message: str = ""

    @classmethod
    def from_json(cls, body: Dict[str, Any]) -> "ToolAnswer":
        """Raises: BadRequest that names the key and what it must be."""
        read = Fields(body, error=BadRequest, what="tool result")
        call_id = read.text("call_id", max_chars=128)
        if "error" not in body:
            check_json(read.value("result"), max_bytes=MAX_RESULT_BYTES, error=BadRequest, what="tool result: 'result'")
            return cls(call_id, read.value("result"))
        error = body["error"]
        if not isinstance(error, dict) or "result" in body:
            raise BadRequest("tool result: 'error' must be an object with type and message, without 'result'")
        read = Fields(error, error=BadRequest, what="tool result: error")
        kind = read.text("type", max_chars=MAX_ERROR_CHARS)
        message = read.text("message", max_chars=MAX_ERROR_CHARS, default="")
        return cls(call_id, error_type=kind or "ToolError", error_message=message)


@dataclass(frozen=True)
class LifetimesRequest:
    """Body of PATCH /v1/sandboxes/{id}: what changes; at least one."""

    timeout_seconds: Optional[int] = None
    """From now on."""
    idle_timeout_seconds: Optional[int] = None

    @classmethod
    def from_json(cls, body: Dict[str, Any]) -> "LifetimesRequest":
        """Raises: BadRequest that names the key and what it must be."""
        read = Fields(body, error=BadRequest, what="lifetimes")
        found = cls(
            timeout_seconds=read.optional_integer("timeout_seconds", low=1, high=MAX_LIFETIME_S),
            idle_timeout_seconds=read.optional_integer("idle_timeout_seconds", low=1, high=MAX_LIFETIME_S),
        )
        if found.timeout_seconds is None and found.idle_timeout_seconds is None:
            raise BadRequest("lifetimes: 'timeout_seconds' or 'idle_timeout_seconds' must be given")
        return found


@dataclass(frozen=True)
class ForkRequest:
    """Body of POST /v1/sandboxes/{id}/fork."""

    n: int = 1
    reseed: bool = True
    timeout_seconds: float = DEFAULT_FORK_TIMEOUT_S
    """For all of it: waiting for a running cell, and the fork."""

    @classmethod
    def from_json(cls, body: Dict[str, Any]) -> "ForkRequest":
        """Raises: BadRequest that names the key and what it must be."""
        read = Fields(body, error=BadRequest, what="fork request")
        timeout = read.optional_number("timeout_seconds", low=0.001, high=MAX_LIFETIME_S)
        return cls(
            n=read.integer("n", low=1, high=MAX_FORKS, default=1),
            reseed=read.flag("reseed", default=True),
            timeout_seconds=DEFAULT_FORK_TIMEOUT_S if timeout is None else timeout,
        )


@dataclass(frozen=True)
class DiffRequest:
    """Query of GET /v1/sandboxes/{id}/diff/{other}."""

    paths: Tuple[str, ...] = DIFF_PATHS
    """Absolute, without `.`, `..` and doubled slashes."""
    detail: bool = False
    variables: bool = False

    @classmethod
    def from_query(cls, fields: Iterable[Tuple[str, str]]) -> "DiffRequest":
        """Raises: BadRequest that names what is wrong.  Unknown parameters are ignored (newer clients)."""
        paths = []
        flags = {"detail": "false", "variables": "false"}
        for name, value in fields:
            if name == "paths":
                paths.append(normal_path(value, "diff request: each of 'paths'"))
            elif name in flags:
                flags[name] = value
        if len(paths) > MAX_DIFF_PATHS:
            raise BadRequest(f"diff request: {len(paths)} paths, the cap is {MAX_DIFF_PATHS}")
        for name, value in flags.items():
            if value not in ("true", "false"):
                raise BadRequest(f"diff request: {name!r} must be true or false, got {value!r:.60}")
        return cls(tuple(paths) or DIFF_PATHS, flags["detail"] == "true", flags["variables"] == "true")


def normal_path(path: str, what: str) -> str:
    """The path without `.`, `..` and doubled slashes.  Raises: BadRequest that begins with `what`."""
    if not path.startswith("/") or "\0" in path or len(path) > MAX_PATH_CHARS:
        raise BadRequest(f"{what} must be an absolute path of at most {MAX_PATH_CHARS} characters, got {path!r:.60}")
    # normpath keeps two leading slashes, as POSIX allows.
    return "/" + posixpath.normpath(path).lstrip("/")


@dataclass(frozen=True)
class PathChange:
    """How one path differs between two sandboxes."""

    kind: str
    """file, directory, link, fifo, socket or device; of a path that changed its kind the new one."""
    size_before: Optional[int] = None
    """Bytes; None where the path is not, and for what has no size."""
    size_after: Optional[int] = None
    patch: Optional[str] = None
    """The change as a unified diff, for text."""

    def to_json(self) -> Dict[str, Any]:
        body: Dict[str, Any] = {"kind": self.kind, "size_before": self.size_before, "size_after": self.size_after}
        if self.patch is not None:
            body["patch"] = self.patch
        return body


@dataclass(frozen=True)
class VariableState:
    """A variable of a sandbox's Python process."""

    type: str
    size: int
    """Bytes of content, about what a pickle of it has."""
    fingerprint: str
    """Hex digest of the content, the same in every branch of a fork."""


@dataclass(frozen=True)
class VariableChange:
    """How one variable differs between two sandboxes."""

    type_before: str
    type_after: str
    size_before: int
    size_after: int
    fingerprint_before: str
    fingerprint_after: str


@dataclass(frozen=True)
class VariablesDiff:
    """Which variables differ between one sandbox and another, by name, sorted."""

    added: Mapping[str, VariableState]
    """Only the other one has them."""
    removed: Mapping[str, VariableState]
    changed: Mapping[str, VariableChange]
    unread: Mapping[str, str]
    """Those that both have and that could not be compared, and why."""


@dataclass(frozen=True)
class Diff:
    """Which paths differ between one sandbox and another: absolute, sorted.  Answer of GET .../diff/{other}."""

    added: Tuple[str, ...]
    """Only the other one has them."""
    removed: Tuple[str, ...]
    modified: Tuple[str, ...]
    detail: Optional[Mapping[str, PathChange]] = None
    """By path, if it was asked for."""
    variables: Optional[VariablesDiff] = None
    """If they were asked for."""

    def to_json(self) -> Dict[str, Any]:
        body: Dict[str, Any] = {
            "added": list(self.added),
            "removed": list(self.removed),
            "modified": list(self.modified),
        }
        if self.detail is not None:
            body["detail"] = {path: change.to_json() for path, change in self.detail.items()}
        if self.variables is not None:
            body["variables"] = asdict(self.variables)
        return body


@dataclass(frozen=True)
class TemplateInfo:
    """What a sandbox can start from.  Answer of GET /v1/templates."""

    name: str
    description: str = ""
    version: str = ""
    """Another one whenever the template is built with another content; empty for the one that needs no building."""
    python: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Name -> version of what it brings besides the standard library."""
    preload: Tuple[str, ...] = ()
    """Modules that are imported before a sandbox starts."""
    missing_programs: Tuple[str, ...] = ()
    """What it should have and the daemon's computer lacked when it was built."""
    ram_mib: int = DEFAULT_RAM_MIB
    rootfs_gb: int = DEFAULT_ROOTFS_GB
    """Limits of a sandbox whose creator names none."""
    cpus: Optional[float] = None
    """Processors that a sandbox may use at a time, on average; None for all."""
    built_at_ms: Optional[int] = None
    size_bytes: int = 0
    not_preloaded: str = ""
    """Why sandboxes start without `preload`, though they could; empty if they do not."""
    problem: str = ""
    """Why no sandbox can be made of it, and what to do; empty if all is well."""
    engine: str = ""
    """Which makes sandboxes of it."""

    def to_json(self) -> Dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ForkReport:
    """What of the parent could not cross into a fork: it stayed with the parent, the fork goes on without it."""

    threads: Tuple[str, ...] = ()
    """Names of background threads."""
    processes: int = 0
    sockets: int = 0
    pipes: int = 0
    terminals: int = 0

    @property
    def lossless(self) -> bool:
        """Whether everything crossed."""
        return not (self.threads or self.processes or self.sockets or self.pipes or self.terminals)


@dataclass(frozen=True)
class SandboxUsage:
    """What a sandbox uses at the moment of the question.  Zero also for what its engine cannot measure."""

    memory_bytes: int
    """What counts against its limit; where nothing counts that, its processes' share of the memory they map."""
    private_memory_bytes: int
    """Of its processes' memory what none shares with another, so what a fork has cost so far."""
    processes: int
    changed_files: int
    """Files, links and deleted names of its own, since it was created or forked; counted up to 100,000."""
    disk_bytes: int
    """What those take on disk."""


@dataclass(frozen=True)
class SandboxInfo:
    """Answer of create, get and list.  Effective values, never the requested ones."""

    id: str
    state: str
    template: str
    engine: str
    isolation: Tuple[str, ...]
    """The walls in force, names from engines.base.Wall."""
    egress: Reach
    """What it may reach, hosts of secrets apart."""
    ram_mib: int
    rootfs_gb: int
    timeout_seconds: Optional[int]
    idle_timeout_seconds: Optional[int]
    persistent: bool
    created_at_ms: int
    metadata: Mapping[str, str]
    warnings: Tuple[str, ...] = ()
    """What was asked for and is not given, in plain words; empty when all was given."""
    parent_id: Optional[str] = None
    """The sandbox that this one was forked from, which may be gone by now."""
    generation: int = 0
    """How many forks lie between the sandbox that was created and the state that this one has now."""
    children: Tuple[str, ...] = ()
    """Ids of its forks that live."""
    fork_report: Optional[ForkReport] = None
    """Of a fork: what could not cross."""
    snapshot: Optional[str] = None
    """The snapshot that it was made of, if it was."""
    secrets: Mapping[str, Tuple[str, ...]] = field(default_factory=dict)
    """Variable -> the hosts whose requests get the value."""
    usage: Optional[SandboxUsage] = None
    """Only if it was asked for, and could be measured in time."""
    expires_at_ms: Optional[int] = None
    """When its lifetime is over, in ms since the epoch; None if nothing limits it."""
    seconds_left: Optional[float] = None
    """Until then."""
    idle_seconds_left: Optional[float] = None
    """Until it ends if nobody uses it; None if nothing limits that."""

    @property
    def expires_at(self) -> Optional[datetime]:
        """When its lifetime is over; None if nothing limits it.  An idle sandbox may end before."""
        if self.expires_at_ms is None:
            return None
        return datetime.fromtimestamp(self.expires_at_ms / 1000, timezone.utc)

    def to_json(self) -> Dict[str, Any]:
        return asdict(self)


def error_body(code: str, message: str) -> Dict[str, Any]:
    """The body of every non-2xx answer: `error` as the real client's users know it, `code` for ours."""
    return {"error": message, "code": code}
