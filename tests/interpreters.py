"""Pythons of this computer that tests can run things with."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14")


def find_python(version: str) -> str | None:
    """An interpreter of exactly this version that starts."""
    installed = Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python3")
    for place in filter(None, [shutil.which(f"python{version}"), *installed]):
        done = subprocess.run(
            [str(place), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
        )
        if done.stdout.strip() == version:
            return str(place)
    return None
