"""Whether QEMU can let guest instructions run on the processor itself (KVM) here: tried, with a time limit.

/dev/kvm alone says little: it may be closed to this user, or be emulated by a hypervisor below and hang.
"""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

from podflare.engines.microvm.vmm import Accelerator

PROBE_TIMEOUT_S = 3.0
_LOOPS = 20_000_000
"""Some milliseconds of a processor, far more where it is imitated."""
_EXIT_WORD = 0x10
_DONE = _EXIT_WORD << 1 | 1
"""Exit status that QEMU's isa-debug-exit device makes of what is written to its port."""
_PORT = 0xF4
_ROM_BYTES = 64 * 1024
_RESET_OFFSET = 0xFFF0


def probe_rom() -> bytes:
    """A firmware that counts down, writes one byte to a port, and halts: real-mode x86 instructions."""
    counts = b"\x66\xb9" + struct.pack("<I", _LOOPS)  # mov ecx, _LOOPS
    counts += b"\x66\x49\x75\xfc"  # dec ecx; jnz to the dec
    leaves = b"\xb0" + bytes([_EXIT_WORD]) + b"\xe6" + bytes([_PORT]) + b"\xf4"  # mov al; out; hlt
    rom = bytearray(_ROM_BYTES)
    rom[: len(counts + leaves)] = counts + leaves
    rom[_RESET_OFFSET : _RESET_OFFSET + 5] = b"\xea\x00\x00\x00\xf0"  # where the processor starts: jmp f000:0000
    return bytes(rom)


_SLOW = "instructions are translated (TCG), computing is slow"


def choose(qemu: str, folder: Path) -> tuple[Accelerator, str]:
    """The best accelerator that works here, and why it is that one.  Blocks for at most PROBE_TIMEOUT_S.

    Args: folder: exists; for a file of the probe's.
    """
    device = Path("/dev/kvm")
    if not device.exists():
        return "tcg", f"there is no /dev/kvm: {_SLOW}"
    if not os.access(device, os.R_OK | os.W_OK):
        return "tcg", f"/dev/kvm is closed to this user (group kvm): {_SLOW}"
    problem = try_accelerator(qemu, "kvm", folder)
    return ("tcg", f"/dev/kvm does not work here ({problem}): {_SLOW}") if problem else ("kvm", "KVM")


def try_accelerator(qemu: str, accelerator: Accelerator, folder: Path) -> str:
    """Run a small program in a VM; empty if it ended well, else what happened.  Blocks."""
    rom = folder / f"probe-{accelerator}.rom"
    rom.write_bytes(probe_rom())
    command = [qemu, "-M", "pc,usb=off", "-accel", accelerator, "-cpu", "host" if accelerator == "kvm" else "qemu64"]
    command += ["-m", "16", "-nodefaults", "-no-user-config", "-display", "none", "-bios", str(rom)]
    command += ["-device", f"isa-debug-exit,iobase={_PORT:#x},iosize=1"]
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"a guest of a few instructions did not end within {PROBE_TIMEOUT_S:g} s"
    except OSError as exc:
        return str(exc)
    finally:
        rom.unlink(missing_ok=True)
    if ended.returncode == _DONE:
        return ""
    said = ended.stderr.decode(errors="replace").strip().splitlines()
    return said[0][:200] if said else f"QEMU ended with status {ended.returncode}"
