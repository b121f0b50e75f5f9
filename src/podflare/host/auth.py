"""Bearer token -> owner.  Knows nothing of HTTP beyond the header's text, and never keeps a key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from podflare.errors import Unauthorized

LOCAL = "local"
"""The owner of everything on a daemon without keys: whoever can reach its socket."""


def digest(key: str) -> bytes:
    """What is kept of an API key.  A plain hash suffices: keys are random, not chosen by people."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def owner_of(key_digest: bytes) -> str:
    """The owner that a key stands for."""
    return key_digest.hex()[:32]


class Keyring:
    """The API keys of a daemon, as digests."""

    def __init__(self, digests: Iterable[bytes]) -> None:
        self._digests = tuple(digests)

    def owner(self, authorization: str | None) -> str:
        """The owner that an `Authorization` header stands for; LOCAL for all if there are no keys.

        Raises: Unauthorized if the header is missing, not a bearer token, or an unknown key.
        """
        if not self._digests:
            return LOCAL
        scheme, _, token = (authorization or "").strip().partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized("missing Authorization: Bearer <key>")
        offered = digest(token)
        match = b""
        # Every digest is compared, in constant time each, so that the time says nothing about the keys.
        for known in self._digests:
            if hmac.compare_digest(known, offered):
                match = known
        if not match:
            raise Unauthorized("invalid api key")
        return owner_of(match)
