"""The demo, for real: the anthropic package, HTTP, a daemon, a sandbox."""

from __future__ import annotations

from typing import Any

import pytest

from podflare import Sandbox
from podflare.demo import Start, Step, run_demo
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
    done = cli("demo", "--scripted")
    assert done.returncode == 0, done.stderr
    assert "not a language model" in done.stdout
    assert f"answer   {ANSWER}" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert "5 programs" in last and "engine process" in last and "seccomp" in last and " ms" in last


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
