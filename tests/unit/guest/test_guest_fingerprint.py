"""Promise: a fingerprint is the same for the same content, in every process, and another one for other content."""

from __future__ import annotations

import copy
import dataclasses
import enum
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from podflare.guest.variables.fingerprint import Reader, Unreadable, read_variable
from podflare.wire.variables import MAX_REASON_CHARS, MAX_TYPE_CHARS

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False, max_magnitude=10)
    | st.text(max_size=8)
    | st.binary(max_size=8)
)
HASHABLE = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3), max_leaves=5
)
VALUES = st.recursive(
    HASHABLE,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(HASHABLE, inner, max_size=4)
        | st.sets(HASHABLE, max_size=4)
        | st.binary(max_size=4).map(bytearray)
        | st.lists(inner, max_size=3).map(deque)
    ),
    max_leaves=12,
)


def fingerprint(value: Any) -> str:
    return Reader(time.monotonic() + 20).read(value).fingerprint


def canonical(value: Any) -> Any:
    """The content as a tree of texts, which says whether two values are the same; sets are sorted."""
    name = type(value).__name__
    if isinstance(value, dict):
        return name, [(canonical(key), canonical(item)) for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return name, sorted((canonical(item) for item in value), key=repr)
    if isinstance(value, (list, tuple, deque)):
        return name, [canonical(item) for item in value]
    return name, repr(value)


@given(VALUES)
def test_a_copy_has_the_same_fingerprint(value: Any) -> None:
    """What was pickled and built anew, and what was copied in depth, has the fingerprint of the original."""
    assert fingerprint(pickle.loads(pickle.dumps(value))) == fingerprint(copy.deepcopy(value)) == fingerprint(value)


@given(VALUES, VALUES)
def test_fingerprints_are_equal_just_if_contents_are(one: Any, other: Any) -> None:
    """Two values have one fingerprint if and only if types and contents are the same."""
    assert (fingerprint(one) == fingerprint(other)) == (canonical(one) == canonical(other))


@given(st.lists(HASHABLE, unique=True, max_size=8), st.randoms())
def test_the_order_of_a_set_does_not_count(items: list[Any], random: Any) -> None:
    """Sets of the same elements have one fingerprint, however they were filled."""
    shuffled = list(items)
    random.shuffle(shuffled)
    grown = set(range(1000))
    grown.clear()
    grown.update(shuffled)
    assert fingerprint(grown) == fingerprint(set(items))
    assert fingerprint(frozenset(shuffled)) == fingerprint(frozenset(items)) != fingerprint(set(items))


def test_another_process_with_other_hashes_finds_the_same() -> None:
    """Processes with different seeds for hashes of text agree on every fingerprint."""
    code = """
import time, fractions
from podflare.guest.variables.fingerprint import Reader
class P:
    def m(self, a, *, b=2): return {"x", "y", "z"} & {a}
P.__module__ = P.m.__module__ = "__main__"
p = P(); p.names = {"alpha", "beta", ("gamma", 1.5)}; p.more = {"k": frozenset("abc")}
for value in (p, P, P.m, lambda q: q in {"a", "b", "c"}, fractions.Fraction(1, 3)):
    print(Reader(time.monotonic() + 20).read(value).fingerprint)
"""
    told = set()
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        told.add(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout)
    assert len(told) == 1 and len(set(told.pop().split())) == 5


Point = namedtuple("Point", "x y")


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Item:
    name: str
    tags: list[str] = dataclasses.field(default_factory=list)


class Slots:
    __slots__ = ("a", "b")


def slots(a: int, b: int) -> Slots:
    made = Slots()
    made.a, made.b = a, b
    return made


PAIRS = [
    (Point(1, 2), Point(1, 3)),
    (Color.RED, Color.BLUE),
    (Item("a", ["x"]), Item("a", ["y"])),
    (slots(1, 2), slots(1, 3)),
    (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)),
    (defaultdict(list, a=[1]), defaultdict(list, a=[2])),
    (Counter("aab"), Counter("abb")),
    (Decimal("1.0"), Decimal("1.00")),
    (Fraction(1, 3), Fraction(2, 3)),
    (datetime(2026, 1, 1), datetime(2026, 1, 2)),
    (Path("/a"), Path("/b")),
    (range(3), range(4)),
    (slice(1), slice(2)),
    (math, os),
    (math.sin, math.cos),
    (len, max),
    (str, bytes),
    ([].append, [1].append),
    (0.0, -0.0),
    (1, True),
    (1, 1.0),
    ("a" * 10_000, "a" * 9_999 + "b"),
    (b"a" * 10_000_000, b"a" * 9_999_999 + b"b"),
    (list(range(10_000)), [*range(9_999), 0]),
    (numpy.arange(10), numpy.arange(11)),
    (numpy.arange(10), numpy.arange(10.0)),
    (numpy.zeros((2, 3)), numpy.zeros((3, 2))),
    (numpy.arange(12).reshape(3, 4)[:, ::2], numpy.arange(12).reshape(3, 4)[:, 1::2]),
    (numpy.array([1, "a", None], object), numpy.array([1, "b", None], object)),
    (numpy.float64(1), numpy.float64(2)),
    (numpy.asfortranarray(numpy.arange(6).reshape(2, 3)), numpy.arange(6).reshape(3, 2).T),
    (numpy.array(5), numpy.array(6)),
    (numpy.zeros((0, 3)), numpy.zeros((3, 0))),
    (numpy.array(["2026-01-01"], "M8[D]"), numpy.array(["2026-01-02"], "M8[D]")),
    (numpy.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]), numpy.array([(1, 3.0)], [("a", "i4"), ("b", "f8")])),
    (numpy.random.default_rng(1), numpy.random.default_rng(2)),
    (bytearray(b"a"), bytearray(b"b")),
    (bytearray(b"a"), b"a"),
    (ValueError("a"), ValueError("b")),
    (lambda: 1, lambda: 2),
    (lambda a=1: a, lambda a=2: a),
    (lambda a: a + 1, lambda a: a - 1),
]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=[type(one).__name__ for one, _ in PAIRS])
def test_objects_of_many_kinds(one: Any, other: Any) -> None:
    """A copy of an object has its fingerprint, a similar one of other content has another one."""
    assert len(fingerprint(one)) == 32
    assert fingerprint(one) != fingerprint(other)
    if type(one).__name__ not in ("module", "builtin_function_or_method", "function"):
        assert fingerprint(copy.deepcopy(one)) == fingerprint(one)


def test_how_an_array_lies_in_memory_does_not_count() -> None:
    """A view, its copy, and an array by columns of the same items have one fingerprint."""
    array = numpy.arange(3_000_000).reshape(3, 1000, 1000)[:, ::2, ::-1]
    assert fingerprint(array) == fingerprint(array.copy()) == fingerprint(numpy.asfortranarray(array))


def test_sharing_and_cycles() -> None:
    """Whether equal parts are one object does not count; values that contain themselves have fingerprints."""
    part = [1, object]
    assert fingerprint([part, part]) == fingerprint([[1, object], [1, object]])
    loop: list[Any] = [1]
    loop.append(loop)
    other: list[Any] = [2]
    other.append(other)
    assert fingerprint(loop) == fingerprint(pickle.loads(pickle.dumps(loop))) != fingerprint(other)
    chain: Any = []
    for _ in range(40):
        chain = [chain, chain, Color]
    assert fingerprint(chain)  # two to the fortieth parts, looked at once each


def compiled(source: str, lines: int = 0) -> dict[str, Any]:
    """What a cell with this code defines, further down in another cell."""
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("\n" * lines + source, f"<cell {lines}>", "exec"), space)
    return space


CELL = """
import functools
class Base:
    def hi(self, who='you'): return f'hi {who}' + self.end
class Child(Base):
    end = '!'
    @property
    def p(self): return 1
    @functools.cached_property
    def c(self): return 2
    @classmethod
    def k(cls): return super().mro()
def counter(start):
    count = [start]
    def more(): count.append(1); return len(count)
    return more
one = counter(1)
child = Child()
"""


@pytest.mark.parametrize("name", ["Base", "Child", "counter", "one", "child"])
def test_definitions_count_by_what_they_do(name: str) -> None:
    """The same definition in another cell has the same fingerprint; with other code or closure it has another one."""
    here, there = compiled(CELL), compiled(CELL, lines=5)
    assert fingerprint(here[name]) == fingerprint(there[name])
    changed = CELL.replace("hi {who}", "ho {who}").replace("append(1)", "append(2)")
    assert fingerprint(compiled(changed)[name]) != fingerprint(here[name])
    here["child"].p, here["one"], here["Child"].k  # using them must not count
    here["child"].__reduce_ex__(4)
    assert fingerprint(here["Child"]) == fingerprint(there["Child"])


class Hostile:
    def __init__(self, raised: BaseException | None = None, given: Any = None) -> None:
        self.raised, self.given = raised, given

    def __reduce_ex__(self, protocol: int) -> Any:
        if self.raised is not None:
            raise self.raised
        return self.given

    def __repr__(self) -> str:
        raise AssertionError("nobody needs this")

    def __eq__(self, other: object) -> bool:
        raise AssertionError("nobody needs this")

    def __hash__(self) -> int:
        raise AssertionError("nobody needs this")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError("nobody needs this")


class Untellable(Exception):
    def __str__(self) -> str:
        raise SystemExit


@pytest.mark.parametrize(
    "make",
    [
        lambda: threading.Lock(),
        lambda: (number for number in [1]),
        lambda: sys.stdout,
        lambda: memoryview(b"a"),
        lambda: Hostile(ValueError("x" * 10_000 + "\udcff")),
        lambda: Hostile(SystemExit()),
        lambda: Hostile(Untellable()),
        lambda: Hostile(given=5),
        lambda: Hostile(given=()),
        lambda: Hostile(given=(int,)),
    ],
)
def test_what_cannot_be_read_is_told(make: Callable[[], Any]) -> None:
    """Objects without readable content count by their type, alone and within others, and the table says why."""
    value = make()
    told = read_variable(Reader(time.monotonic() + 20), value)
    assert told.fingerprint and told.obstacle.startswith(told.type) and len(told.obstacle) <= MAX_REASON_CHARS
    assert told.obstacle.isascii()
    assert fingerprint([1, value]) == fingerprint([1, value]) != fingerprint([2, value])


def endless() -> Any:
    while True:
        yield 1


def deep() -> Any:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (deep, "nested too deeply"),
        (lambda: Hostile(given=(list, (), None, endless())), "took too long"),
        (lambda: Hostile(given=(list, (), None, 5)), "reading it failed: TypeError"),
        (lambda: Hostile(given=(list, (), None, map(len, [5]))), "reading it failed: TypeError"),
    ],
)
def test_what_cannot_be_read_to_its_end_has_no_fingerprint(make: Callable[[], Any], why: str) -> None:
    """Values that are too deep, endless, or that fail in the middle are told as unread, with the reason."""
    value = make()
    told = read_variable(Reader(time.monotonic() + (0.5 if why == "took too long" else 20)), value)
    assert told.fingerprint == "" and why in told.unread


def test_an_interrupt_is_not_swallowed() -> None:
    """KeyboardInterrupt goes through, whatever is being read."""
    with pytest.raises(KeyboardInterrupt):
        fingerprint([1, Hostile(KeyboardInterrupt())])


def test_type_names_are_bounded() -> None:
    """The name of a type is cut, whatever its class is called."""
    assert len(read_variable(Reader(0), type("T" * 1000, (), {})()).type) <= MAX_TYPE_CHARS


def test_a_quick_look_runs_no_code_of_the_users() -> None:
    """A quick reader refuses values whose reading would run methods of the user's, also deep inside."""
    ran = []

    class Loud:
        def __reduce_ex__(self, protocol: int) -> Any:
            ran.append(1)
            return object.__reduce_ex__(self, protocol)

    class State:
        def __getstate__(self) -> Any:
            ran.append(1)
            return {}

    reader = Reader(time.monotonic() + 20, quick=True)
    for value in (Loud(), State(), [{"a": (1, Loud())}]):
        with pytest.raises(Unreadable, match="of its own"):
            reader.read(value)
    assert ran == []
    for value in (Item("a"), numpy.arange(3), {"a": [1]}, Color.RED, compiled(CELL)["child"]):
        assert reader.read(value).fingerprint == fingerprint(value)


def test_a_quick_look_does_not_begin_what_is_too_large() -> None:
    """With a limit on bytes, what is larger is refused before it is read or copied."""
    reader = Reader(time.monotonic() + 20, max_bytes=1000, quick=True)
    strided = numpy.zeros((4000, 4000))[:, ::2]
    values = (numpy.zeros(10**7), strided, b"a" * 10**8, "a" * 10**8, list(range(10**6)), numpy.empty(10**6, object))
    start = time.perf_counter()
    for value in values:
        with pytest.raises(Unreadable, match="too large"):
            reader.read(value)
    assert time.perf_counter() - start < 0.05
    assert reader.read(b"a" * 900).size == 900


def test_a_large_array_is_read_where_it_is() -> None:
    """An array of 100 MB has a fingerprint that tells a single changed byte, and is not copied for it."""
    array = numpy.zeros(100 * 2**20, numpy.uint8)
    before = peak_kib()
    first = fingerprint(array)
    array[12_345_678] = 1
    assert fingerprint(array) != first
    assert peak_kib() - before < 20 * 1024


def peak_kib() -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
