"""Promise: values, with the functions and classes that cells defined, come out of a parcel as they went in."""

from __future__ import annotations

import io
import pickle
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from podflare.guest.variables import parcel
from podflare.guest.variables.definitions import MODULE, Namespace
from podflare.guest.variables.fingerprint import Reader
from podflare.guest.variables.parcel import Misfit, Overflow
from podflare.wire.variables import MAX_REASON_CHARS

LARGE = 2**30


class Repl:
    """A namespace in which cells ran."""

    def __init__(self, *cells: str) -> None:
        self.variables: dict[str, Any] = {"__name__": "__main__"}
        self.sources: dict[str, str] = {}
        for number, cell in enumerate(cells):
            self.run(cell, f"<cell {number}>")

    def run(self, cell: str, name: str = "<cell>") -> None:
        exec(compile(cell, name, "exec", dont_inherit=True), self.variables)

    def __getitem__(self, code: str) -> Any:
        return eval(code, self.variables)

    @property
    def home(self) -> Namespace:
        return Namespace(self.variables, self.sources.keys())

    def packed(self, *names: str) -> bytes:
        data = bytearray()
        values = {name: self.variables[name] for name in names}
        assert parcel.refusals(values, self.home, LARGE) == {}
        parcel.pack(values, self.home, data.extend)
        return bytes(data)

    def take(self, data: bytes) -> None:
        self.variables.update(parcel.unpack(io.BytesIO(data), self.home, self.sources.__setitem__))

    def refused(self, name: str) -> str:
        return parcel.refusals({name: self.variables[name]}, self.home, LARGE)[name]


@pytest.fixture(autouse=True)
def main_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing stays behind in the modules of the process."""
    yield
    assert MODULE not in sys.modules


def lines(*code: str) -> str:
    return "\n".join(code)


def carried(cell: str, *names: str, there: str = "") -> Repl:
    """A new REPL, after `there`, that took these names (all that the cell defines) from one that ran `cell`."""
    source, target = Repl(cell), Repl(there)
    names = names or tuple(name for name in source.variables if not name.startswith("__"))
    before = {name: fingerprint(source[name]) for name in names}
    target.take(source.packed(*names))
    if not there:
        assert {name: fingerprint(target[name]) for name in names} == before
    return target


def fingerprint(value: Any) -> str:
    return Reader(time.monotonic() + 20).read(value).fingerprint


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4)
        | st.sets(st.integers() | st.text(max_size=3), max_size=4)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from("abcdef"), VALUES))
def test_plain_values_come_out_equal(values: dict[str, Any]) -> None:
    """Any values of built-in types are equal to the originals, under their names."""
    source, target = Repl(), Repl()
    source.variables.update(values)
    target.take(source.packed(*values))
    assert {name: target.variables[name] for name in values} == values


def test_what_values_share_stays_shared() -> None:
    """An object that two variables hold is one object afterwards, also in cycles."""
    target = carried("part = [1]\na = {'p': part}\nb = [part, part]\nloop = [a]; loop.append(loop)")
    assert target["a['p'] is b[0] is b[1] is part"] and target["loop[1] is loop and loop[0] is a"]


FUNCTIONS = [
    ("def f(a, b=2, *c, d=4, **e): return a + b + d + len(c) + len(e)", "f(1, 1, 1, x=1)", 8),
    ("f = lambda x: x * 2", "f(4)", 8),
    (
        lines("def f():", "  'doc'", "  yield from range(3)", "f.note = [1]"),
        "(list(f()), f.__doc__, f.note)",
        ([0, 1, 2], "doc", [1]),
    ),
    ("def f(x: int) -> str: return x", "f.__annotations__", {"x": int, "return": str}),
    ("def f(n): return 1 if n < 2 else n * f(n - 1)", "f(5)", 120),
    (lines("k = 3", "def f(): return k"), "f()", 3),
    (
        lines(
            "def make():",
            "  n = 0",
            "  def up():",
            "    nonlocal n; n += 1; return n",
            "  return up, lambda: n",
            "up, get = make(); up()",
        ),
        "(up(), get(), up.__closure__[0] is get.__closure__[0])",
        (2, 2, True),
    ),
    (
        lines(
            "def make():",
            "  def even(n): return n == 0 or odd(n - 1)",
            "  def odd(n): return n != 0 and even(n - 1)",
            "  return even",
            "f = make()",
        ),
        "(f(4), f(5))",
        (True, False),
    ),
    (lines("import functools", "@functools.lru_cache", "def f(x): return x + 1"), "f(1)", 2),
    (lines("import functools", "f = functools.partial(lambda a, b: a - b, 5)"), "f(3)", 2),
    ("from math import sqrt as f", "f(4)", 2.0),
    ("import os.path as f", "f.join('a', 'b')", "a/b"),
    (lines("async def f(): return 1", "c = f.__code__.co_flags"), "f.__code__.co_flags == c", True),
]


@pytest.mark.parametrize(("cell", "use", "result"), FUNCTIONS, ids=[use for _, use, _ in FUNCTIONS])
def test_functions_work_elsewhere(cell: str, use: str, result: Any) -> None:
    """Functions of cells do there what they did here: defaults, closures, generators, recursion, decorators."""
    assert carried(cell)[use] == result


def test_a_function_uses_the_globals_of_its_new_home() -> None:
    """A global name in a function means the receiver's variable from then on."""
    target = carried("k = 1\ndef f(): return k", "f", there="k = 5")
    assert target["f()"] == 5 and target["f.__globals__ is globals()"]


CLASSES = [
    (
        lines("class A:", "  n = 1", "  def m(self): return self.n", "x = A()"),
        "(x.m(), type(x) is A, A.__qualname__)",
        (1, True, "A"),
    ),
    (
        lines("class A:", "  def m(self): return 1", "class B(A):", "  def m(self): return super().m() + 1", "x = B()"),
        "x.m()",
        2,
    ),
    (
        lines("class A:", "  __slots__ = ('a', '__b')", "  def __init__(s): s.a = 1; s.__b = 2", "x = A()"),
        "x.a + x._A__b",
        3,
    ),
    (lines("class A:", "  class B:", "    def m(self): return A.B", "x = A.B()"), "x.m() is A.B is type(x)", True),
    (
        lines(
            "class A:",
            "  @property",
            "  def p(self): return 1",
            "  @staticmethod",
            "  def s(): return 2",
            "  @classmethod",
            "  def c(cls): return cls",
            "x = A()",
        ),
        "(x.p, x.s(), x.c() is A)",
        (1, 2, True),
    ),
    (
        lines("import functools", "class A:", "  @functools.cached_property", "  def p(self): return [1]", "x = A()"),
        "x.p is x.p",
        True,
    ),
    (
        lines(
            "from dataclasses import *",
            "@dataclass(order=True)",
            "class A:",
            "  n: int",
            "  t: list = field(default_factory=list)",
            "x = A(1)",
        ),
        "(x == A(1), x < A(2), replace(x, n=3).n, asdict(x), [f.name for f in fields(A)], A(1).t is A(1).t)",
        (True, True, 3, {"n": 1, "t": []}, ["n", "t"], False),
    ),
    (
        lines(
            "import enum",
            "class A(enum.Enum):",
            "  X = 1",
            "  Y = 'y'",
            "  Z = 1",
            "  @property",
            "  def low(self): return self.name.lower()",
            "x = A.X",
        ),
        "(x is A.X is A.Z is A(1) is A['X'], list(A) == [A.X, A.Y], A.Y.low, isinstance(x, A))",
        (True, True, "y", True),
    ),
    (
        lines("import enum", "class A(enum.IntFlag):", "  X = 1", "  Y = 2", "x = A.X | A.Y"),
        "(x == 3, x == A.X | A.Y, A.Y in x)",
        (True,) * 3,
    ),
    (
        lines(
            "import abc",
            "class A(abc.ABC):",
            "  @abc.abstractmethod",
            "  def m(self): ...",
            "class B(A):",
            "  def m(self): return 1",
            "x = B()",
        ),
        "(x.m(), isinstance(x, A), A.__abstractmethods__)",
        (1, True, frozenset({"m"})),
    ),
    (
        lines("from typing import NamedTuple", "class A(NamedTuple):", "  a: int", "  b: int = 2", "x = A(1)"),
        "(x, x.b, A(5)._replace(b=6).b)",
        ((1, 2), 2, 6),
    ),
    (
        lines("from collections import namedtuple", "A = namedtuple('A', 'a b')", "x = A(1, 2)"),
        "(x.a, A(3, 4)._asdict())",
        (1, {"a": 3, "b": 4}),
    ),
    (
        lines("class A(ValueError):", "  def __str__(self): return 'mine'", "x = A(5)"),
        "(str(x), x.args, isinstance(x, ValueError))",
        ("mine", (5,), True),
    ),
    (lines("class A(dict):", "  tag = None", "x = A(a=1); x.tag = x"), "(x['a'], x.tag is x)", (1, True)),
    (
        lines(
            "from typing import Generic, TypeVar",
            "T = TypeVar('T')",
            "class A(Generic[T]):",
            "  def m(self): return 1",
            "x = A[int]()",
        ),
        "x.m()",
        1,
    ),
    (
        lines(
            "class M(type):",
            "  made = []",
            "  def __init__(cls, *a): M.made.append(cls.__name__)",
            "  def __len__(cls): return 7",
            "class A(metaclass=M): pass",
            "x = A()",
        ),
        "(len(A), type(A) is M, M.made)",
        (7, True, ["A"]),
    ),
    (
        lines("def make():", "  class A:", "    def me(self): return A", "  return A()", "x = make()"),
        "x.me() is type(x)",
        True,
    ),
]


@pytest.mark.parametrize(("cell", "use", "result"), CLASSES, ids=[use[:40] for _, use, _ in CLASSES])
def test_classes_work_elsewhere(cell: str, use: str, result: Any) -> None:
    """Classes of cells and their instances do there what they did here, whatever kind of class it is."""
    assert carried(cell)[use] == result


def test_an_instance_alone_takes_the_class_that_is_there() -> None:
    """A value that is carried without its class is one of the receiver's class of that name."""
    cell = "class A:\n  def m(self): return 1\nx = A(); x.v = 5"
    target = carried(cell, "x", there=cell.replace("1", "2").replace("x = ", "y = ").replace("x.v", "y.v"))
    assert target["(type(x) is A, x.m(), x.v)"] == (True, 2, 5)


def test_what_a_value_needs_is_named_if_it_is_not_there() -> None:
    """Without its class in the receiver the value is refused there, and the message names the class."""
    target = Repl("x = 0")
    with pytest.raises(Misfit, match="needs 'A\\.B', which is not defined here: take 'A', too") as failure:
        target.take(Repl("class A:\n  class B: pass\nok = 1\nx = A.B()").packed("ok", "x"))
    assert failure.value.name == "x" and target["x"] == 0 and "ok" not in target.variables


def test_the_class_that_an_object_was_made_from_goes_along_when_its_name_means_another() -> None:
    """An instance of a class that was defined anew since keeps its own."""
    target = carried("class A:\n  n = 1\nx = A()\nclass A:\n  n = 2", "x")
    assert target["(x.n, 'A' in globals())"] == (1, False)


def test_tracebacks_and_sources_follow_a_function() -> None:
    """A function brings the source of its cell, under a name that none of the receiver's cells has."""
    source, target = Repl(), Repl("def g(): 1 / 0")
    text = "def f():\n    return 1 / 0  # over there\n"
    source.sources["<cell 0>"] = text
    import linecache

    linecache.cache["<cell 0>"] = (len(text), None, text.splitlines(True), "<cell 0>")
    try:
        source.run(text, "<cell 0>")
        target.take(source.packed("f"))
    finally:
        del linecache.cache["<cell 0>"]
    (name,) = target.sources
    assert target["f"].__code__.co_filename == name != "<cell 0>" and target.sources[name] == text


REFUSED = [
    (lines("import threading", "x = threading.Lock()"), "cannot pickle '_thread.lock'"),
    (lines("import socket", "x = socket.socket()"), "cannot pickle 'socket'"),
    ("x = open('/dev/null')", "TextIOWrapper'"),
    ("x = (n for n in [1])", "cannot pickle 'generator'"),
    (lines("import threading", "x = {'deep': [threading.Thread()]}"), "cannot pickle"),
    (lines("import weakref", "class A: pass", "a = A(); x = weakref.ref(a)"), "cannot pickle 'weakref"),
    (lines("async def f(): pass", "x = f(); x.close()"), "cannot pickle 'coroutine'"),
    (lines("x = []", "for _ in range(100000): x = [x]"), "nested too deeply"),
    (lines("class A:", "  def __reduce__(self): raise ValueError('n' * 9999)", "x = A()"), "ValueError: nnn"),
    (lines("class A:", "  def __reduce__(self): raise SystemExit", "x = A()"), "SystemExit"),
    (lines("class A:", "  def __reduce__(self): return 5", "x = A()"), "__reduce__ must return"),
    (
        lines(
            "class E(Exception):",
            "  def __str__(self): raise E",
            "class A:",
            "  def __reduce__(self): raise E",
            "x = A()",
        ),
        "cannot be shown",
    ),
    (lines("class A:", "  def __getattribute__(self, name): raise KeyError(name)", "x = A()"), "KeyError"),
    (
        lines("import enum", "class x(enum.Enum):", "  X = 1", "  def __init__(self, v): self.w = v"),
        "an __init__ or __new__ of its own",
    ),
    (lines("import types", "x = types.ModuleType('nowhere')"), "cannot be imported under its name"),
]


@pytest.mark.parametrize(("cell", "why"), REFUSED, ids=[why[:30] for _, why in REFUSED])
def test_what_cannot_travel_is_refused_with_the_reason(cell: str, why: str) -> None:
    """Locks, sockets, files, generators, threads and hostile objects are refused by name, in bounded words."""
    repl = Repl(cell)
    try:
        told = repl.refused("x")
        assert why in told and len(told) <= MAX_REASON_CHARS
    finally:
        close = getattr(type(repl.variables["x"]), "close", None)
        if close is not None:
            close(repl.variables["x"])


def test_a_refused_value_does_not_hide_another() -> None:
    """Two values that share what cannot travel are both refused; a good one beside them is not."""
    repl = Repl("import threading\npart = [threading.Lock()]\na = {'p': part}\nb = (part,)\nc = 1")
    values = {name: repl[name] for name in "abc"}
    assert sorted(parcel.refusals(values, repl.home, LARGE)) == ["a", "b"]


def test_a_value_above_the_limit_is_named() -> None:
    """One value that is larger than a whole transfer may be stops it, by name."""
    repl = Repl("small = 1\nlarge = b'a' * 5000")
    with pytest.raises(Overflow, match="large"):
        parcel.refusals({name: repl[name] for name in ("small", "large")}, repl.home, 1000)


ARRAYS = [
    numpy.arange(1000),
    numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3)),
    numpy.arange(12).reshape(3, 4)[:, ::2],
    numpy.array([1, "a", None], object),
    numpy.array(["2026-01-01"], "M8[D]"),
    numpy.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
    numpy.zeros((0, 3)),
    numpy.array(5),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: str(array.dtype))
def test_arrays_come_out_equal(array: Any) -> None:
    """Arrays of any layout and type keep shape, type and items, and can be written to."""
    source, target = Repl(), Repl()
    source.variables["a"] = array
    target.take(source.packed("a"))
    taken = target["a"]
    assert taken.dtype == array.dtype and taken.shape == array.shape and (taken == array).all()
    assert taken.flags.writeable


def test_a_large_array_is_not_held_twice_while_it_is_packed() -> None:
    """Packing 100 MB hands out the array's own memory, piece by piece."""
    repl = Repl()
    repl.variables["a"] = numpy.zeros(100 * 2**20, numpy.uint8)
    sizes: list[int] = []
    before = peak_kib()
    assert parcel.refusals({"a": repl["a"]}, repl.home, LARGE) == {}
    parcel.pack({"a": repl["a"]}, repl.home, lambda data: sizes.append(data.nbytes))
    assert sum(sizes) > 100 * 2**20 and peak_kib() - before < 20 * 1024


def test_a_parcel_of_another_python_is_refused() -> None:
    """Code objects are for one version of Python: a parcel says which made it, and others refuse it."""
    data = pickle.dumps(("another python", ["x"])) + pickle.dumps(1) + pickle.dumps({})
    with pytest.raises(Misfit, match="another Python"):
        Repl().take(data)


@given(st.binary(max_size=60), st.integers(0, 200))
def test_a_damaged_parcel_is_one_kind_of_error(noise: bytes, at: int) -> None:
    """A parcel that is cut or overwritten is refused or read; nothing else is raised."""
    data = bytearray(Repl("x = {'a': [1, 2.5, 'text', b'bytes']}\ny = 5").packed("x", "y"))
    data[at : at + len(noise)] = noise
    target = Repl()
    try:
        target.take(bytes(data))
    except Misfit as failure:
        assert len(str(failure)) <= MAX_REASON_CHARS


@pytest.mark.parametrize("raised", [KeyboardInterrupt, parcel.Cancelled])
def test_an_end_from_outside_is_not_taken_for_a_bad_value(raised: type[BaseException]) -> None:
    """An interrupt or the host's change of mind goes through packing and unpacking as it is."""

    def stop(data: object) -> None:
        raise raised

    class Source(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            raise raised

        def read(self, size: int | None = -1) -> bytes:
            raise raised

    repl = Repl("x = 1")
    with pytest.raises(raised):
        parcel.pack({"x": 1}, repl.home, stop)
    with pytest.raises(raised):
        parcel.unpack(Source(), repl.home, repl.sources.__setitem__)


def peak_kib() -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
