"""Messages on the global variables of a REPL: which there are, which there were at a base, values under way.

An operation on variables is an order of the host on a channel of its own, answered and then ended by Exit, as a cell
is; Interrupt and Kill work as for a cell.  A *base* is a moment that two REPLs have in common, a fork or a merge,
under a token that both keep.  Values travel as an opaque stream of DATA frames that only REPLs read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, ClassVar, Dict, Mapping, NamedTuple, Tuple, Union

from podflare.errors import ProtocolError
from podflare.wire.codec import Fields

MAX_VARIABLES = 5000
MAX_NAME_CHARS = 255
MAX_TYPE_CHARS = 100
MAX_REASON_CHARS = 200
MAX_TABLE_BYTES = 4 * 1024 * 1024
"""Of one encoded table or base; what does not fit is left out and counted."""
FINGERPRINT_CHARS = 32
MAX_TOKEN_CHARS = 32
MAX_BASES = 32
"""A REPL forgets older ones."""
_MAX_SIZE = 2**62

# Why an operation came to nothing; a field of VariablesFailed.
TOO_LARGE = "too_large"
NO_BASE = "no_base"
BAD_VALUE = "bad_value"


class Variable(NamedTuple):
    """What is told of one global variable."""

    type: str
    size: int = 0
    """Bytes of content, about what it takes to carry it elsewhere."""
    fingerprint: str = ""
    """Hex digest of the content, the same in every branch of a fork; empty if it was not read."""
    obstacle: str = ""
    """Why the value cannot travel, as far as reading it showed; what hides behind the obstacle is not in the
    fingerprint."""
    unread: str = ""
    """Why there is no fingerprint."""


@dataclass(frozen=True)
class VariablesSurvey:
    """Host: tell all variables.  Guest: VariablesTable."""

    op: ClassVar[str] = "variables_survey"
    budget_ms: int = 0
    """So long the guest may read; variables that it did not get to are `unread`."""


@dataclass(frozen=True)
class VariablesRecall:
    """Host: tell what was there at `base`.  Guest: VariablesBase, or VariablesFailed (NO_BASE)."""

    op: ClassVar[str] = "variables_recall"
    base: str = ""


@dataclass(frozen=True)
class VariablesRemember:
    """Host: `base` is a moment at which the variables were these.  Guest: Exit alone."""

    op: ClassVar[str] = "variables_remember"
    base: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """As in VariablesBase."""
    since: str = ""
    """The base before this one, if there is one."""
    unsettled: Tuple[str, ...] = ()
    """Variables without readable content that count as replaced if they were replaced since then."""


@dataclass(frozen=True)
class VariablesExport:
    """Host: send the values of `names`.  Guest: VariablesParcel, DATA frames; or VariablesFailed at any point.

    There are no Acks: a host that does not read holds the guest up.
    """

    op: ClassVar[str] = "variables_export"
    names: Tuple[str, ...] = ()
    limit_bytes: int = 0


@dataclass(frozen=True)
class VariablesImport:
    """Host: DATA frames of an export follow, then DataEnd.  Guest: Acks, then VariablesStaged or VariablesFailed.

    Staged values are bound by VariablesCommit and dropped by Cancel.
    """

    op: ClassVar[str] = "variables_import"


@dataclass(frozen=True)
class VariablesCommit:
    """Host: bind the staged values, unbind `drop`, remember the base.  All of it or, if the guest dies, nothing."""

    op: ClassVar[str] = "variables_commit"
    drop: Tuple[str, ...] = ()
    base: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    since: str = ""
    unsettled: Tuple[str, ...] = ()


@dataclass(frozen=True)
class VariablesTable:
    """Guest: the answer to VariablesSurvey."""

    op: ClassVar[str] = "variables_table"
    variables: Mapping[str, Variable] = field(default_factory=dict)
    bases: Tuple[str, ...] = ()
    """Tokens of the bases that it remembers, oldest first."""
    present: Tuple[str, ...] = ()
    """Those of them since which no cell ran: this table is what was there."""
    left_out: int = 0
    """Variables that are not told: more than MAX_VARIABLES, or names that no identifier can have."""


@dataclass(frozen=True)
class VariablesBase:
    """Guest: the answer to VariablesRecall."""

    op: ClassVar[str] = "variables_base"
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of every variable of then; empty for one that was too large to be read then."""
    replaced: Tuple[str, ...] = ()
    """Variables without readable content that are another object now."""
    complete: bool = True
    """Whether those of then are all here."""


@dataclass(frozen=True)
class VariablesParcel:
    """Guest: what the DATA frames hold."""

    op: ClassVar[str] = "variables_parcel"
    names: Tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    """Name -> why its value cannot travel."""


@dataclass(frozen=True)
class VariablesStaged:
    """Guest: all values are there and not bound yet."""

    op: ClassVar[str] = "variables_staged"


@dataclass(frozen=True)
class VariablesFailed:
    """Guest: the operation came to nothing; nothing has changed.  Exit follows."""

    op: ClassVar[str] = "variables_failed"
    reason: str = BAD_VALUE
    message: str = ""
    name: str = ""
    """The variable at fault, if it is one."""


VariablesOrder = Union[VariablesSurvey, VariablesRecall, VariablesRemember, VariablesExport, VariablesImport]
"""What begins an operation."""
ORDERS = (VariablesSurvey, VariablesRecall, VariablesRemember, VariablesExport, VariablesImport)
VariablesAnswer = Union[VariablesTable, VariablesBase, VariablesParcel, VariablesStaged, VariablesFailed]
ANSWERS = (VariablesTable, VariablesBase, VariablesParcel, VariablesStaged, VariablesFailed)


def is_told(name: object) -> bool:
    """Whether a global of this name is a variable of the user's that is told and can be carried."""
    if type(name) is not str or len(name) > MAX_NAME_CHARS or not name.isidentifier():
        return False
    return not (name.startswith("__") and name.endswith("__"))


def _names(read: Fields, key: str) -> Tuple[str, ...]:
    value = read.value(key)
    if not isinstance(value, list) or len(value) > MAX_VARIABLES or not all(map(is_told, value)):
        raise read.fail(key, f"at most {MAX_VARIABLES} names of variables")
    return tuple(value)


def _tokens(read: Fields, key: str) -> Tuple[str, ...]:
    value = read.value(key)
    if not isinstance(value, list) or len(value) > MAX_BASES or not all(map(_is_token, value)):
        raise read.fail(key, f"at most {MAX_BASES} tokens")
    return tuple(value)


def _is_token(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TOKEN_CHARS and value.isascii() and value.isalnum()


def _token(read: Fields, key: str = "base") -> str:
    value = read.text(key, max_chars=MAX_TOKEN_CHARS)
    if not _is_token(value):
        raise read.fail(key, "a token")
    return value


def _since(read: Fields) -> str:
    return _token(read, "since") if read.text("since", max_chars=MAX_TOKEN_CHARS) else ""


def _is_fingerprint(value: object) -> bool:
    if not isinstance(value, str):
        return False
    return not value or (len(value) == FINGERPRINT_CHARS and set(value) <= set("0123456789abcdef"))


def _by_name(read: Fields, key: str, check: Callable[[Any], bool], what: str) -> Dict[str, Any]:
    value = read.value(key)
    if not isinstance(value, dict) or len(value) > MAX_VARIABLES or not all(map(is_told, value)):
        raise read.fail(key, f"{what} of at most {MAX_VARIABLES} variables")
    for name, told in value.items():
        if not check(told):
            raise read.fail(key, f"{what} of variables, of which {name!r} has none")
    return value


def _is_reason(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_REASON_CHARS


def _is_row(row: object) -> bool:
    if not isinstance(row, list) or len(row) != len(Variable._fields):
        return False
    kind, size, fingerprint, obstacle, unread = row
    return (
        isinstance(kind, str)
        and len(kind) <= MAX_TYPE_CHARS
        and type(size) is int
        and 0 <= size <= _MAX_SIZE
        and _is_fingerprint(fingerprint)
        and _is_reason(obstacle)
        and _is_reason(unread)
    )


def _table(read: Fields) -> VariablesTable:
    rows = _by_name(read, "variables", _is_row, "type, size, fingerprint, obstacle, unread")
    bases, present = _tokens(read, "bases"), _tokens(read, "present")
    if not set(present) <= set(bases):
        raise read.fail("present", "some of 'bases'")
    return VariablesTable(
        variables={name: Variable(*row) for name, row in rows.items()},
        bases=bases,
        present=present,
        left_out=read.integer("left_out", low=0, high=_MAX_SIZE),
    )


def _fingerprints(read: Fields) -> Dict[str, str]:
    return _by_name(read, "fingerprints", _is_fingerprint, "fingerprints")


def _failed(read: Fields) -> VariablesFailed:
    reason = read.text("reason", max_chars=32)
    if reason not in (TOO_LARGE, NO_BASE, BAD_VALUE):
        raise read.fail("reason", "a known reason")
    name = read.text("name", max_chars=MAX_NAME_CHARS)
    if name and not is_told(name):
        raise read.fail("name", "the name of a variable")
    return VariablesFailed(reason, read.text("message", max_chars=MAX_REASON_CHARS), name)


READERS: Dict[str, Callable[[Fields], Any]] = {
    "variables_survey": lambda read: VariablesSurvey(read.integer("budget_ms", low=0, high=2**31)),
    "variables_recall": lambda read: VariablesRecall(_token(read)),
    "variables_remember": lambda read: VariablesRemember(
        _token(read), _fingerprints(read), _since(read), _names(read, "unsettled")
    ),
    "variables_export": lambda read: VariablesExport(
        _names(read, "names"), read.integer("limit_bytes", low=0, high=_MAX_SIZE)
    ),
    "variables_import": lambda read: VariablesImport(),
    "variables_commit": lambda read: VariablesCommit(
        _names(read, "drop"), _token(read), _fingerprints(read), _since(read), _names(read, "unsettled")
    ),
    "variables_table": _table,
    "variables_base": lambda read: VariablesBase(
        _fingerprints(read), _names(read, "replaced"), read.flag("complete", default=False)
    ),
    "variables_parcel": lambda read: VariablesParcel(
        _names(read, "names"), _by_name(read, "refused", _is_reason, "reasons")
    ),
    "variables_staged": lambda read: VariablesStaged(),
    "variables_failed": _failed,
}


def check_size(payload: bytes) -> None:
    """Raises: ProtocolError for an encoded message on variables that is too large to be decoded at once."""
    if len(payload) > MAX_TABLE_BYTES:
        raise ProtocolError(f"a message on variables with {len(payload)} bytes, the cap is {MAX_TABLE_BYTES}")
