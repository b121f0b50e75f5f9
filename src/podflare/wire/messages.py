"""Meanings of MESSAGE frames between host and guest (docs/protocol.md).

Each message is a frozen dataclass with its `op`; `to_payload` and `from_guest` / `from_host` are the only
encoders and decoders.  The host treats everything that `from_guest` reads as hostile.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Callable, ClassVar, Dict, Optional, Tuple, Type, Union

from podflare.errors import ProtocolError
from podflare.wire.codec import Fields, decode_object, encode_object
from podflare.wire.tools import MAX_ERROR_CHARS, MAX_INPUT_BYTES, MAX_NAME_CHARS, Tools, check_json, read_tools
from podflare.wire.variables import ANSWERS, ORDERS, READERS, VariablesAnswer, VariablesCommit, VariablesOrder

MAX_CODE_CHARS = 8 * 1024 * 1024
MAX_PATH_CHARS = 4096
MAX_TEXT_CHARS = 64 * 1024
MAX_TRACEBACK_CHARS = 512 * 1024
MAX_RICH_CHARS = 12 * 1024 * 1024
"""Sum of one result's mime data; the guest leaves out the largest forms until it fits."""
MAX_MIME_TYPES = 32
MAX_VARIABLES = 256
MANY_VALUES_BYTES = MAX_INPUT_BYTES + 4096
"""A guest's message may be anything up to here: the input of a tool call is the caller's own JSON."""
MAX_VALUES = 100_000
"""Of a guest's longer message, which holds a few long texts, or the table of its variables."""
WINDOW_BYTES = 4 * 1024 * 1024
"""A file sender may have this many bytes under way that were not acknowledged."""

# Why a cell ended; a field of Exit.
ENDED = "ended"
INTERRUPTED = "interrupted"
DIED = "died"

# Why a file operation failed; a field of FileFailed.
MISSING = "missing"
DENIED = "denied"
NOT_A_FILE = "not_a_file"
NO_SPACE = "no_space"
OTHER = "other"


@dataclass(frozen=True)
class Exec:
    """Host: run a cell.  One at a time; a second one before Exit breaks the protocol."""

    op: ClassVar[str] = "exec"
    code: str
    language: str = "python"
    name: str = "<cell>"
    """Stable file name of the cell in tracebacks, for example `<cell 3>`."""
    tools: Tools = field(default_factory=dict)
    """Functions that the code of a Python cell has, whose calls the host answers."""


@dataclass(frozen=True)
class ToolResult:
    """Host: the answer to the call `call` of the cell, once.  One that crosses its ToolCancel is dropped."""

    op: ClassVar[str] = "tool_result"
    call: int = 0
    value: Any = None
    """What the call gives, JSON."""
    error: str = ""
    """If not empty, the name of the exception that it raises instead."""
    message: str = ""


@dataclass(frozen=True)
class Interrupt:
    """Host: SIGINT to the cell `channel` and the end of every process it started."""

    op: ClassVar[str] = "interrupt"


@dataclass(frozen=True)
class Kill:
    """Host: SIGKILL the cell `channel` and its processes; a Python cell's REPL is started anew."""

    op: ClassVar[str] = "kill"


@dataclass(frozen=True)
class FileWrite:
    """Host: DATA frames follow on this channel, then DataEnd.  Guest sends Acks, then FileDone or FileFailed.

    The content appears under `path` whole or not at all (temporary file beside it, then rename).
    """

    op: ClassVar[str] = "file_write"
    path: str


@dataclass(frozen=True)
class FileRead:
    """Host: guest answers FileOpened, DATA frames, then FileDone; or FileFailed at any point."""

    op: ClassVar[str] = "file_read"
    path: str


@dataclass(frozen=True)
class Ack:
    """Receiver of DATA: `bytes` more were consumed (WINDOW_BYTES)."""

    op: ClassVar[str] = "ack"
    bytes: int = 0


@dataclass(frozen=True)
class DataEnd:
    """Sender of DATA: that was all."""

    op: ClassVar[str] = "data_end"


@dataclass(frozen=True)
class Cancel:
    """Host: forget the file transfer `channel`; a partial write is removed.  No answer follows."""

    op: ClassVar[str] = "cancel"


@dataclass(frozen=True)
class ForkComes:
    """Agent to REPL: the whole machine is about to be copied; the variables of now are a base.  Exit answers it."""

    op: ClassVar[str] = "fork_comes"


@dataclass(frozen=True)
class Settle:
    """Agent to REPL: this machine is a copy of another one, which goes on as well.  Exit answers it."""

    op: ClassVar[str] = "settle"
    reseed: bool = True
    """Give the global random generators fresh state."""
    environment: Dict[str, str] = field(default_factory=dict)
    """Variables to set."""


@dataclass(frozen=True)
class Ready:
    """Guest: the REPL waits for its first cell.  The first message, on channel 0."""

    op: ClassVar[str] = "ready"
    protocol: int = 0
    python: str = ""


@dataclass(frozen=True)
class Result:
    """Guest: a value to show, as mime type -> data (binary types base64, JSON types as JSON text)."""

    op: ClassVar[str] = "result"
    data: Dict[str, str] = field(default_factory=dict)
    kind: str = "value"
    """`value` for the last expression, `display` for figures and display() calls."""


@dataclass(frozen=True)
class Error:
    """Guest: the uncaught exception of a Python cell; its traceback text went to stderr as well."""

    op: ClassVar[str] = "error"
    name: str = ""
    value: str = ""
    traceback: str = ""


@dataclass(frozen=True)
class ToolCall:
    """Guest: code calls a tool and waits for its ToolResult."""

    op: ClassVar[str] = "tool_call"
    call: int = 0
    """Chosen by the guest; never used twice in a cell."""
    name: str = ""
    input: Dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ToolCancel:
    """Guest: the code waits for this call's answer no longer."""

    op: ClassVar[str] = "tool_cancel"
    call: int = 0


@dataclass(frozen=True)
class Exit:
    """Guest: the cell is over; nothing follows on its channel."""

    op: ClassVar[str] = "exit"
    code: int = 0
    reason: str = ENDED
    restarted: bool = False
    """The REPL had to be started anew: variables are gone."""
    signal: int = 0
    """With DIED: the signal that ended the REPL or shell, 0 if it exited by itself."""


@dataclass(frozen=True)
class FileOpened:
    op: ClassVar[str] = "file_opened"
    size: int = 0
    """Bytes when opened; what is sent may differ if the file changes meanwhile."""


@dataclass(frozen=True)
class FileDone:
    op: ClassVar[str] = "file_done"
    size: int = 0
    """Bytes transferred."""


@dataclass(frozen=True)
class FileFailed:
    op: ClassVar[str] = "file_failed"
    reason: str = OTHER
    message: str = ""


HostMessage = Union[
    Exec,
    ToolResult,
    Interrupt,
    Kill,
    FileWrite,
    FileRead,
    Ack,
    DataEnd,
    Cancel,
    ForkComes,
    Settle,
    VariablesOrder,
    VariablesCommit,
]
GuestMessage = Union[
    Ready, Result, Error, ToolCall, ToolCancel, Exit, Ack, DataEnd, FileOpened, FileDone, FileFailed, VariablesAnswer
]
Message = Union[HostMessage, GuestMessage]

LANGUAGES: Tuple[str, ...] = ("python", "bash")

_MAX_SIZE = 2**62


def to_payload(message: Message) -> bytes:
    """The MESSAGE payload of one message."""
    body: Dict[str, Any] = {"op": message.op}
    for item in fields(message):
        body[item.name] = getattr(message, item.name)
    return encode_object(body)


def from_guest(payload: bytes) -> GuestMessage:
    """Decode a message that a guest sent.

    Raises: ProtocolError for anything that is not exactly such a message, within its bounds.
    """
    most = MAX_VALUES if len(payload) > MANY_VALUES_BYTES else None
    return _decode(payload, _GUEST, "guest message", max_values=most)  # type: ignore[return-value]  # the table's values are GuestMessages


def from_host(payload: bytes) -> HostMessage:
    """Decode a message that the host sent.  Raises: ProtocolError as `from_guest`."""
    return _decode(payload, _HOST, "host message")  # type: ignore[return-value]  # the table's values are HostMessages


def _decode(payload: bytes, table: Dict[str, Type[Any]], what: str, *, max_values: Optional[int] = None) -> Message:
    body = decode_object(payload, error=ProtocolError, what=what, max_values=max_values)
    read = Fields(body, error=ProtocolError, what=what)
    op = read.text("op", max_chars=32)
    if op not in table:
        raise ProtocolError(f"{what}: unknown op {op!r}")
    return _READERS[op](read)


def _exec(read: Fields) -> Exec:
    language = read.text("language", max_chars=32, default="python")
    if language not in LANGUAGES:
        raise read.fail("language", "one of " + ", ".join(LANGUAGES))
    return Exec(
        code=read.text("code", max_chars=MAX_CODE_CHARS),
        language=language,
        name=read.text("name", max_chars=256, default="<cell>"),
        tools=read_tools(read.value("tools"), error=ProtocolError),
    )


def _tool_result(read: Fields) -> ToolResult:
    return ToolResult(
        call=_call(read),
        value=read.value("value"),
        error=read.text("error", max_chars=MAX_ERROR_CHARS, default=""),
        message=read.text("message", max_chars=MAX_ERROR_CHARS, default=""),
    )


def _tool_call(read: Fields) -> ToolCall:
    given = read.value("input")
    if not isinstance(given, dict):
        raise read.fail("input", "an object")
    check_json(given, max_bytes=MAX_INPUT_BYTES, error=ProtocolError, what="guest message: 'input'")
    return ToolCall(call=_call(read), name=read.text("name", max_chars=MAX_NAME_CHARS), input=given)


def _call(read: Fields) -> int:
    return read.integer("call", low=1, high=_MAX_SIZE)


def _result(read: Fields) -> Result:
    data = read.text_map("data", max_items=MAX_MIME_TYPES, max_chars=MAX_RICH_CHARS)
    if sum(len(value) for value in data.values()) > MAX_RICH_CHARS:
        raise ProtocolError(f"guest message: result above {MAX_RICH_CHARS} characters")
    return Result(data=data, kind=_one_of(read, "kind", ("value", "display")))


def _exit(read: Fields) -> Exit:
    return Exit(
        code=read.integer("code", low=-(2**31), high=2**31 - 1),
        reason=_one_of(read, "reason", (ENDED, INTERRUPTED, DIED)),
        restarted=read.flag("restarted", default=False),
        signal=read.integer("signal", low=0, high=64, default=0),
    )


def _one_of(read: Fields, key: str, values: Tuple[str, ...], default: Optional[str] = None) -> str:
    value = read.text(key, max_chars=32, default=values[0] if default is None else default)
    if value not in values:
        raise read.fail(key, "one of " + ", ".join(values))
    return value


def _path(read: Fields) -> str:
    path = read.text("path", max_chars=MAX_PATH_CHARS)
    if not path or "\0" in path:
        raise read.fail("path", "a path without NUL")
    return path


_READERS: Dict[str, Callable[[Fields], Message]] = {
    "exec": _exec,
    "tool_result": _tool_result,
    "interrupt": lambda read: Interrupt(),
    "kill": lambda read: Kill(),
    "file_write": lambda read: FileWrite(path=_path(read)),
    "file_read": lambda read: FileRead(path=_path(read)),
    "ack": lambda read: Ack(bytes=read.integer("bytes", low=0, high=_MAX_SIZE)),
    "data_end": lambda read: DataEnd(),
    "cancel": lambda read: Cancel(),
    "fork_comes": lambda read: ForkComes(),
    "settle": lambda read: Settle(
        reseed=read.flag("reseed", default=True),
        environment=read.text_map("environment", max_items=MAX_VARIABLES, max_chars=MAX_PATH_CHARS),
    ),
    "ready": lambda read: Ready(
        protocol=read.integer("protocol", low=0, high=2**31), python=read.text("python", max_chars=64)
    ),
    "result": _result,
    "error": lambda read: Error(
        name=read.text("name", max_chars=MAX_TEXT_CHARS),
        value=read.text("value", max_chars=MAX_TEXT_CHARS),
        traceback=read.text("traceback", max_chars=MAX_TRACEBACK_CHARS),
    ),
    "tool_call": _tool_call,
    "tool_cancel": lambda read: ToolCancel(call=_call(read)),
    "exit": _exit,
    "file_opened": lambda read: FileOpened(size=read.integer("size", low=0, high=_MAX_SIZE)),
    "file_done": lambda read: FileDone(size=read.integer("size", low=0, high=_MAX_SIZE)),
    "file_failed": lambda read: FileFailed(
        reason=_one_of(read, "reason", (MISSING, DENIED, NOT_A_FILE, NO_SPACE, OTHER), OTHER),
        message=read.text("message", max_chars=MAX_TEXT_CHARS, default=""),
    ),
}

_HOST: Dict[str, Type[Any]] = {
    cls.op: cls
    for cls in (Exec, ToolResult, Interrupt, Kill, FileWrite, FileRead, Ack, DataEnd, Cancel, ForkComes, Settle)
}
_GUEST: Dict[str, Type[Any]] = {
    cls.op: cls
    for cls in (Ready, Result, Error, ToolCall, ToolCancel, Exit, Ack, DataEnd, FileOpened, FileDone, FileFailed)
}
_READERS.update(READERS)
_HOST.update({cls.op: cls for cls in (*ORDERS, VariablesCommit)})
_GUEST.update({cls.op: cls for cls in ANSWERS})
