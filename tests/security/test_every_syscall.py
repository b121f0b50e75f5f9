"""Promise: the filter answers every system call number as the published table (docs/syscalls.md) says."""

from __future__ import annotations

import ctypes
import json
import platform

import pytest

from podflare.engines.linux import seccomp

EPERM, ENOSYS = 1, 38
LAST = 480
"""Above the newest call that any kernel of today has."""
NOT_TRIED = {"exit", "exit_group", "rt_sigreturn", "pause", "kill", "fork", "vfork", "clone", "personality", "uselib"}
"""They end or stop the process that tries, or have tests of their own."""
PAST_EVERY_FILTER = {335, 336}
"""uretprobe and uprobe, which newer kernels let pass (kernel/seccomp.c, seccomp_uprobe_exception)."""

# Each in a process of its own, with arguments that mean nothing, for at most a second.  A call that is allowed
# may succeed, fail or block; only EPERM and ENOSYS are told from all else.
TRY_ALL = """
import ctypes, json, os, select, signal
libc = ctypes.CDLL(None, use_errno=True)
found = {}
for number in NUMBERS:
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(r)
        arguments = [ctypes.c_long(-1)] * 6
        ctypes.set_errno(0)
        result = libc.syscall(ctypes.c_long(number), *arguments)
        os.write(w, b"%d" % (ctypes.get_errno() if result == -1 else 0))
        os._exit(0)
    os.close(w)
    ready, _, _ = select.select([r], [], [], 1)
    said = os.read(r, 16) if ready else b""
    os.close(r)
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    found[number] = int(said) if said else None
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def names() -> dict[int, str]:
    """number -> name of every call that libseccomp knows here."""
    import pyseccomp

    lists = seccomp.ALLOWED | seccomp.REFUSED | seccomp.UNSUPPORTED
    arch = pyseccomp.system_arch()
    return {number: name for name in lists if (number := pyseccomp.resolve_syscall(arch, name)) >= 0}


def kernel_lacks(number: int) -> bool:
    """Whether the kernel itself says ENOSYS, with these arguments and without any filter."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6)
    return result == -1 and ctypes.get_errno() == ENOSYS


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the harmless arguments were chosen for x86_64")
def test_every_number_answers_as_the_table_says(attacker, names):
    """Refused calls answer EPERM, unsupported and unknown ones ENOSYS, and allowed ones reach the kernel."""
    numbers = [n for n in range(LAST) if names.get(n) not in NOT_TRIED]
    told = attacker.run(f"NUMBERS = {numbers}\n{TRY_ALL}")
    found = {int(number): answer for number, answer in json.loads(told.stdout).items()}
    wrong = {}
    for number in numbers:
        name, answer = names.get(number, ""), found[number]
        if name in seccomp.REFUSED:
            right = answer == EPERM
        elif name in seccomp.ALLOWED:
            right = answer != ENOSYS or kernel_lacks(number)
        elif number in PAST_EVERY_FILTER:
            right = answer != 0
        else:
            right = answer == ENOSYS
        if not right:
            wrong[name or number] = answer
    assert not wrong
    assert attacker.run("print(1)").stdout == "1\n"


def test_personality_turns_off_no_protection(attacker):
    """Only the harmless values pass; address randomisation and write-protection of code stay."""
    told = attacker.run("""
import ctypes
libc = ctypes.CDLL(None)
print([libc.personality(ctypes.c_ulong(value)) for value in (0xffffffff, 0x0040000, 0x0400000, 0x0100000)])
""")
    assert told.stdout == "[0, -1, -1, -1]\n"
