"""Fingerprints: a digest of what a value contains, the same in every process that holds the same content.

Neither identity nor the order of a set counts, nor whether parts that are equal are one object.  Types, the order of a
dict, the sign of zero and the code of functions do.  A value is read through its pickle reduction, so what a pickle
would not carry is not read; parts that cannot be reduced (locks, generators, sockets) count by their type alone and
are told as an obstacle.  Reading is bounded in time, and, for a quick look, in bytes and to types whose code is not
the user's.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import itertools
import marshal
import pickle
import sys
import time
import types
import typing
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

from podflare.wire.variables import FINGERPRINT_CHARS, MAX_REASON_CHARS, MAX_TYPE_CHARS, Variable

_MARSHAL = 2
"""The last version without references to earlier objects, so that its bytes follow from the content alone."""
_PROTOCOL = 5
_SCALARS = frozenset((type(None), bool, int, float, complex, str, bytes, type(...)))
_PLAIN_ITEMS = 64
"""Up to so many scalars in one container are read at once: there are many such, and they need no memory of cycles."""
_CHUNK_ITEMS = 4096
_CHUNK_BYTES = 4 * 1024 * 1024
_MAX_DEPTH = 200
"""Of values within values: below Python's own limit on recursion, and the same wherever it is read."""
_TICKS = 64
"""Values read between two looks at the clock."""
_TRUSTED = frozenset(
    (
        "array",
        "builtins",
        "collections",
        "dataclasses",
        "datetime",
        "decimal",
        "enum",
        "fractions",
        "functools",
        "ipaddress",
        "numpy",
        "operator",
        "pandas",
        "pathlib",
        "random",
        "re",
        "string",
        "time",
        "types",
        "typing",
        "uuid",
        "zoneinfo",
    )
)
"""Packages whose reductions are quick and have no effects."""
_OWN_STATE = ("__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs__", "__getnewargs_ex__")
_VOLATILE = frozenset(
    (
        "__dict__",
        "__weakref__",
        "__module__",
        "__firstlineno__",
        "__static_attributes__",
        "_abc_impl",
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__slotnames__",
    )
)
"""Attributes of a class that are not its content."""

# Bound before user code can put something else in their place.
_blake2b, _dumps, _monotonic = hashlib.blake2b, marshal.dumps, time.monotonic
_PickleBuffer = pickle.PickleBuffer


class Unreadable(Exception):
    """The value is not read to its end; the message says why."""


class Reading(NamedTuple):
    """What reading one value gave."""

    fingerprint: str
    size: int
    obstacle: str


_TOO_LARGE = "it is too large"
QUICK_OBJECTS = 4096
"""Objects that a quick reading looks at: each look counts a reference, and so copies the page that a fork shares."""


class Reader:
    """Reads values until a moment in time."""

    def __init__(
        self,
        deadline_s: float,
        *,
        clock: Callable[[], float] = _monotonic,
        max_bytes: Optional[int] = None,
        quick: bool = False,
    ) -> None:
        """
        Args:
            deadline_s: on `clock`.
            max_bytes: of one value.
            quick: run no code of the user's: values that would need it are Unreadable.
        """
        self._deadline_s = deadline_s
        self._clock = clock
        self._max_bytes = max_bytes
        self._quick = quick
        self._ticks = 0
        self._begin()

    def _begin(self) -> None:
        self._memo: Dict[int, Tuple[Any, bytes]] = {}
        self._path: Dict[int, int] = {}
        self._reach = sys.maxsize
        self._size = 0
        self._obstacle = ""

    def read(self, value: Any) -> Reading:
        """Raises: Unreadable; KeyboardInterrupt.  Nothing else, whatever the value's own code raises."""
        self._begin()
        try:
            digest = self._digest(value)
        except (Unreadable, KeyboardInterrupt):
            raise
        except RecursionError:
            raise Unreadable("it is nested too deeply") from None
        except BaseException as exc:  # noqa: BLE001  # objects may raise anything
            raise Unreadable(f"reading it failed: {_told(exc)}") from None
        finally:
            self._memo, self._path = {}, {}
        return Reading(digest.hex(), self._size, self._obstacle)

    # Bounds.

    def _tick(self) -> None:
        self._ticks += 1
        if self._quick and self._ticks > QUICK_OBJECTS:
            raise Unreadable(_TOO_LARGE)
        if self._ticks % _TICKS == 0:
            self._look_at_clock()

    def _look_at_clock(self) -> None:
        if self._clock() > self._deadline_s:
            raise Unreadable("reading it took too long")

    def _count(self, size: int, ahead: int = 0) -> None:
        """Add to the size; `ahead` is what will come at least."""
        self._size += size
        if self._quick and ahead > QUICK_OBJECTS:
            raise Unreadable(_TOO_LARGE)
        if self._max_bytes is not None and self._size + ahead > self._max_bytes:
            raise Unreadable(_TOO_LARGE)

    # Digests.

    def _leaf(self, tag: bytes, data: bytes) -> bytes:
        self._count(len(data))
        return _blake2b(tag + data, digest_size=FINGERPRINT_CHARS // 2).digest()

    def _joined(self, tag: bytes, parts: List[bytes]) -> bytes:
        """Of parts with a fixed length each, or one of its own."""
        return _blake2b(tag + b"".join(parts), digest_size=FINGERPRINT_CHARS // 2).digest()

    def _digest(self, value: Any) -> bytes:
        self._tick()
        kind = type(value)
        if kind in _SCALARS:
            if kind is str or kind is bytes:
                return self._text(value) if kind is str else self._buffer(b"b", value)
            return self._leaf(b".", _dumps(value, _MARSHAL))
        if (kind is dict or kind is list or kind is tuple) and len(value) <= _PLAIN_ITEMS and _is_plain(kind, value):
            return self._leaf(b"P", _dumps(value, _MARSHAL))
        way = _WAYS.get(kind)
        if way is None:
            way = Reader._class if issubclass(kind, type) else Reader._reduced
        return self._compound(value, way)

    def _compound(self, value: Any, way: Callable[["Reader", Any], bytes]) -> bytes:
        """Digest of what may hold other values: once for each object, and finite for a cycle.

        A part that leads back out to where we are is not kept, for its digest says how far out.
        """
        key = id(value)
        known = self._memo.get(key)
        if known is not None:
            return known[1]
        level = self._path.get(key)
        if level is not None:
            self._reach = min(self._reach, level)
            return self._leaf(b"cycle", str(len(self._path) - level).encode())
        level = self._path[key] = len(self._path)
        if level > _MAX_DEPTH:
            raise Unreadable("it is nested too deeply")
        outer, self._reach = self._reach, sys.maxsize
        try:
            digest = way(self, value)
        finally:
            del self._path[key]
        if self._reach >= level:
            self._memo[key] = (value, digest)
            self._reach = outer
        else:
            self._reach = min(outer, self._reach)
        return digest

    def _text(self, value: str) -> bytes:
        if len(value) < _CHUNK_ITEMS:
            return self._leaf(b"s", value.encode("utf-8", "surrogatepass"))
        state = _blake2b(b"s", digest_size=FINGERPRINT_CHARS // 2)
        for start in range(0, len(value), _CHUNK_BYTES):
            self._count(min(len(value) - start, _CHUNK_BYTES))
            state.update(value[start : start + _CHUNK_BYTES].encode("utf-8", "surrogatepass"))
            self._look_at_clock()
        return state.digest()

    def _buffer(self, tag: bytes, value: Any) -> bytes:
        with memoryview(value) as view:
            self._count(view.nbytes)
            state = _blake2b(tag, digest_size=FINGERPRINT_CHARS // 2)
            for start in range(0, view.nbytes, _CHUNK_BYTES):
                state.update(view[start : start + _CHUNK_BYTES])
                self._look_at_clock()
            return state.digest()

    def _items(self, items: Any) -> List[bytes]:
        """Digests of a list or tuple; plain values by the thousand."""
        self._count(0, ahead=len(items))
        parts = [len(items).to_bytes(8, "little")]
        for start in range(0, len(items), _CHUNK_ITEMS):
            part = items[start : start + _CHUNK_ITEMS]
            self._look_at_clock()
            if _SCALARS.issuperset(map(type, part)):
                parts.append(self._leaf(b"p", _dumps(tuple(part), _MARSHAL)))
            else:
                parts.extend(map(self._digest, part))
        return parts

    def _list(self, value: Any) -> bytes:
        return self._joined(b"l", self._items(value))

    def _tuple(self, value: Any) -> bytes:
        return self._joined(b"t", self._items(value))

    def _dict(self, value: Any) -> bytes:
        self._count(0, ahead=2 * len(value))
        return self._joined(b"d", self._items(list(value)) + self._items(list(value.values())))

    def _set(self, value: Any) -> bytes:
        self._count(0, ahead=len(value))
        items = list(value)
        if _SCALARS.issuperset(map(type, items)):
            ordered = sorted(map(_dumps, items, itertools.repeat(_MARSHAL)))
        else:
            ordered = sorted(map(self._digest, items))
        tag = b"f" if type(value) is frozenset else b"e"
        return self._joined(tag, [self._leaf(b"i", part) for part in ordered])

    def _mapping(self, value: Any) -> bytes:
        return self._joined(b"m", [self._dict(dict(value))])

    def _bytearray(self, value: Any) -> bytes:
        return self._buffer(b"a", value)

    def _pickle_buffer(self, value: Any) -> bytes:
        return self._buffer(b"o", value.raw())

    def _module(self, value: Any) -> bytes:
        return self._leaf(b"M", str(value.__name__).encode("utf-8", "replace"))

    def _cell(self, value: Any) -> bytes:
        try:
            content = value.cell_contents
        except ValueError:
            return self._leaf(b"c", b"")
        return self._joined(b"C", [self._digest(content)])

    def _code(self, value: Any) -> bytes:
        """What the code does; not the cell and the line in which it stands."""
        plain = tuple(getattr(value, name, None) for name in _CODE_PARTS)
        return self._joined(b"k", [self._leaf(b"j", _dumps(plain, _MARSHAL)), self._digest(value.co_consts)])

    def _function(self, value: Any) -> bytes:
        if is_importable(value):
            return self._named(value)
        head = self._digest((value.__module__, value.__qualname__)), self._digest(value.__code__)
        parts = (getattr(value, name) for name in _FUNCTION_PARTS)
        return self._joined(b"F", [*head, *(self._digest(part) if part else _NOTHING for part in parts)])

    def _descriptor(self, value: Any) -> bytes:
        """property, staticmethod, classmethod, cached_property: by the functions in it."""
        names = ("fget", "fset", "fdel", "__doc__") if type(value) is property else ("__func__", "func")
        parts = [getattr(value, name, None) for name in names]
        return self._joined(b"D", [self._leaf(b"T", type(value).__name__.encode()), *map(self._digest, parts)])

    def _cache(self, value: Any) -> bytes:
        """A function under functools.lru_cache; not what it has cached."""
        return self._joined(b"L", [self._digest(value.cache_parameters()), self._digest(value.__wrapped__)])

    def _type_variable(self, value: Any) -> bytes:
        parts = value.__module__, value.__name__, value.__bound__, value.__constraints__
        return self._joined(b"V", [self._digest(part) for part in parts])

    def _class(self, value: Any) -> bytes:
        if is_importable(value) or not is_local(value):
            return self._named(value)
        attributes = {name: value.__dict__[name] for name in sorted(value.__dict__) if name not in _VOLATILE}
        members = [self._digest(name) + self._attribute(attribute) for name, attribute in attributes.items()]
        head = (value.__qualname__, type(value), value.__bases__)
        return self._joined(b"K", [*map(self._digest, head), *members])

    def _attribute(self, value: Any) -> bytes:
        if type(value) in (types.MemberDescriptorType, types.GetSetDescriptorType):
            return self._leaf(b"S", value.__name__.encode())
        return self._digest(value)

    def _named(self, value: Any) -> bytes:
        return self._leaf(b"N", f"{value.__module__}\0{value.__qualname__}".encode("utf-8", "replace"))

    # Everything else: by its reduction.

    def _array(self, value: Any) -> bytes:
        """Of numpy, without Python objects in it: shape and items, however they lie in memory."""
        self._count(value.nbytes)
        head = self._digest((value.shape, value.dtype))
        state = _blake2b(b"A" + head, digest_size=FINGERPRINT_CHARS // 2)
        if value.flags.c_contiguous:
            flat = memoryview(value.reshape(-1).view("u1"))
            pieces: Iterable[Any] = (flat[at : at + _CHUNK_BYTES] for at in range(0, flat.nbytes, _CHUNK_BYTES))
        else:
            rows = max(1, _CHUNK_BYTES * len(value) // max(1, value.nbytes))
            pieces = (value[at : at + rows].tobytes() for at in range(0, len(value), rows))
        for piece in pieces:
            state.update(piece)
            self._look_at_clock()
        return state.digest()

    def _reduced(self, value: Any) -> bytes:
        kind = type(value)
        if kind is getattr(sys.modules.get("numpy"), "ndarray", None):
            if not value.dtype.hasobject:
                return self._array(value)
            if self._max_bytes is not None and value.nbytes > self._max_bytes:
                raise Unreadable("it is too large")  # its reduction is a list of them all
        reduce = copyreg.dispatch_table.get(kind)
        if self._quick:
            self._demand_harmless(kind, value)
        try:
            reduced: Any = reduce(value) if reduce is not None else value.__reduce_ex__(_PROTOCOL)
        except (KeyboardInterrupt, RecursionError):
            raise
        except BaseException as exc:  # noqa: BLE001  # locks and generators say no by TypeError, user code by anything
            return self._opaque(kind, _told(exc))
        if type(reduced) is str:
            if getattr(value, "__module__", None) in (None, "__main__"):
                return self._opaque(kind, "only its name can be stored")
            return self._leaf(b"G", f"{type_name(kind)}\0{reduced}".encode("utf-8", "replace"))
        if type(reduced) is not tuple or not 2 <= len(reduced) <= 6:
            return self._opaque(kind, "its reduction is not one")
        if _package(kind) == "pandas" and len(reduced) > 2:
            reduced = (*reduced[:2], _without_caches(reduced[2]), *reduced[3:])
        parts = [self._digest(part) for part in reduced[:3]]
        for number, iterator in enumerate(reduced[3:5]):
            parts.append(b"0123"[number : number + 1])
            parts.extend(map(self._digest, () if iterator is None else iterator))
        return self._joined(b"R", parts)

    def _opaque(self, kind: type, why: str) -> bytes:
        self._obstacle = self._obstacle or clip(f"{type_name(kind)}: {why}")
        return self._leaf(b"?", type_name(kind).encode("utf-8", "replace"))

    def _demand_harmless(self, kind: type, value: Any) -> None:
        """Raises: Unreadable if reducing it would run code of the user's, or copy much."""
        package = _package(kind)
        if package in _TRUSTED or package.startswith("_cython_"):
            return
        for name in _OWN_STATE:
            found = getattr(kind, name, None)
            if found is not getattr(object, name, None) and _package(found) not in _TRUSTED:
                raise Unreadable("it has a reduction of its own")


_CODE_PARTS = (
    "co_code",
    "co_names",
    "co_varnames",
    "co_freevars",
    "co_cellvars",
    "co_argcount",
    "co_posonlyargcount",
    "co_kwonlyargcount",
    "co_flags",
    "co_name",
    "co_exceptiontable",
)
_FUNCTION_PARTS = ("__defaults__", "__kwdefaults__", "__closure__", "__annotations__", "__dict__")
_NOTHING = bytes(FINGERPRINT_CHARS // 2)
"""In the place of a digest: the function has none of it."""


def _package(value: Any) -> str:
    """To which a class or one of its methods belongs."""
    module = getattr(value, "__module__", None) or getattr(getattr(value, "__objclass__", None), "__module__", "")
    return str(module).partition(".")[0]


def _without_caches(state: Any) -> Any:
    """The state of a pandas object without what comes and goes when it is only looked at."""
    if type(state) is dict:
        return {key: item for key, item in state.items() if key not in ("_cache", "_readonly")}
    return tuple(map(_without_caches, state)) if type(state) is tuple else state


def _is_plain(kind: type, value: Any) -> bool:
    """Whether an exact dict, list or tuple holds scalars only."""
    if not _SCALARS.issuperset(map(type, value)):
        return False
    return kind is not dict or _SCALARS.issuperset(map(type, value.values()))


def is_importable(value: Any) -> bool:
    """Whether a class or function is what its module has under its name, so that its name says all."""
    module, path = value.__module__, value.__qualname__
    if module == "__main__" or type(module) is not str or type(path) is not str:
        return False
    found: Any = sys.modules.get(module)
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is value


def is_local(value: Any) -> bool:
    """Whether a class says of itself that no module has it: a cell or a function defined it."""
    return value.__module__ == "__main__" or "<locals>" in value.__qualname__


def type_name(kind: type) -> str:
    """Of a class, as users write it; bounded."""
    try:
        module, name = str(kind.__module__), str(kind.__qualname__)
    except Exception:  # noqa: BLE001  # a metaclass may have its own idea
        return "?"
    return clip(name if module in ("builtins", "__main__") else f"{module}.{name}", MAX_TYPE_CHARS)


def clip(text: str, chars: int = MAX_REASON_CHARS) -> str:
    """`text` in at most so many ASCII characters."""
    return text[:chars].encode("ascii", "backslashreplace").decode("ascii")[:chars]


def _told(exc: BaseException) -> str:
    try:
        return clip(f"{type(exc).__name__}: {exc}")
    except BaseException:  # noqa: BLE001  # its __str__ may raise anything
        return "an exception that cannot be shown"


def read_variable(reader: Reader, value: Any) -> Variable:
    """All that is told of one variable.  Raises: KeyboardInterrupt."""
    kind = type_name(type(value))
    try:
        reading = reader.read(value)
    except Unreadable as exc:
        return Variable(kind, unread=clip(str(exc)))
    return Variable(kind, reading.size, reading.fingerprint, reading.obstacle)


_WAYS: Dict[type, Callable[[Reader, Any], bytes]] = {
    list: Reader._list,
    tuple: Reader._tuple,
    dict: Reader._dict,
    set: Reader._set,
    frozenset: Reader._set,
    bytearray: Reader._bytearray,
    pickle.PickleBuffer: Reader._pickle_buffer,
    types.MappingProxyType: Reader._mapping,
    types.ModuleType: Reader._module,
    types.CellType: Reader._cell,
    types.CodeType: Reader._code,
    types.FunctionType: Reader._function,
    property: Reader._descriptor,
    staticmethod: Reader._descriptor,
    classmethod: Reader._descriptor,
    functools.cached_property: Reader._descriptor,
    type(functools.lru_cache(is_importable)): Reader._cache,
    typing.TypeVar: Reader._type_variable,
    type: Reader._class,
}
