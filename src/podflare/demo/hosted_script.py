"""What the scripted model says to a program that declares the hosted tool: a file, a command, an answer.  Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from podflare.demo.script import Call

EDITOR = "text_editor_code_execution"
BASH = "bash_code_execution"

_PROGRAM = """\
primes, number = [], 1
while len(primes) < 10_000:
    number += 1
    for prime in primes:
        if prime * prime > number:
            primes.append(number)
            break
        if number % prime == 0:
            break
    else:
        primes.append(number)
print("last:", primes[-1])
print("sum:", sum(primes))
"""


@dataclass(frozen=True)
class HostedTurn:
    """The model's words and the tool that it wants to use; no tool ends the conversation."""

    says: str
    tool: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


def next_turn(results: Sequence[Call]) -> HostedTurn:
    """The turn that follows `results`."""
    if any(result.failed for result in results):
        return HostedTurn(f"I cannot answer the question: {results[-1].text}")
    if not results:
        arguments = {"command": "create", "path": "primes.py", "file_text": _PROGRAM}
        return HostedTurn("I write a program.", EDITOR, arguments)
    if len(results) == 1:
        return HostedTurn("Now I run it.", BASH, {"command": "python3 primes.py"})
    found = re.fullmatch(r"last: (\d+)\nsum: (\d+)\s*", _stdout(results[1]))
    if found is None:
        return HostedTurn(f"I cannot answer the question: the program did not tell. It said: {results[1].text}")
    last, total = (int(digits) for digits in found.groups())
    return HostedTurn(f"The 10,000th prime number is {last:,}; all primes up to it add up to {total:,}.")


def _stdout(result: Call) -> str:
    try:
        return str(json.loads(result.text)["stdout"])
    except (ValueError, KeyError, TypeError):
        return ""
