"""Values of variables as one stream of bytes, from one REPL to another: a pickle that carries definitions, too.

All values share one memo, so what two of them share stays one object.  The stream is read by REPLs only.
"""

from __future__ import annotations

import pickle
import sys
from typing import AbstractSet, Any, Callable, Dict, Mapping, Protocol

from podflare.guest.variables.definitions import Namespace, Reduction, TakenApart, Unpacking
from podflare.guest.variables.fingerprint import clip, type_name

_PROTOCOL = 5
_MAKER = f"{sys.implementation.cache_tag} {sys.hexversion:x}"
"""Code objects are understood by the same Python alone; others may crash on them."""


class Misfit(Exception):
    """One value cannot be packed or unpacked."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(why)
        self.name = name


class Source(Protocol):
    """What an unpickler reads from."""

    def read(self, size: int, /) -> bytes: ...

    def readline(self) -> bytes: ...

    def readinto(self, buffer: Any, /) -> int: ...


class Overflow(Exception):
    """More bytes than are allowed; the text is the name of the variable at fault, if it is one."""


class Cancelled(BaseException):
    """Nobody wants the values any more."""


_NOT_ITS_FAULT = (KeyboardInterrupt, Overflow, Cancelled)
"""What is no failure of the value that was being packed or unpacked."""


class _Counter:
    """A sink that keeps only a count."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def write(self, data: Any) -> None:
        self._left -= len(data) if type(data) is bytes else memoryview(data).nbytes
        if self._left < 0:
            raise Overflow


class _Sink:
    """Passes on what a pickler writes as bytes-like objects with one dimension."""

    def __init__(self, write: Callable[[memoryview], None]) -> None:
        self._write = write

    def write(self, data: Any) -> None:
        # Large buffers come as they are, whatever their shape and item size.
        with pickle.PickleBuffer(data).raw() as flat:
            self._write(flat)


class _Packer(pickle.Pickler):
    def __init__(self, sink: Any, home: Namespace, carried: AbstractSet[str]) -> None:
        super().__init__(sink, protocol=_PROTOCOL)
        self.apart = TakenApart(home, carried)

    def reducer_override(self, value: Any) -> Reduction:
        return self.apart.reduce(value)


def refusals(values: Mapping[str, Any], home: Namespace, limit: int) -> Dict[str, str]:
    """Which of the values cannot be packed, and why.  Raises: Overflow if one of them alone is above `limit`."""
    refused: Dict[str, str] = {}
    with Unpacking(home):
        for name, value in values.items():
            try:
                # Each alone: a memo that has seen a part of what failed would hide that in the next value.
                _Packer(_Counter(limit), home, values.keys()).dump(value)
            except Overflow:
                raise Overflow(name) from None
            except _NOT_ITS_FAULT:
                raise
            except BaseException as exc:  # noqa: BLE001  # objects may raise anything
                refused[name] = _why(exc)
    return refused


def pack(values: Mapping[str, Any], home: Namespace, write: Callable[[memoryview], None]) -> None:
    """Write all values.  Raises: Misfit if one cannot be packed after all; what `write` raises."""
    carried: Dict[str, Any] = dict(values)
    packer = _Packer(_Sink(write), home, values.keys())
    with Unpacking(home):
        packer.dump((_MAKER, list(carried)))
        for name, value in carried.items():
            try:
                packer.dump(value)
            except _NOT_ITS_FAULT:
                raise
            except BaseException as exc:  # noqa: BLE001  # objects may raise anything
                raise Misfit(name, _why(exc)) from None
        packer.dump(packer.apart.sources)


def unpack(source: Source, home: Namespace, keep_source: Callable[[str, str], None]) -> Dict[str, Any]:
    """The values, by name.

    Args:
        keep_source: called with name and text of cells that definitions come from.
    Raises: Misfit; what `source` raises.
    """
    unpacker = pickle.Unpickler(source)
    values: Dict[str, Any] = {}
    name = ""
    with Unpacking(home):
        try:
            maker, names = unpacker.load()
            if maker != _MAKER:
                raise Misfit("", f"the values were made by another Python ({maker}, here {_MAKER})")
            for name in names:
                values[name] = unpacker.load()
            name = ""
            for file, text in unpacker.load().items():
                keep_source(file, text)
        except (Misfit, *_NOT_ITS_FAULT):
            raise
        except BaseException as exc:  # noqa: BLE001  # objects may raise anything
            raise Misfit(name, _why(exc)) from None
    return values


def _why(exc: BaseException) -> str:
    if isinstance(exc, RecursionError):
        return "it is nested too deeply"
    try:
        return clip(f"{type_name(type(exc))}: {exc}")
    except BaseException:  # noqa: BLE001  # its __str__ may raise anything
        return "an exception that cannot be shown"
