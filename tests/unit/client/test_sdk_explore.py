"""explore and explore_async over a daemon in memory: who wins, what is left, on every way out."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest
from forking_daemon import ForkingDaemon
from hypothesis import given
from hypothesis import strategies as st

from podflare import (
    AsyncClient,
    AsyncSandbox,
    Attempt,
    Client,
    ExecResult,
    NoCapacity,
    Sandbox,
    SandboxNotFound,
    explore,
    explore_async,
)
from podflare.client._concurrency import each_sync
from podflare.client._ranking import Ranking, score_cell, scored


@pytest.fixture
def world() -> ForkingDaemon:
    return ForkingDaemon()


@pytest.fixture
def root(world: ForkingDaemon) -> Iterator[Sandbox]:
    """A sandbox with x = 1."""
    with Client("http://daemon.test", transport=httpx.MockTransport(world)) as client:
        with Sandbox(client=client) as sandbox:
            sandbox.run_code("x = 1")
            yield sandbox


def steps(*values: object) -> list[str]:
    return [f"x += {value!r}" for value in values]


def test_the_best_is_merged_and_the_rest_closed(world: ForkingDaemon, root: Sandbox) -> None:
    """With keep=1 the sandbox goes on as the best branch, under its own id, and nothing else is left."""
    found = explore(root, steps(3, 9, 5), "x")
    assert found.best is not None and (found.best.index, found.best.score) == (1, 10.0)
    assert [attempt.score for attempt in found.attempts] == [4.0, 10.0, 6.0]
    assert found.branches == ()
    assert list(world.alive) == [root.id] and world.alive[root.id]["x"] == 10


def test_several_kept_branches_are_the_callers(world: ForkingDaemon, root: Sandbox) -> None:
    """With keep=2 the best two come back in order, open; the sandbox itself is as it was."""
    found = explore(root, steps(3, 9, 5), "x", keep=2)
    assert [attempt.index for attempt in found.ranking] == [1, 2]
    assert [branch.run_code("x").results[0].text for branch in found.branches] == ["10", "6"]
    assert set(world.alive) == {root.id, *(branch.id for branch in found.branches)}
    assert world.alive[root.id]["x"] == 1


def test_each_candidate_starts_from_the_same_state(world: ForkingDaemon, root: Sandbox) -> None:
    """Seventy candidates are forked in three batches, none sees another's change, at most 32 more live at once."""
    found = explore(root, steps(*range(70)), "x", parallel=3)
    assert [attempt.score for attempt in found.attempts] == [1.0 + step for step in range(70)]
    assert world.forks == [32, 32, 6]
    assert world.most_alive <= 1 + 32 + 1
    assert world.alive[root.id]["x"] == 70


def test_scoring_by_a_callable(world: ForkingDaemon, root: Sandbox) -> None:
    """A callable gets branch and result; None and NaN take a candidate out of the race."""
    seen: list[tuple[str, bool]] = []

    def score(branch: Sandbox, result: ExecResult) -> float | None:
        seen.append((branch.id, result.ok))
        x = float(branch.run_code("x").results[0].text)
        return {4.0: None, 10.0: math.nan}.get(x, x)

    found = explore(root, steps(3, 9, 5), score)
    assert [attempt.score for attempt in found.attempts] == [None, None, 6.0]
    assert [attempt.problem for attempt in found.attempts] == ["the score is None", "the score is not a number", ""]
    assert len({branch for branch, _ in seen}) == 3 and all(ok for _, ok in seen)


def test_failing_candidates_cannot_win(world: ForkingDaemon, root: Sandbox) -> None:
    """An exception in a candidate or in its score costs that candidate only, and is told."""
    found = explore(root, ["1/0", "x = 'text'", "x += 1", "del x"], "x")
    assert [attempt.score for attempt in found.attempts] == [None, None, 2.0, None]
    problems = [attempt.problem for attempt in found.attempts]
    assert "ZeroDivisionError" in problems[0] and "candidate failed" in problems[0]
    assert "ValueError" in problems[1] and "score failed" in problems[1]
    assert world.alive[root.id]["x"] == 2


@pytest.mark.parametrize("keep", [1, 3])
def test_without_any_score_nothing_changes(world: ForkingDaemon, root: Sandbox, keep: int) -> None:
    """If all fail, or there is no candidate, the sandbox stays as it is and there is no best."""
    for candidates in (["1/0", "nonsense("], []):
        found = explore(root, candidates, "x", keep=keep)
        assert found.best is None and found.branches == ()
    assert world.alive == {root.id: world.alive[root.id]} and world.alive[root.id]["x"] == 1


def test_a_branch_that_dies_costs_one_candidate(world: ForkingDaemon, root: Sandbox) -> None:
    """A branch that is gone when it is to run, and one that dies in its cell, leave the others in the race."""
    original = world._fork

    def fork(parts: list[str], body: dict[str, Any]) -> httpx.Response:
        answer = original(parts, body)
        del world.alive[answer.json()["children"][0]]
        return answer

    def die(code: str) -> None:
        if code == "x += 2":
            world.alive.pop("sbx_3")

    world._fork, world.on_cell = fork, die  # type: ignore[method-assign]  # this daemon loses branches
    found = explore(root, steps(1, 2, 3), "x", parallel=1)
    assert [attempt.score for attempt in found.attempts] == [None, None, 4.0]
    assert "sandbox_failed" in found.attempts[1].problem
    assert list(world.alive) == [root.id]


def test_an_error_of_the_score_ends_it_and_leaves_nothing(world: ForkingDaemon, root: Sandbox) -> None:
    """What the callable raises reaches the caller; every branch is closed, the sandbox unchanged."""

    def score(branch: Sandbox, result: ExecResult) -> float:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        explore(root, steps(1, 2, 3), score)
    with pytest.raises(TypeError, match="a number"):
        explore(root, steps(1), lambda branch, result: "high")  # type: ignore[arg-type,return-value]  # the point
    assert list(world.alive) == [root.id] and world.alive[root.id]["x"] == 1


@pytest.mark.parametrize(("path", "code"), [("fork", "no_capacity"), ("exec", "quota_exceeded")])
def test_an_error_of_the_daemon_ends_it(world: ForkingDaemon, root: Sandbox, path: str, code: str) -> None:
    """No room for the forks, or a refusal that every branch would meet: the typed error, and no branch left."""
    world.refusal[path] = code
    with pytest.raises(Exception, match=code):
        explore(root, steps(1, 2, 3), "x")
    assert list(world.alive) == [root.id]


def test_a_lost_winner_changes_nothing(world: ForkingDaemon, root: Sandbox) -> None:
    """A best branch that dies before the merge is an error; the sandbox keeps its state."""

    def score(branch: Sandbox, result: ExecResult) -> float:
        del world.alive[branch.id]
        return 1

    with pytest.raises(SandboxNotFound):
        explore(root, steps(1), score)
    assert world.alive[root.id]["x"] == 1


def test_ctrl_c_ends_the_branches(world: ForkingDaemon, root: Sandbox) -> None:
    """Ctrl-C while branches run closes them all, whereby their cells end, and leaves the sandbox unchanged."""
    ended = threading.Event()
    both_run = threading.Barrier(2)

    def spin(code: str) -> None:
        if both_run.wait(30) == 0:
            os.kill(os.getpid(), signal.SIGINT)  # as a terminal does: to the process, not to this thread
        assert ended.wait(30)

    class Alive(dict):  # type: ignore[type-arg]  # sees closes
        def pop(self, *arguments: Any) -> Any:
            ended.set()
            return dict.pop(self, *arguments)

    world.alive, world.on_cell = Alive(world.alive), spin
    with pytest.raises(KeyboardInterrupt):
        explore(root, steps(1, 2), "x")
    assert list(world.alive) == [root.id] and world.alive[root.id]["x"] == 1


def test_ctrl_c_while_work_is_handed_out_stops_what_has_begun() -> None:
    """Ctrl-C that comes when the first branch runs and the second is not begun ends the first, and nothing waits."""
    begun, ended = threading.Event(), threading.Event()

    class Items(list[int]):
        def __iter__(self) -> Iterator[int]:
            yield 1
            assert begun.wait(30)
            signal.raise_signal(signal.SIGINT)
            yield 2

    seen: list[bool] = []

    def work(item: int) -> None:
        begun.set()
        seen.append(ended.wait(30))

    with pytest.raises(KeyboardInterrupt):
        each_sync(work, Items([1, 2]), 2, ended.set)
    assert seen == [True]


def test_equal_scores_go_to_the_first(world: ForkingDaemon, root: Sandbox) -> None:
    """Which of two equals wins does not depend on which ends first."""
    found = explore(root, ["y = 'a'", "y = 'b'", "y = 'c'"], "x", keep=2, parallel=3)
    assert [attempt.index for attempt in found.ranking] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"candidates": "x += 1"}, TypeError),
        ({"candidates": ["x", 1]}, TypeError),
        ({"keep": 0}, ValueError),
        ({"keep": True}, ValueError),
        ({"parallel": 0}, ValueError),
        ({"score": "x ="}, ValueError),
        ({"score": "y = x"}, ValueError),
        ({"score": ""}, ValueError),
    ],
)
def test_wrong_arguments_fork_nothing(
    world: ForkingDaemon, root: Sandbox, arguments: dict[str, Any], error: type[Exception]
) -> None:
    """What cannot work is told before anything is forked."""
    with pytest.raises(error, match="explore"):
        explore(root, **{"candidates": ["x"], "score": "x", **arguments})
    assert world.forks == []


@pytest.mark.parametrize(
    ("code", "value"),
    [("3", 3.0), ("y = 2\ny + x", 3.0), ("    y = 2\n    y + x", 3.0), ("True", 1.0), ("float = 7\nx", 1.0)],
)
def test_score_code_gives_a_plain_number(code: str, value: float) -> None:
    """Whatever number type its last line is, indented or with names of builtins taken: a float comes out."""
    variables: dict[str, Any] = {"x": 1}
    lines, _, last = score_cell(code).rpartition("\n")
    exec(lines, variables)
    assert eval(last, variables) == value and type(eval(last, variables)) is float


def test_score_code_may_await() -> None:
    """Top-level await is allowed, as in every cell."""
    assert score_cell("await f()").endswith("float(await f())")


@given(st.permutations(range(8)), st.integers(1, 9), st.lists(st.floats(0, 3), min_size=8, max_size=8))
def test_ranking_does_not_depend_on_the_order_of_arrival(order: list[int], keep: int, scores: list[float]) -> None:
    """The kept ones are the best by score, then by index, and every other branch is given back exactly once."""
    ranking: Ranking[int] = Ranking(keep)
    out = [ranking.add(scored(Attempt(index, ""), scores[index]), index) for index in order]
    expected = sorted(range(8), key=lambda index: (-scores[index], index))
    assert list(ranking.branches()) == expected[:keep]
    assert sorted(index for index in out if index is not None) == sorted(expected[keep:])


class AsyncWorld:
    """The daemon in memory for asynchronous clients; `waiting` holds cells back until the client goes away."""

    def __init__(self, world: ForkingDaemon) -> None:
        self.world = world
        self.started = 0
        self.both = anyio.Event()

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        if b"forever" in request.content:
            self.started += 1
            if self.started == 2:
                self.both.set()
            await anyio.sleep_forever()
        return self.world(request)


@pytest.mark.anyio
async def test_explore_async(world: ForkingDaemon) -> None:
    """The twin does the same, with a coroutine function as score and with code."""

    async def score(branch: AsyncSandbox, result: ExecResult) -> float:
        return float((await branch.run_code("x")).results[0].text)

    client = AsyncClient("http://daemon.test", transport=httpx.MockTransport(AsyncWorld(world)))
    async with AsyncSandbox(client=client) as root:
        await root.run_code("x = 1")
        assert (await explore_async(root, steps(*range(40)), score)).best == Attempt(
            39, "x += 39", ExecResult("", "", 0), 40.0
        )
        found = await explore_async(root, steps(1, 2), lambda branch, result: 5, keep=2)
        assert [attempt.index for attempt in found.ranking] == [0, 1]
        for branch in found.branches:
            await branch.close()
        with pytest.raises(ZeroDivisionError):
            await explore_async(root, steps(1, 2), lambda branch, result: 1 / 0)
        assert list(world.alive) == [root.id] and world.alive[root.id]["x"] == 40
        world.refusal["fork"] = "no_capacity"
        with pytest.raises(NoCapacity):
            await explore_async(root, steps(1), "x")


@pytest.mark.anyio
async def test_cancelled_explore_leaves_nothing(world: ForkingDaemon) -> None:
    """Cancelled while its branches run, it closes them all and changes nothing."""
    around = AsyncWorld(world)
    client = AsyncClient("http://daemon.test", transport=httpx.MockTransport(around))
    async with AsyncSandbox(client=client) as root:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(explore_async, root, ["'forever'"] * 3, "x", 1, 2)
            await around.both.wait()
            tasks.cancel_scope.cancel()
        assert list(world.alive) == [root.id] and world.forks == [3]


@pytest.mark.anyio
async def test_explore_cancelled_in_its_fork_closes_what_comes(world: ForkingDaemon) -> None:
    """Cancelled while the fork is under way, it waits for the answer, so that no branch is left over."""
    in_fork, go_on = anyio.Event(), anyio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        await request.aread()
        response = world(request)
        if request.url.path.endswith("/fork"):
            in_fork.set()
            await go_on.wait()
        return response

    client = AsyncClient("http://daemon.test", transport=httpx.MockTransport(answer))
    async with AsyncSandbox(client=client) as root:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(explore_async, root, steps(1, 2), "x")
            await in_fork.wait()
            tasks.cancel_scope.cancel()
            go_on.set()
        assert list(world.alive) == [root.id] and world.forks == [2]
