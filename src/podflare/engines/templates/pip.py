"""Runs pip for a template: wheels into a directory, its output into a log, its failures into words.

Wheels are unpacked, so that nothing of a package runs; a source distribution is a program, which pip would run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from podflare.engines.templates.store import Interpreter
from podflare.errors import TemplateFailed

INSTALL_TIMEOUT_S = 3600.0
OLDEST_PIP = (22, 3)
"""With installation reports, and --python."""
MAX_LINE_CHARS = 160
MAX_CHARS = 600
"""Of an explanation; the log has the rest."""


@dataclass(frozen=True)
class Sources:
    """Where packages come from, besides what pip's own configuration and PIP_* variables say."""

    find_links: tuple[str, ...] = ()
    no_index: bool = False
    from_source: bool = False
    """Also build what has no wheel, which runs its code with the rights of whoever builds."""


@dataclass(frozen=True)
class Installed:
    """One package that pip chose."""

    name: str
    version: str
    digest: str
    """Of its archive, where the index has one."""


def install(
    python: Interpreter,
    requirements: Sequence[str],
    target: Path,
    *,
    sources: Sources,
    log: Path,
    tell: Callable[[str], None],
) -> tuple[Installed, ...]:
    """Install `requirements` for `python` into the empty directory `target`.

    Args:
        log: gets all that pip says.
        tell: is called with what it is doing, a short line at a time.
    Returns: everything that was installed, sorted by name.
    Raises: TemplateFailed that says what is wrong; `target` then holds a part.
    """
    report = target.parent / "report.json"
    command = [
        *_pip(python), "install", "--target", str(target), "--report", str(report), "--no-input", "--no-color",
        "--progress-bar", "off", "--disable-pip-version-check", "--no-warn-script-location", "--retries", "2",
    ]  # fmt: skip
    if not sources.from_source:
        command += ["--only-binary", ":all:"]
    if sources.no_index:
        command.append("--no-index")
    for place in sources.find_links:
        command += ["--find-links", place]
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)} -- {' '.join(requirements)}\n".encode())
        output.flush()
        start = output.tell()
        status = _run([*command, "--", *requirements], output.fileno(), log, start, tell)
    if status != 0:
        text = log.read_bytes()[start:].decode("utf-8", "replace")
        raise TemplateFailed(f"{explain(text, python.version)} (all that pip said: {log})")
    found = _read(report)
    report.unlink()
    return found


def _pip(python: Interpreter) -> list[str]:
    """How pip is started for that interpreter: its own, which fits its version, else the one beside podflare."""
    own = [python.executable, "-I", "-m", "pip"]
    done = subprocess.run([*own, "--version"], capture_output=True, text=True, cwd="/")
    found = re.match(r"pip (\d+)\.(\d+)", done.stdout)
    if found is not None and (int(found.group(1)), int(found.group(2))) >= OLDEST_PIP:
        return own
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-I", "-m", "pip", "--python", python.executable]
    raise TemplateFailed(
        f"a template's packages need pip {OLDEST_PIP[0]}.{OLDEST_PIP[1]} or newer, which is installed neither for "
        f"{python.executable} nor beside podflare (python -m ensurepip, or apt-get install python3-pip)"
    )


def _run(command: list[str], output: int, log: Path, start: int, tell: Callable[[str], None]) -> int:
    """Exit status of the command.  Its output is in the log; what it is doing is told about twice a second."""
    before = os.umask(0o022)  # the tree is for every sandbox to read and for nobody else to change
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", start_new_session=True
        )
    finally:
        os.umask(before)
    try:
        waited_s = 0.0
        while waited_s < INSTALL_TIMEOUT_S:
            try:
                return process.wait(0.5)
            except subprocess.TimeoutExpired:
                waited_s += 0.5
                last = _last_step(log, start)
                if last:
                    tell(last)
        raise TemplateFailed(f"pip did not end within {INSTALL_TIMEOUT_S:g} s")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
            process.wait()


def _last_step(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        words = line.split()
        if words[:1] == ["Collecting"]:
            return f"choosing {words[1]}"[:MAX_LINE_CHARS]
        if words[:1] in (["Downloading"], ["Using"]) and len(words) > 1:
            name = words[1 if words[0] == "Downloading" else -2].rpartition("/")[2]
            return f"fetching {name}"[:MAX_LINE_CHARS]
        if words[:2] == ["Installing", "collected"]:
            return f"unpacking {len(words) - 3} package(s)"
        if words[:2] == ["Building", "wheel"]:
            return f"building {words[-2] if len(words) > 3 else ''} from source"[:MAX_LINE_CHARS]
    return ""


def _read(report: Path) -> tuple[Installed, ...]:
    """pip's installation report (https://pip.pypa.io/en/stable/reference/installation-report/)."""
    try:
        rows = json.loads(report.read_bytes())["install"]
        found = [
            Installed(
                row["metadata"]["name"],
                row["metadata"]["version"],
                row.get("download_info", {}).get("archive_info", {}).get("hash", ""),
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise TemplateFailed(f"pip wrote no report that can be read: {exc}") from exc
    return tuple(sorted(found, key=lambda one: one.name.lower()))


_UNREACHABLE = re.compile(
    r"Failed to establish a new connection|Temporary failure in name resolution|Name or service not known"
    r"|Max retries exceeded|Read timed out|ReadTimeoutError|Connection (?:aborted|refused|reset)|Network is unreachable"
    r"|NewConnectionError|ProxyError|CERTIFICATE_VERIFY_FAILED"
)
_NOTHING_FITS = re.compile(r"No matching distribution found for (.+)")
_VERSIONS = re.compile(r"Could not find a version that satisfies the requirement .+ \(from versions: (.*)\)")


def explain(text: str, python: str) -> str:
    """Why pip failed, in one line, from what it said."""
    nothing = _NOTHING_FITS.search(text)
    versions = _VERSIONS.search(text)
    if _UNREACHABLE.search(text):
        return "the package index cannot be reached"
    if nothing is not None:
        wanted = nothing.group(1).strip()
        if versions is not None and versions.group(1).strip() not in ("", "none"):
            there = versions.group(1)
            return f"no version of {wanted} fits: with a wheel for Python {python} there are {there}"[:MAX_CHARS]
        return (
            f"there is no {wanted} with a wheel for Python {python} on this kind of computer. It does not exist, or it "
            "comes as source only, which runs its own code here when it is built: --from-source allows that"
        )[:MAX_CHARS]
    if "ResolutionImpossible" in text:
        lines = [line.strip() for line in text.splitlines() if "depends on" in line or "The user requested" in line]
        return f"these requirements contradict each other: {'; '.join(lines)}"[:MAX_CHARS]
    if "No space left on device" in text:
        return "the disk is full"
    if "DO NOT MATCH THE HASHES" in text:
        return "a downloaded package is not the one that the index promised (its hash differs)"
    errors = [line.partition("ERROR:")[2].strip() for line in text.splitlines() if line.startswith("ERROR:")]
    return f"pip failed: {errors[-1] if errors else 'without a word'}"[:MAX_CHARS]
