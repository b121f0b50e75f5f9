"""A virtual machine of a few instructions, made with the kernel's KVM interface alone.  Run by its path, as a program.

`python -I -S kvm_probe.py LOOPS TRIES` counts LOOPS down in a guest, TRIES times, and prints the fewest seconds.
It fails where KVM does, and does not end where KVM hangs: who runs it sets the time limit (accelerator.py).
Constants and layouts are those of linux/kvm.h for x86_64.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import sys
import time

_API_VERSION = 12
_GET_API_VERSION, _CREATE_VM, _GET_VCPU_MMAP_SIZE, _CREATE_VCPU = 0xAE00, 0xAE01, 0xAE04, 0xAE41
_SET_TSS_ADDR, _SET_MEMORY, _RUN = 0xAE47, 0x4020AE46, 0xAE80
_SET_REGS, _GET_SREGS, _SET_SREGS = 0x4090AE82, 0x8138AE83, 0x4138AE84
_REGS_BYTES, _SREGS_BYTES = 144, 312
_RIP_AT = 128
"""In struct kvm_regs; the flags follow, of which bit 1 is always set."""
_CS_BASE_AT, _CS_SELECTOR_AT = 0, 12
_REASON_AT, _PORT_AT = 8, 34
_EXIT_IO = 2
_PAGE = 4096
_CODE_AT = 0x1000
_TSS_AT = 0x7FFF_B000
"""Where Intel's processors want three pages of the guest's addresses, to imitate real mode."""
PORT = 0xF4
_NAME = "podflare-kvm-probe"


def program(loops: int) -> bytes:
    """Count down, write to a port: real-mode x86 instructions."""
    counts = b"\x66\xb9" + struct.pack("<I", loops)  # mov ecx, loops
    counts += b"\x66\x49\x75\xfc"  # dec ecx; jnz to the dec
    return counts + b"\xe6" + bytes([PORT]) + b"\xf4"  # out; hlt


def run(loops: int) -> float:
    """For how many seconds a new VM ran the program.  Raises: OSError if KVM refuses, or the VM did something else."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    if fcntl.ioctl(kvm, _GET_API_VERSION, 0) != _API_VERSION:
        raise OSError("it is of another version")
    vm = fcntl.ioctl(kvm, _CREATE_VM, 0)
    fcntl.ioctl(vm, _SET_TSS_ADDR, _TSS_AT)
    # One page of memory, whose address in this process the kernel wants to know.
    memory_fd = os.memfd_create(_NAME)
    os.ftruncate(memory_fd, _PAGE)
    memory = mmap.mmap(memory_fd, _PAGE)
    code = program(loops)
    memory[: len(code)] = code
    fcntl.ioctl(vm, _SET_MEMORY, struct.pack("<IIQQQ", 0, 0, _CODE_AT, _PAGE, _address()))
    vcpu = fcntl.ioctl(vm, _CREATE_VCPU, 0)
    state = mmap.mmap(vcpu, fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0))
    segments = bytearray(_SREGS_BYTES)
    fcntl.ioctl(vcpu, _GET_SREGS, segments)
    struct.pack_into("<Q", segments, _CS_BASE_AT, 0)
    struct.pack_into("<H", segments, _CS_SELECTOR_AT, 0)
    fcntl.ioctl(vcpu, _SET_SREGS, segments)
    registers = bytearray(_REGS_BYTES)
    struct.pack_into("<QQ", registers, _RIP_AT, _CODE_AT, 2)
    fcntl.ioctl(vcpu, _SET_REGS, registers)
    started_s = time.monotonic()
    fcntl.ioctl(vcpu, _RUN, 0)
    took_s = time.monotonic() - started_s
    (reason,) = struct.unpack_from("<I", state, _REASON_AT)
    if reason != _EXIT_IO or struct.unpack_from("<H", state, _PORT_AT) != (PORT,):
        raise OSError(f"a guest of a few instructions ended otherwise (KVM exit {reason})")
    state.close()
    memory.close()
    for fd in (vcpu, vm, kvm, memory_fd):
        os.close(fd)
    return took_s


def _address() -> int:
    with open("/proc/self/maps") as maps:
        return next(int(line.partition("-")[0], 16) for line in maps if _NAME in line)


def main() -> int:
    loops, tries = int(sys.argv[1]), int(sys.argv[2])
    try:
        print(min(run(loops) for _ in range(tries)))
    except OSError as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
