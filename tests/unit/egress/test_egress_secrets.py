"""Putting secrets into requests, and answering questions for names, without sockets."""

from __future__ import annotations

import base64
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podflare.egress.certificates import Authority, make_authority
from podflare.egress.journal import Journal
from podflare.egress.names import NameTable
from podflare.egress.policy import Policy, SecretSpec
from podflare.egress.questions import Questions
from podflare.egress.resolver import Resolver
from podflare.egress.substitution import Substitution

PLACEHOLDER = "podflare-secret-0123456789abcdef0123456789abcdef"
SECRETS = Substitution([(PLACEHOLDER, SecretSpec("s3cret&", ("api.example.com", "*.example.org:8443")))])
HELD = PLACEHOLDER.encode()


def test_values_go_where_they_belong():
    """Header values, Basic credentials and queries are filled for a secret's host and port, for no other."""
    basic = b"Basic " + base64.b64encode(b"me:" + HELD)
    headers = [(b"Authorization", basic), (b"X-Key", b"<" + HELD + b">"), (b"X-Broken", b"Basic !!!"), (b"X", b"y")]
    target, filled = SECRETS.fill(b"/p/" + HELD + b"?a=" + HELD, headers, "api.example.com", 443)
    assert target == b"/p/" + HELD + b"?a=s3cret%26"
    assert filled == [
        (b"Authorization", b"Basic " + base64.b64encode(b"me:s3cret&")),
        (b"X-Key", b"<s3cret&>"),
        (b"X-Broken", b"Basic !!!"),
        (b"X", b"y"),
    ]
    for host, port in (("api.example.com", 80), ("evil.example", 443), ("example.org", 8443), ("a.example.org", 443)):
        assert SECRETS.fill(b"/?" + HELD, headers, host, port) == (b"/?" + HELD, headers)
        assert SECRETS.misplaced(b"/", headers, host, port, secure=True)
        assert SECRETS.misplaced(b"/", [(b"A", basic)], host, port, secure=True)
        assert not SECRETS.ends_tls(host, port)
    assert SECRETS.ends_tls("api.example.com", 443) and SECRETS.ends_tls("x.example.org", 8443)
    assert not SECRETS.misplaced(b"/", headers, "api.example.com", 443, secure=True)
    assert SECRETS.misplaced(b"/", headers, "api.example.com", 443, secure=False)
    assert not SECRETS.misplaced(b"/", [(b"X", b"y")], "evil.example", 80, secure=False)
    assert SECRETS.hide([(b"L", b"https://x/s3cret&")]) == [(b"L", b"https://x/" + HELD)]


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_any_header_is_passed_or_filled(name, value):
    """Whatever a header holds, it comes out as it was if no placeholder is in it."""
    assert SECRETS.fill(b"/", [(name, value)], "api.example.com", 443) == (b"/", [(name, value)])


def test_certificates_are_for_their_host_only():
    """A leaf is accepted by who trusts its family's authority, for its host; not by others, nor for other hosts."""
    authority, key = make_authority()
    server = Authority(authority, key).server_context("api.example.com")
    trusting = ssl.create_default_context(cadata=authority.decode())
    assert _handshake(server, trusting, "api.example.com") == ""
    assert "Hostname mismatch" in _handshake(server, trusting, "evil.example")
    stranger = ssl.create_default_context(cadata=make_authority()[0].decode())
    assert "verify failed" in _handshake(server, stranger, "api.example.com")


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> str:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [server.wrap_bio(to_server, to_client, server_side=True)]
    ends.append(client.wrap_bio(to_client, to_server, server_hostname=host))
    for _ in range(10):
        done = 0
        for end in ends:
            try:
                end.do_handshake()
                done += 1
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                return str(error)
        if done == 2:
            return ""
    return "no end"


@pytest.mark.anyio
async def test_any_question_is_answered_or_dropped():
    """Random bytes where a question should be cost nothing: an answer or none, and no exception."""
    policy = Policy.parse(["*.example.org"])
    journal = Journal(lambda: 0.0)
    questions = Questions(policy, NameTable("x"), Substitution([]), Resolver(()), journal)
    seen: list[bytes] = []

    @given(st.binary(max_size=200), st.sampled_from([b"", b"\0\1\1\0\0\1\0\0\0\0\0\0", b"\0\1\1\0\0\1\0\0\0\0\0\1"]))
    def collect(data: bytes, head: bytes) -> None:
        seen.append(head + data)

    collect()
    for wire in seen:
        for stream in (False, True):
            answer = await questions.answer(wire, stream=stream)
            assert answer is None or (answer[:2] == wire[:2] and answer[2] & 0x80)
    assert len(seen) > 50
