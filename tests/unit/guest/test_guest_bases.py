"""Promise: a REPL knows what its variables were at a fork until something runs, then as far as a glance tells."""

from __future__ import annotations

import threading
import time
from typing import Any

from podflare.guest.variables.bases import QUICK_LOOK_S, Bases, told
from podflare.guest.variables.fingerprint import Reader, read_variable
from podflare.wire.variables import MAX_BASES, MAX_VARIABLES, Variable


def survey(namespace: dict[str, Any]) -> dict[str, Variable]:
    return {name: read_variable(Reader(time.monotonic() + 20), value) for name, value in namespace.items()}


def fingerprints(namespace: dict[str, Any]) -> dict[str, str]:
    return {name: one.fingerprint for name, one in survey(namespace).items()}


def test_until_something_runs_the_present_is_the_base() -> None:
    """After a fork the base is present, and nothing has been read; the first change makes it past."""
    bases, namespace = Bases(), {"x": 1}
    bases.begin("a")
    assert bases.tokens() == (("a",), ("a",)) and bases.recall("a", namespace) is None
    before = fingerprints(namespace)
    bases.before_change(namespace)
    namespace["x"] = 2
    assert bases.tokens() == (("a",), ())
    recalled = bases.recall("a", namespace)
    assert recalled is not None and recalled.fingerprints == before and recalled.complete


def test_a_look_is_taken_once_for_each_base() -> None:
    """Later changes leave a base as it is; a second fork begins another one."""
    bases, namespace = Bases(), {"x": 1}
    seen = {}
    for token in ("a", "b"):
        bases.begin(token)
        seen[token] = fingerprints(namespace)
        for _ in range(3):
            bases.before_change(namespace)
            namespace["x"] += 1
    for token, before in seen.items():
        recalled = bases.recall(token, namespace)
        assert recalled is not None and recalled.fingerprints == before


def test_what_is_too_large_is_there_without_a_fingerprint() -> None:
    """The look before the first cell tells small variables and only the names of large ones, and does not take long."""
    large = {f"large{number}": list(range(300_000)) for number in range(20)}
    bases, namespace = Bases(), {**large, "blob": bytes(50_000_000), "x": 1, "t": "text", "y": [1, 2]}
    bases.begin("a")
    start = time.perf_counter()
    bases.before_change(namespace)
    took = time.perf_counter() - start
    recalled = bases.recall("a", namespace)
    assert recalled is not None and set(recalled.fingerprints) == set(namespace)
    known = {name for name, fingerprint in recalled.fingerprints.items() if fingerprint}
    assert {"x", "t"} <= known <= {"x", "t", "y"}
    assert took < 20 * QUICK_LOOK_S


def test_a_survey_makes_the_base_exact() -> None:
    """If all variables were read since the last change, the base has all of that when the next change comes."""
    bases, namespace = Bases(), {"large": list(range(500_000)), "x": 1}
    bases.begin("a")
    variables = survey(namespace)
    bases.surveyed(variables, namespace, complete=True)
    bases.before_change(namespace)
    namespace["large"].append(1)
    recalled = bases.recall("a", namespace)
    assert recalled is not None and recalled.fingerprints == {name: one.fingerprint for name, one in variables.items()}
    bases.begin("b")
    bases.before_change(namespace)
    later = bases.recall("b", namespace)
    assert later is not None and later.fingerprints["large"] == ""


def test_another_object_without_content_is_noticed() -> None:
    """A lock that was replaced is told, although no fingerprint tells two locks apart; one that stays is not."""
    bases, namespace = Bases(), {"kept": threading.Lock(), "new": threading.Lock(), "gone": threading.Lock(), "x": 1}
    bases.begin("a")
    bases.before_change(namespace)
    namespace["new"] = threading.Lock()
    del namespace["gone"]
    recalled = bases.recall("a", namespace)
    assert recalled is not None and recalled.replaced == ("new",)


def test_a_base_keeps_nothing_alive() -> None:
    """What is remembered holds no reference to values: what user code deletes is freed."""

    class Large:
        def __del__(self) -> None:
            freed.append(1)

    freed: list[int] = []
    bases, namespace = Bases(), {"x": Large(), "y": [Large()], "lock": threading.Lock()}
    bases.begin("a")
    bases.surveyed(survey(namespace), namespace, complete=True)
    bases.before_change(namespace)
    namespace.clear()
    assert freed == [1, 1]


def test_a_base_that_was_agreed_on_is_remembered() -> None:
    """A merge's base is told as it was given, after those before it; the oldest of many are forgotten."""
    bases: Bases = Bases()
    for number in range(MAX_BASES + 5):
        bases.remember(f"t{number}", {"x": "0" * 32, "y": ""})
    known, present = bases.tokens()
    assert known == tuple(f"t{number}" for number in range(5, MAX_BASES + 5)) and present == ()
    recalled = bases.recall(known[-1], {})
    assert recalled is not None and recalled.fingerprints == {"x": "0" * 32, "y": ""}
    assert bases.recall("t0", {}) is None


def test_names_that_are_told() -> None:
    """Variables with usual names are told in their order and up to a number; others are counted."""
    names: dict[Any, Any] = {"b": 1, "__name__": 1, "a": 1, "no name": 1, 5: 1, "_": 1}
    found, left_out = told(names)
    assert list(found) == ["b", "a", "_"] and left_out == 2
    found, left_out = told({f"v{number}": 1 for number in range(MAX_VARIABLES + 3)})
    assert len(found) == MAX_VARIABLES and left_out == 3
