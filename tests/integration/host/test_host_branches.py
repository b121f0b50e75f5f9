"""Fork, merge and diff over HTTP on the process engine: state, ids, owners, ends, and what is left afterwards."""

from __future__ import annotations

import json
import os

import anyio
import pytest

from hosting import Host, text, wait_until
from podflare.host.auth import digest

pytestmark = [pytest.mark.anyio, pytest.mark.any_engine]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def machine_names(h: Host) -> set[str]:
    """Directories of machines and layers on disk."""
    return set(os.listdir(h.engine._data / "machines"))


async def listed(h: Host) -> list[str]:
    return [one["id"] for one in (await h.client.get("/v1/sandboxes")).json()["sandboxes"]]


@pytest.mark.process_engine("changed files of virtual machines are not counted")
async def test_usage_is_measured_when_asked_for(walled):
    """With usage=true one sandbox and the list tell what each uses by itself; without it null, at no cost."""
    async with walled() as h:
        parent = await h.create()
        await h.exec(parent, "x = bytearray(b'x' * (32 << 20)); open('/root/f', 'w').write('a')")
        (child,) = await h.fork(parent)
        await h.exec(child, "open('/root/g', 'w').write('b'); open('/root/f', 'w').write('b')")
        told = (await h.client.get(f"/v1/sandboxes/{child}", params={"usage": "true"})).json()["usage"]
        assert set(told) == {"memory_bytes", "private_memory_bytes", "processes", "changed_files", "disk_bytes"}
        assert told["changed_files"] == 2 and told["private_memory_bytes"] < 24 << 20 and told["processes"] >= 1
        answer = (await h.client.get("/v1/sandboxes", params={"usage": "true"})).json()["sandboxes"]
        assert [(one["id"], one["usage"]["changed_files"]) for one in answer] == [(parent, 1), (child, 2)]
        plain = (await h.client.get("/v1/sandboxes")).json()["sandboxes"]
        assert [one["usage"] for one in plain] == [None, None]
        refused = await h.client.get("/v1/sandboxes", params={"usage": "yes"})
        assert refused.status_code == 400 and "true or false" in refused.json()["error"]


# Fork.


async def test_children_go_on_from_the_parents_state_and_apart(walled):
    """Memory and files of the parent are in each child; what a branch does afterwards stays in it."""
    async with walled() as h:
        parent = await h.create()
        await h.exec(parent, "x = [1]; open('/root/f', 'w').write('a')")
        one, two = await h.fork(parent, n=2)
        for sandbox, value in ((one, 2), (two, 3), (parent, 4)):
            await h.exec(sandbox, f"x.append({value}); open('/root/f', 'w').write('{value}')")
        for sandbox, value in ((one, 2), (two, 3), (parent, 4)):
            assert text(await h.exec(sandbox, "print(x, open('/root/f').read())")) == f"[1, {value}] {value}"


async def test_a_fork_tells_its_place_in_the_tree(walled):
    """parent_id, generation, children and fork_report of parent, child and grandchild are what happened."""
    async with walled() as h:
        root = await h.create(metadata={"who": "me"}, timeout_seconds=600, ram_mib=512)
        (child,) = await h.fork(root)
        (grandchild,) = await h.fork(child)
        told = {one: await h.info(one) for one in (root, child, grandchild)}
        assert [(told[one]["parent_id"], told[one]["generation"]) for one in told] == [(None, 0), (root, 1), (child, 2)]
        assert [told[one]["children"] for one in told] == [[child], [grandchild], []]
        assert told[root]["fork_report"] is None
        assert told[child]["fork_report"] == {"threads": [], "processes": 0, "sockets": 0, "pipes": 0, "terminals": 0}
        same = ("metadata", "timeout_seconds", "idle_timeout_seconds", "ram_mib", "rootfs_gb", "template", "isolation")
        assert all(told[grandchild][key] == told[root][key] for key in same)
        assert told[child]["created_at_ms"] >= told[root]["created_at_ms"]
        await h.client.delete(f"/v1/sandboxes/{child}")
        assert (await h.info(root))["children"] == [] and (await h.info(grandchild))["parent_id"] == child
        assert text(await h.exec(grandchild, "print(1)")) == "1"


@pytest.mark.process_engine("virtual machines take all along")
async def test_what_stayed_behind_is_told_once(walled):
    """Threads, processes and sockets of the parent are in the report, and in one line of a child's first cell."""
    async with walled() as h:
        parent = await h.create()
        await h.exec(
            parent,
            "import subprocess, threading, socket\np = subprocess.Popen(['sleep', '1000']); s = socket.socket()\n"
            "threading.Thread(target=threading.Event().wait, name='worker', daemon=True).start()",
        )
        (child,) = await h.fork(parent)
        report = (await h.info(child))["fork_report"]
        assert (report["threads"], report["processes"], report["sockets"]) == (["worker"], 1, 1)
        first, second = await h.exec(child, "print(1)"), await h.exec(child, "print(1)")
        assert "1 background thread, 1 process, 1 socket" in text(first, "stderr") and text(first) == "1"
        assert text(second, "stderr") == "" and text(await h.exec(parent, "1"), "stderr") == ""


async def test_random_numbers_differ_unless_they_are_asked_not_to(walled):
    """Children draw different numbers from each other; with reseed=false all draw the parent's."""
    async with walled() as h:
        parent = await h.create()
        await h.exec(parent, "import random; random.seed(1)")
        draw = "import random; print(random.random())"
        fresh = {text(await h.exec(one, draw)) for one in await h.fork(parent, n=3)}
        same = {text(await h.exec(one, draw)) for one in await h.fork(parent, n=3, reseed=False)}
        assert len(fresh) == 3 and same == {text(await h.exec(parent, draw))} and not same & fresh


async def test_errors_in_a_fork_show_the_right_lines(walled):
    """A function defined before the fork and a cell run after it both show their own source in tracebacks."""
    async with walled() as h:
        parent = await h.create()
        await h.exec(parent, "def boom():\n    raise ValueError('from before')  # the parent's line")
        (child,) = await h.fork(parent)
        await h.exec(parent, "pass  # another cell of the parent")
        failed = text(await h.exec(child, "y = 1\nboom()  # the child's line"), "stderr")
        assert "the parent's line" in failed and "the child's line" in failed


async def test_a_fork_waits_for_the_running_cell(walled):
    """A fork asked for while a cell runs has that cell's whole effect."""
    async with walled() as h:
        parent = await h.create()
        children: list[str] = []

        async def fork() -> None:
            children.extend(await h.fork(parent, n=2))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(h.exec, parent, "import time; done = 0; time.sleep(0.5); done = 1")
            await anyio.sleep(0.1)
            tasks.start_soon(fork)
        assert [text(await h.exec(one, "print(done)")) for one in children] == ["1", "1"]


async def test_thirty_two_children(walled):
    """The largest fork gives 32 sandboxes that all work and all go."""
    async with walled() as h:
        parent = await h.create()
        await h.exec(parent, "x = 7")
        children = await h.fork(parent, n=32)
        assert len(set(children)) == 32 and (await h.info(parent))["children"] == children
        said: dict[str, str] = {}

        async def ask(one: str) -> None:
            said[one] = text(await h.exec(one, f"x += 1; print(x, {children.index(one)})"))

        async with anyio.create_task_group() as tasks:
            for one in children:
                tasks.start_soon(ask, one)
        assert [said[one] for one in children] == [f"8 {number}" for number in range(32)]
        for one in children:
            assert (await h.client.delete(f"/v1/sandboxes/{one}")).status_code == 204
        assert await listed(h) == [parent]


async def test_a_client_that_leaves_a_fork_leaves_no_children(walled):
    """Whenever the client goes away while its fork is made, no child is left and the parent can be forked again."""
    async with walled() as h:
        parent = await h.create()
        await h.exec(
            parent, "x = 1; import os; os.mkdir('/root/d'); [open(f'/root/d/{n}', 'w').close() for n in range(300)]"
        )
        before = machine_names(h)
        request = f"POST /v1/sandboxes/{parent}/fork HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\n" + '{"n":4}'
        for delay_ms in (1, 4, 10, 20, 35, 60):
            _, writer = await h.connect()
            writer.write(request.encode())
            await anyio.sleep(delay_ms / 1000)
            writer.transport.abort()
            # A fork answers only after the one before it in the queue is over, one way or the other.
            (again,) = await h.fork(parent)
            assert text(await h.exec(again, "print(x)")) == "1"
            for one in await listed(h):
                if one != parent:  # of an answer that was complete before the connection broke
                    await h.client.delete(f"/v1/sandboxes/{one}")
        await wait_until(lambda: machine_names(h) == before)
        assert await listed(h) == [parent]


async def test_deleting_the_parent_while_it_is_forked(walled):
    """A parent deleted at any moment of its fork: children that are answered live, otherwise none is left."""
    async with walled() as h:
        for delay_ms in (1, 5, 10, 20, 30, 45, 60):
            parent = await h.create()
            answers = []

            async def fork(parent: str = parent, answers: list = answers) -> None:
                answers.append(await h.client.post(f"/v1/sandboxes/{parent}/fork", json={"n": 2}))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(fork)
                await anyio.sleep(delay_ms / 1000)
                assert (await h.client.delete(f"/v1/sandboxes/{parent}")).status_code == 204
            (answer,) = answers
            if answer.status_code == 200:
                for one in answer.json()["children"]:
                    assert text(await h.exec(one, "print(1)")) == "1"
                    await h.client.delete(f"/v1/sandboxes/{one}")
            else:
                assert answer.status_code == 404 and "it was closed" in answer.json()["error"]
            assert await listed(h) == []
        await wait_until(lambda: machine_names(h) == set())


async def test_children_outlive_a_parent_that_expires(walled):
    """A parent at the end of its lifetime is gone; its fork has a clock of its own and works on."""
    async with walled() as h:
        parent = await h.create(timeout_seconds=600)
        await h.exec(parent, "x = 5")
        (child,) = await h.fork(parent)
        assert (await h.client.patch(f"/v1/sandboxes/{parent}", json={"timeout_seconds": 1})).status_code == 200
        with anyio.fail_after(20):
            while (await h.client.get(f"/v1/sandboxes/{parent}")).status_code == 200:
                await anyio.sleep(0.02)
        assert text(await h.exec(child, "print(x)")) == "5"
        assert (await h.info(child))["parent_id"] == parent


async def test_limits_of_the_parent_hold_in_the_child(walled, engine_name):
    """A fork of a sandbox with its own limits has the same ones."""
    rootfs_gb = 2 if engine_name == "process" else 4  # a virtual machine with another disk would have to be booted
    async with walled() as h:
        parent = await h.create(ram_mib=200, rootfs_gb=rootfs_gb)
        (child,) = await h.fork(parent)
        info = await h.info(child)
        assert (info["ram_mib"], info["rootfs_gb"]) == (200, rootfs_gb)
        if "memory_limit" in info["isolation"]:
            cell = await h.exec(child, "b = b'x' * (400 << 20)")
            assert cell[-1]["data"] != 0 and "200 MiB" in text(cell, "stderr")


# Owners.


@pytest.mark.both_engines
async def test_other_owners_can_neither_fork_nor_merge_nor_compare(walled):
    """To another key a sandbox does not exist, in any place of these calls, and nothing happens to it."""
    async with walled(key_digests=(digest("a"), digest("b"))) as h:

        async def create(key: str) -> str:
            return str((await h.client.post("/v1/sandboxes", headers=bearer(key))).json()["id"])

        mine, yours = await create("a"), await create("b")
        calls = [
            ("POST", f"{yours}/fork"),
            ("POST", f"{yours}/merge_into/{mine}"),
            ("POST", f"{mine}/merge_into/{yours}"),
            ("GET", f"{mine}/diff/{yours}"),
            ("GET", f"{yours}/diff/{mine}"),
        ]
        for method, path in calls:
            answer = await h.client.request(method, f"/v1/sandboxes/{path}", headers=bearer("a"))
            assert (answer.status_code, answer.json()["error"]) == (404, "sandbox not found"), path
        for key, sandbox in (("a", mine), ("b", yours)):
            found = await h.client.get(f"/v1/sandboxes/{sandbox}", headers=bearer(key))
            assert found.status_code == 200
        children = (await h.client.post(f"/v1/sandboxes/{yours}/fork", headers=bearer("b"))).json()["children"]
        assert (await h.client.get(f"/v1/sandboxes/{children[0]}", headers=bearer("a"))).status_code == 404
        assert (await h.client.get(f"/v1/sandboxes/{children[0]}", headers=bearer("b"))).status_code == 200


# Merge.


@pytest.mark.both_engines
async def test_after_a_merge_the_parents_id_is_the_winner(walled):
    """Memory and files are the winner's, siblings live on, the winner's id is gone and says why, and it can go on."""
    async with walled() as h:
        parent = await h.create(metadata={"k": "v"})
        await h.exec(parent, "x = 0; open('/root/f', 'w').write('old')")
        winner, sibling = await h.fork(parent, n=2)
        await h.exec(parent, "x = 'lost'; open('/root/lost', 'w').close()")
        await h.exec(winner, "x = 'won'; open('/root/f', 'w').write('new')")
        merged = await h.merge(parent, winner)
        assert (merged.status_code, merged.content) == (204, b"")
        look = "import os; print(x, open('/root/f').read(), os.path.exists('/root/lost'))"
        assert text(await h.exec(parent, look)) == "won new False"
        assert text(await h.exec(sibling, look)) == "0 old False"
        gone = await h.client.get(f"/v1/sandboxes/{winner}")
        assert gone.status_code == 404 and f"merged into {parent}" in gone.json()["error"]
        assert (await h.client.post(f"/v1/sandboxes/{winner}/exec", json={"code": "1"})).status_code == 404
        again = await h.merge(parent, winner)
        assert again.status_code == 404 and "merged into" in again.json()["error"]
        assert (await h.client.delete(f"/v1/sandboxes/{winner}")).status_code == 204
        info = await h.info(parent)
        assert (info["children"], info["generation"], info["parent_id"]) == ([sibling], 1, None)
        assert info["metadata"] == {"k": "v"}
        (next_one,) = await h.fork(parent)
        assert text(await h.exec(next_one, look)) == "won new False"
        assert (await h.info(next_one))["generation"] == 2


@pytest.mark.process_engine("what is looked at are its groups and files")
async def test_the_replaced_state_is_really_gone(walled):
    """After a merge no process, no memory of it and no file of the parent's former state is left."""
    async with walled() as h:
        parent = await h.create()
        (former,) = h.engine._machines
        (winner,) = await h.fork(parent)
        await h.exec(parent, "import subprocess; subprocess.Popen(['sleep', '1000'])")
        await h.exec(parent, "open('/root/big', 'wb').write(b'x' * (4 << 20))")
        await h.exec(
            parent,
            "import os; os.makedirs('/dev/shm/d/e')\nfor n in 'ab': open('/dev/shm/d/' + n, 'wb').write(bytes(2**25))",
        )
        assert (await h.merge(parent, winner)).status_code == 204
        group = former.parts.cgroup
        if group is not None:
            for path in group.directories:
                left = (path / "cgroup.procs").read_text().split() if path.exists() else []
                assert left in ([], [str(former.agent_pid)])
            await wait_until(lambda: group.usage().memory_bytes < 32 << 20)
        assert not former.directory.exists()
        assert text(await h.exec(parent, "import os; print(os.listdir('/dev/shm'))")) == "[]"


async def test_merge_with_itself_or_what_is_no_sandbox(walled):
    """Itself is 400; unknown, closed and malformed ids are 404 in either place; nothing has changed."""
    async with walled() as h:
        sandbox, closed = await h.create(), await h.create()
        await h.exec(sandbox, "x = 1")
        await h.client.delete(f"/v1/sandboxes/{closed}")
        for other in (closed, "sbx_" + "0" * 32, "nonsense"):
            assert (await h.merge(sandbox, other)).status_code == 404
            assert (await h.merge(other, sandbox)).status_code == 404
        assert (await h.merge(sandbox, sandbox)).status_code == 400
        assert text(await h.exec(sandbox, "print(x)")) == "1"


async def test_any_sandbox_may_win(walled):
    """A stranger, and an ancestor of the parent, can be merged in; the tree stays a tree."""
    async with walled() as h:
        root = await h.create()
        await h.exec(root, "who = 'root'")
        (child,) = await h.fork(root)
        (grandchild,) = await h.fork(child)
        stranger = await h.create(ram_mib=256)
        await h.exec(stranger, "who = 'stranger'")
        assert (await h.merge(grandchild, root)).status_code == 204  # the root's machine under the grandchild's id
        assert text(await h.exec(grandchild, "print(who)")) == "root"
        info = await h.info(grandchild)
        assert (info["parent_id"], info["children"]) == (None, [child])
        assert (await h.info(child))["parent_id"] == grandchild
        assert (await h.merge(child, stranger)).status_code == 204
        assert text(await h.exec(child, "print(who)")) == "stranger"
        info = await h.info(child)
        assert (info["ram_mib"], info["parent_id"]) == (256, grandchild)
        assert set(await listed(h)) == {child, grandchild}


async def test_many_rounds(walled, engine_name):
    """Fifty rounds of fork(2), work and merge, past every depth that the kernel has, give a right state each time."""
    rounds = 50 if engine_name == "process" else 10  # of virtual machines none is deeper than another
    async with walled() as h:
        sandbox = await h.create()
        await h.exec(sandbox, "steps = []; notes = open('/root/notes', 'w')")
        for turn in range(rounds):
            answer = await h.client.post(f"/v1/sandboxes/{sandbox}/fork", json={"n": 2})
            assert answer.status_code == 200, answer.text
            winner, loser = answer.json()["children"]
            await h.exec(loser, "steps.append('wrong'); notes.write('wrong')")
            await h.exec(winner, f"steps.append({turn}); print({turn}, file=notes, flush=True)")
            assert (await h.merge(sandbox, winner)).status_code == 204
            await h.client.delete(f"/v1/sandboxes/{loser}")
        told = text(await h.exec(sandbox, "print(steps); print(open('/root/notes').read().split())"))
        assert told == f"{list(range(rounds))}\n{[str(turn) for turn in range(rounds)]}"
        assert (await h.info(sandbox))["generation"] == rounds and await listed(h) == [sandbox]


# Diff.


@pytest.mark.both_engines
async def test_diff_over_http(walled):
    """Lists are sorted absolute paths; default paths are /root and /tmp; detail comes when it is asked for."""
    async with walled() as h:
        parent = await h.create()
        await h.exec(parent, "open('/root/same', 'w').write('s'); open('/root/gone', 'w').write('g')")
        (child,) = await h.fork(parent)
        await h.exec(
            child,
            "rm /root/gone; echo t > /tmp/t; echo n > /root/n; echo y >> /root/same; echo e > /opt/e",
            language="bash",
        )
        expected = {"added": ["/root/n", "/tmp/t"], "removed": ["/root/gone"], "modified": ["/root/same"]}
        assert await h.diff(parent, child) == expected
        assert await h.diff(parent, child, paths=["/root/", "//tmp/./x/.."]) == expected
        assert (await h.diff(parent, child, paths="/opt"))["added"] == ["/opt/e"]
        assert await h.diff(child, child) == {"added": [], "removed": [], "modified": []}
        detail = (await h.diff(parent, child, detail="true"))["detail"]
        assert set(detail) == {"/root/n", "/tmp/t", "/root/gone", "/root/same"}
        assert detail["/root/gone"] == {
            "kind": "file",
            "size_before": 1,
            "size_after": None,
            "patch": "--- a/root/gone\n+++ /dev/null\n@@ -1 +0,0 @@\n-g\n\\ No newline at end of file\n",
        }


async def test_diff_names_of_any_bytes_in_plain_ascii(walled):
    """Names with newlines, U+2028 and bytes that are not UTF-8 come back as JSON escapes, and match as a path again."""
    async with walled() as h:
        parent = await h.create()
        (child,) = await h.fork(parent)
        await h.exec(child, "open(b'/root/\\xff\\n\\xe2\\x80\\xa8', 'w').close()")
        answer = await h.client.get(f"/v1/sandboxes/{parent}/diff/{child}")
        assert answer.content.isascii()
        (name,) = json.loads(answer.content)["added"]
        assert name.encode("utf-8", "surrogateescape") == b"/root/\xff\n\xe2\x80\xa8"
        again = await h.client.get(f"/v1/sandboxes/{parent}/diff/{child}?paths=/root/%FF%0A%E2%80%A8")
        assert json.loads(again.content)["added"] == [name]


WRONG_QUERIES = ["paths=root", "paths=", "paths=/a%00b", "paths=/" + "x" * 5000, "detail=yes"]
WRONG_QUERIES += ["&".join(["paths=/x"] * 65), "&".join(["a=b"] * 200)]


async def test_wrong_diff_queries_are_400(walled):
    """Relative, empty and endless paths, too many of them, and odd flags are refused with what is wrong."""
    async with walled() as h:
        one = await h.create()
        for query in WRONG_QUERIES:
            answer = await h.client.get(f"/v1/sandboxes/{one}/diff/{one}?{query}")
            assert (answer.status_code, answer.json()["code"]) == (400, "bad_request"), query[:80]


async def test_diff_with_a_gone_sandbox_says_so(walled):
    """A deleted or merged sandbox in either place is 404 with its cause."""
    async with walled() as h:
        parent = await h.create()
        one, two = await h.fork(parent, n=2)
        await h.client.delete(f"/v1/sandboxes/{one}")
        await h.merge(parent, two)
        for left, right, why in ((parent, one, "it was closed"), (two, parent, "merged into")):
            answer = await h.client.get(f"/v1/sandboxes/{left}/diff/{right}")
            assert answer.status_code == 404 and why in answer.json()["error"]


async def test_diff_while_the_sandboxes_go_and_are_merged(walled):
    """Compared while it is merged or deleted, a sandbox gives the right lists or an error, never removed files."""
    async with walled() as h:
        parent = await h.create()
        await h.exec(parent, "[open(f'/root/{n}', 'w').write('x') for n in range(500)]")
        one, two = await h.fork(parent, n=2)
        answers: list[tuple[int, dict[str, object]]] = []
        stop = anyio.Event()

        async def compare(left: str, right: str) -> None:
            while not stop.is_set():
                answer = await h.client.get(f"/v1/sandboxes/{left}/diff/{right}")
                answers.append((answer.status_code, answer.json()))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(compare, parent, two)
            tasks.start_soon(compare, one, two)
            await wait_until(lambda: len(answers) > 4)
            assert (await h.merge(parent, one)).status_code == 204
            await wait_until(lambda: any(status == 404 for status, _ in answers))
            assert (await h.client.delete(f"/v1/sandboxes/{two}")).status_code == 204
            count = len(answers)
            await wait_until(lambda: len(answers) > count + 4)
            stop.set()
        assert {status for status, _ in answers} <= {200, 404, 409}
        assert all(body == {"added": [], "removed": [], "modified": []} for status, body in answers if status == 200)
