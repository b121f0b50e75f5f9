"""The system calls that code in a sandbox may make, compiled to BPF by libseccomp.

Programs are stacked, the stricter answer wins (seccomp(2)):

1. an allow-list: what container engines allow an unprivileged container by default, less what a sandbox has no use
   for.  A known dangerous call answers EPERM, any other unknown call ENOSYS, so that libraries fall back.
2. arguments: socket families, namespace flags of clone, terminal injection.
3. signals: somebody outside of the sandbox is asked (guest/process/signals.py).

Calls of another architecture (32-bit, x32) answer ENOSYS: the lists here say nothing about their numbers.
"""

from __future__ import annotations

import errno
import os
from functools import lru_cache

from podflare.errors import IsolationIncomplete

ALLOWED = frozenset(
    """
    accept accept4 access alarm arch_prctl bind brk capget capset chdir chmod chown clock_getres clock_gettime
    clock_nanosleep clone close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1
    epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit
    exit_group faccessat faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl
    fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstatfs fsync ftruncate futex
    futex_waitv futimesat get_mempolicy get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid
    geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid
    getresuid getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid getxattr inotify_add_watch
    inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit
    ioctl ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown
    lgetxattr link linkat listen listxattr llistxattr lremovexattr lseek lsetxattr lstat madvise membarrier
    memfd_create mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mprotect mq_getsetattr mq_notify
    mq_open mq_timedreceive mq_timedsend mq_unlink mremap msgctl msgget msgrcv msgsnd msync munlock munlockall
    munmap nanosleep newfstatat open openat openat2 pause personality pidfd_open pidfd_send_signal pipe pipe2
    pkey_alloc pkey_free pkey_mprotect poll ppoll prctl pread64 preadv preadv2 prlimit64 process_mrelease pselect6
    pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recvfrom recvmmsg recvmsg remap_file_pages
    removexattr rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask
    rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max
    sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
    sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop
    semtimedop sendfile sendmmsg sendmsg sendto set_robust_list set_thread_area set_tid_address setfsgid setfsuid
    setgid setgroups setitimer setns
    setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid setsockopt
    setuid setxattr shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 socket socketpair splice stat
    statfs statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete
    timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill truncate
    umask uname unlink unlinkat utime utimensat utimes vfork vmsplice wait4 waitid write writev
    """.split()
)

# setns is in the list for the REPL alone, which moves its forks into their machines with it: it asks for capabilities
# that no other process of a sandbox has.

REFUSED = frozenset(
    """
    acct add_key adjtimex bpf chroot clock_adjtime clock_settime delete_module fanotify_init fanotify_mark
    finit_module fsconfig fsmount fsopen fspick get_kernel_syms init_module ioperm iopl kcmp kexec_file_load
    kexec_load keyctl lookup_dcookie mbind migrate_pages mount mount_setattr move_mount move_pages name_to_handle_at
    nfsservctl open_by_handle_at open_tree perf_event_open pidfd_getfd pivot_root process_madvise process_vm_readv
    process_vm_writev ptrace query_module quotactl quotactl_fd reboot request_key set_mempolicy
    set_mempolicy_home_node setdomainname sethostname settimeofday stime swapoff swapon sysfs syslog umount
    umount2 unshare uselib userfaultfd ustat vhangup vm86 vm86old
    """.split()
)
"""Answer EPERM, as container engines do: present, but not for you."""

UNSUPPORTED = frozenset("clone3 io_uring_enter io_uring_register io_uring_setup memfd_secret".split())
"""Answer ENOSYS, so that libraries take the older call (clone3 keeps its flags in memory, out of a filter's sight)."""

NAMESPACE_FLAGS = 0x7E020000
"""CLONE_NEWNS|NEWCGROUP|NEWUTS|NEWIPC|NEWUSER|NEWPID|NEWNET."""

SIGNALS = "kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal".split()
"""Calls that send a signal to a process by its number."""
F_SETOWN, F_SETOWN_EX = 8, 15
_OWNER_REQUESTS = (0x8901, 0x8902)  # FIOSETOWN, SIOCSPGRP: F_SETOWN by other names, with the number in memory

_SOCKET_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_U32 = 0xFFFFFFFF


@lru_cache(maxsize=1)
def compile_filters() -> tuple[bytes, ...]:
    """The BPF programs, in the order in which they are to be loaded; the last one needs a listener.

    Raises: IsolationIncomplete if libseccomp is not installed.
    """
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError) as exc:
        raise IsolationIncomplete(
            f"libseccomp could not be loaded ({exc}); install it: apt-get install libseccomp2 "
            "(Debian, Ubuntu), dnf install libseccomp (Fedora)"
        ) from exc
    return (_calls(pyseccomp), _arguments(pyseccomp), _signals(pyseccomp))


def _calls(seccomp: object) -> bytes:
    s = seccomp
    rules = s.SyscallFilter(s.ERRNO(errno.ENOSYS))  # type: ignore[attr-defined]  # pyseccomp has no types
    _refuse_foreign(s, rules)
    for name in sorted(ALLOWED):
        if _known(s, name):
            rules.add_rule(s.ALLOW, name)  # type: ignore[attr-defined]
    for name in sorted(REFUSED):
        if _known(s, name):
            rules.add_rule(s.ERRNO(errno.EPERM), name)  # type: ignore[attr-defined]
    return _export(rules)


def _arguments(seccomp: object) -> bytes:
    s = seccomp
    rules = s.SyscallFilter(s.ALLOW)  # type: ignore[attr-defined]
    _refuse_foreign(s, rules)
    refuse, arg = s.ERRNO(errno.EPERM), s.Arg  # type: ignore[attr-defined]
    masked, above = s.MASKED_EQ, s.GT  # type: ignore[attr-defined]
    for flag in (1 << bit for bit in range(32) if NAMESPACE_FLAGS >> bit & 1):
        rules.add_rule(refuse, "clone", arg(0, masked, flag, flag))
    # The kernel looks at the low 32 bits of these arguments only, so the masks must, too.
    for request in _TERMINAL_INJECTION:
        rules.add_rule(refuse, "ioctl", arg(1, masked, _U32, request))
    no_family = s.ERRNO(errno.EAFNOSUPPORT)  # type: ignore[attr-defined]
    for call in ("socket", "socketpair"):
        for family in range(max(_SOCKET_FAMILIES) + 1):
            if family not in _SOCKET_FAMILIES:
                rules.add_rule(no_family, call, arg(0, masked, _U32, family))
        rules.add_rule(no_family, call, arg(0, above, max(_SOCKET_FAMILIES)))
        for kind in (3, 4, 6, 10):  # SOCK_RAW, SOCK_RDM, SOCK_DCCP, SOCK_PACKET
            rules.add_rule(refuse, call, arg(1, masked, 0xF, kind))
    return _export(rules)


def _signals(seccomp: object) -> bytes:
    """Asks its listener (seccomp_unotify(2)) whether a process may signal another one."""
    s = seccomp
    rules = s.SyscallFilter(s.ALLOW)  # type: ignore[attr-defined]
    _refuse_foreign(s, rules)
    ask, refuse, arg, masked = s.NOTIFY, s.ERRNO(errno.EPERM), s.Arg, s.MASKED_EQ  # type: ignore[attr-defined]
    for call in SIGNALS:
        rules.add_rule(ask, call)
    # Whom the kernel signals for a descriptor; what is in memory could change after it was looked at.
    rules.add_rule(ask, "fcntl", arg(1, masked, _U32, F_SETOWN))
    rules.add_rule(refuse, "fcntl", arg(1, masked, _U32, F_SETOWN_EX))
    for request in _OWNER_REQUESTS:
        rules.add_rule(refuse, "ioctl", arg(1, masked, _U32, request))
    return _export(rules)


def _refuse_foreign(seccomp: object, rules: object) -> None:
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.ERRNO(errno.ENOSYS))  # type: ignore[attr-defined]


def _known(seccomp: object, name: str) -> bool:
    """Whether libseccomp knows the call for this architecture (names differ by architecture and version)."""
    number: int = seccomp.resolve_syscall(seccomp.system_arch(), name)  # type: ignore[attr-defined]
    return number >= 0


def _export(rules: object) -> bytes:
    fd = os.memfd_create("seccomp")
    with open(fd, "w+b") as file:
        rules.export_bpf(file)  # type: ignore[attr-defined]
        file.seek(0)
        return file.read()
