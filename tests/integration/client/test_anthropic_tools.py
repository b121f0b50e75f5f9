"""Claude's client tools in real sandboxes: the shell that goes on, the editor, all calls of a message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from daemons import ServedDaemon
from podflare import AsyncSandbox, BadRequest, Sandbox
from podflare.integrations.anthropic import (
    handle_code_execution_tool_use,
    run_tool_uses,
    run_tool_uses_async,
    text_editor_tool,
)

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def shared(sdk_daemon: ServedDaemon) -> Iterator[Sandbox]:
    """One sandbox for the tests that use names of their own in it."""
    with Sandbox(host=sdk_daemon.url) as sandbox:
        yield sandbox


def call(sandbox: Sandbox, name: str, arguments: dict[str, Any], **options: Any) -> tuple[str, bool]:
    """Text and is_error of one call."""
    block = {"type": "tool_use", "id": "toolu_1", "name": name, "input": arguments}
    result = handle_code_execution_tool_use(block, sandbox, **options)
    assert (result["type"], result["tool_use_id"]) == ("tool_result", "toolu_1")
    (part,) = result["content"]
    assert part["type"] == "text" and part["text"], "the API refuses empty texts"
    return part["text"], result["is_error"]


def bash(sandbox: Sandbox, command: str, **options: Any) -> tuple[str, bool]:
    return call(sandbox, "bash", {"command": command}, **options)


def edit(sandbox: Sandbox, command: str, path: str, **arguments: Any) -> tuple[str, bool]:
    return call(sandbox, "str_replace_based_edit_tool", {"command": command, "path": path, **arguments})


# The shell.


def test_the_shell_goes_on(shared: Sandbox) -> None:
    """Directory, variables, arrays, functions, aliases, options, umask and the last status stay from call to call."""
    first = """
cd /tmp
plain='a  b
c'
export SEEN=yes
list=(1 'two words' 3)
declare -A map=([key]=value)
f() { echo "f says $1"; }
export -f f
shopt -s expand_aliases
alias greet='echo hello'
set -o pipefail
umask 027
unset HOME
false
"""
    assert bash(shared, first) == ("exit_code: 1", True)
    text, failed = bash(
        shared,
        'echo "$? $PWD"; echo "$plain"; env | grep SEEN; echo "${list[1]} ${map[key]}"; bash -c "f it"; greet\n'
        'set -o | grep pipefail | tr -d "\\t "; umask; echo "${HOME-none}"; cd - > /dev/null; pwd',
    )
    assert text.splitlines() == [
        "1 /tmp", "a  b", "c", "SEEN=yes", "two words value", "f says it", "hello", "pipefailon", "0027", "none",
        text.splitlines()[-1],
    ]  # fmt: skip
    assert not failed


def test_restart_gives_a_new_shell(shared: Sandbox) -> None:
    """After a restart nothing of the former shell is left; a command given with it runs in the new one."""
    bash(shared, "cd /tmp; left=over")
    assert call(shared, "bash", {"restart": True}) == ("The shell was restarted.", False)
    assert bash(shared, "echo $PWD ${left-none} $HOME") == ("/root none /root", False)
    bash(shared, "left=over")
    assert call(shared, "bash", {"restart": True, "command": "echo ${left-none}"}) == ("none", False)


def test_output_and_errors_of_commands(shared: Sandbox) -> None:
    """stdout and stderr come together in their order, with the code of what failed and lines counted as written."""
    assert bash(shared, "echo out; echo err >&2; echo more") == ("out\nerr\nmore", False)
    assert bash(shared, "true") == ("(no output)", False)
    assert bash(shared, "echo one\nnonsense\n(exit 4)") == (
        "one\nbash: line 2: nonsense: command not found\nexit_code: 4",
        True,
    )
    text, failed = bash(shared, "echo 'never closed")
    assert failed and "unexpected EOF" in text and "podflare" not in text
    assert bash(shared, "cat; read x; echo end") == ("end", False)
    text, failed = bash(shared, "seq 1 100000")
    assert not failed and len(text) < 51_000
    assert text.startswith("1\n2\n") and text.endswith("\n100000") and "characters left out here]" in text


def test_what_ends_a_shell_does_not_end_this_one(shared: Sandbox) -> None:
    """exit, set -e, set -u and exec end their command; the state that was reached is kept."""
    assert bash(shared, "mark=1; cd /usr; exit 3") == ("exit_code: 3", True)
    assert bash(shared, "echo $mark $PWD") == ("1 /usr", False)
    assert bash(shared, "mark=2; set -eu; false; mark=3") == ("exit_code: 1", True)
    assert bash(shared, "echo $mark; echo ${nothing}")[1]
    assert bash(shared, "set +eu; echo $mark") == ("2", False)
    assert bash(shared, "exec echo replaced") == ("replaced", False)
    assert bash(shared, "trap 'echo bye' EXIT; mark=4")[1] is False
    assert bash(shared, "echo $mark") == ("4", False)


def test_a_command_that_hangs_is_ended_and_said_so(shared: Sandbox) -> None:
    """After its time a command is ended with all it started, and the shell goes on with its state."""
    text, failed = bash(shared, "cd /tmp; before=1; sleep 1000", timeout=0.4)
    assert failed and "timed out after 0.4 s" in text and "The shell was restarted" in text
    assert text.endswith("exit_code: 124")
    assert bash(shared, "echo $before; pgrep sleep || echo none") == ("1\nnone", False)


def test_background_processes_live_on(shared: Sandbox) -> None:
    """What a command starts in the background runs on, and holds up nobody."""
    assert bash(shared, "sleep 1000 & echo $! > /tmp/pid") == ("(no output)", False)
    assert bash(shared, "kill $(cat /tmp/pid) && echo was there") == ("was there", False)


def test_the_shell_goes_along_with_a_fork(sdk_daemon: ServedDaemon) -> None:
    """A fork's shell goes on where the parent's was, each on its own from then on."""
    with Sandbox(host=sdk_daemon.url) as sandbox:
        bash(sandbox, "cd /usr; who=parent")
        with sandbox.fork()[0] as child:
            assert bash(child, "echo $who; pwd; who=child") == ("parent\n/usr", False)
            assert bash(sandbox, "echo $who") == ("parent", False)
            assert sandbox.diff(child) == {"added": [], "removed": [], "modified": []}


# The editor.


def test_editing_a_file(shared: Sandbox) -> None:
    """create, view with numbers, a range, str_replace and insert do what the tool's description says."""
    path = "/root/deep/down/f.txt"
    assert edit(shared, "create", path, file_text="one\ntwo\nthree\n") == (f"{path} was written.", False)
    assert edit(shared, "view", path) == ("     1\tone\n     2\ttwo\n     3\tthree\n", False)
    assert edit(shared, "view", path, view_range=[2, 3]) == ("     2\ttwo\n     3\tthree\n", False)
    assert edit(shared, "view", path, view_range=[3, -1]) == ("     3\tthree\n", False)
    assert edit(shared, "str_replace", path, old_str="two\n", new_str="2\n2b\n")[1] is False
    assert edit(shared, "insert", path, insert_line=0, insert_text="zero")[1] is False
    assert edit(shared, "insert", path, insert_line=5, insert_text="end\n")[1] is False
    assert edit(shared, "str_replace", path, old_str="one\n")[1] is False
    assert shared.download(path) == b"zero\n2\n2b\nthree\nend\n"


def test_lines_end_at_newlines_only(shared: Sandbox) -> None:
    """Carriage returns and other separators stay what they are, and so does a missing last newline."""
    shared.upload("a\r\nb\u2028c\x0cd".encode(), "odd")
    assert edit(shared, "view", "odd") == ("     1\ta\r\n     2\tb\u2028c\x0cd", False)
    edit(shared, "insert", "odd", insert_line=2, insert_text="e")
    assert shared.download("odd") == "a\r\nb\u2028c\x0cd\ne\n".encode()
    shared.upload(b"", "empty")
    assert edit(shared, "view", "empty") == ("(the file is empty)", False)


def test_a_replacement_must_be_unambiguous(shared: Sandbox) -> None:
    """Text that is not there, or there more than once (also overlapping), changes nothing and says how often."""
    shared.upload(b"aaa b b", "u")
    assert "not found" in edit(shared, "str_replace", "u", old_str="c", new_str="d")[0]
    assert "2 times" in edit(shared, "str_replace", "u", old_str="b", new_str="d")[0]
    assert "2 times" in edit(shared, "str_replace", "u", old_str="aa", new_str="d")[0]
    assert "empty" in edit(shared, "str_replace", "u", old_str="", new_str="d")[0]
    assert shared.download("u") == b"aaa b b"


def test_directories_are_listed(shared: Sandbox) -> None:
    """view of a directory shows two levels without hidden entries, whatever the names are."""
    shared.run_code("mkdir -p '/root/-d ir/sub/deep' '/root/-d ir/.hidden'; touch '/root/-d ir/file' ; mkdir e", "bash")
    text, failed = edit(shared, "view", "-d ir")
    assert not failed
    assert text.splitlines()[1:] == ["file", "sub/", "sub/deep/"]
    assert edit(shared, "view", "~/-d ir/sub")[0].splitlines()[1:] == ["deep/"]
    assert edit(shared, "view", "/root/e") == ("/root/e is an empty directory.", False)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"command": "view", "path": "/nope"}, "/nope"),
        ({"command": "view", "path": "/dev/null"}, "/dev/null"),
        ({"command": "view", "path": "bytes"}, "not text in UTF-8"),
        ({"command": "view", "path": "u", "view_range": [2, 1]}, "view_range"),
        ({"command": "view", "path": "u", "view_range": [0, 1]}, "view_range"),
        ({"command": "view", "path": "u", "view_range": [99, 100]}, "view_range"),
        ({"command": "view", "path": "u", "view_range": "all"}, "view_range"),
        ({"command": "view", "path": "u", "view_range": [1, True]}, "view_range"),
        ({"command": "create", "path": "f"}, "file_text must be a string, got nothing"),
        ({"command": "create", "path": "/proc/x/y", "file_text": ""}, "/proc/x"),
        ({"command": "create", "path": "f", "file_text": "\ud800"}, "UTF-8"),
        ({"command": "str_replace", "path": "/nope", "old_str": "a", "new_str": "b"}, "/nope"),
        ({"command": "str_replace", "path": "u", "new_str": "b"}, "old_str"),
        ({"command": "insert", "path": "u", "insert_line": 99, "insert_text": "x"}, "from 0 to 1"),
        ({"command": "insert", "path": "u", "insert_line": "1", "insert_text": "x"}, "insert_line"),
        ({"command": "insert", "path": "u", "insert_line": 1}, "insert_text"),
        ({"command": "undo_edit", "path": "u"}, "must be one of view, create, str_replace, insert"),
        ({"command": "view"}, "path"),
        ({"command": "view", "path": ""}, "path"),
        ({"command": "view", "path": "a\0b"}, "path"),
        ({"command": "view", "path": "x" * 5000}, "path"),
        ({}, "command"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_what_the_editor_cannot_do_is_told(shared: Sandbox, arguments: dict[str, Any], told: str) -> None:
    """A wrong call, a file that is missing, no text or not to be written gives an error that says which and why."""
    shared.upload(b"one line\n", "u")
    shared.upload(b"\xff\xfe", "bytes")
    text, failed = call(shared, "str_replace_based_edit_tool", arguments)
    assert failed and text.startswith("error: ") and told in text


def test_large_files_are_cut_or_refused(shared: Sandbox) -> None:
    """view shows head and tail of a long file, as many characters as was said; a huge one is not fetched at all."""
    shared.run_code("open('long', 'w').write('x' * 99 + '\\n' * 1 + 'y' * 200_000); open('huge', 'w').truncate(2**30)")
    assert len(edit(shared, "view", "long")[0]) < 51_000
    arguments = {"command": "view", "path": "long"}
    text, failed = call(shared, "str_replace_based_edit_tool", arguments, max_characters=20)
    assert (text.splitlines()[0], failed) == ("     1\txxx", False) and "characters left out here]" in text
    text, failed = edit(shared, "view", "huge")
    assert failed and "has more than 16777216 bytes" in text
    assert text_editor_tool(20)["max_characters"] == 20
    with pytest.raises(BadRequest, match="max_characters"):
        call(shared, "str_replace_based_edit_tool", arguments, max_characters=0)


# The look-alikes of the hosted sub-tools.


def test_bash_code_execution_is_a_new_shell_each_time(shared: Sandbox) -> None:
    """stdout, stderr and exit code come apart in the known shape; nothing but files stays."""
    text, failed = call(shared, "bash_code_execution", {"command": "cd /tmp; x=1; echo out; echo err >&2; exit 2"})
    assert (text, failed) == ("stdout:\nout\nstderr:\nerr\nexit_code: 2", True)
    assert call(shared, "bash_code_execution", {"command": "echo $PWD $x"})[0].startswith("stdout:\n/root\n")
    text, failed = call(shared, "bash_code_execution", {"command": "sleep 1000"}, timeout=0.3)
    assert failed and "timed out" in text and text.endswith("exit_code: 124")


def test_text_editor_code_execution_views_without_numbers(shared: Sandbox) -> None:
    """The hosted editor's three commands work, its view is the raw text, and insert is none of its commands."""
    name = "text_editor_code_execution"
    assert not call(shared, name, {"command": "create", "path": "h", "file_text": "a\nb\n"})[1]
    assert not call(shared, name, {"command": "str_replace", "path": "h", "old_str": "a", "new_str": "c"})[1]
    assert call(shared, name, {"command": "view", "path": "h"}) == ("c\nb\n", False)
    assert call(shared, name, {"command": "insert", "path": "h"})[1]


# Rich answers and whole messages.


def test_rich_answers_show_images_and_bound_long_outputs(shared: Sandbox) -> None:
    """With rich=True images and values are blocks of their own and long outputs say what was left out."""
    code = """
class Picture:
    def _repr_png_(self): return b"\\x89PNG tiny"
class Wall:
    def _repr_png_(self): return b"x" * 5_000_000
display(Picture()); display(Wall()); print("y" * 200_000)
list(range(30_000))
"""
    block = {"type": "tool_use", "id": "toolu_1", "name": "code_execution", "input": {"code": code}}
    text, image, wall, value = handle_code_execution_tool_use(block, shared, rich=True)["content"]
    assert len(text["text"]) < 51_000 and "characters left out here]" in text["text"]
    assert image["source"] == {"type": "base64", "media_type": "image/png", "data": "iVBORyB0aW55"}
    assert "left out" in wall["text"]
    assert len(value["text"]) < 51_000 and "characters left out here]" in value["text"]
    (plain,) = handle_code_execution_tool_use(block, shared)["content"]
    assert plain["text"] == "stdout:\n" + "y" * 200_000 + "\nstderr:\n\nexit_code: 0"


def message(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def use(number: int, name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{number}", "name": name, "input": arguments}


def test_all_calls_of_a_message_are_answered_in_order(shared: Sandbox) -> None:
    """One user message has a result for each call, run in their order, unknown tools and failures included."""
    said = message(
        {"type": "text", "text": "Working."},
        use(1, "bash", command="echo 1 > /tmp/order; cd /tmp"),
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}},
        use(2, "code_execution", code="print(open('/tmp/order').read().strip()); open('/tmp/order', 'a').write('2')"),
        use(3, "get_weather", city="Oslo"),
        use(4, "str_replace_based_edit_tool", command="view", path="/tmp/order"),
        use(5, "bash", command="pwd; false"),
    )
    answer = run_tool_uses(said, shared)
    assert answer["role"] == "user"
    assert [result["tool_use_id"] for result in answer["content"]] == [f"toolu_{n}" for n in range(1, 6)]
    assert [result["is_error"] for result in answer["content"]] == [False, False, True, False, True]
    texts = [result["content"][0]["text"] for result in answer["content"]]
    assert texts[1].startswith("stdout:\n1\n") and "get_weather" in texts[2]
    assert texts[3:] == ["     1\t1\n     2\t2", "/tmp\nexit_code: 1"]
    objects = SimpleNamespace(content=[SimpleNamespace(**block) for block in said["content"]])
    assert len(run_tool_uses(objects, shared)["content"]) == 5
    assert len(run_tool_uses(said["content"], shared)["content"]) == 5
    with pytest.raises(BadRequest, match="no tool_use"):
        run_tool_uses(message({"type": "text", "text": "Done."}), shared)


@pytest.mark.anyio
async def test_the_same_with_an_async_sandbox(sdk_daemon: ServedDaemon) -> None:
    """Shell, editor and code work on an AsyncSandbox, errors included."""
    async with AsyncSandbox(host=sdk_daemon.url) as sandbox:
        said = message(
            use(1, "bash", command="cd /tmp; printf 'a\\nb\\n' > f"),
            use(2, "bash", command="pwd"),
            use(3, "str_replace_based_edit_tool", command="insert", path="/tmp/f", insert_line=1, insert_text="c"),
            use(4, "str_replace_based_edit_tool", command="view", path="/tmp/f"),
            use(5, "str_replace_based_edit_tool", command="view", path="/tmp"),
            use(6, "str_replace_based_edit_tool", command="view", path="/nope"),
            use(7, "code_execution", code="1 / 0"),
        )
        results = (await run_tool_uses_async(said, sandbox))["content"]
    texts = [result["content"][0]["text"] for result in results]
    assert texts[1] == "/tmp"
    assert texts[3] == "     1\ta\n     2\tc\n     3\tb\n"
    assert texts[4].splitlines()[1:] == ["f"]
    assert [result["is_error"] for result in results] == [False, False, False, False, False, True, True]
