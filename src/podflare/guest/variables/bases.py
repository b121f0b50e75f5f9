"""Bases: what the variables were at moments that this REPL has in common with others.

A fork makes one.  Nothing is read then: as long as no cell has run the variables are still what they were.  Before
the first cell that follows, a quick look is taken, so short that it does not show: what is too large for it stays
unknown.  It runs no code of the user's.
"""

from __future__ import annotations

import sys
import time
import weakref
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from podflare.guest.variables.fingerprint import Reader, read_variable
from podflare.wire.variables import MAX_BASES, MAX_VARIABLES, Variable, VariablesBase, is_told

QUICK_LOOK_S = 0.002
"""For all variables together; of processor time, so that what is known does not hang on how busy the machine is."""
_QUICK_VALUE_S = 0.0007
_QUICK_BYTES = 256 * 1024
"""Of one value: what can be read in a fraction of the time."""
_AT_ONCE = frozenset((type(None), bool, int, float, complex, str, bytes, type(sys)))
"""Types that cost next to nothing, and so come first."""

_clock = time.thread_time


class Moment:
    """What the variables were once."""

    def __init__(self, fingerprints: Mapping[str, str], complete: bool) -> None:
        self.fingerprints = dict(fingerprints)
        self.complete = complete
        self._opaque: Dict[str, "weakref.ref[Any]"] = {}

    def watch(self, name: str, value: Any) -> None:
        """Notice if a value without readable content is replaced by another one."""
        try:
            self._opaque[name] = weakref.ref(value)
        except TypeError:
            pass  # it has no weak references; then its type alone tells it from others

    def watch_as(self, other: "Moment", names: Optional[Sequence[str]] = None) -> None:
        """Notice what `other` would, of all names or of these."""
        for name in other._opaque if names is None else names:
            if name in other._opaque:
                self._opaque[name] = other._opaque[name]

    def replaced(self, namespace: Mapping[str, Any]) -> List[str]:
        """Names whose value is another object now."""
        return [name for name, value in self._opaque.items() if name in namespace and namespace[name] is not value()]


class Bases:
    """All that this REPL remembers, in its order."""

    def __init__(self) -> None:
        self._moments: Dict[str, Optional[Moment]] = {}
        """Token -> moment; None: nothing has changed since."""
        self._now: Optional[Moment] = None
        """The variables of now, if they were all read since the last change."""
        self._read: Optional[Moment] = None
        """The variables when they were all read last."""

    def begin(self, token: str) -> None:
        """The present state is a base: a fork happens."""
        self._put(token, None)

    def _put(self, token: str, moment: Optional[Moment]) -> None:
        self._moments.pop(token, None)
        self._moments[token] = moment
        while len(self._moments) > MAX_BASES:
            del self._moments[next(iter(self._moments))]

    def before_change(self, namespace: Mapping[str, Any]) -> None:
        """Something will change the variables: remember what they are, as far as that is quick."""
        if self._moments and None in self._moments.values():
            moment = self._now or quick_look(namespace)
            for token, known in self._moments.items():
                if known is None:
                    self._moments[token] = moment
        self._now = None

    def surveyed(self, variables: Mapping[str, Variable], namespace: Mapping[str, Any], complete: bool) -> None:
        """The variables of now were read."""
        self._now = self._read = _moment(variables, namespace, complete)

    def remember(
        self, token: str, fingerprints: Mapping[str, str], since: str = "", unsettled: Sequence[str] = ()
    ) -> None:
        """A base that was agreed on.

        Values without readable content are those of now, but of `unsettled` those of the base `since`.
        """
        moment, before = Moment(fingerprints, complete=True), self._moments.get(since)
        if self._read is not None:
            moment.watch_as(self._read)
        if before is not None:
            moment.watch_as(before, unsettled)
        self._put(token, moment)

    def recall(self, token: str, namespace: Mapping[str, Any]) -> Optional[VariablesBase]:
        """None if this REPL does not know that base, or if the present state is it."""
        moment = self._moments.get(token)
        if moment is None:
            return None
        return VariablesBase(moment.fingerprints, tuple(moment.replaced(namespace)), moment.complete)

    def tokens(self) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
        """All, oldest first; and those that are the present state."""
        return tuple(self._moments), tuple(token for token, moment in self._moments.items() if moment is None)


def told(namespace: Mapping[str, Any]) -> Tuple[Dict[str, Any], int]:
    """Name -> value of the user's variables, in order, and how many others there are that are not told."""
    # A copy at one moment: threads may go on.
    found = {name: value for name, value in list(namespace.items()) if is_told(name)}
    odd = sum(1 for name in list(namespace) if not is_told(name) and not _is_private(name))
    rest = len(found) - MAX_VARIABLES
    return dict(list(found.items())[:MAX_VARIABLES]), odd + max(0, rest)


def _is_private(name: Any) -> bool:
    return type(name) is str and name.startswith("__") and name.endswith("__")


def quick_look(namespace: Mapping[str, Any]) -> Moment:
    """The state of now as far as it can be read in QUICK_LOOK_S."""
    values, left_out = told(namespace)
    end_s = _clock() + QUICK_LOOK_S
    variables: Dict[str, Variable] = {}
    for name, value in _cheap_first(values):
        now_s = _clock()
        if now_s >= end_s:
            variables[name] = Variable("")
            continue
        reader = Reader(min(end_s, now_s + _QUICK_VALUE_S), clock=_clock, max_bytes=_QUICK_BYTES, quick=True)
        variables[name] = read_variable(reader, value)
    return _moment(variables, values, left_out == 0)


def _cheap_first(values: Mapping[str, Any]) -> Iterable[Tuple[str, Any]]:
    return sorted(values.items(), key=lambda item: type(item[1]) not in _AT_ONCE)


def _moment(variables: Mapping[str, Variable], namespace: Mapping[str, Any], complete: bool) -> Moment:
    moment = Moment({name: one.fingerprint for name, one in variables.items()}, complete)
    for name, one in variables.items():
        if one.obstacle and name in namespace:
            moment.watch(name, namespace[name])
    return moment
