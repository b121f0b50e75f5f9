"""The published client 0.0.22 works unchanged on this project's daemon.  It is driven, never read or shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from daemons import served
from podflare import Sandbox

pytestmark = pytest.mark.timeout(90)

RUN = """
with Sandbox(host=HOST) as s:
    def show(code, language="python"):
        r = s.run_code(code, language)
        print([r.stdout, r.stderr, r.exit_code])
"""


def lines(output: str) -> list[object]:
    return [eval(line, {"__builtins__": {}}) for line in output.splitlines()]


def test_published_tour(script) -> None:  # type: ignore[no-untyped-def]  # fixture
    """Create, python, bash, state, files, stream, close: the sequence of its own introduction."""
    output = script(
        RUN
        + """
    show("x = 41")
    show("print(x + 1)")
    show("echo $((6*7))", "bash")
    s.upload(b"a,b\\n1,2\\n", "/root/data.csv")
    show("print(open('/root/data.csv').read())")
    print([s.download("/root/data.csv")])
    print([(e.type, e.data, e.seq) for e in s.run_code_stream("print(1); print(2)")])
    print([Client(HOST).healthz(), s.id.startswith("sbx_"), s.run_code("1/0").ok])
"""
    )
    assert lines(output) == [
        ["", "", 0],
        ["42", "", 0],
        ["42", "", 0],
        ["a,b\n1,2\n", "", 0],
        [b"a,b\n1,2\n"],
        [("stdout", "1", 0), ("stdout", "2", 1), ("exit", 0, 2)],
        [True, True, False],
    ]


def test_published_indented_examples(script) -> None:  # type: ignore[no-untyped-def]  # fixture
    """Code in indented triple quotes, as its documentation writes it, runs; so do strings that hold indentation."""
    output = script(
        RUN + '    show("""\n        import math\n        for i in range(2):\n            print(i)\n    """)\n'
    )
    assert lines(output) == [["0\n1", "", 0]]


def test_published_output_rule(script) -> None:  # type: ignore[no-untyped-def]  # fixture
    """Empty, blank, unterminated and odd output arrives by the line rule; Unicode line ends do not break the stream."""
    output = script(
        RUN
        + """
    show("pass")
    show("print()")
    show("print('a'); print()")
    show("print('a', end='')")
    show("import sys; sys.stdout.write('x\\\\ny')")
    show("print('a\\\\u2028b\\\\u2029c\\\\x85d\\\\x00e\\\\rf')")
    show("import os; os.write(1, b'\\\\xff\\\\n')")
    show("6 * 7")
"""
    )
    assert lines(output) == [
        ["", "", 0],
        ["", "", 0],
        ["a\n", "", 0],
        ["a", "", 0],
        ["x\ny", "", 0],
        ["a\u2028b\u2029c\x85d\x00e\rf", "", 0],
        ["\ufffd", "", 0],
        ["", "", 0],
    ]


def test_published_long_line(script) -> None:  # type: ignore[no-untyped-def]  # fixture
    """One line of 3 MB arrives whole."""
    assert lines(script(RUN + "    print([len(s.run_code(\"print('x' * 3_000_000)\").stdout)])\n")) == [[3_000_000]]


def test_published_exits(script) -> None:  # type: ignore[no-untyped-def]  # fixture
    """SystemExit in its forms, exceptions, and the next call after each."""
    output = script(
        RUN
        + """
    show("import sys; x = 7; sys.exit()")
    show("sys.exit(0)")
    show("sys.exit(3)")
    r = s.run_code("sys.exit('bye')"); print([r.stdout, r.stderr.splitlines()[-1], r.exit_code])
    r = s.run_code("raise ValueError('no')"); print(["ValueError: no" in r.stderr, r.exit_code])
    r = s.run_code("def f(:"); print(["SyntaxError" in r.stderr, r.exit_code])
    show("exit 5", "bash")
    show("print(x)")
"""
    )
    assert lines(output) == [
        ["", "", 0],
        ["", "", 0],
        ["", "", 3],
        ["", "bye", 1],
        [True, 1],
        [True, 1],
        ["", "", 5],
        ["7", "", 0],
    ]


def test_published_silent_cell(script) -> None:  # type: ignore[no-untyped-def]  # fixture
    """A cell silent for longer than the client's read timeout ends well, because of heartbeats; waiting cells too."""
    output = script(
        """
import threading
c = Client(HOST, timeout=2.0)
s = Sandbox(client=c)
waited = []
t = threading.Thread(target=lambda: waited.append(s.run_code("import time; time.sleep(4.5); print('first')").stdout))
t.start()
while not waited and s.run_code("print('second')").stdout != "second": pass
t.join()
print(waited)
s.close()
"""
    )
    assert lines(output) == [["first"]]


def test_published_concurrent_cells(script) -> None:  # type: ignore[no-untyped-def]  # fixture
    """Ten calls at a time on one sandbox all succeed, one after the other, each with its own output."""
    output = script(
        RUN
        + """
    from concurrent.futures import ThreadPoolExecutor
    s.run_code("n = 0")
    with ThreadPoolExecutor(10) as pool:
        texts = list(pool.map(lambda i: s.run_code(f"n += 1; print({i})").stdout, range(10)))
    print(texts)
    show("print(n)")
"""
    )
    assert lines(output) == [[str(i) for i in range(10)], ["10", "", 0]]


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_published_file_helpers(script, size: int) -> None:  # type: ignore[no-untyped-def]  # fixture
    """Its upload and download, which run code in the REPL, carry any bytes of these sizes."""
    output = script(
        RUN
        + f"""
    import os
    content = os.urandom({size})
    s.upload(content, "/data/deep/f.bin")
    print([s.download("/data/deep/f.bin") == content])
    try: s.download("/nope")
    except IOError as e: print([type(e).__name__, "download failed" in str(e)])
"""
    )
    assert lines(output) == [[True], ["OSError", True]]


def test_published_replay(script) -> None:  # type: ignore[no-untyped-def]  # fixture
    """Its replay reads what ours keeps."""
    output = script(RUN + "    show('print(1)')\n    print([(e.type, e.data) for e in s.replay()])\n")
    assert lines(output)[1] == [("stdout", "1"), ("exit", 0)]


def test_published_close(script) -> None:  # type: ignore[no-untyped-def]  # fixture
    """Closing twice is silent, by object and by id; an id never issued is its HTTP error 404."""
    output = script(
        """
import httpx
s = Sandbox(host=HOST)
s.close()
c = Client(HOST)
c.destroy_sandbox(s.id); c.destroy_sandbox(s.id)
try: c.destroy_sandbox("sbx_" + "0" * 32)
except httpx.HTTPStatusError as e: print([e.response.status_code, sorted(e.response.json())])
try: list(c.exec_stream(s.id, "1"))
except httpx.HTTPStatusError as e: print([e.response.status_code])
"""
    )
    assert lines(output) == [[404, ["code", "error"]], [404]]


def test_published_options(script) -> None:  # type: ignore[no-untyped-def]  # fixture
    """Every option it can send is understood or refused with a status, none breaks the answer."""
    output = script(
        """
import httpx
with Sandbox(host=HOST, template="default", timeout_seconds=60, idle_timeout_seconds=60, ram_mib=512,
             rootfs_gb=1, egress=True, traceparent="00-bad", api_key="pf_any") as s:
    print([s.run_code("print(1)").stdout])
for options in ({"template": "none"}, {"persistent": True}, {"ram_mib": "x"}):
    try: Sandbox(host=HOST, **options)
    except httpx.HTTPStatusError as e: print([e.response.status_code])
with Sandbox(host=HOST) as s:
    try: Sandbox.resume("spc_1", host=HOST)
    except httpx.HTTPStatusError as e: print([e.response.status_code])
"""
    )
    assert lines(output) == [["1"], [400], [501], [400], [501]]


def test_published_fork_and_merge(script) -> None:  # type: ignore[no-untyped-def]  # fixture
    """Its best-of-n loop: branches go their own ways, the winner takes the parent's id and closes silently."""
    output = script(
        """
import httpx
def at(s): return s.run_code("print(x, open('/root/f').read())").stdout
with Sandbox(host=HOST) as s:
    s.run_code("x = 1; open('/root/f', 'w').write('start')")
    first, second, third = s.fork(3)
    second.run_code("x = 2; open('/root/f', 'w').write('second')")
    third.run_code("x = 3")
    print([at(s), at(first), at(second), at(third), len({s.id, first.id, second.id, third.id})])
    grandchild, = second.fork()
    grandchild.run_code("x += 10")
    print([at(grandchild), at(second)])
    s.merge_into(second)
    print([at(s)])
    second.close()
    try: Client(HOST).merge_into(s.id, second.id)
    except httpx.HTTPStatusError as e: print([e.response.status_code])
    try: s.merge_into(s)
    except ValueError: print(["itself"])
    for branch in (first, third, grandchild): branch.close()
    print([at(s)])
"""
    )
    assert lines(output) == [
        ["1 start", "1 start", "2 second", "3 start", 4],
        ["12 second", "2 second"],
        ["2 second"],
        [404],
        ["itself"],
        ["2 second"],
    ]


def test_published_fork_range(script) -> None:  # type: ignore[no-untyped-def]  # fixture
    """It refuses 0 itself; 33 is the daemon's 400, an unknown parent its 404; 32 are made, each ready."""
    output = script(
        """
import httpx
with Sandbox(host=HOST) as s:
    try: s.fork(0)
    except ValueError: print(["ValueError"])
    try: s.fork(33)
    except httpx.HTTPStatusError as e: print([e.response.status_code, "32" in e.response.json()["error"]])
    try: Client(HOST).fork_sandbox("sbx_" + "0" * 32)
    except httpx.HTTPStatusError as e: print([e.response.status_code])
    s.run_code("x = 7")
    children = s.fork(32)
    print([len(children), {c.run_code("print(x)").stdout for c in children}])
    for c in children: c.close()
"""
    )
    assert lines(output) == [["ValueError"], [400, True], [404], [32, {"7"}]]


def test_published_diff(script) -> None:  # type: ignore[no-untyped-def]  # fixture
    """Its own way to compare, by commands in both sandboxes, works here."""
    output = script(
        """
with Sandbox(host=HOST) as s:
    s.run_code("mkdir /data; echo 1 > /root/same; echo 1 > /root/changed; echo 1 > /tmp/gone; echo 1 > /data/d", "bash")
    other, = s.fork()
    with other:
        other.run_code("echo 2 > /root/changed; rm /tmp/gone; echo 1 > '/root/new name'; rm /data/d", "bash")
        print([s.diff(other), s.diff(other, paths=["/data"])])
"""
    )
    assert lines(output) == [
        [
            {"added": ["/root/new name"], "removed": ["/tmp/gone"], "modified": ["/root/changed"]},
            {"added": [], "removed": ["/data/d"], "modified": []},
        ]
    ]


def test_published_environment(script, compat_daemon, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]  # fixture
    """PODFLARE_API_URL directs a plain Sandbox; no pin to another place is left on disk."""
    text = "with Sandbox() as s: print([s.run_code('print(1)').stdout])"
    assert lines(script(text, PODFLARE_API_URL=compat_daemon.url)) == [["1"]]
    pinned = [path.read_text() for path in tmp_path.rglob("region-cache.json")]
    assert all(json.loads(text).get("url") in (None, compat_daemon.url) for text in pinned)


def test_published_client_survives_the_warning_of_the_end(script) -> None:  # type: ignore[no-untyped-def]  # fixture
    """A cell in a sandbox that ends soon gives its result; the warning is one more event of its stream."""
    output = script("""
with Sandbox(host=HOST, timeout_seconds=4) as s:
    while "warning" not in [e.type for e in s.run_code_stream("1")]: pass
    r = s.run_code("print(42)")
    print([r.stdout, r.stderr, r.exit_code])
""")
    assert lines(output) == [["42", "", 0]]


def test_published_keys(script, data_dir: Path) -> None:  # type: ignore[no-untyped-def]  # fixture
    """Both refusals of a key arrive as 401 with the documented texts; a right key works."""
    text = """
import httpx
for key in (None, "pf_wrong"):
    try: Sandbox(client=Client(HOST, api_key=key))
    except httpx.HTTPStatusError as e: print([e.response.status_code, e.response.json()["error"]])
with Sandbox(host=HOST, api_key="pf_right") as s: print([s.run_code("print(1)").stdout])
"""
    with served(data_dir, env={"PODFLARE_API_KEYS": "pf_right"}) as daemon:
        output = script(text, host=daemon.url)
    assert lines(output) == [
        [401, "missing Authorization: Bearer <key>"],
        [401, "invalid api key"],
        ["1"],
    ]


def test_published_anthropic_handler_agrees(script, compat_daemon) -> None:  # type: ignore[no-untyped-def]  # fixture
    """For well-formed blocks, its Anthropic handler and ours give the same tool_result."""
    from podflare import close_default_client
    from podflare.integrations.anthropic import handle_code_execution_tool_use

    codes = ["print(1)", "import sys; print('e', file=sys.stderr)", "pass", "import sys; sys.exit(2)"]
    blocks = [
        {"type": "tool_use", "id": f"toolu_{i}", "name": "code_execution", "input": {"code": code}}
        for i, code in enumerate(codes)
    ]
    output = script(
        "from podflare.integrations.anthropic import handle_code_execution_tool_use as handle\n"
        f"with Sandbox(host=HOST) as s: print([handle(block, s) for block in {blocks!r}])\n"
    )
    with Sandbox(host=compat_daemon.url) as sandbox:
        ours = [handle_code_execution_tool_use(block, sandbox) for block in blocks]
    close_default_client()
    assert lines(output) == [ours]
