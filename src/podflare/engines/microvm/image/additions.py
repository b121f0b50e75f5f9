"""What a template adds to the default image: Python packages, files, links to programs, and settings for its guest."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import posixpath
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from podflare.engines.microvm.image.python import ImagePython
from podflare.engines.microvm.image.rootfs import Entry
from podflare.engines.templates.definition import PACKAGES, Definition
from podflare.engines.templates.pip import Installed, Sources, install
from podflare.errors import TemplateFailed

SETTINGS = "template.json"
"""Beside the guest's code."""


def check_python(definition: Definition, version: str) -> None:
    """Raises: TemplateFailed if the template is for another Python than the image's."""
    if definition.python not in ("", ".".join(version.split(".")[:2])):
        raise TemplateFailed(
            f"template {definition.name!r} asks for Python {definition.python}, but the distribution's, which images "
            f"have, is {version}"
        )


def settings(definition: Definition | None) -> bytes:
    """What the guest reads at its start."""
    if definition is None:
        return b"{}\n"
    environment = dict(definition.environment)
    if definition.packages:
        environment["PYTHONPATH"] = PACKAGES
        environment["PATH"] = f"{PACKAGES}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    paths = [PACKAGES] if definition.packages else []
    found = {"environment": environment, "paths": paths, "preload": list(definition.preload)}
    return (json.dumps(found, sort_keys=True) + "\n").encode()


def wheels(
    definition: Definition, python: ImagePython, scratch: Path, log: Path, tell: Callable[[str], None]
) -> tuple[tuple[Installed, ...], list[Entry]]:
    """Install the template's packages.

    Args:
        scratch: an empty directory; holds the files until the entries have been used.
        log: gets what pip says.
    Returns: what was installed, and its files.
    Raises: TemplateFailed.
    """
    target = scratch / PACKAGES.strip("/")
    target.mkdir(parents=True)
    installed = install(python.interpreter(), definition.packages, target, sources=Sources(), log=log, tell=tell)
    for compiled in sorted(target.rglob("__pycache__")):
        shutil.rmtree(compiled)  # with times in them
    python.compile(target, scratch)
    paths = [path for path in sorted(target.rglob("*")) if path.is_file()]
    written = {str(path.relative_to(target)): python.for_the_image(path.read_bytes()) for path in paths}
    for name in written:
        if name.endswith(".dist-info/RECORD"):
            written[name] = _checked_anew(written[name], written)
    return installed, [
        Entry(str(path.relative_to(scratch)), written[str(path.relative_to(target))], path.stat().st_mode & 0o755)
        for path in paths
    ]


def _checked_anew(record: bytes, written: Mapping[str, bytes]) -> bytes:
    """A wheel's RECORD with the checksums of what is in the image: its commands name another interpreter than here."""
    rows = list(csv.reader(record.decode("utf-8", "surrogateescape").splitlines()))
    for row in rows:
        # Commands are told relative to where packages usually are.
        content = written.get(posixpath.normpath(f"/{row[0]}").lstrip("/")) if row else None
        if content is not None and len(row) == 3 and row[1]:
            checksum = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            row[1:] = [f"sha256={checksum.decode()}", str(len(content))]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def files(definition: Definition) -> Iterator[Entry]:
    """The template's own files.  Raises: TemplateFailed for one that is not there."""
    for target, source in definition.files:
        path = definition.folder / source
        if path.is_dir():
            inside = [one for one in sorted(path.rglob("*")) if one.is_symlink() or one.is_file()]
        elif path.is_file():
            inside = [path]
        else:
            raise TemplateFailed(f"{path}, to be copied to {target}, is neither a file nor a directory")
        for one in inside:
            name = f"{target}/{one.relative_to(path)}" if one != path else target
            if one.is_symlink() and one != path:
                yield Entry(name.strip("/"), link=str(one.readlink()))
            else:
                mode = 0o755 if one.stat().st_mode & 0o111 else 0o644
                yield Entry(name.strip("/"), one.read_bytes(), mode)


def program_links(definition: Definition, names: Callable[[str], bool]) -> tuple[list[Entry], tuple[str, ...]]:
    """Links for programs that have another name here, and the programs that are missing.

    Args: names: is a path in the root?
    """
    links: list[Entry] = []
    missing: list[str] = []
    for choice, _ in definition.programs:
        wanted, *others = choice.split("|")
        if _is_there(wanted, names):
            continue
        other = next((name for name in others if _is_there(name, names)), None)
        if other is None:
            missing.append(wanted)
        else:
            links.append(Entry(f"usr/local/bin/{wanted}", link=f"/usr/bin/{other}"))
    return links, tuple(missing)


def _is_there(program: str, names: Callable[[str], bool]) -> bool:
    return any(names(f"{folder}/{program}") for folder in ("usr/bin", "usr/sbin", "usr/local/bin"))
