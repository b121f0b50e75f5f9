"""What goes into an image: packages of the distribution, and what a template adds to them.  Touches no file."""

from __future__ import annotations

from dataclasses import dataclass

from podflare.engines.templates.definition import Definition
from podflare.wire.api import DEFAULT_TEMPLATE

KERNEL = "linux-image-cloud-amd64"
"""A package without files that depends on the newest kernel."""
SHELL = "busybox-static"
_SYSTEM = (
    "base-files", "base-passwd", "bash", "bsdutils", "coreutils", "dash", "debianutils", "diffutils", "findutils",
    "grep", "gzip", "hostname", "libc-bin", "login", "mawk", "mount", "ncurses-base", "ncurses-bin", "passwd",
    "perl-base", "procps", "sed", "sysvinit-utils", "tar", "tzdata", "usr-is-merged", "util-linux",
)  # fmt: skip
"""What every Debian has, without what only installing needs."""
_TOOLS = ("bzip2", "ca-certificates", "curl", "file", "iproute2", "less", "unzip", "xz-utils", "zip")
_PYTHON = ("python3", "python3-pip")


@dataclass(frozen=True)
class Recipe:
    """One image."""

    name: str
    packages: tuple[str, ...]
    programs: tuple[str, ...] = ()
    """Packages that are left out where the distribution does not have them."""
    definition: Definition | None = None
    """The template's, but for `default`, which has none."""


def default() -> Recipe:
    return Recipe(DEFAULT_TEMPLATE, tuple(sorted((*_SYSTEM, *_TOOLS, *_PYTHON))))


def of(definition: Definition) -> Recipe:
    """The image of a template: the default one with the packages of its programs; the rest comes from the builder."""
    programs = tuple(sorted({package for _, package in definition.programs}))
    return Recipe(definition.name, default().packages, programs, definition)
