"""Finds the Python that a template is for, and asks it about itself.  Runs nothing but that interpreter, isolated."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from podflare.engines.templates.store import Interpreter
from podflare.errors import TemplateFailed

ASK_TIMEOUT_S = 30.0
OLDEST = (3, 9)
"""What the guest runs on."""

_QUESTION = """
import json, os, site, sys
print(json.dumps({
    "base": os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable),
    "is_base": sys.prefix == sys.base_prefix,
    "version": list(sys.version_info[:3]),
    "implementation": sys.implementation.name,
    "prefixes": sorted({os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)}),
    "site": [os.path.realpath(path) for path in site.getsitepackages() if os.path.isdir(path)],
}))
"""


def find(wanted: str) -> Interpreter:
    """The interpreter for a template.

    Args:
        wanted: a version such as 3.11, an absolute path, or empty for the one below the running one.
    Raises: TemplateFailed that says what is there instead.
    """
    if wanted.startswith("/"):
        return ask(wanted)
    running = _dotted(sys.version_info[:2])
    if wanted in ("", running):
        return ask(sys.executable)
    for folder in os.get_exec_path():
        path = shutil.which(f"python{wanted}", path=folder)
        try:
            if path is not None:
                return ask(path)
        except TemplateFailed:
            continue  # a version manager's stand-in for a version that is not there
    raise TemplateFailed(
        f"Python {wanted} is not installed on this computer (no python{wanted} on the PATH works, and podflare runs on "
        f"{running}): install it, or name another version or the path of an interpreter as 'python'"
    )


def ask(executable: str) -> Interpreter:
    """What the interpreter says about itself, or the one below it if it is a virtual environment's.

    Raises: TemplateFailed if it does not answer, or cannot run the guest.
    """
    answer = _answer(executable)
    if not answer["is_base"]:
        answer = _answer(answer["base"])
    version = _dotted(answer["version"])
    if answer["implementation"] != "cpython" or tuple(answer["version"][:2]) < OLDEST:
        raise TemplateFailed(
            f"{executable} is {answer['implementation']} {version}, a template needs CPython {_dotted(OLDEST)} or newer"
        )
    sites = tuple(dict.fromkeys(answer["site"]))
    return Interpreter(answer["base"], version, tuple(answer["prefixes"]), sites)


def _answer(executable: str) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [executable, "-I", "-c", _QUESTION], capture_output=True, timeout=ASK_TIMEOUT_S, env={}, cwd="/"
        )
        answer: dict[str, Any] = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError) as exc:
        raise TemplateFailed(f"{executable} does not work as a Python interpreter: {exc}") from exc
    return answer


def _dotted(numbers: Iterable[int]) -> str:
    return ".".join(str(number) for number in numbers)
