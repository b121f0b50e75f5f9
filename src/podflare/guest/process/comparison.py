"""One order to compare two machines, from the daemon's words to its answer.

Order: {"before", "after": names of layers, topmost first, "paths", "detail", "timeout_s"}.
Answer, on a SOCK_SEQPACKET socket: {"error": null} with a descriptor of the result, which is JSON in a file in
memory; or {"error", "too_much"}.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
from typing import Any, Dict

from podflare.guest.process.compare import Comparison, TooMuch, overlays_of
from podflare.guest.process.patches import Details
from podflare.wire.plan import StagePlan

MAX_ERROR_CHARS = 2000


def answer_comparison(stage: StagePlan, order: Dict[str, Any], answer_to: int) -> None:
    """Carry the order out, in a process of its own: it dies when its time is over."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, order["timeout_s"])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with socket.socket(fileno=os.dup(answer_to)) as sock:
        try:
            result = os.memfd_create("diff", os.MFD_CLOEXEC)
            with os.fdopen(os.dup(result), "wb") as file:
                file.write(json.dumps(compare(stage, order)).encode())
            socket.send_fds(sock, [b'{"error": null}'], [result])
        except BaseException as exc:
            text = f"{exc}" if isinstance(exc, TooMuch) else f"{type(exc).__name__}: {exc}"
            answer = {"error": text[:MAX_ERROR_CHARS], "too_much": isinstance(exc, TooMuch)}
            sock.send(json.dumps(answer).encode())


def compare(stage: StagePlan, order: Dict[str, Any]) -> Dict[str, Any]:
    """The result: three sorted lists of paths, and the details by path or None.  Raises: OSError, TooMuch."""
    details = Details() if order["detail"] else None
    comparison = Comparison(order["before"], order["after"], details or (lambda path, before, after: None))
    for overlay, lower, mounted, path in overlays_of(stage, order["paths"]):
        comparison.overlay(overlay, lower, mounted, path)
    return {
        "added": sorted(comparison.added),
        "removed": sorted(comparison.removed),
        "modified": sorted(comparison.modified),
        "detail": None if details is None else details.by_path,
    }
