"""What `podflare doctor` says about a report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from podflare.cli.doctor import show, to_json
from podflare.engines.base import EngineReport, WallStatus

REPORT = EngineReport(
    "process",
    usable=True,
    walls=(WallStatus("seccomp", True, "libseccomp 2.5"), WallStatus("memory_limit", False, "no cgroup;\nask \x1b[2J")),
)
BROKEN = EngineReport("process", usable=False, walls=(), problem="user namespaces are off: sysctl ...")


def test_every_wall_is_one_line_with_its_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    """In a pipe each wall is a line that says yes or NO and why; hostile details cannot break out of it."""
    show([REPORT])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["seccomp", "yes", "libseccomp", "2.5"] for line in lines)
    assert any(
        line.strip().startswith("memory_limit") and "NO" in line and r"no cgroup;\nask \x1b[2J" in line
        for line in lines
    )
    assert "1 of 2 walls missing" in "\n".join(lines)


def test_a_computer_without_tunnels_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Whether sandboxes can have a network is a line of its own, with what to do if not."""
    show([REPORT, replace(REPORT, no_uplink="modprobe tun")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["egress", "yes"] in lines and ["egress", "NO", "modprobe", "tun"] in lines


def test_an_unusable_engine_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """The problem line is shown, and that no sandbox can be made here."""
    show([BROKEN])
    out = capsys.readouterr().out
    assert BROKEN.problem in out and "No engine can make a sandbox here" in out


def test_the_json_holds_the_whole_report() -> None:
    """A script reads verdict, system and every wall."""
    body = json.loads(json.dumps(to_json([REPORT, BROKEN])))
    assert body["usable"] is True
    assert body["engines"][0]["walls"][1]["available"] is False
    assert body["engines"][1]["problem"] == BROKEN.problem
    assert {"kernel", "machine", "python", "uid"} <= body["system"].keys()
