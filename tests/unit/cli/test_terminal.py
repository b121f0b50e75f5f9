"""What of a sandbox's output may act on the user's terminal."""

from __future__ import annotations

import io

import pytest

from podflare.cli.terminal import for_terminal, one_line, write_output

ATTACKS = {
    "set the title": "\x1b]0;owned\x07",
    "write the clipboard": "\x1b]52;c;cm0gLXJmIC8=\x07",
    "ask for the cursor position": "\x1b[6n",
    "clear the screen": "\x1b[2J",
    "move the cursor up": "\x1b[5A",
    "C1 control sequence": "\x9b2J",
    "backspace over text": "safe\x08\x08\x08\x08evil",
    "ring": "\x07",
    "device control string": "\x1bP+q\x1b\\",
}


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_escape_sequences_other_than_colours_are_shown_not_obeyed(attack: str) -> None:
    """No byte that can do more than colour text reaches the terminal."""
    shown = for_terminal(attack)
    assert not any(ord(char) < 32 or 0x7F <= ord(char) <= 0x9F for char in shown)


def test_colours_tabs_and_progress_bars_pass() -> None:
    """What test runners and progress bars print looks as they meant it."""
    text = "\x1b[1;31mFAILED\x1b[0m\ttest\r50%\n"
    assert for_terminal(text) == text


def test_one_line_cannot_be_broken_or_turned_around() -> None:
    """A name from a daemon stays one line of a table, readable from left to right."""
    assert one_line("a\nb\x1b[2J\u202eevil") == "a\\nb\\x1b[2J\\u202eevil"


def test_a_pipe_gets_the_bytes_as_they_are() -> None:
    """Nothing is defused where no terminal reads it: a program's output is data there."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    write_output(ATTACKS["clear the screen"] + "ü", stream)
    assert raw.getvalue() == "\x1b[2Jü\n".encode()


def test_a_terminal_gets_them_defused_and_its_colours_back() -> None:
    """A cell that leaves a colour switched on does not colour the user's prompt."""
    raw = io.BytesIO()
    stream = _Terminal(raw)
    write_output("\x1b[31mred\x1b]0;t\x07", stream)
    assert raw.getvalue() == b"\x1b[31mred\\x1b]0;t\\x07\x1b[0m\n"
