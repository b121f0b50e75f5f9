"""One merge of files, from the daemon's order to its end: a process of the family that is there for so long.

Order: {"base", "ours", "theirs": names of layers, topmost first, "paths", "timeout_s", "former", "layer"} with the
descriptors of a SOCK_SEQPACKET socket and of our machine's mount namespace.  On the socket then, each answer being
{"error": null or text, "kind"}:

1. Answer, with a descriptor of the plan: JSON in a file in memory.
2. From the daemon {"apply": true} with a descriptor of decisions, a JSON object path -> "ours" or "theirs"; answer.
3. From the daemon {"keep": true}; answer.  Whatever else ends the conversation undoes all.

Nobody in the machine sees this process or can signal it: it stays in the family's PID namespace.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
from typing import Any, Dict, List, Tuple

from podflare.guest.process.compare import overlays_of
from podflare.guest.process.filemerge import FileMerge, failure, stop
from podflare.guest.process.mergebase import write_base
from podflare.wire.plan import StagePlan

MAX_WORD_BYTES = 4096


def answer_merge(stage: StagePlan, order: Dict[str, Any], fds: List[int]) -> None:
    """Carry the order out, in a process of its own."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGALRM, stop)
    os.umask(0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with socket.socket(fileno=os.dup(fds[0])) as sock:
        parts = list(overlays_of(stage, order["paths"]))
        chains = (order["base"], order["ours"], order["theirs"])
        merge = FileMerge(list(overlays_of(stage, ["/"])), chains, fds[1])

        def plan() -> int:
            made = os.memfd_create("merge", os.MFD_CLOEXEC)
            with os.fdopen(os.dup(made), "wb") as file:
                file.write(json.dumps(merge.plan(parts)).encode())
            return made

        def apply() -> None:
            """Write the next base, then change our files."""
            write_base(order["layer"], order["former"], merge.units, *merge.places, merge.mounts, merge.room())
            merge.apply(told)

        try:
            if _step(sock, plan, order["timeout_s"]):
                word, told = _hear(sock)
                if word.get("apply") and _step(sock, apply, word["timeout_s"]):
                    word, _ = _hear(sock)
                    if word.get("keep"):
                        merge.keep()
                        sock.send(b'{"error": null}')
        finally:
            merge.end()


def _step(sock: socket.socket, action: Any, timeout_s: float) -> bool:
    """Answer with the outcome of a step.  Returns whether it was done."""
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            made = action()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        socket.send_fds(sock, [b'{"error": null}'], [] if made is None else [made])
        return True
    except BaseException as exc:
        answer = failure(exc)
    sock.send(json.dumps(answer).encode())
    return False


def _hear(sock: socket.socket) -> Tuple[Dict[str, Any], Dict[str, str]]:
    """The daemon's next word, and what it passed along; nothing at the end."""
    data, fds, _, _ = socket.recv_fds(sock, MAX_WORD_BYTES, 1)
    told: Dict[str, str] = {}
    for fd in fds:
        with os.fdopen(fd, "rb") as file:
            file.seek(0)
            told = json.loads(file.read())
    return (json.loads(data) if data else {}), told
