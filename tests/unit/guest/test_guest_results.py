"""Promise: values are shown in every form they have, figures too, and no form can break a cell."""

from __future__ import annotations

import base64
import json

import pytest

from podflare.wire import frames
from podflare.wire.messages import MAX_RICH_CHARS, Result, from_guest

PNG = b"\x89PNG\r\n\x1a\n"


def test_rich_forms(guest):
    """Each _repr_*_ method adds its mime type; binary data is base64, JSON is text."""
    cell = guest.run("""
class Rich:
    def __repr__(self): return "plain"
    def _repr_html_(self): return "<b>html</b>"
    def _repr_markdown_(self): return "**md**"
    def _repr_svg_(self): return "<svg/>"
    def _repr_png_(self): return b"png"
    def _repr_jpeg_(self): return b"jpeg", {"width": 1}
    def _repr_latex_(self): return "$x$"
    def _repr_json_(self): return {"a": [1]}
Rich()
""")
    [result] = cell.results
    assert result.kind == "value"
    assert json.loads(result.data.pop("application/json")) == {"a": [1]}
    assert result.data == {
        "text/plain": "plain",
        "text/html": "<b>html</b>",
        "text/markdown": "**md**",
        "image/svg+xml": "<svg/>",
        "image/png": base64.b64encode(b"png").decode(),
        "image/jpeg": base64.b64encode(b"jpeg").decode(),
        "text/latex": "$x$",
    }


def test_mimebundle_method_comes_first(guest):
    """_repr_mimebundle_ may give forms of its own, also as a pair with metadata, and wins over single methods."""
    cell = guest.run("""
class Bundle:
    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"text/html": "from bundle", "application/vnd.x+json": {"n": 1}, 5: "no mime type"}, {}
    def _repr_html_(self): return "single"
Bundle()
""")
    data = cell.results[0].data
    assert data["text/html"] == "from bundle"
    assert json.loads(data["application/vnd.x+json"]) == {"n": 1}
    assert data["text/plain"].startswith("<__main__.Bundle object")


def test_classes_are_not_asked_for_rich_forms(guest):
    """A class as last value is shown by its repr; its methods need an instance."""
    cell = guest.run("class A:\n    def _repr_html_(self): return 'x'\nA")
    assert cell.results[0].data == {"text/plain": "<class '__main__.A'>"}
    assert cell.stderr == ""


@pytest.mark.parametrize("failure", ["raise ValueError('broken')", "raise SystemExit(3)", "return object()", "1 / 0"])
def test_failing_form_is_left_out(guest, failure):
    """A form that fails is left out with a note on stderr; the other forms and the cell are as if it were not there."""
    cell = guest.run(f"""
class Odd:
    def __repr__(self): return "plain"
    def _repr_json_(self): {failure}
    def _repr_html_(self): return "html"
Odd()
""")
    assert cell.exit.code == 0
    assert cell.results[0].data == {"text/plain": "plain", "text/html": "html"}
    assert cell.stderr.startswith("podflare: ")
    assert cell.error is None


def test_failing_repr(guest):
    """A value whose repr raises is shown as such, with a note, and the cell is a success."""
    cell = guest.run("class Bad:\n    def __repr__(self): raise RuntimeError('no')\nBad()")
    assert cell.value == "<Bad object whose repr failed>"
    assert "repr of Bad failed: RuntimeError: no" in cell.stderr
    assert cell.exit.code == 0


def test_objects_that_have_every_attribute(guest):
    """A mock, which answers to any name, is shown by its repr alone."""
    cell = guest.run("from unittest.mock import Mock\nMock(name='m')")
    assert list(cell.results[0].data) == ["text/plain"]


def test_huge_repr_is_cut(guest):
    """The repr of 100 MB is cut to head and tail with the number of characters between."""
    cell = guest.run("'x' * 100_000_000")
    assert cell.value is not None
    assert len(cell.value) <= 1024 * 1024
    assert "characters left out" in cell.value


def test_largest_form_is_left_out_of_a_result_too_large(guest):
    """A result above the cap arrives without its largest form, and its text says which and how large."""
    cell = guest.run(f"""
class Big:
    def __repr__(self): return "plain"
    def _repr_html_(self): return "h" * 1000
    def _repr_svg_(self): return "s" * {MAX_RICH_CHARS + 1}
Big()
""")
    data = cell.results[0].data
    assert set(data) == {"text/plain", "text/html"}
    assert "image/svg+xml" in data["text/plain"]
    assert str(MAX_RICH_CHARS + 1) in data["text/plain"]


def test_result_that_grows_when_encoded(guest):
    """Characters that take twelve bytes each in JSON count as such, so the frame stays within its cap."""
    cell = guest.run(f"""
class Wide:
    def __repr__(self): return "\\U0001f600" * 1_000_000
    def _repr_html_(self): return "\\U0001f600" * {frames.MAX_MESSAGE_BYTES // 8}
Wide()
""")
    assert set(cell.results[0].data) == {"text/plain"}
    assert cell.exit.code == 0


def test_display_shows_in_the_midst_of_a_cell(guest):
    """display() is a builtin that sends each of its values at once, as display results."""
    channel = guest.start("import time\ndisplay(1, 'two')\ntime.sleep(60)")
    shown = [from_guest(guest.next_frame(channel).payload) for _ in range(2)]
    assert shown == [Result({"text/plain": "1"}, "display"), Result({"text/plain": "'two'"}, "display")]
    guest.interrupt(channel)
    assert guest.finish(channel).exit.reason == "interrupted"


def test_display_comes_after_what_was_printed_before(guest):
    """Text printed before display() arrives before it."""
    cell = guest.run("print('first')\ndisplay('second')")
    assert cell.order[:2] == ["stdout", "result"]


def test_display_outside_of_a_cell_prints(guest):
    """display() in a thread that outlives its cell, or in a forked child, prints the text form."""
    guest.run("""
import threading
go = threading.Event()
thread = threading.Thread(target=lambda: (go.wait(), display("late"))); thread.start()
import os
pid = os.fork()
if pid == 0:
    display("child"); os._exit(0)
os.waitpid(pid, 0)
""")
    assert guest.run("go.set(); thread.join()").exit.code == 0
    assert guest.run("1").exit.code == 0


def test_open_figures_are_shown_and_closed(guest):
    """Open matplotlib figures become PNG display results after the cell, in order, and are closed."""
    pytest.importorskip("matplotlib")
    cell = guest.run("""
import matplotlib.pyplot as plt
plt.plot([1, 2]); plt.show()
plt.figure(); plt.plot([2, 1])
print(plt.get_backend().lower())
""")
    assert cell.out == "agg\n", cell.stderr
    assert [result.kind for result in cell.results] == ["display", "display"]
    for result in cell.results:
        assert base64.b64decode(result.data["image/png"]).startswith(PNG)
    assert cell.stderr == ""
    assert guest.run("plt.get_fignums()").value == "[]"


def test_figure_as_last_value(guest):
    """A figure object has its picture among its forms."""
    pytest.importorskip("matplotlib")
    cell = guest.run("from matplotlib.figure import Figure\nf = Figure(); f.subplots().plot([1]); f")
    assert base64.b64decode(cell.results[0].data["image/png"]).startswith(PNG)


def test_figures_of_a_failed_cell_are_shown(guest):
    """A cell that draws and then fails shows both the figure and the error."""
    pytest.importorskip("matplotlib")
    cell = guest.run("import matplotlib.pyplot as plt\nplt.plot([1])\n1 / 0")
    assert len(cell.results) == 1
    assert cell.error is not None
    assert cell.order[-2:] != ["result", "result"]


def test_large_html_arrives_whole(guest):
    """A 5 MB HTML form is one result, not fragments."""
    cell = guest.run("class H:\n    def _repr_html_(self): return '<p>' + 'x' * 5_000_000 + '</p>'\nH()")
    html = cell.results[0].data["text/html"]
    assert len(html) == 5_000_007
    assert html.endswith("</p>")
