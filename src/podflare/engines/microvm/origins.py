"""Saved VMs that machines start from: each template's is booted once, saved, and restored ever after.

They are kept beside the image that they were booted from, also for later daemons, and go with it.  One is good for
machines of one shape and size of disk, of one version of the VMM, and of one image.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from podflare.engines.linux.ending import remove_tree
from podflare.engines.linux.waiting import to_the_end, wait_readable
from podflare.engines.microvm.disks import copy_disk, make_disk
from podflare.engines.microvm.image.store import Image
from podflare.engines.microvm.vmm import BootSource, Drives, SavedVm, Shape, Vm, Vmm
from podflare.errors import Conflict, DeadlineExceeded, MachineFailed, TemplateFailed

BOOT_TIMEOUT_S = 180.0
"""Translated (TCG), on a busy computer."""
COMMAND_LINE = "console=ttyS0 quiet loglevel=4 panic=-1 8250.nr_uarts=1 random.trust_cpu=on"
TRANSLATED = " mitigations=off"
"""Where instructions are translated: the processor has none of the flaws that the kernel takes it to have, and guarding
against them (above all Meltdown, by other page tables for each system call) makes a system call ten times as long."""
_LOCK_LOOK_S = 0.1
_FORMAT = "1"


@dataclass(frozen=True)
class Origin:
    """A saved VM with its drives: all that another one goes on from."""

    saved: SavedVm
    disk: Path
    root: Path
    shape: Shape

    @classmethod
    def within(cls, folder: Path, root: Path, shape: Shape) -> Origin:
        """The files of one below `folder`, which exist already or are to be made."""
        return cls(SavedVm(folder / "memory", folder / "devices"), folder / "disk", root, shape)


def check_same_image(one: Path, other: Path) -> None:
    """Args: roots of two machines.  Raises: Conflict if nothing tells what in them is whose."""
    if not same_file(one, other):
        raise Conflict("the two sandboxes were started from different images")


def same_file(one: Path, other: Path) -> bool:
    """Also under another name, as snapshots have their image's root."""
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False


class Origins:
    """Those of one engine's templates."""

    def __init__(self, vmm: Vmm, machine_key: str, scratch: Path) -> None:
        """Args:
        machine_key: names VMM, version and machine; what was saved under another one is not restored.
        scratch: directory of this daemon's; for VMs that boot, and for origins where the image's is closed.
        """
        self._vmm = vmm
        self._arguments = COMMAND_LINE + (TRANSLATED if vmm.accelerator == "tcg" else "")
        self._machine_key = machine_key
        self._scratch = scratch
        self._making: dict[Path, asyncio.Lock] = {}
        self.boots = 0
        self.last_boot_s = 0.0

    async def get(self, image: Image, shape: Shape, disk_bytes: int) -> Origin:
        """The origin of machines of this kind, booted now if it is the first time.

        Raises: TemplateFailed if the image does not boot; DeadlineExceeded.
        If cancelled: nothing half-made is left.
        """
        parts = (_FORMAT, self._machine_key, image.checksum, str(shape), str(disk_bytes), self._arguments)
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
        kept = self._folder(image)
        origin = Origin.within(kept / key, image.rootfs, shape)
        if origin.disk.exists():
            return origin
        # In this process first: flock(2) is by open file.
        async with self._making.setdefault(kept / key, asyncio.Lock()), _lock_file(kept / f"{key}.lock"):
            if not origin.disk.exists():
                for half in kept.glob(f"{key}-*"):
                    remove_tree(half)  # of a daemon that was killed: who makes one holds the lock
                await self._make(image, origin, disk_bytes)
        return origin

    def _folder(self, image: Image) -> Path:
        """Beside the image's files if this user may write there."""
        beside = image.directory / "origins"
        try:
            beside.mkdir(mode=0o700, exist_ok=True)
            if os.access(beside, os.W_OK):
                return beside
        except OSError:
            pass
        own = self._scratch / "origins"
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        return own

    async def _make(self, image: Image, origin: Origin, disk_bytes: int) -> None:
        """Boot, wait for the guest, save; appear under the final name as a whole."""
        loop = asyncio.get_running_loop()
        final = origin.saved.memory.parent
        half = Origin.within(final.with_name(f"{final.name}-{secrets.token_hex(4)}"), image.rootfs, origin.shape)
        folder = half.disk.parent
        started_s = time.monotonic()
        with self._scratch_folder() as directory:
            try:
                folder.mkdir(mode=0o700)
                disk = directory / "disk"
                await loop.run_in_executor(None, make_disk, disk, disk_bytes)
                kernel = image.kernel if self._vmm.kernel_kind == "bzImage" else image.vmlinux
                source = BootSource(kernel, image.initrd, self._arguments)
                vm = await self._vmm.boot(directory, origin.shape, source, Drives(image.rootfs, disk))
                try:
                    await _wait_ready(vm, image.name)

                    async def copy() -> None:
                        await loop.run_in_executor(None, copy_disk, disk, half.disk)

                    await vm.capture(half.saved, while_paused=copy)
                finally:
                    await to_the_end(vm.aclose())
                folder.rename(final)
            except OSError as exc:
                raise TemplateFailed(f"template {image.name!r}: its virtual machine could not be saved: {exc}") from exc
            finally:
                if folder.exists():
                    remove_tree(folder)
        self.boots += 1
        self.last_boot_s = time.monotonic() - started_s

    @contextlib.contextmanager
    def _scratch_folder(self) -> Iterator[Path]:
        folder = self._scratch / f"boot-{secrets.token_hex(4)}"
        folder.mkdir(mode=0o700, parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def _lock_file(path: Path) -> AsyncIterator[None]:
    """Daemons of one computer boot a template one after the other, and the second finds what the first has made."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(_LOCK_LOOK_S)
        yield


async def _first_bytes(vm: Vm, what: str) -> None:
    ends_s = time.monotonic() + BOOT_TIMEOUT_S
    await vm.open_channels(timeout_s=BOOT_TIMEOUT_S)
    await wait_readable(vm.channel, max(0.01, ends_s - time.monotonic()), what)


async def _wait_ready(vm: Vm, name: str) -> None:
    """Raises: TemplateFailed with the last words of the console."""
    ready = asyncio.ensure_future(_first_bytes(vm, f"template {name!r} did not boot"))
    dead = asyncio.ensure_future(vm.wait_dead())
    try:
        await asyncio.wait([ready, dead], return_when=asyncio.FIRST_COMPLETED)
        if ready.done() and not dead.done():
            await ready
            return
        how = await dead
    except (DeadlineExceeded, MachineFailed) as exc:
        raise TemplateFailed(f"{exc}; the last line of its console: {vm.console.last_line!r}") from exc
    finally:
        for task in (ready, dead):
            task.cancel()
    raise TemplateFailed(
        f"template {name!r} did not boot: {how}; the last line of its console: {vm.console.last_line!r}"
    )
