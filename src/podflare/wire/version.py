"""The guest protocol's version number and how two sides agree on one.

The number is the one in docs/protocol.md (a test compares them).  It says nothing about package versions.
"""

from __future__ import annotations

from podflare.errors import ProtocolError

PROTOCOL = 1


def check_protocol(theirs: object) -> int:
    """Return the version both sides speak.

    Raises: ProtocolError if the peer's number is not one that this side speaks.
    """
    if theirs != PROTOCOL or isinstance(theirs, bool):
        raise ProtocolError(f"guest speaks protocol {theirs!r:.40}, this host speaks {PROTOCOL}")
    return PROTOCOL
