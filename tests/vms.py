"""The image that tests of virtual machines boot: built once, shared by all test processes, kept for the next run."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from podflare.engines.microvm.image import recipe, tools
from podflare.engines.microvm.image.build import build
from podflare.engines.microvm.image.store import Image, ImageStore

KEPT = Path(__file__).resolve().parent.parent / "build" / "test-images"
PROGRAMS = ("qemu-system-x86_64", "mkfs.ext4")
"""What running virtual machines needs, besides what building an image does."""


def skip_without(*programs: str) -> None:
    """Skip the test if this computer cannot build images or lacks one of the programs."""
    lost = [*tools.missing(), *(name for name in programs if shutil.which(name) is None)]
    if lost:
        pytest.skip(f"virtual machines need {', '.join(lost)}: scripts/setup.sh --microvm installs them (as root)")


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
