"""Firecracker with a guest that answers.  Needs a /dev/kvm that truly works: `make test-kvm`."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

import firecrackers
import vms
from podflare.engines.microvm import accelerator
from podflare.engines.microvm.confinement import Confinement
from podflare.engines.microvm.control import Control, renew
from podflare.engines.microvm.disks import make_disk
from podflare.engines.microvm.firecracker import Firecracker, FirecrackerVm, find
from podflare.engines.microvm.image.store import Image
from podflare.engines.microvm.vmm import BootSource, Drives, SavedVm, Shape
from podflare.wire import frames
from podflare.wire.messages import Exec, Exit, Ready, from_guest, to_payload

pytestmark = [pytest.mark.anyio, pytest.mark.kvm, pytest.mark.timeout(300)]

SHAPE = Shape(memory_bytes=256 << 20, cpus=1)
BOOT_S, ANSWER_S = 60.0, 20.0
CHILDREN = 5


@pytest.fixture
async def folder(private_temp: Path) -> AsyncIterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="fg", dir=private_temp))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def vmm() -> Firecracker:
    binary = firecrackers.find_or_skip()
    vms.skip_without(*vms.PROGRAMS)
    problem = accelerator.problem_with_kvm()
    if problem:
        pytest.skip(problem)
    return Firecracker(find(binary), Confinement.detect(kvm=True, jailed=True))


async def test_guests_of_firecracker_answer_and_fork(vmm: Firecracker, folder: Path, image: Image):
    """A booted guest answers orders; copies restored from its saved state at once run cells, each for itself."""
    (folder / "root").hardlink_to(image.rootfs)
    disk = folder / "empty"
    make_disk(disk, 1 << 30)
    parent_dir = folder / "parent"
    parent_dir.mkdir(mode=0o711)
    shutil.copyfile(disk, parent_dir / "disk")
    source = BootSource(image.vmlinux, image.initrd, "console=ttyS0 quiet panic=-1")
    parent = await vmm.boot(parent_dir, SHAPE, source, Drives(folder / "root", parent_dir / "disk"))
    children: list[FirecrackerVm] = []
    try:
        assert "usage" in await Control(parent.control).ask({"usage": True}, timeout_s=BOOT_S), parent.console.text
        saved = SavedVm(folder / "memory", folder / "devices")

        async def copy_disk() -> None:
            shutil.copyfile(parent_dir / "disk", folder / "saved-disk")

        await parent.capture(saved, while_paused=copy_disk)

        async def restore(number: int) -> None:
            directory = folder / f"child{number}"
            directory.mkdir(mode=0o711)
            shutil.copyfile(folder / "saved-disk", directory / "disk")
            child = await vmm.restore(directory, SHAPE, saved, Drives(folder / "root", directory / "disk"))
            children.append(child)
            await child.resume()
            await renew(child, Control(child.control), hostname=f"box{number}", reseed=True, timeout_s=ANSWER_S)

        async with anyio.create_task_group() as group:
            for number in range(CHILDREN):
                group.start_soon(restore, number)
        said = {
            await run(child, "import os, socket; print(socket.gethostname(), os.urandom(8).hex())")
            for child in children
        }
        assert len({text.split()[0] for text in said}) == CHILDREN
        assert len({text.split()[1] for text in said}) == CHILDREN
    finally:
        for vm in (parent, *children):
            await vm.aclose()


async def run(vm: FirecrackerVm, code: str) -> str:
    """Standard output of one Python cell."""
    decoder, waiting, text = frames.Decoder(), [], b""
    ends_s = time.monotonic() + ANSWER_S
    vm.channel.send(frames.encode(frames.MESSAGE, 1, to_payload(Exec(code=code, language="python", name="<cell 1>"))))
    while time.monotonic() < ends_s:
        if not waiting:
            await anyio.wait_readable(vm.channel)
            waiting = decoder.feed(vm.channel.recv(1 << 16))
            continue
        frame = waiting.pop(0)
        if frame.kind == frames.STDOUT:
            text += frame.payload
        elif frame.kind == frames.MESSAGE:
            message = from_guest(frame.payload)
            assert isinstance(message, (Ready, Exit)), message
            if isinstance(message, Exit):
                return text.decode()
    raise TimeoutError("the cell did not end")
