"""The image that tests of virtual machines boot: built once, shared by all test processes, kept for the next run."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

import cutting
import tapping
from machines import LIMITS
from podflare import Sandbox
from podflare.engines.base import Engine, EngineOptions, MachineSpec
from podflare.engines.microvm.engine import MicrovmEngine
from podflare.engines.microvm.image import recipe, tools
from podflare.engines.microvm.image.build import build
from podflare.engines.microvm.image.store import Image, ImageStore
from podflare.errors import DeadlineExceeded

KEPT = Path(__file__).resolve().parent.parent / "build" / "test-images"
BOOT_TIMEOUT_S = 300.0
PROGRAMS = ("qemu-system-x86_64", "mkfs.ext4")
"""What running virtual machines needs, besides what building an image does."""


vmm = "qemu"
"""Set by pytest's option --vmm: qemu, firecracker (make test-kvm), cut (cutting.py) or tap (tapping.py)."""
settings: dict[str, str] = {}
"""The same for daemons that tests start."""
MARKS = (pytest.mark.timeout(400), pytest.mark.microvm)
"""Of tests in which virtual machines run: the first one waits for the image and its first boot."""


def skip_without(*programs: str) -> None:
    """Skip the test if this computer cannot build images or lacks one of the programs."""
    lost = [*tools.missing(), *(name for name in programs if shutil.which(name) is None)]
    if lost:
        pytest.skip(f"virtual machines need {', '.join(lost)}: scripts/setup.sh --microvm installs them (as root)")


def skip_where_they_would_boot_anew() -> None:
    """Skip the test for a visitor of somebody else's checkout: no boot could be kept from one fixture to the next."""
    if not os.access(KEPT.parent.parent, os.W_OK):
        pytest.skip("virtual machines are tested by the owner of the checkout")


def shared_store() -> ImageStore:
    """The store in the checkout; in a checkout of somebody else, one of this test process."""
    for folder in (KEPT, Path(tempfile.gettempdir(), "cache", "images")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return ImageStore(folder)
    raise AssertionError("nowhere to keep images")


def default_image(store: ImageStore) -> Image:
    """The default template's image in the store; built if it is not there or of another version of the code."""
    return build(recipe.default(), store, again=False, tell=lambda step, done: None).image


def engine_of(options: EngineOptions, store: ImageStore | None = None) -> MicrovmEngine:
    """A microvm engine on the VMM that these tests are to run on, not started."""
    if store is not None:
        options = replace(options, image_dir=str(store.root))
    options = replace(options, vmm=settings["PODFLARE_VMM"], firecracker=settings.get("PODFLARE_FIRECRACKER", ""))
    return MicrovmEngine(options, {"cut": cutting.find, "tap": tapping.find}.get(vmm))


async def started_engine(options: EngineOptions, store: ImageStore) -> MicrovmEngine:
    """A microvm engine whose default template has been booted: later machines are restored."""
    default_image(store)
    engine = engine_of(options, store)
    await engine.start()
    await boot(engine)
    return engine


async def boot(engine: Engine) -> None:
    """Make one machine, which boots the template if nobody has yet."""
    machine = await engine.create(MachineSpec("default", LIMITS), timeout_s=BOOT_TIMEOUT_S)
    await machine.aclose()


def boot_over_http(url: str, *, egress: bool = False) -> None:
    """The same of a daemon, whose creates wait less long than a boot may take.

    Args: egress: machines with a network, which are booted apart.
    """
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while True:
        try:
            with Sandbox(host=url, egress=egress):
                return
        except DeadlineExceeded:
            assert time.monotonic() < deadline
