"""A process that is stopped and looked into from outside (ptrace(2), proc_pid_mem(5)).

Knows the registers of x86_64 only; `SUPPORTED` says whether this is one.
"""

from __future__ import annotations

import errno
import os
import platform
import struct
import time
from typing import Dict, List, Tuple

from podflare.guest import syscalls as sc

SUPPORTED = platform.machine() == "x86_64"

MMAP, MPROTECT, MUNMAP, BRK, MADVISE = 9, 10, 11, 12, 28
"""Numbers of the system calls that are made in a tracee's name."""

_READ = 0

_NT_PRSTATUS = 1
_NT_X86_XSTATE = 0x202
# struct user_regs_struct, sys/user.h
_NAMES = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_REGISTERS = struct.Struct(f"={len(_NAMES)}Q")
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
_SYSCALL = b"\x0f\x05"
_U64 = (1 << 64) - 1
_STOP_TIMEOUT_S = 10.0
_STOP_POLL_S = 0.0005

Registers = Dict[str, int]


class Tracee:
    """One process, stopped from `__init__` to `release`.  It is killed if the tracer dies before."""

    def __init__(self, pid: int, proc: str, *, reads: int) -> None:
        """Wait until it waits in a read of the descriptor `reads`, and stop it there.

        Args:
            pid: in the PID namespace of the caller and of the procfs that is mounted on `proc`.
        Raises: OSError if it cannot be traced, does not stop or does something else.
        """
        self.pid = pid
        self.folder = f"{proc}/{pid}"
        self._wait_for_read(reads)
        sc.ptrace(sc.PTRACE_SEIZE, pid, 0, sc.PTRACE_O_EXITKILL)
        sc.ptrace(sc.PTRACE_INTERRUPT, pid)
        self._wait()
        self.memory = os.open(f"{self.folder}/mem", os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.memory)

    def _wait_for_read(self, fd: int) -> None:
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        wanted = [str(_READ), hex(fd)]
        while True:
            with open(f"{self.folder}/syscall") as file:  # proc_pid_syscall(5)
                if file.read().split()[:2] == wanted:
                    return
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, f"process {self.pid} does not wait to be carried")
            time.sleep(_STOP_POLL_S)  # there is no event for it

    def _wait(self) -> None:
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while True:
            # __WALL: a tracee need not be a child.
            pid, status = os.waitpid(self.pid, os.WNOHANG | 0x40000000)
            if pid and os.WIFSTOPPED(status):
                return
            if pid:
                raise OSError(errno.ESRCH, f"process {self.pid} ended while it was looked into")
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, f"process {self.pid} did not stop")
            time.sleep(_STOP_POLL_S)  # waitpid has no limit of its own

    def registers(self) -> Registers:
        return dict(zip(_NAMES, _REGISTERS.unpack(sc.get_registers(self.pid, _NT_PRSTATUS)[: _REGISTERS.size])))

    def set_registers(self, registers: Registers) -> None:
        content = _REGISTERS.pack(*(registers[name] & _U64 for name in _NAMES))
        sc.set_registers(self.pid, _NT_PRSTATUS, content)

    def float_registers(self) -> bytes:
        return sc.get_registers(self.pid, _NT_X86_XSTATE)

    def set_float_registers(self, content: bytes) -> None:
        sc.set_registers(self.pid, _NT_X86_XSTATE, content)

    def read(self, address: int, length: int) -> bytes:
        """Raises: OSError, EIO where nothing is mapped, ESRCH if the process has been killed."""
        content = os.pread(self.memory, length, address)
        return content or self._gone()

    def _gone(self) -> bytes:
        raise OSError(errno.ESRCH, f"process {self.pid} was ended")

    def write(self, address: int, content: "bytes | memoryview") -> None:
        """Protection of the memory does not matter (FOLL_FORCE)."""
        view = memoryview(content)
        while view:
            count = os.pwrite(self.memory, view, address) or len(self._gone())
            address, view = address + count, view[count:]

    def syscall_address(self) -> int:
        """Where the instruction lies by which the process waits in the kernel.

        Precondition: it was stopped in a blocking system call.
        """
        address = self.registers()["rip"] - len(_SYSCALL)
        if self.read(address, len(_SYSCALL)) != _SYSCALL:
            raise OSError(errno.EINVAL, f"process {self.pid} was not stopped in a system call")
        return address

    def call(self, at: int, number: int, *arguments: int) -> int:
        """Make a system call in its name with the instruction at `at`; its registers are as before afterwards.

        Raises: OSError with the errno of the call.
        """
        before = self.registers()
        registers = dict(before, rax=number, orig_rax=_U64, rip=at)
        registers.update(zip(_ARGUMENTS, (value & _U64 for value in arguments)))
        self.set_registers(registers)
        sc.ptrace(sc.PTRACE_SINGLESTEP, self.pid)
        self._wait()
        result = self.registers()["rax"]
        self.set_registers(before)
        if result > _U64 - 4096:
            number_of_error = (1 << 64) - result
            raise OSError(number_of_error, f"system call {number}: {os.strerror(number_of_error)}")
        return result

    def status(self) -> Dict[str, str]:
        """/proc/<pid>/status."""
        with open(f"{self.folder}/status") as file:
            return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}

    def thread_id(self) -> int:
        """As the process itself sees it: in the innermost of its PID namespaces."""
        return int(self.status()["NSpid"].split()[-1])

    def release(self) -> None:
        """Let it run on."""
        sc.ptrace(sc.PTRACE_DETACH, self.pid)


def present_pages(tracee: Tracee, start: int, end: int, page: int) -> List[Tuple[int, int]]:
    """Runs (start, end) of pages in [start, end) that hold memory of the process's own (pagemap, kernel docs)."""
    runs: List[Tuple[int, int]] = []
    with open(f"{tracee.folder}/pagemap", "rb", buffering=0) as file:
        address = start
        while address < end:
            count = min((end - address) // page, 1 << 16)
            file.seek(address // page * 8)
            entries = struct.unpack(f"={count}Q", file.read(count * 8))
            for entry in entries:
                # 63: present, 62: swapped, 61: a page of a file or of shared memory.
                if entry >> 62 and not entry >> 61 & 1:
                    if runs and runs[-1][1] == address:
                        runs[-1] = (runs[-1][0], address + page)
                    else:
                        runs.append((address, address + page))
                address += page
    return runs
