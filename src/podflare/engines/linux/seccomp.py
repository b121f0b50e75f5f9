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

ALLOWED_FOR = {
    "files and directories of its own tree": """
        access chdir chmod chown creat faccessat faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchmodat2
        fchown fchownat fdatasync fgetxattr flistxattr flock fremovexattr fsetxattr fstat fstatfs fsync
        ftruncate futimesat getcwd getdents getdents64 getxattr inotify_add_watch inotify_init inotify_init1
        inotify_rm_watch lchown lgetxattr link linkat listxattr llistxattr lremovexattr lseek lsetxattr lstat
        mkdir mkdirat mknod mknodat newfstatat open openat openat2 readahead readlink readlinkat removexattr
        rename renameat renameat2 rmdir setxattr stat statfs statx symlink symlinkat sync sync_file_range syncfs
        truncate umask unlink unlinkat utime utimensat utimes
    """,
    "descriptors: reading, writing, waiting": """
        close close_range copy_file_range dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old
        epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 fcntl ioctl pipe pipe2 poll ppoll
        pread64 preadv preadv2 pselect6 pwrite64 pwritev pwritev2 read readv select sendfile splice tee vmsplice
        write writev
    """,
    "its own memory": """
        brk get_mempolicy madvise membarrier memfd_create mincore mlock mlock2 mlockall mmap mprotect mremap
        msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect remap_file_pages
    """,
    "processes and threads": """
        arch_prctl clone execve execveat exit exit_group fork futex futex_waitv get_robust_list get_thread_area
        getpgid getpgrp getpid getppid getsid gettid personality pidfd_open prctl process_mrelease rseq
        set_robust_list set_thread_area set_tid_address setpgid setsid vfork wait4 waitid
    """,
    "identity, which no capability lets it change": """
        capget capset getegid geteuid getgid getgroups getresgid getresuid getuid setfsgid setfsuid setgid
        setgroups setregid setresgid setresuid setreuid setuid
    """,
    "limits and scheduling within its control group": """
        getcpu getpriority getrlimit getrusage ioprio_get ioprio_set prlimit64 sched_get_priority_max
        sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
        sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield
        setpriority setrlimit
    """,
    "signals within its PID namespace": """
        kill pause pidfd_send_signal restart_syscall rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo
        rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sigaltstack signalfd signalfd4 tgkill tkill
    """,
    "telling time, timers": """
        alarm clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep setitimer time
        timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime
        timerfd_settime times
    """,
    "sockets in its own network": """
        accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmmsg recvmsg sendmmsg
        sendmsg sendto setsockopt shutdown socket socketpair
    """,
    "shared memory and queues in its own namespace": """
        mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink msgctl msgget msgrcv msgsnd
        semctl semget semop semtimedop shmat shmctl shmdt shmget
    """,
    "confining itself further": "landlock_add_rule landlock_create_ruleset landlock_restrict_self seccomp",
    "asking the system": "getrandom sysinfo uname",
    "moving forks, which asks for capabilities that only a REPL has": "setns",
}
"""Why a call is allowed, and which calls that are."""

REFUSED_FOR = {
    "mounts and roots": """
        chroot fsconfig fsmount fsopen fspick mount mount_setattr move_mount open_tree pivot_root umount umount2
    """,
    "new namespaces, names of the machine": "setdomainname sethostname unshare",
    "other processes' memory, descriptors and tracing": """
        kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace
    """,
    "programs and keys in the kernel": """
        add_key bpf delete_module finit_module get_kernel_syms init_module kexec_file_load kexec_load keyctl
        perf_event_open query_module request_key userfaultfd
    """,
    "files by handle, watching and accounting all of a file system": """
        acct fanotify_init fanotify_mark lookup_dcookie name_to_handle_at nfsservctl open_by_handle_at quotactl
        quotactl_fd sysfs uselib ustat
    """,
    "clocks, power, swap, consoles, ports of the machine": """
        adjtimex clock_adjtime clock_settime ioperm iopl reboot settimeofday stime swapoff swapon syslog vhangup
        vm86 vm86old
    """,
    "placing memory on the machine's nodes": """
        mbind migrate_pages move_pages set_mempolicy set_mempolicy_home_node
    """,
}
"""Known dangerous calls, by what they would reach.  Answer EPERM, as container engines do: present, but not for you."""

ALLOWED = frozenset(" ".join(ALLOWED_FOR.values()).split())
REFUSED = frozenset(" ".join(REFUSED_FOR.values()).split())

PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
"""Arguments of personality(2) that turn off no protection: Linux, its 32-bit word, UNAME26, asking."""

UNSUPPORTED = frozenset(
    """
        clone3 io_uring_enter io_uring_register io_uring_setup memfd_secret
        io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit
    """.split()
)
"""Answer ENOSYS, so that libraries take the older call (clone3 keeps its flags in memory, out of a filter's sight;
what io_setup takes comes out of one number for the whole machine, fs.aio-max-nr)."""

NAMESPACE_FLAGS = 0x7E020000
"""CLONE_NEWNS|NEWCGROUP|NEWUTS|NEWIPC|NEWUSER|NEWPID|NEWNET."""

SIGNALS = "kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal".split()
"""Calls that send a signal to a process by its number."""
F_SETOWN, F_SETOWN_EX = 8, 15
_OWNER_REQUESTS = (0x8901, 0x8902)  # FIOSETOWN, SIOCSPGRP: F_SETOWN by other names, with the number in memory

_SOCKET_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_NAMESPACE_REQUESTS = (0xB7, *range(0xFF01, 0xFF0B))
"""What leads from a descriptor to namespaces: all of ioctl_nsfs(2), by their type alone (from Linux 6.12 on one of
them hands out every mount namespace that the caller's capabilities reach, its family's too), and those of a pidfd."""
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
    for name in sorted(ALLOWED - {"personality"}):
        if _known(s, name):
            rules.add_rule(s.ALLOW, name)  # type: ignore[attr-defined]
    for value in PERSONALITIES:
        rules.add_rule(s.ALLOW, "personality", s.Arg(0, s.MASKED_EQ, _U32, value))  # type: ignore[attr-defined]
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
    for request in _NAMESPACE_REQUESTS:
        kind, value = (0xFF00, request << 8) if request < 0x100 else (0xFFFF, request)
        rules.add_rule(refuse, "ioctl", arg(1, masked, kind, value))
    # Of others only: the agent has the same user, and RLIMIT_CPU ends even it.
    rules.add_rule(refuse, "prlimit64", arg(0, s.NE, 0))  # type: ignore[attr-defined]
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
