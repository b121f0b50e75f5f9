"""What the daemon writes to its log: one line an event, as text or JSON, with the caller's trace ids.  No metrics.

Log lines go to stderr.  A field's value may come from a user, so it is quoted and cannot start a new line.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from contextvars import ContextVar
from dataclasses import dataclass

_LOGGER = logging.getLogger("podflare")
_TRACEPARENT = re.compile(r"^[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}", re.ASCII)
_PLAIN = re.compile(r"^[\w.:/@%+,\-]+$", re.ASCII)


@dataclass(frozen=True)
class Trace:
    """Ids of the request that is being served; empty if the caller sent none."""

    trace_id: str = ""
    parent_span_id: str = ""


NO_TRACE = Trace()
current_trace: ContextVar[Trace] = ContextVar("podflare_trace", default=NO_TRACE)


def parse_traceparent(header: str | None) -> Trace:
    """The ids of a W3C `traceparent`.  An unusable value gives empty ids: tracing must never fail a request."""
    found = _TRACEPARENT.match((header or "").strip().lower())
    if found is None or set(found[1]) == {"0"} or set(found[2]) == {"0"}:
        return NO_TRACE
    return Trace(found[1], found[2])


def event(name: str, **fields: object) -> None:
    """Log that something normal happened."""
    if _LOGGER.isEnabledFor(logging.INFO):
        _emit(logging.INFO, name, fields)


def problem(name: str, *, exc_info: bool = False, **fields: object) -> None:
    """Log that something went wrong which the operator may want to know; with `exc_info` the traceback."""
    _emit(logging.WARNING, name, fields, exc_info=exc_info)


def _emit(level: int, name: str, fields: dict[str, object], *, exc_info: bool = False) -> None:
    trace = current_trace.get()
    if trace.trace_id:
        fields = {**fields, "trace_id": trace.trace_id, "parent_span_id": trace.parent_span_id}
    _LOGGER.log(level, name, extra={"fields": fields}, exc_info=exc_info)


def configure(log_format: str, level: str) -> None:
    """Send the daemon's log to stderr.  The HTTP server's errors are in it as events of ours."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    logging.captureWarnings(True)
    for name, threshold in (("podflare", level.upper()), ("uvicorn", "CRITICAL"), ("py.warnings", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(threshold)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        parts = [f"{stamp}.{int(record.msecs):03d}Z {record.levelname.lower():7} {_one_line(record.getMessage())}"]
        parts += [f"{key}={_quoted(value)}" for key, value in getattr(record, "fields", {}).items()]
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        body: dict[str, object] = {
            "ts": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            body["traceback"] = self.formatException(record.exc_info)
        return json.dumps(body, ensure_ascii=True, default=str)


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _quoted(value: object) -> str:
    text = str(value)
    return text if _PLAIN.match(text) else json.dumps(text)
