"""The short form of `make chaos`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = {"process": "9", "microvm": "20"}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.any_engine
def test_nothing_is_lost_mixed_up_or_left_when_processes_are_killed(
    engine_name: str, serve_words: tuple[str, ...]
) -> None:
    """Under load, with processes of every kind killed and stopped at random, the model of `make chaos` holds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    # The limit of a start is for a machine that does nothing else.
    command = [sys.executable, "-m", "chaos", "--seed", "7", "--round", "5", "--clients", "2", "--restart-limit", "30"]
    command += ["--seconds", SECONDS[engine_name], *(serve_words or ("--engine", engine_name))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    events, operations = (int(number) for number in re.findall(r"^(?:events|operations) +(\d+)", done.stdout, re.M))
    assert events >= 2 and operations >= 20, done.stdout
