"""Promise: of a private mapping exactly the changed pages are found, and sparse files are copied as they are."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podflare.engines.microvm import memory
from podflare.engines.microvm.memory import Run, copy_sparse, data_runs, own_runs, take_changes, write_changes
from podflare.errors import MachineFailed

PAGE = 4096
ABSENT, OF_FILE, OWN, SWAPPED = 0, 0xA0 << 56 | 7, 0x81 << 56 | 7, 0x40 << 56


@given(st.lists(st.sampled_from([ABSENT, OF_FILE, OWN, SWAPPED]), max_size=200))
def test_own_pages(entries: list[int]) -> None:
    """Every anonymous or swapped page is in a run, runs do not meet, and begin and end with such a page."""
    runs = own_runs(struct.pack(f"<{len(entries)}Q", *entries))
    own = {number for number, entry in enumerate(entries) if entry in (OWN, SWAPPED)}
    covered = {page for run in runs for page in range(run.offset // PAGE, (run.offset + run.size) // PAGE)}
    assert own <= covered
    for run in runs:
        assert {run.offset // PAGE, (run.offset + run.size) // PAGE - 1} <= own
    ends = [(run.offset, run.offset + run.size) for run in runs]
    assert all(first[1] < second[0] for first, second in itertools.pairwise(ends))


CHILD = """
import mmap, sys
file = open(sys.argv[1], "r+b")
memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
memory[0:5] = b"first"
memory[40 * 4096:40 * 4096 + 3] = b"two"
memory[63 * 4096 + 4095] = 9
memory[20 * 4096]  # read only: the file's page
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kept_bytes", [memory.KEPT_BYTES, PAGE, 0])
def test_changes_of_a_living_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int) -> None:
    """What another process wrote to its private mapping is written to a copy, some of it later; the file below is as
    it was."""
    monkeypatch.setattr(memory, "KEPT_BYTES", kept_bytes)
    base = tmp_path / "base"
    base.write_bytes(bytes([7]) * PAGE * 64)
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(base)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process, base.open("rb") as below, (tmp_path / "copy").open("w+b") as copy:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        copy_sparse(below.fileno(), copy.fileno())
        changes = take_changes(process.pid, below.fileno(), copy.fileno())
        assert sum(len(data) for _, data in changes) == min(3 * PAGE, kept_bytes)
        process.stdin.close()
        write_changes(changes, copy.fileno())
        copy.seek(0)
        expected = bytearray(base.read_bytes())
        expected[0:5], expected[40 * PAGE : 40 * PAGE + 3], expected[-1] = b"first", b"two", 9
        assert copy.read() == bytes(expected)
    with base.open("rb") as below, pytest.raises(MachineFailed, match="could not be read"):
        take_changes(os.getpid(), below.fileno(), below.fileno())


def test_holes_stay_holes(tmp_path: Path) -> None:
    """A sparse file's copy has its content and size, and takes as little room."""
    source = tmp_path / "source"
    with source.open("w+b") as file:
        for offset in (0, 5 << 20, 90 << 20):
            os.pwrite(file.fileno(), b"data" * 2000, offset)
        file.truncate(100 << 20)
    with source.open("rb") as reading, (tmp_path / "copy").open("w+b") as writing:
        copy_sparse(reading.fileno(), writing.fileno())
        assert list(data_runs(writing.fileno())) == list(data_runs(reading.fileno()))
        assert Run(0, 8192) in data_runs(reading.fileno())
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 1 << 20
