"""Promise: `podflare` obeys no escape sequence of a sandbox's output, names or errors but colours."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import unicodedata

from podflare.cli.terminal import for_terminal, one_line, write_output

SEQUENCES = {
    "title": "\x1b]0;owned\x07", "title, ended otherwise": "\x1b]2;owned\x1b\\", "clipboard": "\x1b]52;c;cm0gLXJmIC8=\x07",
    "link": "\x1b]8;;http://evil.example\x07click\x1b]8;;\x07", "cursor position": "\x1b[6n", "device attributes": "\x1b[c",
    "secondary attributes": "\x1b[>c", "answerback": "\x05", "terminal parameters": "\x1b[x", "report the title": "\x1b[21t",
    "resize": "\x1b[8;1;1t", "iconify": "\x1b[2t", "clear": "\x1b[2J", "clear history": "\x1b[3J", "cursor up": "\x1b[9A", "column": "\x1b[1G",
    "save and restore": "\x1b7\x1b8", "scroll region": "\x1b[1;2r", "insert lines": "\x1b[9L", "delete characters": "\x1b[9P", "reset": "\x1bc",
    "soft reset": "\x1b[!p", "alternate screen": "\x1b[?1049h", "mouse reports": "\x1b[?1003h", "bracketed paste off": "\x1b[?2004l", "echo off": "\x1b[12h",
    "keypad": "\x1b=", "character set": "\x1b(0", "shift out": "\x0e", "device control": "\x1bP+q544e\x1b\\", "sixel": "\x1bPq#0;2;0;0;0\x1b\\",
    "private message": "\x1b^x\x1b\\", "application command": "\x1b_Gx\x1b\\", "string": "\x1bXx\x1b\\", "C1 control": "\x9b2J", "C1 title": "\x9d0;x\x9c",
    "C1 device control": "\x90q\x9c", "bell": "\x07", "backspace": "safe\x08\x08\x08\x08evil", "vertical tab": "a\x0bb", "form feed": "a\x0cb", "delete": "a\x7fb",
    "null": "a\0b", "substitute": "\x1a", "colour that is none": "\x1b[38;5;1;2J", "colour with a command in it": "\x1b[31;6n", "colour cut short": "\x1b[31",
    "colour with a private mark": "\x1b[?31m", "colour with a space": "\x1b[31 q", "key redefinition": "\x1b[65;66;67p", "media copy": "\x1b[5i",
    "kitty keyboard": "\x1b[>1u", "modify keys": "\x1b[>4;2m", "iTerm file": "\x1b]1337;File=inline=1:AAAA\x07", "colour palette": "\x1b]4;0;rgb:ff/ff/ff\x07",
    "palette question": "\x1b]4;0;?\x07", "notification": "\x1b]9;x\x07", "command of the shell": "\x1b]133;C\x07", "nested": "\x1b[\x1b[2J2J", "lone escape": "\x1b",
}  # fmt: skip
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")


def test_no_sequence_but_colours_reaches_a_terminal(record):
    """Each sequence is shown, not obeyed, in output and in the one line of a name."""
    found = {}
    for name, sequence in SEQUENCES.items():
        shown = _COLOUR.sub("", for_terminal(f"a{sequence}b"))
        left = [char for char in shown if unicodedata.category(char) == "Cc" and char not in "\n\t\r"]
        found[f"{name} in output"] = f"broke: {shown!r}" if left else "held"
        line = one_line(f"a{sequence}\u202e\u2028b")
        left = [char for char in line if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp")]
        found[f"{name} in a name"] = f"broke: {line!r}" if left else "held"
    record(found)


def test_a_sequence_in_pieces_is_none(record):
    """Cut anywhere into two writes a sequence comes through no better than whole."""

    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    found = {}
    for name, sequence in SEQUENCES.items():
        results = []
        for cut in range(1, len(sequence)):
            stream = Terminal(raw := io.BytesIO(), encoding="utf-8")
            for piece in (sequence[:cut], sequence[cut:]):
                write_output(piece, stream)
            stream.flush()
            shown = _COLOUR.sub("", raw.getvalue().decode())
            results += [char for char in shown if unicodedata.category(char) == "Cc" and char not in "\n\t\r"]
        found[f"{name} in two pieces"] = f"broke: {results}" if results else "held"
    record(found)


def test_podflare_run_on_a_terminal_obeys_nothing(private_temp, record):
    """The command itself, on a real terminal: output, an error's text and a result of a sandbox are defused."""
    script = private_temp / "attack-4711.py"
    sequences = "".join(
        SEQUENCES[name]
        for name in (
            "title",
            "clipboard",
            "clear",
            "cursor position",
            "reset",
            "bell",
            "C1 control",
            "alternate screen",
        )
    )
    script.write_text(
        f"import sys\nprint({sequences!r})\nprint({sequences!r}, file=sys.stderr)\nraise type({sequences!r}.replace(chr(0), ''), (Exception,), {{}})({sequences!r})\n"
    )
    master, slave = pty.openpty()
    try:
        done = subprocess.Popen(
            [sys.executable, "-m", "podflare", "run", str(script)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            close_fds=True,
        )
        os.close(slave)
        said = b""
        try:
            while piece := os.read(master, 65536):
                said += piece
        except OSError:
            pass  # the other end is closed
        assert done.wait(60) != 0
    finally:
        os.close(master)
        script.unlink()
    text = _COLOUR.sub("", said.decode("utf-8", "replace"))
    left = [char for char in text if unicodedata.category(char) == "Cc" and char not in "\n\t\r"]
    assert "owned" in text
    record({"output, error and traceback of podflare run": f"broke: {left} in {text[:300]!r}" if left else "held"})
