"""The Python world that user code sees: its `__main__`, its sys.path, no trace of ours.

The agent runs with -I -S so that nothing of a user can get into it.  A REPL undoes that for user code: the path
is what the template's interpreter would have, the user's packages included, without the bundle.
"""

from __future__ import annotations

import builtins
import os
import site
import sys
from types import ModuleType
from typing import List, Optional, Sequence

import podflare.errors

BUNDLE = os.path.dirname(os.path.dirname(os.path.abspath(podflare.errors.__file__)))
"""The folder from which our own code was imported."""

_kept: List[ModuleType] = []
_prepared: Optional[List[str]] = None


def make_main() -> ModuleType:
    """A new, empty `__main__` like that of an interactive interpreter.  Its __dict__ is the cells' globals."""
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    return main


def hide_bundle() -> None:
    """Make our modules unimportable for user code; our own references to them keep working."""
    for name in [name for name in sys.modules if name == "podflare" or name.startswith("podflare.")]:
        _kept.append(sys.modules.pop(name))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != BUNDLE]
    sys.path_importer_cache.pop(BUNDLE, None)
    sys.argv = [""]


def prepare_paths(paths: Sequence[str] = ()) -> None:
    """Run the interpreter's site configuration now, for REPLs that start before user code could have changed it.

    Called once in a process that many machines are forked from; its own sys.path stays as it is.
    Args:
        paths: what REPLs are to have instead of what that configuration says.
    """
    global _prepared
    if paths:
        _prepared = list(paths)
        return
    before = list(sys.path)
    site.addsitepackages(set(before))
    _prepared = [entry for entry in sys.path if entry not in before]
    sys.path[:] = before


def open_paths(*, with_site: bool, prepared: bool = False) -> None:
    """sys.path as `python -i` would have it in the present directory and HOME.

    Args:
        with_site: run the interpreter's site configuration, which may hold files that user code wrote.
        prepared: take what `prepare_paths` found instead, if it was called.
    """
    if prepared and _prepared is not None:
        sys.path += _prepared
        site.ENABLE_USER_SITE = True
        with_site = False
    else:
        # A template's packages; -I made the interpreter ignore it, for it might have been the daemon's.
        sys.path += [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if with_site:
        known = site.venv(site.removeduppaths()) or set()
        site.ENABLE_USER_SITE = True
        user_packages = site.getusersitepackages()
        if os.path.isdir(user_packages):
            site.addsitedir(user_packages, known)
        site.addsitepackages(known)
    site.setquit()
    site.setcopyright()
    site.sethelper()
    sys.path.insert(0, "")
