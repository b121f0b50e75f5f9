"""Three-way merge over HTTP: files and variables as one step, conflicts, refusals, a daemon that dies amid one."""

from __future__ import annotations

from typing import Any

import anyio
import httpx
import pytest

from hosting import Host, text

pytestmark = [pytest.mark.anyio, pytest.mark.any_engine]


async def merge(h: Host, sandbox: str, other: str, **body: Any) -> dict[str, Any]:
    answer = await h.client.post(f"/v1/sandboxes/{sandbox}/merge/{other}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def two_forks(h: Host, parent: str) -> list[str]:
    """Two forks that know for sure what their variables were: a look before the first cell has all its time."""
    children = await h.fork(parent, n=2)
    await h.diff(*children, variables="true")
    return children


async def value(h: Host, sandbox: str, expression: str) -> str:
    return text(await h.exec(sandbox, f"print({expression})"))


async def test_files_and_variables_come_over(walled):
    """What the other one changed since the fork is there, what this one changed stays, the other is as it was."""
    async with walled() as h:
        parent = await h.create()
        await h.exec(parent, "a, b, c, gone = [1], [2], [3], [4]; open('/root/f', 'w').write('1\\n2\\n3\\n')")
        one, two = await two_forks(h, parent)
        await h.exec(one, "a.append('one'); open('/root/f', 'w').write('one\\n2\\n3\\n'); mine = 1")
        await h.exec(
            two, "b.append('two'); del gone; new = lambda x: x + 1; open('/root/f', 'w').write('1\\n2\\nthree\\n')"
        )
        report = await merge(h, one, two)
        assert report == {
            "merged": {"files": ["/root/f"], "variables": ["b", "gone", "new"]},
            "conflicts": [],
            "not_transferable": [],
            "applied": True,
        }
        assert await value(h, one, "a, b, c, mine, new(1), 'gone' in globals(), open('/root/f').read()") == (
            "[1, 'one'] [2, 'two'] [3] 1 2 False one\n2\nthree\n"
        )
        assert (
            await value(h, two, "a, b, 'mine' in globals(), open('/root/f').read()")
            == "[1] [2, 'two'] False 1\n2\nthree\n"
        )
        again = await merge(h, one, two)
        assert again["applied"] and again["merged"] == {"files": [], "variables": []}
        await h.exec(two, "b.append('more'); open('/root/g', 'w').write('g')")
        third = await merge(h, one, two)
        assert third["merged"] == {"files": ["/root/g"], "variables": ["b"]}
        back = await merge(h, two, one)
        assert back["merged"] == {"files": ["/root/f"], "variables": ["a", "mine"]}
        assert await value(h, two, "a, b, mine") == "[1, 'one'] [2, 'two', 'more'] 1"


async def test_a_conflict_changes_nothing(walled):
    """One conflict, in a file or a variable, keeps all else back; both kinds are told; a side resolves them."""
    async with walled() as h:
        parent = await h.create()
        await h.exec(parent, "x = 1; y = 1; open('/root/f', 'w').write('1')")
        one, two = await two_forks(h, parent)
        await h.exec(one, "x = 2; open('/root/f', 'w').write('2')")
        await h.exec(two, "x = 3; y = 3; open('/root/f', 'w').write('3'); open('/root/g', 'w').write('g')")
        report = await merge(h, one, two)
        assert not report["applied"]
        told = [(item["kind"], item["name"], item["why"], item["resolution"]) for item in report["conflicts"]]
        assert told == [
            ("file", "/root/f", "both changed the same lines", None),
            ("variable", "x", "changed in both", None),
        ]
        assert report["conflicts"][0]["ours"] == {"type": "file", "size": 1}
        assert report["conflicts"][1]["theirs"]["type"] == "int"
        assert await value(h, one, "x, y, open('/root/f').read(), *__import__('glob').glob('*')") == "2 1 2 f"
        versions = {item["kind"]: item["version"] for item in report["conflicts"]}
        chosen = [
            {"kind": "file", "name": "/root/f", "resolution": "theirs", "version": versions["file"]},
            {"kind": "variable", "name": "x", "resolution": "ours", "version": versions["variable"]},
        ]
        await h.exec(two, "open('/root/f', 'w').write('4')")
        changed = await merge(h, one, two, resolutions=chosen)
        assert not changed["applied"]
        assert [item["resolution"] for item in changed["conflicts"]] == [None, "ours"]
        chosen[0]["version"] = changed["conflicts"][0]["version"]
        done = await merge(h, one, two, resolutions=chosen)
        assert done["applied"] and done["merged"] == {"files": ["/root/f", "/root/g"], "variables": ["y"]}
        assert await value(h, one, "x, y, open('/root/f').read()") == "2 3 4"
        settled = await merge(h, one, two)
        assert settled["applied"] and settled["merged"] == {"files": [], "variables": []} and not settled["conflicts"]


@pytest.mark.parametrize(("side", "expected"), [("ours", "2 2"), ("theirs", "3 3")])
async def test_one_side_decides_all(walled, side, expected):
    """on_conflict gives every conflict to that side."""
    async with walled() as h:
        parent = await h.create()
        one, two = await two_forks(h, parent)
        for branch, number in ((one, 2), (two, 3)):
            await h.exec(branch, f"x = {number}; open('/root/f', 'w').write('{number}')")
        report = await merge(h, one, two, on_conflict=side)
        assert report["applied"] and {item["resolution"] for item in report["conflicts"]} == {side}
        assert await value(h, one, "x, open('/root/f').read()") == expected


async def test_what_cannot_travel_is_told(walled):
    """A generator and a socket file stay behind and are named; asked for by name, a variable is a refusal."""
    async with walled() as h:
        parent = await h.create()
        one, two = await two_forks(h, parent)
        await h.exec(
            two,
            "import socket, threading\ng = (n for n in [1]); lock = threading.Lock(); good = 1\n"
            "s = socket.socket(socket.AF_UNIX); s.bind('/root/s')",
        )
        report = await merge(h, one, two)
        lost = {(item["kind"], item["name"], item["type"]) for item in report["not_transferable"]}
        assert {
            ("file", "/root/s", "socket"),
            ("variable", "g", "generator"),
            ("variable", "lock", "_thread.lock"),
        } <= lost
        assert report["applied"] and {"good", "socket", "threading"} <= {*report["merged"]["variables"]}
        refused = await h.client.post(f"/v1/sandboxes/{one}/merge/{two}", json={"variables": ["g"]})
        assert refused.status_code == 409 and "'g' cannot be merged" in refused.json()["error"]


async def test_only_what_is_asked_for(walled):
    """Files alone, variables alone, some of each."""
    async with walled() as h:
        parent = await h.create()
        one, two = await two_forks(h, parent)
        await h.exec(two, "x = y = 1; open('/root/f', 'w').close(); open('/root/g', 'w').close()")
        assert (await merge(h, one, two, files=False, variables=["x"]))["merged"] == {"files": [], "variables": ["x"]}
        some = await merge(h, one, two, files=["/root/f"], variables=False)
        assert some["merged"] == {"files": ["/root/f"], "variables": []}
        rest = await merge(h, one, two)
        assert rest["merged"] == {"files": ["/root/g"], "variables": ["y"]}


async def test_refusals(walled, host):
    """Itself, strangers, unknown values and engines without layers are refused with what is wrong."""
    async with walled() as h:
        one = await h.create()
        two = await h.create()

        async def status(other: str, **body: Any) -> tuple[int, str]:
            answer = await h.client.post(f"/v1/sandboxes/{one}/merge/{other}", json=body)
            return answer.status_code, answer.json()["error"]

        assert (await status(one))[0] == 400
        assert (await status("sbx_" + "0" * 32))[0] == 404
        for body in (
            {"files": "x"},
            {"files": ["x"]},
            {"variables": ["no name"]},
            {"variables": 1},
            {"on_conflict": "mine"},
            {"resolutions": [{"kind": "file", "name": "/x", "resolution": "both"}]},
            {"timeout_seconds": 0},
        ):
            code, error = await status(two, **body)
            assert code == 400 and next(iter(body))[:5] in error, (body, error)
        await h.client.delete(f"/v1/sandboxes/{two}")
        assert (await status(two))[0] == 404
    async with host() as h:
        one, two = await h.create(), await h.create()
        assert (await h.client.post(f"/v1/sandboxes/{one}/merge/{two}")).status_code == 501


async def test_cells_are_waited_for(walled):
    """A merge has the whole effect of a cell that runs, and is given up in time if that does not end."""
    async with walled() as h:
        parent = await h.create()
        one, two = await two_forks(h, parent)
        reports: list[dict[str, Any]] = []

        async def run() -> None:
            reports.append(await merge(h, one, two))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(h.exec, two, "import time; x = 0; time.sleep(0.5); x = 1")
            await anyio.sleep(0.1)
            tasks.start_soon(run)
        assert reports[0]["applied"] and await value(h, one, "x") == "1"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(h.exec, one, "time.sleep(60)")
            await anyio.sleep(0.1)
            late = await h.client.post(f"/v1/sandboxes/{one}/merge/{two}", json={"timeout_seconds": 0.2})
            assert late.status_code == 504 and "nothing has changed" in late.json()["error"]
            await h.client.post(f"/v1/sandboxes/{one}/interrupt")


async def test_two_merges_at_once_do_not_wait_for_each_other_forever(walled):
    """Merging two sandboxes into each other at the same time ends, and both have all."""
    async with walled() as h:
        parent = await h.create()
        one, two = await two_forks(h, parent)
        await h.exec(one, "x = 1; open('/root/x', 'w').close()")
        await h.exec(two, "y = 2; open('/root/y', 'w').close()")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(merge, h, one, two)
            tasks.start_soon(merge, h, two, one)
        for branch in (one, two):
            assert await value(h, branch, "x, y, sorted(__import__('glob').glob('*'))") == "1 2 ['x', 'y']"


async def test_values_that_cannot_be_set_are_left_out(walled):
    """A value whose rebuilding fails in the receiver is told, everything else comes."""
    async with walled() as h:
        parent = await h.create()
        await h.exec(parent, "class Bad:\n    def __setstate__(self, state): raise OSError('no')")
        one, two = await two_forks(h, parent)
        await h.exec(two, "bad = Bad(); bad.x = 1; good = 1; open('/root/f', 'w').close()")
        report = await merge(h, one, two)
        assert report["applied"] and report["merged"] == {"files": ["/root/f"], "variables": ["good"]}
        assert [item["name"] for item in report["not_transferable"]] == ["bad"]


async def test_a_client_that_leaves_gets_all_or_nothing(walled, engine_name):
    """A merge whose client goes away is done or not begun, and the sandboxes work on."""
    async with walled() as h:
        parent = await h.create()
        one, two = await two_forks(h, parent)
        size = 30_000_000 if engine_name == "process" else 2_000_000  # translated, all takes longer
        await h.exec(two, f"x = bytes({size}); open('/root/f', 'wb').write(x)")
        for wait_s in (0.005, 0.05, 0.1):
            with pytest.raises(httpx.TimeoutException):
                await h.client.post(f"/v1/sandboxes/{one}/merge/{two}", timeout=wait_s)
            state = await value(h, one, "'x' in globals(), *__import__('glob').glob('*')")
            assert state in ("False", "True f"), state
            assert "podflare" not in await value(h, one, "*__import__('os').listdir('/')")
            if state == "True f":
                break
        assert (await merge(h, one, two))["applied"] and await value(h, one, "len(x)") == str(size)
