"""`podflare run` against a real daemon and real sandboxes."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from programs import PROGRAM, Cli


def test_output_and_exit_code_come_through(cli: Cli) -> None:
    """Standard output, standard error and the exit code are the program's own, whatever its characters."""
    code = "import sys\nprint('grüße \\u2028 \\x1b[6n')\nprint('warn', file=sys.stderr)\nsys.exit(3)"
    done = cli("run", "-c", code)
    assert (done.stdout, done.stderr, done.returncode) == ("grüße \u2028 \x1b[6n\n", "warn\n", 3)


def test_an_exception_is_a_traceback_of_the_program_alone(cli: Cli) -> None:
    """A failing program gives exit code 1 and its own traceback; nothing of ours is in it."""
    done = cli("run", "-c", "def broken():\n    return 1 / 0\nbroken()")
    assert done.returncode == 1 and not done.stdout
    assert "ZeroDivisionError" in done.stderr and "return 1 / 0" in done.stderr and "podflare" not in done.stderr


def test_files_run_in_their_language(cli: Cli, tmp_path: Path) -> None:
    """A .sh file is bash, a .py file is Python, - is standard input, --language decides over both."""
    (tmp_path / "a.sh").write_text("echo $((6 * 7)); exit 4")
    (tmp_path / "a.py").write_text("print(6 * 7)")
    done = cli("run", str(tmp_path / "a.sh"))
    assert (done.stdout, done.returncode) == ("42\n", 4)
    assert cli("run", str(tmp_path / "a.py")).stdout == "42\n"
    assert cli("run", "-", stdin="print('piped')").stdout == "piped\n"
    assert cli("run", "--language", "bash", "-c", "echo bash").stdout == "bash\n"


def test_a_timeout_is_exit_code_124_and_says_so(cli: Cli) -> None:
    """A program that runs too long is ended, and the user reads why."""
    done = cli("run", "--timeout", "0.5", "-c", "while True: pass")
    assert done.returncode == 124 and "0.5" in done.stderr


@pytest.mark.parametrize(("answer", "code"), [("raise", 130), ("import sys; sys.exit(5)", 5)])
def test_ctrl_c_interrupts_the_program_and_output_streams(cli: Cli, answer: str, code: int) -> None:
    """What a running program printed is there before it ends, and SIGINT reaches the program, not just the client."""
    program = f"print('first')\nimport time\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    {answer}"
    with cli.start("run", "-c", program) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "first\n"
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=30)
    assert running.returncode == code


def test_a_reader_that_leaves_is_no_traceback(cli: Cli) -> None:
    """`podflare run ... | head -1` ends quietly."""
    words = [*PROGRAM, "run", "-c", "'for n in range(10**6): print(n)'"]
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(words)} | head -1"], env=cli.environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "0\n" and "Traceback" not in done.stderr


def test_without_an_address_a_private_daemon_serves_the_command(cli: Cli) -> None:
    """Nothing needs to be started first, and nothing is left running after it (the leak check looks)."""
    environment = {name: value for name, value in cli.environment.items() if not name.startswith("PODFLARE_")}
    done = subprocess.run(
        [*PROGRAM, "run", "-c", "print(1)"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr, done.returncode) == ("1\n", "", 0)


def test_an_unknown_template_is_one_line(cli: Cli) -> None:
    """The daemon's refusal is shown as it is, with exit code 1."""
    done = cli("run", "--template", "nope", "-c", "1")
    assert done.returncode == 1 and "nope" in done.stderr and len(done.stderr.splitlines()) == 1
