"""guest/inheritance.py: which descriptors share a position, asked of new kernels and found out on old ones."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from podflare.guest import inheritance


@pytest.mark.parametrize("question", [inheritance._F_DUPFD_QUERY, 0x7FFF])
def test_only_duplicates_are_duplicates(home: Path, monkeypatch: pytest.MonkeyPatch, question: int) -> None:
    """Descriptors made by dup are found, those of the same file opened twice are not, and flags stay as they were."""
    monkeypatch.setattr(inheritance, "_F_DUPFD_QUERY", question)  # the other one is known to no kernel
    path = home / "f"
    path.write_text("abc")
    first, apart = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
    second, third = os.dup(first), os.dup(apart)
    try:
        found = inheritance.find_duplicates()
        assert {fd: found.get(fd) for fd in (first, apart, second, third)} == {
            first: None, apart: None, second: first, third: apart
        }  # fmt: skip
        assert all(not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK for fd in (first, apart, second, third))
    finally:
        for fd in (first, apart, second, third):
            os.close(fd)
