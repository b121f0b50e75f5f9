"""Wrong usage and expected failures: an exit code and a line, never a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from podflare.cli import main

WRONG = [
    ["frobnicate"],
    ["run"],
    ["run", "-c", "1", "file.py"],
    ["run", "/no/such/file.py"],
    ["run", "-c", "1", "--language", "cobol"],
    ["run", "-c", "1", "--timeout", "0"],
    ["ls", "--frob"],
    ["serve", "--port", "x"],
    ["serve", "--port", "70000"],
    ["serve", "--uds", "/tmp/x", "--port", "1"],
    ["serve", "--frob"],
]


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_wrong_usage_is_exit_code_2_and_a_message(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The message goes to stderr and nothing to stdout."""
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.strip() and not out and "Traceback" not in err


def test_a_file_that_is_not_text_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A binary file is refused by name before any sandbox is made."""
    (tmp_path / "program").write_bytes(b"\xff\xfe\x00")
    assert main(["run", str(tmp_path / "program")]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_a_daemon_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """An address nobody listens on gives exit code 1 and one line that names it."""
    assert main(["ls", "--host", "http://127.0.0.1:9"]) == 1
    err = capsys.readouterr().err
    assert "127.0.0.1:9" in err and len(err.splitlines()) == 1 and err.startswith("podflare: ")


def test_serve_starts_without_the_libraries_of_the_other_commands() -> None:
    """The first Sandbox() waits for this command, so it imports no typer and no rich."""
    code = (
        "import sys, podflare.cli; podflare.cli.main(['serve', '--help']); "
        "print([name for name in ('typer', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
