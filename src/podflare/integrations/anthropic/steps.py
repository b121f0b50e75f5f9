"""One way to write what a tool does, for both kinds of sandbox: a generator of steps, each a call on the sandbox.

result = yield lambda sandbox: sandbox.run_code("1 + 1")
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")

Steps = Generator[Callable[[Any], Any], Any, T]
"""Yields calls, gets what they give, or raise; returns a T."""


def carry_out(steps: Steps[T], sandbox: Any) -> T:
    """Do all steps on a Sandbox.  Raises: what the steps raise."""
    try:
        call = next(steps)
        while True:
            try:
                value = call(sandbox)
            except Exception as exc:  # noqa: BLE001  # it belongs to the step that asked
                call = steps.throw(exc)
            else:
                call = steps.send(value)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]  # the generator's own type says T


async def carry_out_async(steps: Steps[T], sandbox: Any) -> T:
    """Do all steps on an AsyncSandbox.  Raises: what the steps raise."""
    try:
        call = next(steps)
        while True:
            try:
                value = await call(sandbox)
            except Exception as exc:  # noqa: BLE001  # as above
                call = steps.throw(exc)
            else:
                call = steps.send(value)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]  # as above
