"""What the image's template says about the processes of a machine: variables, where packages are, what to import.

The file was written when the image was built and lies in a read-only file system.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from typing import Any, Dict

from podflare.guest import namespace
from podflare.guest.vm.system import OWN_FOLDER

SETTINGS = f"{OWN_FOLDER}/template.json"


def prepare() -> None:
    """Set the variables of this process and all below it, and sys.path of REPLs.

    Raises: OSError, ValueError if the image is damaged.
    """
    settings = _read()
    os.environ.clear()  # what the kernel gave to process 1
    os.environ.update(settings.get("environment", {}))
    namespace.prepare_paths(settings.get("paths", ()))


def preload() -> None:
    """Import the template's modules, in the process that all REPLs are forked from.

    Precondition: no privileges any more; importing runs code of the packages.
    Raises: ImportError, or whatever else a module raises.
    """
    settings = _read()
    before = list(sys.path)
    sys.path += settings.get("paths", ())
    for name in settings.get("preload", ()):
        importlib.import_module(name)
    sys.path[:] = before
    gc.collect()


def _read() -> Dict[str, Any]:
    with open(SETTINGS) as file:
        found: Dict[str, Any] = json.load(file)
    return found
