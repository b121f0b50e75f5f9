"""The global random generators of a forked REPL: fresh in each child, or kept exactly.

Identical branches that draw identical numbers are the most reported fork bug of the field; generator objects that
the user made are user data and stay as they are.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Callable, Dict


def reseed() -> None:
    """Fresh state for the global generators of random, numpy, torch and OpenSSL, where these are imported."""
    for name, action in _RESEED.items():
        module = sys.modules.get(name)
        if module is not None:
            try:
                action(module)
            except Exception:  # noqa: BLE001, S110  # a module that user code has replaced or broken has no state of ours
                pass


class Keep:
    """The state of the global generators before a fork; `restore` in the child undoes what the fork did to them."""

    def __init__(self) -> None:
        self._states: Dict[str, Any] = {}
        for name, (get, _) in _STATE.items():
            module = sys.modules.get(name)
            if module is not None:
                try:
                    self._states[name] = get(module)
                except Exception:  # noqa: BLE001, S110  # as in reseed
                    pass

    def restore(self) -> None:
        for name, state in self._states.items():
            try:
                _STATE[name][1](sys.modules[name], state)
            except Exception:  # noqa: BLE001, S110  # as in reseed
                pass


def _numpy_seed(module: Any) -> None:
    module.seed([int.from_bytes(os.urandom(4), "little") for _ in range(8)])


_RESEED: Dict[str, Callable[[Any], Any]] = {
    "random": lambda module: module.seed(),
    "numpy.random": _numpy_seed,
    "torch": lambda module: module.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1),
    # OpenSSL notices a fork by the process id, and not that a whole machine was copied.
    "_ssl": lambda module: module.RAND_add(os.urandom(32), 32.0),
}

# name -> (state of the module, set state).  `random` reseeds itself after every fork, so it must be put back.
_STATE: "Dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]]" = {
    "random": (lambda module: module.getstate(), lambda module, state: module.setstate(state)),
    "numpy.random": (lambda module: module.get_state(), lambda module, state: module.set_state(state)),
    "torch": (lambda module: module.get_rng_state(), lambda module, state: module.set_rng_state(state)),
}
