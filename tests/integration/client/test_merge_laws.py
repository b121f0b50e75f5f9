"""The laws of merge, on real sandboxes that do made-up things: any order will do, twice is once, nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemons import ServedDaemon
from podflare import MergeReport, Sandbox

pytestmark = [pytest.mark.any_engine, pytest.mark.timeout(900)]
PATHS = ["a", "b", "d/x", "d/y", "e/z"]
NAMES = ["p", "q", "r"]
SETUP = """
import os, shutil
def put(path, text):
    full = '/root/' + path
    os.makedirs(os.path.dirname(full), exist_ok=True)
    open(full, 'w').write(text)
def drop(path):
    if os.path.lexists('/root/' + path):
        os.remove('/root/' + path)
def state():
    files = {}
    for folder, _, names in os.walk('/root'):
        for name in names:
            path = os.path.join(folder, name)
            files[path[6:]] = open(path).read()
    return repr((sorted(files.items()), sorted((n, v) for n, v in globals().items() if n in 'pqr')))
for path in ('a', 'd/x', 'e/z'):
    put(path, 'start\\n')
p, q = ['start'], ['start']
"""
SLOW = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

Change = tuple[str, str, str]


def change(side: str) -> st.SearchStrategy[Change]:
    """One thing that a side does to a file or a variable."""
    return st.one_of(
        st.tuples(st.just("put"), st.sampled_from(PATHS), st.sampled_from([f"{side}1\n", f"{side}2\n", "same\n"])),
        st.tuples(st.just("drop"), st.sampled_from(PATHS), st.just("")),
        st.tuples(st.just("set"), st.sampled_from(NAMES), st.sampled_from([f"{side}1", f"{side}2", "same"])),
        st.tuples(st.just("del"), st.sampled_from(NAMES), st.just("")),
    )


def code(changes: list[Change]) -> str:
    lines = []
    for what, name, text in changes:
        if what == "put":
            lines.append(f"put({name!r}, {text!r})")
        elif what == "drop":
            lines.append(f"drop({name!r})")
        else:
            lines.append(f"{name} = [{text!r}]" if what == "set" else f"globals().pop({name!r}, None)")
    return "\n".join(lines) or "pass"


def do(sandbox: Sandbox, changes: list[Change]) -> None:
    assert sandbox.run_code(code(changes)).exit_code == 0


def state(sandbox: Sandbox) -> tuple[dict[str, str], dict[str, list[str]]]:
    files, names = eval(sandbox.run_code("print(state())").stdout)
    return dict(files), dict(names)


@pytest.fixture(scope="module")
def root(sdk_daemon: ServedDaemon) -> Iterator[Sandbox]:
    """What all branches of these tests start from."""
    with Sandbox(host=sdk_daemon.url) as sandbox:
        assert sandbox.run_code(SETUP).exit_code == 0
        yield sandbox


@contextmanager
def branches(root: Sandbox, count: int) -> Iterator[list[Sandbox]]:
    with ExitStack() as stack:
        children = [stack.enter_context(child) for child in root.fork(count)]
        for child in children:
            # Before its first cell, so that all of its variables are known as they were, however busy the computer is.
            child.diff(root, variables=True)
        yield children


def all_of(report: MergeReport) -> set[str]:
    """Every path and name that a report tells of."""
    told = (report.conflicts, report.not_transferable)
    return {*report.files, *report.variables, *(item.name for items in told for item in items)}


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


@SLOW
@given(ours=st.lists(change("ours"), max_size=5), theirs=st.lists(change("theirs"), max_size=5))
def test_nothing_is_lost_silently_and_twice_is_once(root, ours, theirs):
    """Whatever both did: each change of theirs is merged, told as a conflict, or was ours already; again is nothing."""
    start = state(root)
    with branches(root, 2) as (one, two):
        do(one, ours)
        do(two, theirs)
        mine, others = state(one), state(two)
        report = one.merge(two, on_conflict="theirs")
        after = state(one)
        for before, here, there, now, prefix in zip(start, mine, others, after, ("/root/", ""), strict=True):
            for name in changed(before, there):
                assert now.get(name) == there.get(name)
                assert here.get(name) == there.get(name) or prefix + name in all_of(report)
            for name in changed(before, here) - changed(before, there):
                assert now.get(name) == here.get(name)
        assert state(two) == others
        again = one.merge(two)
        assert again == MergeReport(applied=True) and state(one) == after


@SLOW
@given(
    owners=st.lists(st.integers(0, 2), min_size=8, max_size=8),
    works=st.tuples(*(st.lists(change(side), max_size=5) for side in ("a", "b", "c"))),
)
def test_disjoint_changes_commute_and_associate(root, owners, works):
    """Three branches that each change what is theirs end as the same, merged in whatever order and grouping."""
    owned = dict(zip([*PATHS, *NAMES], owners, strict=True))
    parts = [[one for one in work if owned[one[1]] == side] for side, work in enumerate(works)]
    with branches(root, 6) as (a, b, c, d, e, f):
        for branch, part in zip((a, b, c, d, e, f), parts * 2, strict=True):
            do(branch, part)
        a.merge(b)
        a.merge(c)  # (a + b) + c
        e.merge(f)
        d.merge(e)  # a + (b + c)
        assert state(a) == state(d)
        f.merge(b)
        f.merge(d)  # c + b + all, which says all of it again
        assert state(f) == state(a)
