"""Writes the archive that Linux unpacks as its first root file system (initramfs; cpio "newc").  Pure."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import PurePosixPath

TRAILER = "TRAILER!!!"


def archive(files: Mapping[str, bytes], executable: frozenset[str] = frozenset()) -> bytes:
    """An archive with these files and the directories above them, root's, without times: same input, same bytes.

    Args:
        files: path without a leading / -> content.
        executable: paths of programs.
    """
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in folders]
    entries += [
        (name, stat.S_IFREG | (0o755 if name in executable else 0o644), content) for name, content in files.items()
    ]
    parts = [_entry(number, *entry) for number, entry in enumerate(sorted(entries), 1)]
    parts.append(_entry(0, TRAILER, 0, b""))
    return b"".join(parts)


def _entry(number: int, name: str, mode: int, content: bytes) -> bytes:
    path = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (number, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + path
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
