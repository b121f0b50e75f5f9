"""Whether a virtual machine's instructions can run on the processor itself (KVM) here: tried, with a time limit.

/dev/kvm alone says little: it may be closed to this user, or be imitated by a hypervisor below, so slowly that no guest
boots.  What is tried is a small VM made without any VMM (kvm_probe.py), in a process that can be ended.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

from podflare.engines.microvm import kvm_probe

PROBE_TIMEOUT_S = 10.0
LOOPS, TRIES = 200_000, 3
"""Two instructions each: less than a millisecond of a processor."""
SLOWEST_S = 0.05
"""Eight million instructions a second: no processor is that slow, and whatever imitates one is."""
DEVICE = Path("/dev/kvm")


def problem_with_kvm(*, loops: int | None = None, timeout_s: float = PROBE_TIMEOUT_S) -> str:
    """Why KVM cannot be used, with what to do where something can be done; empty if it works.

    Args: loops: LOOPS.
    Blocks for some tens of milliseconds, or for timeout_s where it hangs.
    """
    if platform.machine() != "x86_64":
        return f"images are for x86_64, this computer is {platform.machine()}"
    if not DEVICE.exists():
        return "there is no /dev/kvm (modprobe kvm_intel or kvm_amd; in a virtual machine: allow nested ones below it)"
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return "/dev/kvm is closed to this user (join the group kvm)"
    told = _tried(LOOPS if loops is None else loops, timeout_s)
    return f"/dev/kvm does not work here ({told})" if told else ""


def _tried(loops: int, timeout_s: float) -> str:
    command = [sys.executable, "-I", "-S", kvm_probe.__file__, str(loops), str(TRIES)]
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as exc:
        return str(exc)
    with process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"a guest of a few instructions did not end within {timeout_s:g} s"
    if process.returncode != 0:
        said = err.decode(errors="replace").strip().splitlines()
        return said[-1][:200] if said else f"a guest of a few instructions ended with status {process.returncode}"
    took_s = float(out)
    if took_s > SLOWEST_S:
        return f"it is imitated: {2 * loops} instructions took {took_s * 1000:.0f} ms"
    return ""
