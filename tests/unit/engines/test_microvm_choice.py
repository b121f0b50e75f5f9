"""Promise: the VMM that is taken is the best that can work here or the one asked for, and everybody is told why."""

from __future__ import annotations

import os
import time

import pytest

from podflare.engines.microvm import accelerator, choice
from podflare.engines.microvm.vmm import VmmStatus
from podflare.errors import BadRequest
from podflare.host.config import VMMS, Config

FIRECRACKER = VmmStatus("firecracker", True, "kvm", "1.12.1", "Firecracker 1.12.1 with KVM")
NO_FIRECRACKER = VmmStatus("firecracker", False, None, "", "firecracker is not on the PATH")
QEMU = VmmStatus("qemu", True, "tcg", "7.2", "QEMU 7.2, translated")
QEMU_KVM = VmmStatus("qemu", True, "kvm", "7.2", "QEMU 7.2 with KVM")
NO_QEMU = VmmStatus("qemu", False, None, "", "qemu is missing")


def test_what_is_taken() -> None:
    """What has KVM, of two QEMU, else what can work; one that was asked for, or a reason and what would work."""
    assert choice.choose("auto", (QEMU_KVM, FIRECRACKER)) == ("qemu", "")
    assert choice.choose("auto", (QEMU, FIRECRACKER)) == ("firecracker", "")
    assert choice.choose("auto", (NO_QEMU, FIRECRACKER)) == ("firecracker", "")
    assert choice.choose("auto", (NO_FIRECRACKER, QEMU)) == ("qemu", "")
    assert choice.choose("qemu", (FIRECRACKER, QEMU)) == ("qemu", "")
    taken, why = choice.choose("auto", (NO_FIRECRACKER, NO_QEMU))
    assert taken == "" and "not on the PATH" in why and "qemu is missing" in why
    taken, why = choice.choose("firecracker", (NO_FIRECRACKER, QEMU))
    assert taken == "" and "not on the PATH" in why and "--vmm qemu can work here" in why
    assert "can work" not in choice.choose("firecracker", (NO_FIRECRACKER, NO_QEMU))[1]
    assert choice.choose("xen", (FIRECRACKER, QEMU))[0] == ""


def test_everybody_is_told() -> None:
    """Each VMM has a line: what was found, whether it is taken, and why or why not."""
    one, other = choice.notes("auto", (QEMU_KVM, FIRECRACKER))
    assert "7.2" in one and "- taken: the first" in one
    assert "1.12.1" in other and "not taken: qemu comes first" in other
    one, other = choice.notes("qemu", (FIRECRACKER, QEMU))
    assert "not taken: another one was asked for" in one and "- taken: asked for" in other
    assert "cannot be used" in choice.notes("auto", (NO_FIRECRACKER, QEMU))[0]


def test_settings() -> None:
    """Variables say which VMM and where Firecracker is, an option wins, and a wrong word is refused."""
    found = Config.from_environment({"PODFLARE_VMM": "QEMU", "PODFLARE_FIRECRACKER": "/opt/fc"})
    assert found.vmm == "qemu" and str(found.firecracker) == "/opt/fc"
    assert Config.from_environment({"PODFLARE_VMM": "qemu"}, vmm="firecracker").vmm == "firecracker"
    assert Config.from_environment({}).vmm == VMMS[0] == choice.AUTO
    assert {*VMMS} == {choice.AUTO, *choice.ORDER}
    with pytest.raises(BadRequest, match=r"PODFLARE_VMM.*auto, qemu, firecracker"):
        Config.from_environment({"PODFLARE_VMM": "xen"})


def test_kvm_is_tried_with_a_limit() -> None:
    """A guest of a few instructions runs if KVM does anything at all; one that takes long is given up, in words."""
    if not os.access(accelerator.DEVICE, os.R_OK | os.W_OK):
        told = accelerator.problem_with_kvm()
        assert "/dev/kvm" in told and ("closed to this user" in told or "there is no" in told)
        return
    assert accelerator.problem_with_kvm(loops=10) == ""
    started_s = time.monotonic()
    told = accelerator.problem_with_kvm(loops=4_000_000_000, timeout_s=0.5)
    assert told == "/dev/kvm does not work here (a guest of a few instructions did not end within 0.5 s)"
    assert time.monotonic() - started_s < 20
