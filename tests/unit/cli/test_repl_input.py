"""When the REPL has read enough to run it."""

from __future__ import annotations

import pytest

from podflare.cli.repl import is_complete

COMPLETE = [
    "1 + 1",
    "x = [1,\n 2]",
    "f(\n  1)",
    "if x:\n    y\n",
    "await asyncio.sleep(0)",
    "!ls -l | grep (",
    "",
    "# nothing but a comment",
]
INCOMPLETE = ["if x:", "if x:\n    y", "x = [1,", "'''text", "def f():\n    '''doc\n", "@decorator", "f(\\"]
WRONG = ["x = )", "'text", "for for", "\x00"]


@pytest.mark.parametrize("source", COMPLETE)
def test_complete_cells_run_at_once(source: str) -> None:
    """A statement that can run is not held back."""
    assert is_complete(source)


@pytest.mark.parametrize("source", INCOMPLETE)
def test_open_blocks_wait_for_more(source: str) -> None:
    """A block, a bracket or a string that is still open asks for another line."""
    assert not is_complete(source)


@pytest.mark.parametrize("source", WRONG)
def test_wrong_syntax_goes_to_the_sandbox(source: str) -> None:
    """What no further line can mend is sent, so that the sandbox's Python explains it."""
    assert is_complete(source)


def test_a_pasted_block_with_a_statement_behind_it_runs_whole() -> None:
    """Code pasted without an empty line between block and next statement is one cell."""
    assert is_complete("if x:\n    y\nz = 1")
