"""The demo, for real: the anthropic package, HTTP, a daemon, a sandbox."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from podflare import Sandbox
from podflare.demo import HostedStart, Start, Step, run_demo, run_hosted
from podflare.integrations.anthropic import handle_code_execution_tool_use
from programs import Cli

ANSWER = (
    "West earned the most: 85,898.20 EUR, 2,103.90 EUR ahead of South. "
    "The best month over all regions was 2024-06 with 31,547.30 EUR."
)


@pytest.fixture(autouse=True)
def without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test talks to the real API, whatever the environment holds."""
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)


def test_the_command_ends_with_the_answer_and_what_ran_where(cli: Cli) -> None:
    """One command shows every step, names the script as a script, and closes with answer, engine, walls and times."""
    done = cli("demo", "--scripted", "--way", "1")
    assert done.returncode == 0, done.stderr
    assert "not a language model" in done.stdout
    assert f"answer   {ANSWER}" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert "5 programs" in last and "engine process" in last and "seccomp" in last and " ms" in last


def test_a_program_for_the_hosted_tool_runs_as_it_is(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing but an address in its environment, the program gets the hosted blocks and an answer that was
    computed; afterwards the gateway is gone, also where the program's output could not be shown."""
    monkeypatch.setenv("PODFLARE_GATEWAY_KEYS", "of another gateway")
    happened: list[HostedStart | str] = []
    run_hosted(happened.append, host=cli.address)
    start, *lines = happened
    assert isinstance(start, HostedStart) and "podflare" not in start.program.read_text().partition('"""\n')[2]
    assert "bash_code_execution_tool_result: " in str(lines[-2]) and "'return_code': 0" in str(lines[-2])
    assert lines[-1] == "text: The 10,000th prime number is 104,729; all primes up to it add up to 496,165,411."
    _assert_gone(start.gateway)

    def refuse(shown: HostedStart | str) -> None:
        happened.append(shown)
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_hosted(refuse, host=cli.address)
    again = happened[-1]
    assert isinstance(again, HostedStart)
    _assert_gone(again.gateway)


def test_a_killed_demo_takes_its_gateway_with_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even SIGKILL leaves a gateway behind, and its files go with the next demo; SIGTERM ends all in order."""
    monkeypatch.delitem(cli.environment, "PODFLARE_HOSTD_URL")
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setitem(cli.environment, "TMPDIR", folder)
        for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
            process = cli.start("demo", "--scripted", "--way", "3")
            assert process.stdout is not None
            address = next(line.split()[1].rstrip(",") for line in process.stdout if line.startswith("gateway"))
            (files,) = Path(folder).glob("podflare-demo-*")
            process.send_signal(number)
            process.communicate(timeout=30)
            assert process.returncode == code
            _assert_gone(address)
            _wait_until_free(files)
        assert list(Path(folder).glob("podflare-demo-*")) == []


def _wait_until_free(folder: Path) -> None:
    """Return when no process of the demo has the directory's lock any more, or it is gone."""
    deadline = time.monotonic() + 20
    while folder.exists():
        fd = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            assert time.monotonic() < deadline, "the gateway did not end"
            time.sleep(0.02)  # as below
        finally:
            os.close(fd)


def _assert_gone(address: str) -> None:
    """Wait until nobody listens at `address`."""
    port, deadline = urlsplit(address).port, time.monotonic() + 20
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return
        assert time.monotonic() < deadline, f"{address} still takes connections"
        time.sleep(0.02)  # the gateway ends in a process of its own


def test_the_agent_recovers_from_its_error(cli: Cli) -> None:
    """One of the five programs fails, and the next builds on the variables that it left."""
    happened: list[Start | Step] = []
    outcome = run_demo(happened.append, host=cli.address)
    steps = [step for step in happened if isinstance(step, Step)]
    assert [step.failed for step in steps] == [False, True, False, False, False]
    assert "rows" in steps[2].code and "open(" not in steps[2].code
    assert outcome.answer == ANSWER and outcome.summary == ANSWER + "\n"


@pytest.mark.parametrize("number", range(5))
def test_a_flipped_tool_result_changes_the_answer(cli: Cli, number: int) -> None:
    """Whichever result is turned into its opposite on the way to the model, the answer is another one."""
    seen = 0

    def flipped(block: Any, sandbox: Sandbox) -> dict[str, Any]:
        nonlocal seen
        result = handle_code_execution_tool_use(block, sandbox)
        if seen == number:
            text = "stdout:\n\nstderr:\nMemoryError\nexit_code: 1" if not result["is_error"] else "exit_code: 0"
            result = {**result, "content": [{"type": "text", "text": text}], "is_error": not result["is_error"]}
        seen += 1
        return result

    outcome = run_demo(lambda happened: None, host=cli.address, run_tool=flipped)
    assert outcome.answer != ANSWER and outcome.answer.startswith("I cannot answer")
