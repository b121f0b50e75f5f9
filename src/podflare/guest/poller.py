"""Which descriptors are ready, and who handles them: epoll with one handler per descriptor."""

from __future__ import annotations

import select
from typing import Callable, Dict

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

Handler = Callable[[int], None]


class Poller:
    """Set of watched descriptors."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: Dict[int, int] = {}
        self._handlers: Dict[int, Handler] = {}

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Call `handler(events)` when one of `events` is there.  With none, forget `fd`.

        Forgetting rather than waiting for nothing: epoll reports the other end's closing in any case, for ever.
        """
        known = self._watched.get(fd, 0)
        if events == known:
            return
        if not events:
            self.forget(fd)
            return
        if known:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._watched[fd] = events
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Stop watching.  Must come before the descriptor is closed."""
        if self._watched.pop(fd, 0):
            del self._handlers[fd]
            self._epoll.unregister(fd)

    def wait(self, timeout_s: float) -> None:
        """Handle what is ready, waiting at most `timeout_s` (negative: without end) for the first."""
        for fd, events in self._epoll.poll(timeout_s):
            handler = self._handlers.get(fd)
            if handler is not None:  # an earlier handler of this round may have forgotten it
                handler(events)
