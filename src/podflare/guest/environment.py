"""Environment variables of everything that runs in the sandbox.  The agent's own environment is the source."""

from __future__ import annotations

import os
import sys

_DEFAULTS = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "MPLBACKEND": "agg",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/bash",
}


def set_environment(home: str) -> None:
    """Complete os.environ: what the engine chose stays, HOME is `home`, `python` is the template's interpreter."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ["HOME"] = home
    folders = os.environ["PATH"].split(":")
    for folder in (os.path.dirname(sys.executable), f"{home}/.local/bin"):
        if folder and folder not in folders:
            folders.insert(0, folder)
    os.environ["PATH"] = ":".join(folders)


def enter_home(home: str) -> None:
    """Make `home` the working directory; / if user code removed it."""
    try:
        os.chdir(home)
        os.environ["PWD"] = home
    except OSError:
        os.chdir("/")
        os.environ["PWD"] = "/"
