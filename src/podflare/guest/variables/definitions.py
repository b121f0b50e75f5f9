"""How functions and classes that cells defined are taken apart and put together again, by reductions for pickle.

The pickle module stores only the names of functions and classes, which are of no use in another REPL.  Here they
travel with their code.  A function goes on with the globals of the receiving REPL's `__main__`, as if the cell had run
there.  What a definition refers to by a global name does not travel with it.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import hashlib
import linecache
import marshal
import sys
import types
import typing
from pickle import PicklingError
from typing import Any, Callable, Dict, List, Optional, Tuple

from podflare.guest.variables.fingerprint import is_importable, is_local

MODULE = "_podflare_definitions"
"""Under this name the functions that put together can be imported while a parcel is packed or unpacked."""
_CLASS_LEFT_OUT = frozenset(
    (
        "__dict__",
        "__weakref__",
        "__module__",
        "__qualname__",
        "__slots__",
        "__doc__",
        "_abc_impl",
        "__abstractmethods__",
        "__annotate_func__",
        "__slotnames__",
    )
)
_HEAD = ("__module__", "__qualname__", "__doc__", "__slots__", "__orig_bases__")
"""Attributes that a class must have from its beginning."""
_ENUM_OWN = frozenset(
    (
        "_member_map_",
        "_member_names_",
        "_value2member_map_",
        "_hashable_values_",
        "_unhashable_values_",
        "_unhashable_values_map_",
        "_member_type_",
        "_value_repr_",
        "_use_args_",
        "_generate_next_value_",
        "__new__",
        "__new_member__",
        "_new_member_",
        "__reduce_ex__",
    )
)
Reduction = Any
"""As __reduce_ex__ gives it."""


class Namespace:
    """Where definitions belong: the globals of one REPL, and the sources of its cells."""

    def __init__(self, variables: Dict[str, Any], cells: "typing.AbstractSet[str]") -> None:
        self.variables = variables
        self.cells = cells


class TakenApart:
    """Reductions of the definitions in one parcel."""

    def __init__(self, home: Namespace, carried: "typing.AbstractSet[str]") -> None:
        """`carried`: names whose values are in the parcel.  What hangs on another name stays a name."""
        self._home = home
        self._carried = carried
        self._globals: Dict[int, Tuple[Any, Dict[str, Any]]] = {}
        self.sources: Dict[str, str] = {}
        """Source of the cells that definitions in the parcel come from, by the file name in their code."""

    def reduce(self, value: Any) -> Reduction:
        """For Pickler.reducer_override.  Raises: PicklingError that says what is not possible."""
        kind = type(value)
        way = _WAYS.get(kind)
        if way is not None:
            return way(self, value)
        if issubclass(kind, type):
            return self._class(value)
        if kind.__module__ == "dataclasses" and kind not in (dataclasses.Field,):
            return _dataclass_sign(value)
        return NotImplemented

    def _function(self, value: Any) -> Reduction:
        if value.__module__ == MODULE or is_importable(value):
            return NotImplemented
        path = self._path_here(value)
        if path is not None:
            return named, (path,)
        return (
            empty_function,
            (self._code(value.__code__), self._globals_of(value), value.__name__, value.__closure__),
            {
                "__qualname__": value.__qualname__,
                "__module__": value.__module__,
                "__defaults__": value.__defaults__,
                "__kwdefaults__": value.__kwdefaults__,
                "__annotations__": value.__annotations__,
                "__doc__": value.__doc__,
                "__dict__": value.__dict__,
            },
            None,
            None,
            fill_function,
        )

    def _path_here(self, value: Any) -> Optional[str]:
        """The name under which the receiver, too, may have `value`; None if it is to travel itself."""
        path = value.__qualname__
        root = path.partition(".")[0]
        if value.__module__ != "__main__" or root in self._carried or "<locals>" in path:
            return None
        found: Any = self._home.variables.get(root)
        for name in path.split(".")[1:]:
            found = getattr(found, name, None)
        return path if found is value else None

    def _globals_of(self, value: Any) -> Any:
        """A module's name for its globals, or what other globals a function has: generated code has own ones."""
        space = value.__globals__
        if space is self._home.variables:
            return "__main__"
        name = space.get("__name__")
        if type(name) is str and getattr(sys.modules.get(name), "__dict__", None) is space:
            return name
        if id(space) not in self._globals:
            own = {key: item for key, item in space.items() if key != "__builtins__"}
            self._globals[id(space)] = (space, own)
        return self._globals[id(space)][1]

    def _code(self, code: types.CodeType) -> bytes:
        return marshal.dumps(self._renamed(code))

    def _renamed(self, code: types.CodeType) -> types.CodeType:
        """With file names that mean the same source in the receiving REPL, which has other cells."""
        consts = tuple(self._renamed(one) if isinstance(one, types.CodeType) else one for one in code.co_consts)
        name = code.co_filename
        if name in self._home.cells:
            source = "".join(linecache.getlines(name))
            digest = hashlib.blake2b(source.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
            name = f"{name.rstrip('>')} {digest}>"
            self.sources[name] = source
        return code.replace(co_consts=consts, co_filename=name)

    def _cache(self, value: Any) -> Reduction:
        path = self._path_here(value)
        if path is not None:
            return named, (path,)
        if is_importable(value):
            return NotImplemented
        return cached_function, (value.__wrapped__, value.cache_parameters())

    def _cell(self, value: types.CellType) -> Reduction:
        try:
            content: Tuple[Any, ...] = (value.cell_contents,)
        except ValueError:
            content = ()
        return types.CellType, (), content or None, None, None, fill_cell

    def _class(self, value: Any) -> Reduction:
        if value in _NAMELESS:
            return _NAMELESS[value]
        if is_importable(value) or not is_local(value):
            return NotImplemented
        path = self._path_here(value)
        if path is not None:
            return named, (path,)
        if isinstance(value, enum.EnumMeta):
            return self._enum(value)
        content = vars(value)
        head = {key: content[key] for key in _HEAD if key in content}
        head["__qualname__"] = value.__qualname__
        slots = content.get("__slots__", ())
        left_out = _CLASS_LEFT_OUT | ({slots} if isinstance(slots, str) else set(slots))
        # Slots of private names have another name in the class.
        body = {
            key: item
            for key, item in content.items()
            if key not in left_out and not isinstance(item, (types.MemberDescriptorType, types.GetSetDescriptorType))
        }
        args = type(value), value.__name__, value.__bases__, head
        return empty_class, args, body, None, None, fill_class

    def _enum(self, value: Any) -> Reduction:
        content = vars(value)
        if "__init__" in content or "__new_member__" in content:
            # It would have to run with the members half made.
            raise PicklingError(f"the enumeration {value.__qualname__} has an __init__ or __new__ of its own")
        members = [(name, member._value_) for name, member in value.__members__.items()]
        head = {"__module__": value.__module__, "__qualname__": value.__qualname__, "__doc__": value.__doc__}
        left_out = _CLASS_LEFT_OUT | _ENUM_OWN | set(value.__members__)
        body = {key: item for key, item in content.items() if key not in left_out and _is_written(item)}
        return filled_enum, (type(value), value.__name__, value.__bases__, head, members), body, None, None, fill_class

    def _module(self, value: Any) -> Reduction:
        name = value.__name__
        if type(name) is not str or sys.modules.get(name) is not value:
            raise PicklingError(f"the module {name!r} cannot be imported under its name")
        return imported, (name,)


def _is_written(item: Any) -> bool:
    """Whether an attribute of an enumeration was written in its body, and not made by the metaclass."""
    return isinstance(item, (types.FunctionType, staticmethod, classmethod, property, dict, str, tuple))


def _dataclass_sign(value: Any) -> Reduction:
    """The module's own signs (MISSING, KW_ONLY ...) are compared by identity."""
    for name, item in vars(dataclasses).items():
        if item is value:
            return getattr, (dataclasses, name)
    return NotImplemented


# Built-in types that are not where they say.
_NAMELESS: Dict[Any, Reduction] = {
    item: (getattr, (types, name)) for name, item in vars(types).items() if type(item) is type
}
_NAMELESS.update({type(one): (type, (one,)) for one in (None, NotImplemented, ...)})

_WAYS: Dict[Any, Callable[[TakenApart, Any], Reduction]] = {
    types.FunctionType: TakenApart._function,
    types.CellType: TakenApart._cell,
    types.ModuleType: TakenApart._module,
    types.CodeType: lambda apart, value: (marshal.loads, (apart._code(value),)),
    types.MappingProxyType: lambda apart, value: (types.MappingProxyType, (dict(value),)),
    property: lambda apart, value: (property, (value.fget, value.fset, value.fdel, value.__doc__)),
    staticmethod: lambda apart, value: (staticmethod, (value.__func__,)),
    classmethod: lambda apart, value: (classmethod, (value.__func__,)),
    functools.cached_property: lambda apart, value: (cached, (value.func, value.attrname)),
    type(functools.lru_cache(is_local)): TakenApart._cache,
    typing.TypeVar: lambda apart, value: _type_variable(value),
}


def _type_variable(value: Any) -> Reduction:
    if value.__module__ != "__main__":
        return NotImplemented
    return type_variable, (
        value.__name__,
        value.__constraints__,
        value.__bound__,
        value.__covariant__,
        value.__contravariant__,
    )


# -- putting together, in the receiving REPL

_here: List[Namespace] = []


class Unpacking:
    """Within the block the parts below put together for `home`, and pickle finds them under MODULE."""

    def __init__(self, home: Namespace) -> None:
        self._home = home

    def __enter__(self) -> None:
        _here.append(self._home)
        module = types.ModuleType(MODULE)
        for part in _PARTS:
            setattr(module, part.__name__, part)
        sys.modules[MODULE] = module

    def __exit__(self, *exc: object) -> None:
        sys.modules.pop(MODULE, None)
        _here.clear()


def named(path: str) -> Any:
    """What the receiving REPL has under a name of a cell's definition.  Raises: LookupError that names it."""
    first, *rest = path.split(".")
    try:
        found = _here[-1].variables[first]
        for name in rest:
            found = getattr(found, name)
    except (KeyError, AttributeError):
        raise LookupError(f"it needs {path!r}, which is not defined here: take {first!r}, too") from None
    return found


def imported(name: str) -> Any:
    """A module, imported if it is not yet."""
    __import__(name)
    return sys.modules[name]


def empty_function(code: bytes, space: Any, name: str, closure: Any) -> Any:
    """A function without what may refer back to it."""
    if space == "__main__":
        space = _here[-1].variables
    elif isinstance(space, str):
        space = vars(imported(space))
    else:
        space.setdefault("__builtins__", __builtins__)
    return types.FunctionType(marshal.loads(code), space, name, None, closure)


def fill_function(function: Any, state: Dict[str, Any]) -> None:
    """The rest of it."""
    function.__dict__.update(state.pop("__dict__"))
    for name, value in state.items():
        setattr(function, name, value)


def fill_cell(cell: types.CellType, content: Tuple[Any]) -> None:
    """Of a closure."""
    cell.cell_contents = content[0]


def empty_class(metaclass: Any, name: str, bases: Tuple[Any, ...], head: Dict[str, Any]) -> Any:
    """A class without its attributes; of its metaclass's own code nothing runs."""
    made = type.__new__(metaclass, name, bases, dict(head))
    if isinstance(made, abc.ABCMeta):
        _abc_init(made)
    return made


def fill_class(made: Any, body: Dict[str, Any]) -> None:
    """Its attributes, past what the metaclass thinks of setting them."""
    for name, value in body.items():
        type.__setattr__(made, name, value)
    if isinstance(made, abc.ABCMeta):
        _abc_init(made)


def filled_enum(metaclass: Any, name: str, bases: Tuple[Any, ...], head: Dict[str, Any], members: Any) -> Any:
    """An enumeration with its members."""
    space = metaclass.__prepare__(name, bases)
    for key, value in (*head.items(), *members):
        space[key] = value
    return metaclass.__new__(metaclass, name, bases, space)


def cached(function: Any, name: str) -> Any:
    """A cached_property that knows its name, as in a class body."""
    made: Any = functools.cached_property(function)
    made.attrname = name
    return made


def cached_function(function: Any, parameters: Dict[str, Any]) -> Any:
    """A function under lru_cache, with nothing cached yet."""
    return functools.lru_cache(**parameters)(function)


def type_variable(name: str, constraints: Any, bound: Any, covariant: bool, contravariant: bool) -> Any:
    """A TypeVar of a cell."""
    make: Any = typing.TypeVar  # a type checker wants to know them all beforehand
    made = make(name, *constraints, bound=bound, covariant=covariant, contravariant=contravariant)
    made.__module__ = "__main__"
    return made


def _abc_init(made: Any) -> None:
    # The abc module has no public way to this.
    abc._abc_init(made)  # type: ignore[attr-defined]


_PARTS: Tuple[Any, ...] = (
    named,
    imported,
    empty_function,
    fill_function,
    fill_cell,
    empty_class,
    fill_class,
    filled_enum,
    cached,
    cached_function,
    type_variable,
)
for _part in _PARTS:
    _part.__module__ = MODULE
