"""The programs under examples/ do what they say."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from daemons import ServedDaemon
from podflare import Sandbox

ROOT = Path(__file__).resolve().parents[3]


def test_tree_search_finds_the_formula_and_draws_its_way(sdk_daemon: ServedDaemon, tmp_path: Path) -> None:
    """The three terms that made the data are found, the root has the model, the picture is SVG, nothing is left."""
    picture = tmp_path / "tree.svg"
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples/tree_search.py", "--host", sdk_daemon.url, "--out", picture],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert set(told["found"].split(",")[0].split(" + ")) == {"d", "c ** 2", "math.sin(a * b)"}
    assert told["in"].startswith("root  ['c ** 2', 'd', 'math.sin(a * b)'] 0.99")
    tree = ET.parse(picture).getroot()
    tried = int(told["tried"].split()[0])
    assert len(tree.findall("{http://www.w3.org/2000/svg}circle")) == tried + 1 > 100
    assert Sandbox.list(host=sdk_daemon.url) == []


def test_a_forked_conversation_keeps_the_best_of_its_plans(sdk_daemon: ServedDaemon) -> None:
    """Three ways of one conversation end in three answers, the one that brings most is what the sandbox then holds."""
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples/fork_conversation.py", "--host", sdk_daemon.url, "--scripted"],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shared, *branches, kept = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert [shared[0], kept[0], *(word for word, _ in branches)] == ["shared", "kept", "branch", "branch", "branch"]
    revenues = [float(said.split(": ")[1].split(" EUR")[0]) for _, said in branches]
    assert f"worth {revenues[0]} EUR" in shared[1]
    assert revenues[1] > revenues[0] > revenues[2]
    answer = branches[1][1].partition(" EUR. ")[2]
    assert f"{revenues[1]} EUR. {answer}" in kept[1]
    assert Sandbox.list(host=sdk_daemon.url) == []
