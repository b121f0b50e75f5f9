"""What the gate gives up before it touches a byte of a sandbox: root, new programs, and what a parser never needs."""

from __future__ import annotations

import errno
import os
import resource

import pyseccomp

_IDS = (0x7001_0001, 65534)
"""For a root daemon's gate: the first above those of machines; nobody, where a user namespace holds fewer ids."""
_REFUSED = """
    execve execveat fork vfork ptrace process_vm_readv process_vm_writev pidfd_getfd pidfd_open kill tkill
    mount umount2 pivot_root chroot setns unshare open_tree move_mount fsopen fsmount init_module finit_module
    delete_module kexec_load bpf perf_event_open userfaultfd keyctl add_key request_key io_uring_setup
    unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat mkdir mkdirat mknod mknodat
    chmod fchmodat chown lchown fchownat truncate creat
""".split()


def open_many_files() -> int:
    """Raise the limit of open files as far as it goes, and return it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def give_up() -> None:
    """Become a process that can read what everybody can, and use sockets; for good.

    Raises: OSError if anything of it is not possible: the gate must not go on then.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold secrets
    if os.geteuid() == 0:
        _change_id()
    rules = pyseccomp.SyscallFilter(defaction=pyseccomp.ALLOW)
    for name in _REFUSED:
        try:
            rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
        except OSError as error:  # a name that this library or architecture does not have
            if error.errno not in (errno.EINVAL, errno.EFAULT, errno.EDOM):
                raise
    rules.load()  # sets no_new_privs, too


def _change_id() -> None:
    os.setgroups([])
    for number in _IDS:
        try:
            os.setresgid(number, number, number)
            os.setresuid(number, number, number)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            continue
        return
    raise OSError(errno.EINVAL, "the gate runs as root and there is no other id that it could take")
