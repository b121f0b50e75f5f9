"""Puts secrets into requests in the place of their placeholders.  Pure.

A value is put in only where a request is about to go, over TLS, to one of its secret's hosts.  Nobody looks at bodies.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from podflare.egress.policy import NameRule, SecretSpec

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class _Secret:
    placeholder: bytes
    value: bytes = field(repr=False)
    rules: tuple[NameRule, ...]

    def goes_to(self, host: str, port: int) -> bool:
        return any(rule.covers(host) and rule.opens(port) for rule in self.rules)


class Substitution:
    """The secrets of one family."""

    def __init__(self, secrets: Sequence[tuple[str, SecretSpec]]) -> None:
        """`secrets`: each placeholder and what it stands for."""
        self._secrets = tuple(_Secret(p.encode(), spec.value.encode(), spec.rules) for p, spec in secrets)

    def knows(self, host: str) -> bool:
        """Whether any secret goes to this name."""
        return any(rule.covers(host) for secret in self._secrets for rule in secret.rules)

    def ends_tls(self, host: str, port: int) -> bool:
        """Whether TLS to this host and port is ended at the gate."""
        return any(secret.goes_to(host, port) for secret in self._secrets)

    def fill(self, target: bytes, headers: Headers, host: str, port: int) -> tuple[bytes, Headers]:
        """The request with the values of those secrets that go to `host`:`port`; other placeholders stay."""
        for secret in self._secrets:
            if secret.goes_to(host, port):
                path, mark, query = target.partition(b"?")
                value = quote(secret.value, safe="").encode()
                target = path + mark + query.replace(secret.placeholder, value)
                headers = [(name, _replaced(content, secret)) for name, content in headers]
        return target, headers

    def misplaced(self, target: bytes, headers: Headers, host: str, port: int, *, secure: bool) -> bool:
        """Whether the request carries a placeholder of a secret that does not go there, or not unprotected."""
        return any(
            not (secure and secret.goes_to(host, port))
            and (secret.placeholder in target or any(_replaced(content, secret) != content for _, content in headers))
            for secret in self._secrets
        )

    def hide(self, headers: Headers) -> Headers:
        """Headers of an answer with placeholders in the place of values that the other side has sent back."""
        for secret in self._secrets:
            headers = [(name, content.replace(secret.value, secret.placeholder)) for name, content in headers]
        return headers


def _replaced(content: bytes, secret: _Secret) -> bytes:
    """A header's content with the value; within `Basic` credentials, too, which hide their text in base64."""
    scheme, space, coded = content.partition(b" ")
    if scheme.lower() == b"basic" and space:
        try:
            plain = base64.b64decode(coded.strip(), validate=True)
        except (binascii.Error, ValueError):
            plain = b""
        if secret.placeholder in plain:
            return scheme + space + base64.b64encode(plain.replace(secret.placeholder, secret.value))
    return content.replace(secret.placeholder, secret.value)
