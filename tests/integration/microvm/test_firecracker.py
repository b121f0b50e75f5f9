"""The driver against a real Firecracker, as far as an emulated /dev/kvm lets it: all but what a guest answers."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.to_thread import run_sync

import firecrackers
from machines import LIMITS
from podflare.egress import ethernet
from podflare.engines.base import EngineOptions, MachineSpec
from podflare.engines.microvm import accelerator, probe
from podflare.engines.microvm import firecracker_orders as orders
from podflare.engines.microvm.birth import bear
from podflare.engines.microvm.confinement import ALWAYS, AS_ROOT, ENTERED, VMM_ID, Confinement
from podflare.engines.microvm.engine import MOST_CPUS, MicrovmEngine, shape_of
from podflare.engines.microvm.firecracker import Firecracker, FirecrackerVm, Programs, find
from podflare.engines.microvm.firecracker_orders import Order
from podflare.engines.microvm.image.store import Image
from podflare.engines.microvm.origins import Origin, Origins
from podflare.engines.microvm.vmm import NO_LIMIT, BootSource, DiskRate, Drives, SavedVm, Shape
from podflare.engines.microvm.vsock import connect
from podflare.errors import DeadlineExceeded, EgressUnavailable, IsolationIncomplete, MachineFailed
from podflare.wire.uplink import Uplink

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

SHAPE = Shape(memory_bytes=128 << 20, cpus=1)


@pytest.fixture(scope="module")
def programs() -> Programs:
    return find(firecrackers.find_or_skip())


@pytest.fixture
def folder(private_temp: Path) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="fc", dir=private_temp))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


@pytest.fixture
async def vmm(programs: Programs) -> Firecracker:
    return Firecracker(programs, Confinement.detect(kvm=True, jailed=True))


def place(folder: Path, name: str, rate: DiskRate = NO_LIMIT) -> tuple[Path, Drives]:
    """A VM's directory with a disk, as the engine makes it."""
    directory = folder / name
    directory.mkdir(mode=0o711)
    disk = directory / "disk"
    disk.touch()
    os.truncate(disk, 16 << 20)
    return directory, Drives(folder / "root", disk, rate)


async def limiter_of(vm: FirecrackerVm) -> Any:
    """Of its own disk; the image's has none."""
    drives = {drive["drive_id"]: drive for drive in (await vm.order(Order("GET", "/vm/config")))["drives"]}
    assert drives["root"]["rate_limiter"] is None
    return drives["disk"]["rate_limiter"]


@pytest.fixture
async def running(vmm: Firecracker, folder: Path, image: Image) -> AsyncIterator[FirecrackerVm]:
    """A VM that boots the default image; here its guest does not get far."""
    (folder / "root").hardlink_to(image.rootfs)
    directory, drives = place(folder, "parent")
    source = BootSource(image.vmlinux, image.initrd, "console=ttyS0 quiet")
    vm = await vmm.boot(directory, SHAPE, source, drives)
    try:
        yield vm
    finally:
        await vm.aclose()


async def copied() -> None:
    """Nothing to copy while a VM stands still."""


async def test_a_vm_is_configured_saved_and_goes_on_many_times(vmm, folder, running, image):
    """A VM boots as told, is saved whole and by its changes, and several go on at once from one saved state."""
    told = await running.order(Order("GET", "/vm/config"))
    assert told["machine-config"]["mem_size_mib"] == 128 and told["machine-config"]["track_dirty_pages"] is True
    assert told["boot-source"]["boot_args"] == "console=ttyS0 quiet reboot=k pci=off"
    assert {drive["drive_id"]: drive["is_read_only"] for drive in told["drives"]} == {"root": True, "disk": False}
    assert await limiter_of(running) is None
    assert told["vsock"]["uds_path"] == "vsock"

    saved = [SavedVm(folder / f"memory{n}", folder / f"devices{n}") for n in range(2)]
    stood_still = []

    async def while_paused() -> None:
        stood_still.append((await running.order(Order("GET", "/")))["state"])

    for one in saved:
        assert 0 < await running.capture(one, while_paused=while_paused) < 30
        assert one.memory.stat().st_size == SHAPE.memory_bytes and one.devices.stat().st_size > 0
    assert stood_still == ["Paused", "Paused"]
    assert (await running.order(Order("GET", "/")))["state"] == "Running"
    # The kernel lies in memory of both, though the second capture wrote only what changed since the first.
    assert all(b"Linux version" in one.memory.read_bytes() for one in saved)
    # Devices are described by ACPI, where the image's kernel looks for them: nothing on its command line does.
    assert b"LNRO0005" in saved[0].memory.read_bytes()
    assert saved[0].memory.stat().st_blocks * 512 < SHAPE.memory_bytes

    before = saved[1].memory.read_bytes()
    children: list[FirecrackerVm] = []

    async def restore(number: int) -> None:
        directory, drives = place(folder, f"child{number}", DiskRate(50 << 20, 1000))
        children.append(await vmm.restore(directory, SHAPE, saved[1], drives))

    try:
        async with anyio.create_task_group() as group:
            for number in range(3):
                group.start_soon(restore, number)
        assert len({child.pid for child in children}) == 3
        with pytest.raises(DeadlineExceeded, match="nobody in the virtual machine listened on port 7000"):
            await running.open_channels(timeout_s=0.05)  # the device is there, and its guest not yet
        for child in children:
            assert (await child.order(Order("GET", "/")))["state"] == "Paused"
            walls = {*ALWAYS, *(AS_ROOT if os.geteuid() == 0 else ())}
            assert walls == set(Confinement.detect(kvm=True, jailed=True).verify(child.pid))
            await child.resume()
            assert (await child.order(Order("GET", "/")))["state"] == "Running"
            limiter = await limiter_of(child)
            assert (limiter["bandwidth"]["size"], limiter["ops"]["size"]) == (50 << 20, 1000)
        again = SavedVm(folder / "memory-of-child", folder / "devices-of-child")
        await children[0].capture(again, while_paused=copied)
        assert again.memory.stat().st_size == SHAPE.memory_bytes
        # What was saved has its rate in it, which counts for nobody.
        for number, rate in enumerate((DiskRate(operations_per_s=7), NO_LIMIT)):
            directory, drives = place(folder, f"grandchild{number}", rate)
            children.append(await vmm.restore(directory, SHAPE, again, drives))
        limiter = await limiter_of(children[-2])
        assert (limiter["bandwidth"], limiter["ops"]["size"]) == (None, 7)
        assert await limiter_of(children[-1]) is None
        assert saved[1].memory.read_bytes() == before, "a child wrote to what it shares with its siblings"
    finally:
        for child in children:
            await child.aclose()


NETWORKED = replace(SHAPE, network=True)


@pytest.fixture
async def networked(vmm: Firecracker, folder: Path, image: Image) -> AsyncIterator[FirecrackerVm]:
    """Likewise with a network interface."""
    (folder / "root").hardlink_to(image.rootfs)
    directory, drives = place(folder, "networked")
    vm = await vmm.boot(directory, NETWORKED, BootSource(image.vmlinux, image.initrd, "quiet"), drives)
    try:
        yield vm
    finally:
        await vm.aclose()


async def test_each_vm_is_on_a_tap_of_its_own(vmm, folder, networked):
    """A VM with an interface, and each that goes on from it, is alone in a network namespace with a tap of that name,
    which it has open; what is sent into it waits there for the guest; nothing of it is left when the VM is gone."""
    told = await networked.order(Order("GET", "/vm/config"))
    [interface] = told["network-interfaces"]
    assert (interface["host_dev_name"], interface["guest_mac"]) == ("tap0", ethernet.TO_MACHINE[:6].hex(":"))
    saved = SavedVm(folder / "memory", folder / "devices")
    await networked.capture(saved, while_paused=copied)
    children: list[FirecrackerVm] = []

    async def restore(number: int) -> None:
        directory, drives = place(folder, f"child{number}")
        children.append(await vmm.restore(directory, NETWORKED, saved, drives))

    try:
        async with anyio.create_task_group() as group:
            for number in range(3):
                group.start_soon(restore, number)
        spaces = set()
        for vm in (networked, *children):
            walls = Confinement.detect(kvm=True, jailed=True).verify(vm.pid, entered=True)
            assert set(walls) == {*ALWAYS, *(AS_ROOT if os.geteuid() == 0 else ENTERED)}
            spaces.add(os.readlink(f"/proc/{vm.pid}/ns/net"))
            opened = [info.read_text() for info in Path(f"/proc/{vm.pid}/fdinfo").iterdir()]
            assert sum("iff:\ttap0\n" in text for text in opened) == 1
            links = [os.readlink(link) for link in Path(f"/proc/{vm.pid}/fd").iterdir()]
            assert not any(link.startswith(("net:", "user:")) for link in links), "the way in came along"
            assert interfaces(vm.pid) == {"lo", "tap0"}
            await vm.resume()
            assert vm.frames is not None and vm.frames.getsockname()[:2] == ("tap0", 0x0800)
            vm.frames.send(ethernet.TO_MACHINE + bytes(60))
            with pytest.raises(BlockingIOError):
                vm.frames.recv(1)
        assert len(spaces) == 4 and os.readlink("/proc/self/ns/net") not in spaces
    finally:
        for child in children:
            await child.aclose()
    await networked.aclose()
    with anyio.fail_after(20):
        while spaces & {link for link in map(network_of, Path("/proc").glob("[0-9]*")) if link}:
            await asyncio.sleep(0.02)


def interfaces(pid: int) -> set[str]:
    """What network interfaces there are where this process is."""
    rows = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    return {row.split(":")[0].strip() for row in rows}


def network_of(process: Path) -> str:
    """The network namespace of a process; empty if it has gone meanwhile, or is another user's."""
    try:
        return os.readlink(process / "ns/net")
    except OSError:
        return ""


async def test_a_network_that_cannot_be_made(vmm, folder, image, monkeypatch):
    """A VM that is to have an interface where there can be none is not started, in words; nothing of it is left."""
    directory, drives = place(folder, "nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EgressUnavailable, match="network of a virtual machine could not be made"):
        await vmm.boot(directory, NETWORKED, BootSource(image.vmlinux, image.initrd, "quiet"), drives)
    assert [path.name for path in directory.iterdir()] == ["disk"]


async def test_a_vmm_is_confined_and_its_end_is_noticed(programs, running):
    """As root the process is another user's in a jail; its death is told in words, and closes what belongs to it."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{running.pid}/status").read_text().splitlines())
    assert set(Confinement.detect(kvm=True, jailed=True).verify(running.pid)) >= {"seccomp", "no_new_privileges"}
    assert status["NoNewPrivs"].strip() == "1"
    for thread in Path(f"/proc/{running.pid}/task").iterdir():
        assert "\nSeccomp:\t2\n" in (thread / "status").read_text()
    assert (programs.jailer is not None) == (os.geteuid() == 0)
    if os.geteuid() == 0:
        assert set(status["Uid"].split()) == {str(VMM_ID)} and int(status["CapEff"], 16) == 0
        inside = set(os.listdir(f"/proc/{running.pid}/root"))
        files = {"api", "vsock", "kernel", "initrd", "root", "disk", "dev", "run", "firecracker", "firecracker.pid"}
        assert inside <= files, inside - files
        for shared in ("kernel", "initrd", "root"):
            assert Path(f"/proc/{running.pid}/root/{shared}").stat().st_uid == 0
        for kind in ("net", "ipc", "mnt", "pid"):
            assert os.readlink(f"/proc/{running.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    os.kill(running.pid, 9)
    with anyio.fail_after(20):
        assert await running.wait_dead() == "Firecracker ended by signal 9"
    with pytest.raises(MachineFailed, match="did not answer /vm"):
        await running.resume()
    with pytest.raises(MachineFailed, match="ended by signal 9"):
        await running.open_channels(timeout_s=20)


@pytest.fixture
def no_kvm(monkeypatch: pytest.MonkeyPatch) -> str:
    """Why KVM does not work; it counts as working all the same, which does for everything before a guest answers."""
    problem = accelerator.problem_with_kvm()
    monkeypatch.setattr(accelerator, "LOOPS", 1)
    return problem


async def test_it_is_chosen_where_it_can_work(programs, folder, image_store, image, no_kvm):
    """With KVM and a named binary the engine takes Firecracker, says so; what it cannot do is refused with a way out;
    a template that does not come up in time is told, and nothing is left of it."""
    found = await run_sync(lambda: probe.find("auto", programs.firecracker))
    assert isinstance(found.vmm, Firecracker) and programs.version in found.detail
    assert found.notes[0].endswith("- taken: asked for")
    assert found.machine_key not in ("", (await run_sync(lambda: probe.find("qemu"))).machine_key)
    options = EngineOptions(
        data_dir=str(folder / "d"),
        instance=folder.name,
        image_dir=str(image_store.root),
        firecracker=programs.firecracker,
    )
    engine = MicrovmEngine(options)
    await engine.start()
    try:
        assert engine.how == found.detail
        assert (await engine.probe()).no_uplink == ""
        if not no_kvm:
            return  # there the whole suite runs on it
        with pytest.raises(DeadlineExceeded, match=r"not ready within 0\.5 s"):
            await engine.create(MachineSpec("default", LIMITS), timeout_s=0.5)
    finally:
        await engine.aclose()
    assert [path.name for path in (folder / "d").iterdir()] == ["machines"]


async def test_a_birth_goes_as_far_as_its_guest(programs, folder, image_store, networked, image, no_kvm):
    """A machine is restored, with a way out or, as from a snapshot, without, looked at from outside and put into its
    control group; a guest that does not answer is told in time, and nothing of the machine is left."""
    if not no_kvm:
        pytest.skip("its guest would answer; with KVM every test of virtual machines is about that")
    origin = Origin.within(folder / "origin", image.rootfs, NETWORKED)
    (folder / "origin").mkdir()
    await networked.capture(origin.saved, while_paused=copied)
    await networked.aclose()
    origin.disk.touch()
    os.truncate(origin.disk, 16 << 20)
    data = folder / "d"
    engine = MicrovmEngine(EngineOptions(str(data), folder.name, vmm="firecracker", firecracker=programs.firecracker))
    await engine.start()
    try:
        nursery, _ = engine._ready()
        asked = replace(nursery, options=replace(nursery.options, require=ENTERED))
        for uplink in (Uplink(), None):
            with pytest.raises(DeadlineExceeded, match="listened on port 7000"):
                spec = MachineSpec("default", LIMITS, uplink=uplink)
                await bear(asked, spec, origin, reseed=True, timeout_s=0.5)
        required = replace(nursery, options=replace(nursery.options, require=("user_namespace",)))
        with pytest.raises(IsolationIncomplete, match="user_namespace"):
            await bear(required, MachineSpec("default", LIMITS), origin, reseed=True, timeout_s=0.5)
        assert not any((data / "machines").iterdir())
        assert origin.saved.memory.stat().st_uid == os.geteuid() and origin.saved.memory.stat().st_mode & 0o022 == 0
    finally:
        await engine.aclose()


DAEMON = """
import asyncio, sys
from podflare.engines.base import EngineOptions, Limits, MachineSpec
from podflare.engines.microvm import accelerator
from podflare.engines.microvm.engine import MicrovmEngine
from podflare.wire.uplink import Uplink
accelerator.LOOPS = 1
data, instance, images, binary, network = sys.argv[1:]
async def main():
    engine = MicrovmEngine(EngineOptions(data, instance, image_dir=images, vmm="firecracker", firecracker=binary))
    await engine.start()
    uplink = Uplink() if network else None
    await engine.create(MachineSpec("default", Limits(512 << 20, 4 << 30), uplink=uplink), timeout_s=600)
asyncio.run(main())
"""


@pytest.mark.parametrize("network", ["", "network"])
async def test_the_daemons_end_is_the_vms_end(programs, folder, image_store, image, no_kvm, network):
    """When the daemon is killed the kernel ends its VMMs, whoever they run as, wherever; the next start clears their
    jails."""
    data = folder / "d"
    arguments = [str(data), folder.name, str(image_store.root), programs.firecracker, network]
    if not no_kvm:
        pytest.skip("its guest would be up too soon; with KVM test_machines.py has the same for a whole daemon")
    daemon = await asyncio.create_subprocess_exec(sys.executable, "-c", DAEMON, *arguments)
    try:
        with anyio.fail_after(40):
            while not (found := firecrackers.below(daemon.pid)) or not any(data.glob("boot-*/**/vsock")):
                assert daemon.returncode is None
                await asyncio.sleep(0.02)
        watched = [os.pidfd_open(pid) for pid in firecrackers.tree(daemon.pid)]
        if os.geteuid() == 0:
            assert all(Path(f"/proc/{pid}/status").stat().st_uid == VMM_ID for pid in found)
        if network:
            assert all(interfaces(pid) == {"lo", "tap0"} for pid in found)
    finally:
        daemon.kill()
        await daemon.wait()
    for pidfd in watched:
        with anyio.fail_after(20):
            await anyio.wait_readable(pidfd)
        os.close(pidfd)
    assert any(data.glob("boot-*"))
    MicrovmEngine.reap(data, folder.name)
    assert [path.name for path in data.iterdir()] == ["machines"] and not any((data / "machines").iterdir())
    # What it had half made beside the image goes when that is made again, here by a program that does not even start.
    halves = list((image.directory / "origins").glob("*-*"))
    found = await run_sync(lambda: probe.find("firecracker", programs.firecracker))
    broken = Firecracker(Programs("/bin/false", None, programs.version), Confinement(None))
    shape = shape_of(LIMITS, cpus=min(MOST_CPUS, os.cpu_count() or 1), network=bool(network))
    with pytest.raises(MachineFailed, match="did not start"):
        await Origins(broken, found.machine_key, folder).get(image, shape, LIMITS.disk_bytes)
    assert any(not half.exists() for half in halves)


async def test_what_firecracker_refuses_is_told(vmm, folder, image, running):
    """Orders out of place, and files that are none of Firecracker's, are refused in its own words; nothing is left."""
    with pytest.raises(MachineFailed, match=r"refused /actions: .*not supported after starting"):
        await running.order(Order("PUT", "/actions", {"action_type": "InstanceStart"}))
    directory, drives = place(folder, "broken")
    source = BootSource(image.initrd, image.initrd, "quiet")
    with pytest.raises(MachineFailed, match=r"refused /(boot-source|actions): .*[Kk]ernel"):
        await vmm.boot(directory, SHAPE, source, drives)
    (folder / "memory").write_bytes(bytes(4096))
    (folder / "devices").write_bytes(b"nonsense" * 100)
    directory, drives = place(folder, "unloadable")
    with pytest.raises(MachineFailed, match="refused /snapshot/load: "):
        await vmm.restore(directory, SHAPE, SavedVm(folder / "memory", folder / "devices"), drives)


async def test_a_program_that_is_not_firecracker_is_told(folder, image, monkeypatch):
    """What is missing, does not answer or is too old is told with what to do; what ends at once, by its last words."""
    with pytest.raises(MachineFailed, match="nowhere is not on the PATH"):
        find("nowhere")
    fake = folder / "firecracker"
    for answer, told in (("Firecracker v1.9.1", r"1\.9\.1 is not supported: 1\.10 or newer"), ("hello", "no version")):
        fake.write_text(f"#!/bin/sh\necho '{answer}'\n")
        fake.chmod(0o755)
        with pytest.raises(MachineFailed, match=told):
            find(str(fake))
    fake.write_text("#!/bin/sh\necho 'cannot do anything here' >&2\nexit 3\n")
    (folder / "root").touch()
    directory, drives = place(folder, "ended")
    vmm = Firecracker(Programs(str(fake), None, "1.12.1"), Confinement(None))
    with pytest.raises(MachineFailed, match="Firecracker did not start: cannot do anything here"):
        await vmm.boot(directory, SHAPE, BootSource(image.vmlinux, image.initrd, ""), drives)


async def test_a_port_is_connected_as_soon_as_somebody_listens(folder):
    """A refusal, a silence and nonsense are tried again, what follows the answer is the guest's; nobody is told."""
    answers = [b"", b"nonsense without end that is no answer at all\n", b"NO\n", b"OK 1073741824\nhello\n"]
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readline())
        writer.write(answers.pop(0) if answers else b"")
        writer.close()
        await writer.wait_closed()

    async with anyio.create_task_group() as group:
        connected: list[socket.socket] = []

        async def keep() -> None:
            connected.append(await connect(folder / "vsock", 7000, timeout_s=20))

        group.start_soon(keep)  # before there is a device at all
        await asyncio.sleep(0)
        device = await asyncio.start_unix_server(serve, folder / "vsock")
    try:
        with connected[0] as sock, anyio.fail_after(20):
            assert await read_line(sock) == b"hello\n"
        assert heard == [b"CONNECT 7000\n"] * 4
        with pytest.raises(
            DeadlineExceeded, match=r"nobody in the virtual machine listened on port 7000 within 0\.05 s"
        ):
            await connect(folder / "vsock", 7000, timeout_s=0.05)
    finally:
        device.close()
        await device.wait_closed()


async def read_line(sock: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += await asyncio.get_running_loop().sock_recv(sock, 1)
    return line


def test_orders_are_what_the_shape_says():
    """An odd number of processors becomes even, and a limit of the disk that is none is told as such."""
    machine = orders.boot_orders(Shape(1 << 30, 5), "quiet")[0].body
    assert machine == {"vcpu_count": 4, "mem_size_mib": 1024, "track_dirty_pages": True}
    limiter = orders.rate_order(DiskRate(bytes_per_s=5)).body["rate_limiter"]
    assert limiter == {"bandwidth": {"size": 5, "refill_time": 1000}, "ops": {"size": 0, "refill_time": 0}}
    assert orders.problem_with("Firecracker v1.12.1") == "" == orders.problem_with("v1.10.0")
    assert "below 2.0" in orders.problem_with("Firecracker v2.0.0")
