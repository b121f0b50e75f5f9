"""How much lies below a directory that hostile code may have arranged."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from podflare.engines.base import Limits
from podflare.engines.process import written
from podflare.engines.process.disk import excess
from podflare.engines.process.written import TooDeep, Written, measure

MANY = 10**6


def test_everything_counts_once(tmp_path):
    """Files, directories and links count, hard links once, and nothing outside is looked at."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/f").write_bytes(bytes(100_000))
    os.link(tmp_path / "a/f", tmp_path / "again")
    (tmp_path / "link").symlink_to("/")
    found = measure(tmp_path, max_files=MANY)
    assert found.files == 3  # a, f, link
    du = subprocess.run(["du", "-s", "-B1", str(tmp_path)], capture_output=True, text=True, check=True)
    assert found.size == int(du.stdout.split()[0]) - tmp_path.stat().st_blocks * 512


def test_counting_stops_above_the_limit(tmp_path):
    """A look at more files than allowed goes no further."""
    for number in range(50):
        (tmp_path / str(number)).touch()
    assert measure(tmp_path, max_files=20).files == 21
    assert "may have 1 files within" in excess(tmp_path, Limits(1, disk_bytes=20_000))


def test_nothing_hides_in_depth_or_behind_modes(tmp_path):
    """What lies below paths longer than the kernel takes, or in directories closed to their owner, is found."""
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(40):
            os.mkdir("n" * 250, dir_fd=here)
            inner = os.open("n" * 250, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
        with open(os.open("big", os.O_WRONLY | os.O_CREAT, dir_fd=here), "wb") as file:
            file.write(bytes(1 << 20))
        os.chmod(tmp_path / ("n" * 250), 0)
        assert measure(tmp_path, max_files=MANY).size > 1 << 20
        assert (tmp_path / ("n" * 250)).stat().st_mode & 0o777 == 0
        assert "disk full" in excess(tmp_path, Limits(1, disk_bytes=1 << 20))
    finally:
        os.close(here)
        os.chmod(tmp_path / ("n" * 250), 0o700)
        subprocess.run(["rm", "-rf", "--", str(tmp_path / ("n" * 250))], check=True)


def test_depth_has_an_end(tmp_path, monkeypatch):
    """Directories nested without end are too much disk."""
    monkeypatch.setattr(written, "MAX_DEPTH", 10)
    path = tmp_path.joinpath(*["d"] * 12)
    path.mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TooDeep):
        measure(tmp_path, max_files=MANY)
    assert len(os.listdir("/proc/self/fd")) == before
    assert "nested deeper than" in excess(tmp_path, Limits(1, disk_bytes=1 << 30))
    shutil.rmtree(tmp_path / "d")


def test_what_is_gone_counts_nothing(tmp_path):
    """A directory that is not there, or no directory any more, has nothing."""
    (tmp_path / "f").touch()
    assert measure(tmp_path / "none", max_files=9) == measure(tmp_path / "f", max_files=9) == Written(0, 0)
