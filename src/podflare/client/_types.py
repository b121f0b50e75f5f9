"""Values that the SDK hands to its user.  No I/O."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from podflare.wire.events import Event

__all__ = [
    "CellError",
    "Diff",
    "Event",
    "ExecResult",
    "Language",
    "PathChange",
    "PtySessionInfo",
    "Result",
    "ToolCallEvent",
    "VariableChange",
    "VariableState",
    "VariablesDiff",
]

Language = Literal["python", "bash"]

INCOMPLETE = "incomplete"
"""`reason` of a result whose stream ended without an exit event; its exit code is -1."""


@dataclass(frozen=True)
class Result:
    """A rich value of a cell: its last expression (`kind` "value") or something displayed ("display")."""

    data: Mapping[str, Any]
    """Mime type -> representation; binary ones in base64, as in Jupyter."""
    kind: str = "value"

    @property
    def text(self) -> str:
        """text/plain, or ""."""
        return str(self.data.get("text/plain", ""))

    @property
    def html(self) -> str | None:
        return self.data.get("text/html")

    @property
    def png(self) -> bytes | None:
        """The image/png form, decoded."""
        encoded = self.data.get("image/png")
        return None if encoded is None else base64.b64decode(encoded)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """Lets a notebook show the result as the sandbox's REPL would."""
        return dict(self.data)


@dataclass(frozen=True)
class CellError:
    """The exception that ended a cell."""

    name: str
    value: str
    traceback: str


@dataclass
class ExecResult:
    """What a cell gave.

    `stdout` and `stderr` are the lines joined by "\\n", without the last newline.
    """

    stdout: str
    stderr: str
    exit_code: int
    results: list[Result] = field(default_factory=list)
    error: CellError | None = None
    duration: float = 0.0
    """Seconds, measured by the daemon."""
    cell_id: str = ""
    reason: str = "ended"
    """ended | interrupted | timed_out | died | out_of_memory | disconnected | sandbox_failed | incomplete."""
    restarted: bool = False
    """The REPL had to be started anew: its variables are gone."""
    stdout_dropped_bytes: int = 0
    """Left out of the middle of `stdout`; `Sandbox.output(cell_id)` has the whole."""
    stderr_dropped_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    """What the daemon told while the cell ran: that the sandbox ends soon."""

    @property
    def ok(self) -> bool:
        return self.exit_code == 0


@dataclass(frozen=True)
class ToolCallEvent(Event):
    """An event of type "tool_call": the code waits for the answer of a function of the caller."""

    @property
    def cell_id(self) -> str:
        """The cell that waits."""
        return str(self.extra.get("cell_id", ""))

    @property
    def call_id(self) -> str:
        """Unique among all calls of all cells."""
        return str(self.data["call_id"])

    @property
    def name(self) -> str:
        return str(self.data["name"])

    @property
    def input(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(self.data["input"])


@dataclass
class PtySessionInfo:
    """One terminal of a sandbox."""

    pty_id: str
    cmd_label: str
    created_at_ms: int
    exit_code: int | None = None


class _ChangeKeys(TypedDict):
    kind: str
    size_before: int | None
    size_after: int | None


class PathChange(_ChangeKeys, total=False):
    """How one path differs between two sandboxes; a size is None on the side where the path is not."""

    patch: str
    """The change as a unified diff, for text."""


class VariableState(TypedDict):
    """A variable of a sandbox's Python process."""

    type: str
    size: int
    """Bytes of content, about what a pickle of it has."""
    fingerprint: str
    """Hex digest of the content, the same in every branch of a fork."""


class VariableChange(TypedDict):
    """How one variable differs between two sandboxes."""

    type_before: str
    type_after: str
    size_before: int
    size_after: int
    fingerprint_before: str
    fingerprint_after: str


class VariablesDiff(TypedDict):
    """Variables that differ, by name, sorted.  `added` are those that only the other sandbox has."""

    added: dict[str, VariableState]
    removed: dict[str, VariableState]
    changed: dict[str, VariableChange]
    unread: dict[str, str]
    """Those that both have and that could not be compared, and why."""


class _DiffKeys(TypedDict):
    added: list[str]
    removed: list[str]
    modified: list[str]


class Diff(_DiffKeys, total=False):
    """Absolute paths that differ, sorted.  `added` are those that only the other sandbox has."""

    detail: dict[str, PathChange]
    """By path, if it was asked for."""
    variables: VariablesDiff
    """If they were asked for."""
