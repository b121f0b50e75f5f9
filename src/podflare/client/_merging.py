"""The three-way merge: what is sent, what comes back, and what a rule says to its conflicts.  Pure."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

from podflare.client._calls import Call, json_body, parse_object, sandbox_path, seconds
from podflare.errors import BadRequest, MergeConflict, ProtocolError
from podflare.wire.merges import ON_CONFLICT, SIDES, ConflictInfo, MergeReport, MergeSide, NotTransferable

ConflictSide: TypeAlias = Literal["ours", "theirs"]
Rule: TypeAlias = Callable[[ConflictInfo], ConflictSide]
AsyncRule: TypeAlias = Callable[[ConflictInfo], ConflictSide | Awaitable[ConflictSide]]
OnConflict: TypeAlias = Literal["error", "ours", "theirs"]
MAX_ROUNDS = 10
"""How often a rule is asked about conflicts that running code goes on to change."""
_SHOWN = 5


def merge(
    sandbox_id: str,
    other_id: str,
    files: bool | Iterable[str],
    variables: bool | Iterable[str],
    on_conflict: object,
    resolutions: Iterable[dict[str, str]],
    timeout_s: float | None,
) -> Call:
    """Not repeatable: one whose answer is lost may have been done.

    Raises: ValueError (BadRequest) if both are one sandbox, or a value is none of those allowed; TypeError.
    """
    if sandbox_id == other_id:
        raise BadRequest(f"merge: {sandbox_id} cannot be merged into itself")
    if not callable(on_conflict) and on_conflict not in ON_CONFLICT:
        raise BadRequest(f'merge: on_conflict must be "error", "ours", "theirs" or a function, got {on_conflict!r:.80}')
    body: dict[str, Any] = {
        "files": _flag_or_names("files", files),
        "variables": _flag_or_names("variables", variables),
        "on_conflict": "error" if callable(on_conflict) else on_conflict,
    }
    if given := list(resolutions):
        body["resolutions"] = given
    if timeout_s is not None:
        body["timeout_seconds"] = seconds(timeout_s)
    path = sandbox_path(sandbox_id, f"/merge/{quote(other_id, safe='')}")
    return Call("POST", path, "merge", f"{sandbox_id}, other {other_id}", body=json_body(body))


def _flag_or_names(what: str, value: bool | Iterable[str]) -> bool | list[str]:
    if isinstance(value, bool):
        return value
    listed = [] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    if not listed or not all(isinstance(item, str) for item in listed):
        raise TypeError(f"merge: {what} must be True, False or a list of str that is not empty, got {value!r:.80}")
    return listed


def resolution(item: ConflictInfo, answer: object) -> dict[str, str]:
    """What is sent for a rule's answer.  Raises: ValueError (BadRequest) if that is no side."""
    if answer not in SIDES:
        raise BadRequest(f'merge: on_conflict(...) must return "ours" or "theirs", got {answer!r:.80}')
    return {"kind": item.kind, "name": item.name, "resolution": str(answer), "version": item.version}


def ask(rule: Callable[[ConflictInfo], Any], item: ConflictInfo) -> Any:
    return rule(item)


def conflict_error(sandbox_id: str, other_id: str, report: MergeReport) -> MergeConflict:
    """The error for a merge with conflicts that nothing resolved."""
    items = report.unresolved
    told = "; ".join(f"{item.kind} {item.name!r:.200}: {item.why}" for item in items[:_SHOWN])
    more = f"; and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    count = "a conflict" if len(items) == 1 else f"{len(items)} conflicts"
    text = f"merge failed: {count}, nothing has changed in {sandbox_id} (other {other_id}): {told}{more}"
    return MergeConflict(text, report)


def parse_report(call: Call, body: bytes) -> MergeReport:
    """Raises: ProtocolError if the answer is none."""
    value = parse_object(call, body)
    try:
        merged = value["merged"]
        return MergeReport(
            applied=value["applied"] is True,
            files=tuple(map(str, merged["files"])),
            variables=tuple(map(str, merged["variables"])),
            conflicts=tuple(_conflict(item) for item in value["conflicts"]),
            not_transferable=tuple(
                NotTransferable(*(str(item[key]) for key in ("kind", "name", "type", "why")))
                for item in value["not_transferable"]
            ),
        )
    except (AttributeError, KeyError, TypeError) as exc:
        raise ProtocolError(f"{call.what}: the answer is no report of a merge: {value!r:.200}") from exc


def _conflict(item: dict[str, Any]) -> ConflictInfo:
    decided = item.get("resolution")
    return ConflictInfo(
        kind=str(item["kind"]),
        name=str(item["name"]),
        why=str(item["why"]),
        ours=_side(item.get("ours")),
        theirs=_side(item.get("theirs")),
        version=str(item.get("version", "")),
        resolution=decided if decided in SIDES else None,
    )


def _side(value: Any) -> MergeSide | None:
    if not isinstance(value, dict):
        return None
    size = value.get("size")
    return MergeSide(str(value.get("type", "")), size if isinstance(size, int) else None)
