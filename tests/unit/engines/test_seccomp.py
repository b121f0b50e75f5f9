"""The system-call lists and their compiled form."""

from __future__ import annotations

from podflare.engines.linux import seccomp


def test_no_call_is_on_two_lists():
    """Each call has one answer."""
    assert not seccomp.ALLOWED & seccomp.REFUSED
    assert not seccomp.ALLOWED & seccomp.UNSUPPORTED
    assert not seccomp.REFUSED & seccomp.UNSUPPORTED


def test_calls_that_reach_outside_are_not_allowed():
    """Mounts, new namespaces, modules, other processes' memory, io_uring, bpf and keys are off the allow-list."""
    dangerous = """mount umount2 move_mount open_tree fsopen pivot_root chroot unshare clone3 bpf perf_event_open
    keyctl add_key userfaultfd io_uring_setup ptrace process_vm_readv process_vm_writev kexec_load init_module
    finit_module open_by_handle_at pidfd_getfd kcmp swapon reboot settimeofday sethostname""".split()
    assert not seccomp.ALLOWED & set(dangerous)


def test_filters_compile_to_whole_bpf_programs():
    """libseccomp makes three programs of whole 8-byte instructions, below the kernel's cap."""
    programs = seccomp.compile_filters()
    assert len(programs) == 3
    assert all(program and len(program) % 8 == 0 and len(program) // 8 < 4096 for program in programs)
