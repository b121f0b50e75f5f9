"""How much may be copied out of a tree that running code can change meanwhile.

A directory that is moved about ahead of the copier would be copied again and again: without a bound, a few renames a
second would fill the disk, outside of every sandbox's own limit.
"""

from __future__ import annotations


class Outgrown(Exception):
    """More came than was there when the room was measured."""


class Room:
    """What is left of it.  Whoever copies takes from it first."""

    def __init__(self, entries: int, size: int) -> None:
        """Args: size: bytes of content; what is shared with the original (reflinks, holes) takes none."""
        self._entries = entries
        self._size = size

    def take_entry(self) -> None:
        """Raises: Outgrown."""
        self._entries -= 1
        if self._entries < 0:
            raise Outgrown("running code moved or made files faster than they could be copied")

    def take_bytes(self, count: int) -> None:
        """Raises: Outgrown."""
        self._size -= count
        if self._size < 0:
            raise Outgrown("running code moved or wrote files faster than they could be copied")
