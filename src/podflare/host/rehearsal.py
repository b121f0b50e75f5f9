"""One cell in a machine that nobody has yet, so that its user's first one is not the first.  Its output is dropped."""

from __future__ import annotations

import anyio

from podflare.errors import DeadlineExceeded, MachineFailed, ProtocolError
from podflare.host.guest_link import GuestLink
from podflare.wire import frames
from podflare.wire.frames import Frame
from podflare.wire.messages import Exec, Exit, from_guest

NAME = "<rehearsal>"


class _Rehearsal:
    """See guest_link.Listener."""

    def __init__(self) -> None:
        self.over = anyio.Event()
        self.problem = ""

    def on_frame(self, frame: Frame) -> None:
        if frame.kind == frames.MESSAGE and isinstance(from_guest(frame.payload), Exit):
            self.over.set()
        elif frame.kind == frames.DATA:
            raise ProtocolError("a cell sent bytes of a file")

    def on_down(self, cause: str) -> None:
        self.problem = cause
        self.over.set()


async def rehearse(link: GuestLink, code: str, *, timeout_s: float) -> None:
    """Run `code` as a cell to its end.  Precondition: nobody has the machine.

    Raises: MachineFailed if the guest is gone; DeadlineExceeded.  Then the machine is good for nothing.
    """
    rehearsal = _Rehearsal()
    channel = link.attach(rehearsal)
    try:
        link.say(channel, Exec(code, "python", name=NAME))
        with anyio.fail_after(timeout_s):
            await rehearsal.over.wait()
    except TimeoutError:
        raise DeadlineExceeded(f"a new machine ran no cell within {timeout_s:g} s") from None
    finally:
        link.detach(channel)
    if rehearsal.problem:
        raise MachineFailed(rehearsal.problem)
