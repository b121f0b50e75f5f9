"""Every exception of podflare, under one root.  Knows nothing else of the project.

PodflareError
├── BadRequest               the request itself is wrong; the same request will fail again
│   ├── UnknownTemplate
│   ├── UnknownRegionError   a region name that the configuration does not know
│   └── FileAccessError      a path in a sandbox could not be read or written
│       └── FileMissing
├── Unauthorized             no API key, or one the daemon does not know
├── Forbidden                the daemon refuses this kind of peer (a web page of another origin)
├── SandboxNotFound          no such sandbox for this key (never made, closed, expired)
├── SnapshotNotFound         no such snapshot for this key
├── CellNotFound             no kept output under this cell id
├── CallNotFound             the cell made no such tool call
├── Conflict                 the sandbox is in a state that does not allow this
│   └── MergeConflict        both sandboxes changed the same, and nothing says which is right; carries the report
├── TooLarge                 a body or message above its cap
├── QuotaExceeded            an owner's limit is reached
├── NotBuilt                 this version does not have the feature yet
├── NoCapacity               the machine cannot hold another sandbox now
├── IsolationIncomplete      a required wall is missing on this machine: nothing was handed out
├── EgressUnavailable        this machine cannot give sandboxes a way out; the message says what is missing
├── MachineFailed            a sandbox's machine died or did not start
├── TemplateFailed           a template could not be built, or a built one cannot be used
├── DeadlineExceeded         no answer in time
├── ProtocolError            a peer (often a hostile guest) sent bytes that break the protocol
├── DaemonUnreachable        the SDK could not connect to the daemon
├── ConnectionLost           the daemon went away before its answer was complete: outcome unknown
└── DaemonStartFailed        the SDK could not start its private daemon

PodflareWarning              (a UserWarning, not an error) something asked for is not given
└── SandboxEndingWarning     a running cell's sandbox ends soon

`code` travels on the wire and never changes; match on it or on the class, never on the text.
"""

from __future__ import annotations

from typing import Any, ClassVar, Dict, Iterator, Type


class PodflareError(Exception):
    """Root of all podflare exceptions.

    Attributes:
        code: stable identifier, also sent in HTTP error bodies as `code`.
        status: HTTP status of the answer that carries this error.
        retry_safe: the operation certainly did not happen, so repeating it is harmless.
        fault: "caller" (change the request), "host" (the daemon or machine), "peer" (the other end).
    """

    code: ClassVar[str] = "podflare_error"
    status: ClassVar[int] = 500
    retry_safe: ClassVar[bool] = False
    fault: ClassVar[str] = "host"


class BadRequest(PodflareError, ValueError):
    code = "bad_request"
    status = 400
    fault = "caller"


class UnknownTemplate(BadRequest):
    code = "unknown_template"


class UnknownRegionError(BadRequest):
    code = "unknown_region"


class FileAccessError(BadRequest, OSError):
    """A file operation in a sandbox failed.  The message names the path and the reason."""

    code = "file_access_error"

    # OSError.__new__ would turn two-argument calls into errno pairs; one message is the contract.
    def __init__(self, message: str = "") -> None:
        super().__init__(message)

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class FileMissing(FileAccessError):
    code = "file_missing"
    status = 404


class Unauthorized(PodflareError):
    code = "unauthorized"
    status = 401
    fault = "caller"
    retry_safe = True


class Forbidden(PodflareError, PermissionError):
    code = "forbidden"
    status = 403
    fault = "caller"
    retry_safe = True

    def __init__(self, message: str = "") -> None:  # as in FileAccessError
        super().__init__(message)

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class SandboxNotFound(PodflareError, LookupError):
    code = "sandbox_not_found"
    status = 404
    fault = "caller"
    retry_safe = True


class SnapshotNotFound(PodflareError, LookupError):
    code = "snapshot_not_found"
    status = 404
    fault = "caller"
    retry_safe = True


class CellNotFound(PodflareError, LookupError):
    code = "cell_not_found"
    status = 404
    fault = "caller"
    retry_safe = True


class CallNotFound(PodflareError, LookupError):
    code = "call_not_found"
    status = 404
    fault = "caller"
    retry_safe = True


class Conflict(PodflareError):
    code = "conflict"
    status = 409
    fault = "caller"
    retry_safe = True


class MergeConflict(Conflict):
    """Nothing was merged, because of conflicts that nothing resolves.

    Attributes:
        report: wire.merges.MergeReport, with what was in conflict and what would have been merged.
    """

    code = "merge_conflict"

    def __init__(self, message: str = "", report: object = None) -> None:
        super().__init__(message)
        self.report: Any = report


class TooLarge(PodflareError, ValueError):
    code = "too_large"
    status = 413
    fault = "caller"


class QuotaExceeded(PodflareError):
    code = "quota_exceeded"
    status = 429
    fault = "caller"
    retry_safe = True


class NotBuilt(PodflareError, NotImplementedError):
    code = "not_built"
    status = 501
    fault = "caller"
    retry_safe = True


class NoCapacity(PodflareError):
    code = "no_capacity"
    status = 503
    retry_safe = True


class IsolationIncomplete(PodflareError):
    code = "isolation_incomplete"
    status = 503
    retry_safe = True


class EgressUnavailable(PodflareError):
    code = "egress_unavailable"
    status = 503
    retry_safe = True


class MachineFailed(PodflareError, RuntimeError):
    code = "machine_failed"
    status = 500


class TemplateFailed(PodflareError, RuntimeError):
    code = "template_failed"
    status = 500
    retry_safe = True


class DeadlineExceeded(PodflareError, TimeoutError):
    code = "deadline_exceeded"
    status = 504

    def __init__(self, message: str = "") -> None:  # as in FileAccessError
        super().__init__(message)

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ProtocolError(PodflareError, ValueError):
    code = "protocol_error"
    status = 500
    fault = "peer"


class DaemonUnreachable(PodflareError, ConnectionError):
    code = "daemon_unreachable"
    status = 502
    retry_safe = True

    def __init__(self, message: str = "") -> None:  # as in FileAccessError
        super().__init__(message)

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ConnectionLost(PodflareError, ConnectionError):
    code = "connection_lost"
    status = 502

    def __init__(self, message: str = "") -> None:  # as in FileAccessError
        super().__init__(message)

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class DaemonStartFailed(PodflareError, RuntimeError):
    code = "daemon_start_failed"
    status = 502
    retry_safe = True


class PodflareWarning(UserWarning):
    """The daemon gives less than was asked for; the text says what."""


class SandboxEndingWarning(PodflareWarning):
    """The lifetime of a sandbox in which a cell runs is over soon; the text says when."""


def _tree(cls: Type[PodflareError]) -> Iterator[Type[PodflareError]]:
    yield cls
    for child in cls.__subclasses__():
        if child.__module__ == __name__:
            yield from _tree(child)


BY_CODE: Dict[str, Type[PodflareError]] = {cls.code: cls for cls in _tree(PodflareError)}
"""Error class for each stable code."""
