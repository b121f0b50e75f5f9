"""The zygote's stage: a root directory that holds what machines may see, and nothing else of the computer.

Runs once per zygote, before any machine exists.  After `enter_stage` the host's file system is detached: neither
the zygote nor anything forked from it can reach the rest of it any more.

Layout of the stage:  /lower/<n> trees | /skel root layer | /dev nodes | /proc | /machines writable layers |
/empty | /new mount point of a machine's root | /tun device.
"""

from __future__ import annotations

import os
import signal
from typing import List, Optional

from podflare.guest import syscalls as sc
from podflare.guest.process.uplink import DEVICE
from podflare.wire.plan import IdMap, SkeletonEntry, StagePlan


def become_namespace_root() -> None:
    """An ordinary user's first step: root of an own user namespace, in which mounts may be made.

    user_namespaces(7): without privilege only the own id can be mapped, and setgroups must be denied before.
    """
    uid, gid = os.geteuid(), os.getegid()
    sc.unshare(sc.CLONE_NEWUSER | sc.CLONE_NEWNS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        _write(f"/proc/self/{name}", text)


def enter_stage(plan: StagePlan) -> None:
    """Build the stage on plan.stage_dir and make it the root directory.

    Precondition: CAP_SYS_ADMIN over the mount namespace (root, or after `become_namespace_root`).
    Raises: OSError that names the step; nothing outside the own mount namespace has changed.
    """
    if not plan.own_user_namespace:
        sc.unshare(sc.CLONE_NEWNS)
    # Without this, mounts below would show up in the host's namespace, too (shared propagation under systemd).
    sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)
    base = plan.stage_dir
    # chown below needs the mapped ids; in an own user namespace the machine's root is simply id 0.
    owner = 0 if plan.own_user_namespace else plan.ids.first
    sc.mount("podflare-stage", base, "tmpfs", sc.MS_NOSUID, "mode=755,size=64m")
    for name in ("lower", "skel", "dev", "proc", "machines", "empty", "new"):
        os.mkdir(f"{base}/{name}", 0o755)
    _attach_trees(plan)
    for entry in plan.skeleton:
        _add_skeleton(f"{base}/skel", entry, owner)
    os.chown(f"{base}/skel", owner, owner)
    _fill_dev(plan, f"{base}/dev")
    if plan.tunnels:
        _bind_device("/dev/net/tun", f"{base}{DEVICE}")
    # A later mount of proc inside a machine is only allowed while this namespace shows one in full
    # (fs/namespace.c, mount_too_revealing).
    sc.mount("/proc", f"{base}/proc", None, sc.MS_BIND | sc.MS_REC)
    sc.mount(plan.machines_dir, f"{base}/machines", None, sc.MS_BIND)
    # All machines share it, and in an ordinary user's daemon they own it: only a read-only mount keeps it empty.
    sc.mount(f"{base}/empty", f"{base}/empty", None, sc.MS_BIND)
    sc.mount(None, f"{base}/empty", None, sc.MS_REMOUNT | sc.MS_BIND | sc.MS_RDONLY | sc.MS_NOSUID | sc.MS_NODEV)
    os.chdir(base)
    sc.pivot_root(".", ".")  # pivot_root(2): the old root now lies on top of the new one ...
    sc.umount(".", sc.MNT_DETACH)  # ... and goes
    os.chdir("/")


def show_root(plan: StagePlan) -> List[str]:
    """Show, on the stage itself, the files that machines have, under the paths that they have there.

    For modules that are imported before there is a machine.  Writable are /tmp and /root, which are nobody's later.
    Returns: the mounts, for `hide_root`.
    """
    mounts: List[str] = []

    def bind(source: str, target: str) -> None:
        os.makedirs(target, exist_ok=True)
        sc.mount(source, target, None, sc.MS_BIND | sc.MS_REC)
        mounts.append(target)

    for number, tree in enumerate(plan.trees):
        bind(f"/lower/{number}", tree.target)
    bind("/skel/etc", "/etc")
    for path in plan.hide:
        bind("/empty", path)
    for entry in plan.skeleton:
        if entry.link_to is not None and entry.path.count("/") == 1:
            os.symlink(entry.link_to, entry.path)
    for path in ("/tmp", "/root"):
        os.makedirs(path, exist_ok=True)
        os.chmod(path, 0o1777)
    return mounts


def hide_root(mounts: List[str]) -> None:
    """Undo `show_root`, so that no machine starts with these mounts.  What is mapped from them stays mapped."""
    for target in reversed(mounts):
        sc.umount(target, sc.MNT_DETACH)


def _attach_trees(plan: StagePlan) -> None:
    mapped: Optional[int] = None
    try:
        for number, tree in enumerate(plan.trees):
            target = f"{plan.stage_dir}/lower/{number}"
            os.mkdir(target)
            if tree.map_ids:
                if mapped is None:
                    mapped = _user_namespace_fd(plan.ids)
                fd = sc.clone_mount(tree.source, id_map_fd=mapped, recursive=False)
            else:
                # A mount with submounts can, in an own user namespace, only be copied together with them.
                fd = sc.clone_mount(tree.source, id_map_fd=None, recursive=True)
            try:
                sc.attach_mount(fd, target)
            finally:
                os.close(fd)
    finally:
        if mapped is not None:
            os.close(mapped)


def _user_namespace_fd(ids: IdMap) -> int:
    """An fd of a user namespace with this map, for idmapped mounts; made by a child that lives just for it."""
    ready_r, ready_w = os.pipe()
    stay_r, stay_w = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(stay_w)  # else the read below would never end
            sc.unshare(sc.CLONE_NEWUSER)
            os.write(ready_w, b".")
            os.read(stay_r, 1)
        finally:
            os._exit(0)
    try:
        os.close(ready_w)
        if os.read(ready_r, 1) != b".":
            raise OSError("could not make a user namespace for idmapped mounts")
        write_id_maps(child, ids)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for fd in (ready_r, stay_r, stay_w):
            os.close(fd)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def write_id_maps(pid: int, ids: IdMap) -> None:
    """Set the maps of the user namespace that `pid` just made.  Precondition: CAP_SETUID, CAP_SETGID here."""
    for name in ("uid_map", "gid_map"):
        _write(f"/proc/{pid}/{name}", f"0 {ids.first} {ids.count}")


def _add_skeleton(root: str, entry: SkeletonEntry, owner: int) -> None:
    path = root + entry.path
    if entry.link_to is not None:
        os.symlink(entry.link_to, path)
        os.lchown(path, owner, owner)
        return
    if entry.text is not None or entry.copy_of is not None:
        content = entry.text.encode() if entry.text is not None else _read(str(entry.copy_of))
        with open(path, "wb") as file:
            file.write(content)
    else:
        os.makedirs(path, exist_ok=True)
    os.chmod(path, entry.mode)
    os.chown(path, owner, owner)


def _fill_dev(plan: StagePlan, dev: str) -> None:
    sc.mount("podflare-dev", dev, "tmpfs", sc.MS_NOSUID | sc.MS_NOEXEC, "mode=755,size=64k")
    for name in plan.devices:
        _bind_device(f"/dev/{name}", f"{dev}/{name}")
    for name in ("pts", "shm"):
        os.mkdir(f"{dev}/{name}")
    links = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx"}
    for name, target in links.items():
        os.symlink(target, f"{dev}/{name}")
    sc.mount(None, dev, None, sc.MS_REMOUNT | sc.MS_BIND | sc.MS_RDONLY | sc.MS_NOSUID | sc.MS_NOEXEC)


def _bind_device(device: str, path: str) -> None:
    """Bound from the host: a user namespace cannot make working device nodes of its own."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o666))
    sc.mount(device, path, None, sc.MS_BIND)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    # The kernel takes a map in a single write(2) only.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
