"""All states of a sandbox and every allowed step between them.  Pure.

starting --started--> ready <--cell_ended/cell_started--> busy
any of them --end--> closing --released--> gone
"""

from __future__ import annotations

from enum import Enum

from podflare.errors import Conflict


class State(str, Enum):
    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    CLOSING = "closing"
    GONE = "gone"


class Step(str, Enum):
    STARTED = "started"
    CELL_STARTED = "cell_started"
    CELL_ENDED = "cell_ended"
    END = "end"
    """Closed, expired or dead: from here on nobody can use it."""
    RELEASED = "released"
    """Nothing of its machine is left."""


TABLE: dict[tuple[State, Step], State] = {
    (State.STARTING, Step.STARTED): State.READY,
    (State.STARTING, Step.END): State.CLOSING,
    (State.READY, Step.CELL_STARTED): State.BUSY,
    (State.READY, Step.END): State.CLOSING,
    (State.BUSY, Step.CELL_ENDED): State.READY,
    (State.BUSY, Step.END): State.CLOSING,
    (State.CLOSING, Step.RELEASED): State.GONE,
}


def step(state: State, what: Step) -> State:
    """The state after `what`.

    Raises: Conflict if the step is not allowed in this state.
    """
    try:
        return TABLE[state, what]
    except KeyError:
        raise Conflict(f"a sandbox that is {state.value} cannot take the step {what.value}") from None
