"""Keeps the clocks of machines right: inside, nobody notices that the machine stood still, that the computer slept or
had its clock set, or that the two clocks drift apart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection

from podflare.engines.microvm.control import Control
from podflare.engines.microvm.machine import MicrovmMachine
from podflare.errors import PodflareError

LOOK_S = 5.0
"""Between two looks at whether the computer's clock went otherwise than time passed."""
STEP_S = 0.01
DRIFT_S = 600.0
"""After so long every machine is told the time in any case."""
ANSWER_S = 2.0
PROMPT_S = 0.01
"""An order that took longer may have been under way for so long, and the clock be slow by that."""
TRIES = 3


async def keep_clocks(machines: Callable[[], Collection[MicrovmMachine]]) -> None:
    """Tell them the time whenever theirs may be wrong, until cancelled."""
    known_s, told_s = _offset_s(), time.monotonic()
    while True:
        await asyncio.sleep(LOOK_S)
        if abs(_offset_s() - known_s) < STEP_S and time.monotonic() - told_s < DRIFT_S:
            continue
        known_s, told_s = _offset_s(), time.monotonic()
        for machine in list(machines()):
            await tell_time(machine.control)


async def tell_time(control: Control) -> None:
    """Set a machine's clock if it is slow, or far ahead.  One that does not answer keeps its own."""
    for _ in range(TRIES):
        asked_s = time.monotonic()
        try:
            await control.ask({"clock": time.time_ns()}, timeout_s=ANSWER_S)
        except PodflareError:
            return
        if time.monotonic() - asked_s < PROMPT_S:
            return


def _offset_s() -> float:
    """Changes where the clock is set, and by what the computer slept: the monotonic one stands still then."""
    return time.time() - time.monotonic()
