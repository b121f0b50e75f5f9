"""Promise: QEMU's command line is a machine without network or devices that nobody needs, and QEMU itself confined."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from podflare.engines.base import EngineOptions, Limits
from podflare.engines.microvm.confinement import VMM_ID, Confinement
from podflare.engines.microvm.engine import LEAST_BYTES, OWN_BYTES, MicrovmEngine, disk_bytes_of, shape_of
from podflare.engines.microvm.firecracker_orders import guarded
from podflare.engines.microvm.qemu_command import Descriptors, machine_key, qemu_command
from podflare.engines.microvm.tap import Entrance
from podflare.engines.microvm.vmm import BootSource, DiskRate, Shape

FDS = Descriptors(10, 11, 12, 13, 14, 15, 16)
SHAPE = Shape(1 << 30, 2)
SOURCE = BootSource(Path("/k"), Path("/i"), "console=ttyS0")
GIB = 1 << 30


def value_after(command: list[str], option: str) -> list[str]:
    return [command[at + 1] for at, word in enumerate(command) if word == option]


def test_the_machine() -> None:
    """No default devices, no network, memory mapped privately from a descriptor, a read-only root, own sandbox on."""
    command = qemu_command("qemu", "tcg", SHAPE, FDS, SOURCE)
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(command)
    assert not any("net" in word for word in command)
    assert value_after(command, "-sandbox")[0].startswith("on,")
    [memory] = value_after(command, "-object")
    assert "share=off" in memory and "/proc/self/fd/14" in memory and str(1 << 30) in memory
    root, disk = value_after(command, "-drive")
    assert "read-only=on" in root and "read-only" not in disk
    assert value_after(command, "-append") == ["console=ttyS0"] and "-S" not in command
    assert value_after(command, "-smp") == ["2"]


def test_a_network_interface_where_the_shape_has_one() -> None:
    """Its frames go through an inherited descriptor, its firmware is left out, and it is another machine."""
    fds = Descriptors(10, 11, 12, 13, 14, 15, 16, frames=18)
    command = qemu_command("qemu", "tcg", Shape(1 << 30, 2, network=True), fds, SOURCE)
    assert value_after(command, "-netdev") == ["dgram,id=network,local.type=fd,local.str=18"]
    assert [word for word in command if word.startswith("virtio-net-pci,") and word.endswith(",romfile=")]
    assert 18 in fds.all()
    assert machine_key("7.2", "tcg", Shape(1 << 30, 2, network=True)) != machine_key("7.2", "tcg", SHAPE)


def test_the_rate_of_a_disk() -> None:
    """It stands at the machine's own disk alone, one second's worth at once; nothing that the guest sees follows."""
    plain = qemu_command("qemu", "tcg", SHAPE, FDS, SOURCE)
    held = qemu_command("qemu", "tcg", SHAPE, FDS, SOURCE, rate=DiskRate(5, 6))
    [(before, after)] = [(one, other) for one, other in zip(plain, held, strict=True) if one != other]
    assert "id=disk" in before and not any("throttling" in word for word in plain)
    throttle = "throttling.bps-total=5,throttling.bps-total-max=5,throttling.iops-total=6,throttling.iops-total-max=6"
    assert after == f"{before},{throttle}"
    one = qemu_command("qemu", "tcg", SHAPE, FDS, SOURCE, rate=DiskRate(operations_per_s=6))
    assert not any("bps" in word for word in one) and any("iops-total=6" in word for word in one)


def test_a_restored_machine_is_the_same_machine() -> None:
    """Going on from a saved VM differs in what is loaded alone: no kernel, device state from a descriptor, stopped."""
    booted = qemu_command("qemu", "kvm", SHAPE, FDS, SOURCE)
    restored = qemu_command("qemu", "kvm", SHAPE, Descriptors(10, 11, 12, 13, 14, 15, 16, 17))
    start = booted.index("-kernel")
    assert restored == [*booted[:start], "-S", "-incoming", "fd:17"]


def test_what_was_saved_under_another_machine_is_not_restored() -> None:
    """Version, accelerator and shape each give another key; descriptors and boot sources do not matter."""
    keys = {
        machine_key("7.2", "tcg", SHAPE),
        machine_key("8.0", "tcg", SHAPE),
        machine_key("7.2", "kvm", SHAPE),
        machine_key("7.2", "tcg", Shape(1 << 30, 1)),
    }
    assert len(keys) == 4
    assert machine_key("7.2", "tcg", SHAPE) == machine_key("7.2", "tcg", Shape(1 << 30, 2))


def test_confinement_of_the_vmm() -> None:
    """As root it gets an id, namespaces and no capability of its own; in any case it ends with the daemon."""
    root = Confinement(VMM_ID).wrap(["qemu", "-S"])
    assert root[-3:] == ["--", "qemu", "-S"]
    for words in (["--pdeathsig", "KILL"], ["--reuid", str(VMM_ID)], ["--bounding-set", "-all"], ["--clear-groups"]):
        at = root.index(words[0])
        assert root[at : at + len(words)] == words
    assert "--no-new-privs" in root and "--net" in root
    assert "--clear-groups" not in Confinement(VMM_ID, kvm_group=105).wrap(["qemu"])
    user = Confinement(None).wrap(["qemu"])
    assert "unshare" not in user and "--no-new-privs" in user and "--pdeathsig" in user


def test_confinement_of_the_vmm_beside_its_tap() -> None:
    """It enters the namespace that is there before it is confined as ever, and as an ordinary user gives up what it is
    in the user namespace of that; Firecracker's guards enter it, too."""
    root = Confinement(VMM_ID).wrap(["qemu"], Entrance("/net", None))
    assert root[:4] == ["nsenter", "--net=/net", "--", "unshare"] and "--net" not in root
    assert {"--ipc", "--reuid", "--bounding-set", "--no-new-privs"} <= set(root)
    user = Confinement(None).wrap(["qemu"], Entrance("/net", "/user"))
    assert user[:5] == ["nsenter", "--user=/user", "--preserve-credentials", "--net=/net", "--"]
    assert {"--pdeathsig", "--no-new-privs", "--bounding-set", "--inh-caps"} <= set(user)
    assert user[-2:] == ["--", "qemu"]
    assert "--net" in guarded(["jailer"]) and "--net" not in guarded(["jailer"], network=False)


def test_few_shapes() -> None:
    """Memory is a power of two and room for the kernel, disks are whole gibibytes, processors whole ones."""
    limits = Limits(memory_bytes=512 << 20, disk_bytes=GIB)
    assert shape_of(limits, cpus=3) == Shape(LEAST_BYTES + OWN_BYTES, 3)
    large = Limits(memory_bytes=5 * GIB, disk_bytes=GIB + 1, cpus=1.5)
    assert shape_of(large, cpus=3) == Shape(8 * GIB + OWN_BYTES, 2)
    assert (disk_bytes_of(limits), disk_bytes_of(large)) == (GIB, 2 * GIB)


def test_what_a_waiting_machine_can_become() -> None:
    """A machine that is made can be given less or as much memory as it has, and no other disk or processors."""
    engine = MicrovmEngine(EngineOptions("/nonexistent", "test"))
    made = Limits(memory_bytes=2 * GIB, disk_bytes=4 * GIB)
    for wanted, can in (
        (made, True),
        (replace(made, memory_bytes=GIB // 4), True),
        (replace(made, memory_bytes=GIB + 1), True),
        (replace(made, memory_bytes=2 * GIB + 1), False),
        (replace(made, disk_bytes=2 * GIB), False),
        (replace(made, cpus=2.0), False),
    ):
        assert engine.can_change(made, wanted) is can, wanted
