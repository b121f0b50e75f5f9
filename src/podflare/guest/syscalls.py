"""The kernel calls that Python's standard library does not have.  The only ctypes of the project.

Every function raises OSError with errno and the names of what it was given.  Nothing here decides anything.
Linux on x86_64 and aarch64; Python 3.9.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import Iterable, Optional

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

CAP_DAC_OVERRIDE = 1
CAP_FOWNER = 3
CAP_SYS_CHROOT = 18
CAP_SYS_ADMIN = 21
CAP_LAST = 63
"""Bits above the kernel's last capability answer EINVAL, which is how the end is found."""

_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_SECUREBITS = 28
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

# SECBIT_NOROOT, NO_SETUID_FIXUP, KEEP_CAPS off but locked, NO_CAP_AMBIENT_RAISE; each with its lock bit.
_SECUREBITS_LOCKED = 0b11101111

_NUMBERS = {
    #                x86_64, aarch64
    "pivot_root": (155, 41),
    "capget": (125, 90),
    "capset": (126, 91),
    "renameat2": (316, 276),
    "ptrace": (101, 117),
    "rt_sigaction": (13, 134),
    "sigaltstack": (131, 132),
    "seccomp": (317, 277),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "close_range": (436, 436),
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
}
_COLUMN = {"x86_64": 0, "aarch64": 1}.get(platform.machine(), 0)

_U32 = 0xFFFFFFFF

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(name: str, *args: object) -> int:
    return _check(_libc.syscall(ctypes.c_long(_NUMBERS[name][_COLUMN]), *args), name)


def _path(path: Optional[str]) -> Optional[bytes]:
    return None if path is None else os.fsencode(path)


def close_range(first: int, last: int) -> None:
    """Close the descriptors from `first` to `last`; those that are not open are no error."""
    _syscall("close_range", ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(0))


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A copy of descriptor `fd` of another process.  Needs ptrace rights over it."""
    return _syscall("pidfd_getfd", ctypes.c_int(pidfd), ctypes.c_int(fd), ctypes.c_uint(0))


def unshare(flags: int) -> None:
    """Move the caller (its future children, for CLONE_NEWPID) into new namespaces."""
    _check(_libc.unshare(ctypes.c_int(flags)), f"unshare({flags:#x})")


def setns(fd: int, kind: int) -> None:
    """Move the caller into the namespace behind `fd`."""
    _check(_libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)), f"setns({kind:#x})")


def mount(source: Optional[str], target: str, fstype: Optional[str], flags: int = 0, data: str = "") -> None:
    result = _libc.mount(
        _path(source), _path(target), _path(fstype), ctypes.c_ulong(flags), _path(data) if data else None
    )
    _check(result, f"mount {fstype or 'bind'} {source} on {target} ({data})")


def umount(target: str, flags: int = 0) -> None:
    _check(_libc.umount2(_path(target), ctypes.c_int(flags)), f"umount {target}")


def pivot_root(new_root: str, put_old: str) -> None:
    _syscall("pivot_root", _path(new_root), _path(put_old))


def rename(name: str, folder: int, new_name: str, new_folder: int, *, exchange: bool = False) -> None:
    """Rename between two directories, over nothing that is there; or exchange two entries at one moment.

    Raises: OSError; FileExistsError if something has the new name and is not to be exchanged.
    """
    flags = 2 if exchange else 1  # RENAME_EXCHANGE, RENAME_NOREPLACE
    _syscall(
        "renameat2",
        ctypes.c_int(folder),
        _path(name),
        ctypes.c_int(new_folder),
        _path(new_name),
        ctypes.c_uint(flags),
    )


def clone_mount(path: str, *, id_map_fd: Optional[int], recursive: bool) -> int:
    """An fd of a detached, read-only, nosuid, nodev copy of the mount at `path`; put somewhere by `attach_mount`.

    Args:
        id_map_fd: a user namespace through which the owners of files are seen, or None.
        recursive: with the mounts below it.
    Raises: OSError; EINVAL, ENOSYS or EPERM where kernel or file system cannot map ids (mount_setattr(2)).
    """
    at_recursive = 0x8000 if recursive else 0
    open_tree_clone = 1
    flags = open_tree_clone | os.O_CLOEXEC | at_recursive
    fd = _syscall("open_tree", ctypes.c_int(-100), _path(path), ctypes.c_uint(flags))
    try:
        set_flags = 0x1 | 0x2 | 0x4 | (0 if id_map_fd is None else 0x00100000)  # RDONLY, NOSUID, NODEV, IDMAP
        # struct mount_attr { u64 attr_set, attr_clr, propagation, userns_fd }
        attr = struct.pack("QQQQ", set_flags, 0, MS_PRIVATE, id_map_fd or 0)
        at_flags = 0x1000 | at_recursive  # AT_EMPTY_PATH
        _syscall("mount_setattr", ctypes.c_int(fd), b"", ctypes.c_uint(at_flags), attr, ctypes.c_size_t(len(attr)))
    except BaseException:
        os.close(fd)
        raise
    return fd


def attach_mount(fd: int, target: str) -> None:
    """Put the detached mount `fd` on `target`."""
    _syscall("move_mount", ctypes.c_int(fd), b"", ctypes.c_int(-100), _path(target), ctypes.c_uint(0x4))


def _prctl(option: int, *args: int) -> int:
    words = [ctypes.c_ulong(value) for value in (*args, 0, 0, 0, 0)[:4]]
    return _check(_libc.prctl(ctypes.c_int(option), *words), f"prctl({option})")


def set_child_subreaper() -> None:
    """Orphaned descendants become children of this process, so that it can reap and end them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def set_dumpable(dumpable: bool) -> None:
    """Not dumpable: /proc/<pid> of this process belongs to root of the initial namespace, nobody may attach."""
    _prctl(_PR_SET_DUMPABLE, int(dumpable))


def set_no_new_privs() -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def lock_secure_bits() -> None:
    """From now on user id 0 means no capability, for this process and all after it.  Needs CAP_SETPCAP."""
    _prctl(_PR_SET_SECUREBITS, _SECUREBITS_LOCKED)


def empty_bounding_set(keep: Iterable[int] = ()) -> None:
    """Drop every capability but `keep` from the bounding set.  Needs CAP_SETPCAP."""
    kept = frozenset(keep)
    for cap in range(CAP_LAST + 1):
        if cap in kept:
            continue
        try:
            _prctl(_PR_CAPBSET_DROP, cap)
        except OSError as exc:
            if exc.errno == 22 and cap > 0:  # EINVAL: above the last capability of this kernel
                return
            raise


def set_capabilities(permitted: Iterable[int] = (), effective: Iterable[int] = ()) -> None:
    """Permitted and effective set become exactly these, inheritable and ambient empty."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    may = sum(1 << cap for cap in permitted)
    has = sum(1 << cap for cap in effective)
    header = struct.pack("II", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    words = [part for shift in (0, 32) for part in (has >> shift & _U32, may >> shift & _U32, 0)]
    _syscall("capset", header, struct.pack("6I", *words))


_NEW_LISTENER = 1 << 3
_WAIT_KILLABLE = 1 << 5
"""Once the listener took the question up, only SIGKILL interrupts the call that waits for the answer (Linux 5.19)."""


def load_seccomp_filter(program: bytes, *, listener: bool = False) -> int:
    """Install a compiled BPF program (array of struct sock_filter) for this process and all its children.

    Needs no_new_privs.
    Args:
        listener: return a descriptor on which the program asks (seccomp_unotify(2)); else 0 is returned.
    Raises: OSError if the kernel refuses the program, EBUSY if somebody listens already; ValueError if it is none.
    """
    count, rest = divmod(len(program), 8)
    if rest or not 0 < count <= 4096:
        raise ValueError(f"not a BPF program: {len(program)} bytes")
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog { unsigned short len; struct sock_filter *filter; } with native padding
    fprog = struct.pack("H6xP", count, ctypes.addressof(buffer))
    set_mode_filter = ctypes.c_uint(1)
    if not listener:
        return _syscall("seccomp", set_mode_filter, ctypes.c_uint(0), fprog)
    try:
        return _syscall("seccomp", set_mode_filter, ctypes.c_uint(_NEW_LISTENER | _WAIT_KILLABLE), fprog)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        return _syscall("seccomp", set_mode_filter, ctypes.c_uint(_NEW_LISTENER), fprog)


_PROT_READ, _PROT_WRITE = 1, 2
_MAP_SHARED, _MAP_FIXED, _MAP_ANONYMOUS = 1, 0x10, 0x20
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_FAILED = ctypes.c_void_p(-1).value

_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p


def map_file_over(start: int, length: int, protection: int, fd: int, offset: int) -> None:
    """Replace the mapping at `start` by a shared mapping of the file `fd`."""
    where = _libc.mmap(
        ctypes.c_void_p(start),
        ctypes.c_size_t(length),
        ctypes.c_int(protection),
        ctypes.c_int(_MAP_SHARED | _MAP_FIXED),
        ctypes.c_int(fd),
        ctypes.c_long(offset),
    )
    _check(-1 if where == _FAILED else 0, f"mmap over {start:#x}")


def copy_shared_mapping(start: int, length: int, protection: int) -> None:
    """Replace the readable shared mapping at `start` by an own one with the same content."""
    copy = _libc.mmap(
        None,
        ctypes.c_size_t(length),
        ctypes.c_int(_PROT_READ | _PROT_WRITE),
        ctypes.c_int(_MAP_SHARED | _MAP_ANONYMOUS),
        ctypes.c_int(-1),
        ctypes.c_long(0),
    )
    _check(-1 if copy == _FAILED else 0, f"mmap of {length} bytes")
    ctypes.memmove(copy, start, length)
    if protection != _PROT_READ | _PROT_WRITE:
        _check(_libc.mprotect(ctypes.c_void_p(copy), ctypes.c_size_t(length), ctypes.c_int(protection)), "mprotect")
    moved = _libc.mremap(
        ctypes.c_void_p(copy),
        ctypes.c_size_t(length),
        ctypes.c_size_t(length),
        ctypes.c_int(_MREMAP_MAYMOVE | _MREMAP_FIXED),
        ctypes.c_void_p(start),
    )
    _check(-1 if moved == _FAILED else 0, f"mremap to {start:#x}")


PTRACE_SINGLESTEP = 9
PTRACE_DETACH = 17
PTRACE_GETREGSET = 0x4204
PTRACE_SETREGSET = 0x4205
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_O_EXITKILL = 1 << 20
_MAX_REGISTERS = 32 * 1024


def ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    """One ptrace(2) request that carries no buffer."""
    result = _libc.syscall(
        ctypes.c_long(_NUMBERS["ptrace"][_COLUMN]),
        ctypes.c_long(request),
        ctypes.c_long(pid),
        ctypes.c_void_p(address),
        ctypes.c_void_p(data),
    )
    _check(result, f"ptrace({request:#x}) of {pid}")


def get_registers(pid: int, kind: int) -> bytes:
    """One register set (an NT_* number of elf.h) of a stopped tracee."""
    buffer = ctypes.create_string_buffer(_MAX_REGISTERS)
    vector = ctypes.create_string_buffer(struct.pack("PL", ctypes.addressof(buffer), _MAX_REGISTERS))
    ptrace(PTRACE_GETREGSET, pid, kind, ctypes.addressof(vector))
    return buffer.raw[: struct.unpack("PL", vector.raw[:16])[1]]


def set_registers(pid: int, kind: int, content: bytes) -> None:
    """Replace one register set of a stopped tracee."""
    buffer = ctypes.create_string_buffer(content, len(content))
    vector = ctypes.create_string_buffer(struct.pack("PL", ctypes.addressof(buffer), len(content)))
    ptrace(PTRACE_SETREGSET, pid, kind, ctypes.addressof(vector))


_SIGNALS = [number for number in range(1, 65) if number not in (9, 19)]  # SIGKILL and SIGSTOP have no action
_SIGACTION_BYTES = 32
"""struct sigaction of the kernel, not of libc; the same on both architectures."""


def signal_actions() -> bytes:
    """What every signal does in this process, as the kernel knows it, for `set_signal_actions`."""
    found = []
    for number in _SIGNALS:
        action = ctypes.create_string_buffer(_SIGACTION_BYTES)
        _syscall("rt_sigaction", ctypes.c_int(number), None, action, ctypes.c_size_t(8))
        found.append(action.raw[:_SIGACTION_BYTES])
    return b"".join(found)


def set_signal_actions(actions: bytes) -> None:
    """Make every signal do what it did when `signal_actions` was called."""
    for index, number in enumerate(_SIGNALS):
        action = actions[index * _SIGACTION_BYTES : (index + 1) * _SIGACTION_BYTES]
        _syscall("rt_sigaction", ctypes.c_int(number), action, None, ctypes.c_size_t(8))


_STACK_BYTES = 24


def signal_stack() -> bytes:
    """The alternate signal stack, for `set_signal_stack`."""
    stack = ctypes.create_string_buffer(_STACK_BYTES)
    _syscall("sigaltstack", None, stack)
    return stack.raw[:_STACK_BYTES]


def set_signal_stack(stack: bytes) -> None:
    """Use the alternate signal stack that `signal_stack` told."""
    _syscall("sigaltstack", stack, None)
