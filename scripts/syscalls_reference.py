"""Writes docs/syscalls.md from the filter's own tables; with --check, fails if the page is stale."""

from __future__ import annotations

import sys
from pathlib import Path

from podflare.engines.linux import seccomp

PAGE = Path(__file__).resolve().parent.parent / "docs" / "syscalls.md"
HEAD = """\
# System calls

Written by `make docs` from `engines/linux/seccomp.py`; do not edit. What the filter does is tried call by call, on the
real kernel, in [tests/security/test_every_syscall.py](../tests/security/test_every_syscall.py).

An allow-list: a call that is on no list below answers ENOSYS, as on a kernel that does not have it, so that libraries
fall back. So do all calls of other architectures (32-bit, x32).
"""
ARGUMENTS = """\
## Allowed with some arguments only

| call | refused |
|---|---|
| `clone` | every flag that makes a namespace (EPERM) |
| `socket`, `socketpair` | families but Unix, IPv4, IPv6 (EAFNOSUPPORT); raw, packet and other rare types (EPERM) |
| `ioctl` | `TIOCSTI`, `TIOCLINUX` (terminal injection), `FIOSETOWN`, `SIOCSPGRP` (EPERM) |
| `fcntl` | `F_SETOWN_EX` (EPERM); `F_SETOWN` asks as signals do |
| `personality` | all but 0, 0x8, 0x20000, 0x20008 and asking (ENOSYS) |
| calls that signal by number | processes of the sandbox's own forks (EPERM, [signal_filter](security-model.md)) |
"""
EXCEPTIONS = """\
## What no filter sees

Newer kernels pass two calls by every filter, by their own decision: `uretprobe` (335) and `uprobe` (336) on x86_64, for
programs that an administrator traces. Called by anybody else they end the process (SIGILL) or fail (ENXIO).
"""
COMPARED = """\
## Beside the default of container engines

The published default profile of the Moby project (`profiles/seccomp/default.json`, for a container without added
capabilities, kernel 4.8 or newer) allows these as well, which are refused here:

| call | why not here |
|---|---|
| `ptrace`, `process_vm_readv`, `process_vm_writev` | the agent and the REPL share a user id; nothing in a sandbox needs to look into another process |
| `io_uring_setup`, `io_uring_enter`, `io_uring_register` | source of many kernel bugs; operations pass by the filter (older versions of that profile) |
| `memfd_secret` | memory that even the daemon's machine cannot look into |
| `modify_ldt` | 16-bit segments: for no program of today |
| `name_to_handle_at`, `fanotify_mark` | file handles and marks for all of a file system |
| `adjtimex`, `clock_adjtime` | the machine's clock, even if only read |

Allowed here and not there: `setns` (it asks for capabilities that only a REPL has, for moving its forks),
`get_mempolicy` (reads the own policy; numerical libraries ask), `fchmodat2` (newer than many versions of the profile).
Both refuse `clone3` with ENOSYS. That profile allows all socket families but vsock.
"""


def page() -> str:
    def table(title: str, rows: dict[str, str]) -> str:
        lines = [f"## {title}", "", "| for | calls |", "|---|---|"]
        for reason, names in rows.items():
            lines.append(f"| {reason} | {', '.join(f'`{name}`' for name in sorted(names.split()))} |")
        return "\n".join(lines) + "\n"

    return "\n".join(
        (
            HEAD,
            table("Allowed", seccomp.ALLOWED_FOR),
            ARGUMENTS,
            table("Refused with EPERM", seccomp.REFUSED_FOR),
            table("Refused with ENOSYS, for libraries to take another way", {"": " ".join(seccomp.UNSUPPORTED)}),
            EXCEPTIONS,
            COMPARED,
        )
    )


def main() -> int:
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        print(f"{PAGE.name} is stale: run make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
