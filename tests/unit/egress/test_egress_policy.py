"""The policy of egress: what is parsed, what is refused at once, what may be reached."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podflare.egress.addresses import never, not_public, parse_address
from podflare.egress.policy import (
    Policy,
    SecretSpec,
    normal_name,
    parse_private,
)
from podflare.errors import BadRequest
from podflare.wire.egress import MAX_ALLOWED


@pytest.mark.parametrize(
    ("entry", "name", "port", "allowed"),
    [
        ("api.example.com", "api.example.com", 443, True),
        ("api.example.com", "api.example.com", 80, True),
        ("api.example.com", "api.example.com", 22, False),
        ("api.example.com", "x.api.example.com", 443, False),
        ("api.example.com", "example.com", 443, False),
        ("api.example.com", "api.example.com.evil.example", 443, False),
        ("API.Example.COM.", "api.example.com", 443, True),
        ("*.example.com", "a.example.com", 443, True),
        ("*.example.com", "a.b.example.com", 443, True),
        ("*.example.com", "example.com", 443, False),
        ("*.example.com", "evilexample.com", 443, False),
        ("db.example.com:5432", "db.example.com", 5432, True),
        ("db.example.com:5432", "db.example.com", 443, False),
        ("*.example.com:8443", "a.example.com", 8443, True),
        ("bücher.example", "xn--bcher-kva.example", 443, True),
    ],
)
def test_names(entry, name, port, allowed):
    """An entry opens its name, or the names below, on its port or those of the web."""
    assert (Policy.parse([entry]).refuses_name(name, port) == "") is allowed


@pytest.mark.parametrize(
    ("entry", "address", "port", "allowed"),
    [
        ("8.8.8.8", "8.8.8.8", 443, True),
        ("8.8.8.8", "8.8.8.8", 53, False),
        ("8.8.8.8", "8.8.4.4", 443, False),
        ("8.8.8.0/24:853", "8.8.8.200", 853, True),
        ("2606:4700::1111", "2606:4700::1111", 443, True),
        ("[2606:4700::1111]:853", "2606:4700::1111", 853, True),
        ("2606:4700::/32", "2606:4700::5", 80, True),
        ("::ffff:8.8.8.8", "8.8.8.8", 443, True),
        ("8.8.8.8", "::ffff:8.8.8.8", 443, True),
        ("api.example.com", "8.8.8.8", 443, False),
    ],
)
def test_addresses(entry, address, port, allowed):
    """An address is open if an entry names it or its network, whatever way it is written."""
    assert (Policy.parse([entry]).refuses_address(ipaddress.ip_address(address), port) == "") is allowed


@pytest.mark.parametrize(
    "entry",
    """
    10.1.2.3 127.0.0.1 localhost:99999 host:0 host:x http://x.example x.example/path *.*.example * *. .example a..b
    -a.example user@host 169.254.169.254 0.0.0.0/0 ::/0 0.0.0.0 [::1]:80 fe80::1 fc00::/7 8.0.0.0/5 224.0.0.1 198.18.0.1
    127.1 0x7f.1 2130706433 10.0.0.0/33 10.0.0.1/8 ::ffff:10.0.0.1 64:ff9b::a00:1 2002:a00:1::1 192.168.0.0/16:80
    a.*.example
    """.split(),
)
def test_entries_that_are_refused(entry):
    """What is no host, or may not be opened, is refused in words, when the policy is made."""
    with pytest.raises(BadRequest, match="egress"):
        Policy.parse([entry])


_SHAPES = [False, None, "api.example.com", 7, {"a": 1}, [1], [None], [["a"]], ["a.b"] * (MAX_ALLOWED + 1)]


@pytest.mark.parametrize("egress", _SHAPES)
def test_shapes_that_are_refused(egress):
    """Only True and lists of text are policies."""
    with pytest.raises(BadRequest):
        Policy.parse(egress)


def test_private_networks_need_both_words():
    """A private address needs the operator's word and the policy's; what nothing opens needs no word at all."""
    private = parse_private("10.0.0.0/8, fd12::/16")
    policy = Policy.parse(["10.1.0.0/16:5432", "fd12::5", "db.example.com:5432"], private=private)
    ten = ipaddress.ip_address("10.1.2.3")
    assert policy.refuses_address(ten, 5432) == "" == policy.refuses_address(ten, 5432, named=True)
    assert policy.refuses_address(ten, 80) and policy.refuses_address(ten, 80, named=True)
    assert policy.refuses_address(ipaddress.ip_address("10.2.0.1"), 5432, named=True)
    assert policy.refuses_address(ipaddress.ip_address("fd12::5"), 443) == ""
    assert Policy.parse(True).refuses_address(ten, 5432)
    with pytest.raises(BadRequest, match="PODFLARE_EGRESS_PRIVATE"):
        Policy.parse(["192.168.0.1"], private=private)
    for text in ("127.0.0.0/8", "169.254.0.0/16", "0.0.0.0/0", "::/0", "198.18.0.0/15", "nonsense", "10.0.0.1/8"):
        with pytest.raises(BadRequest):
            parse_private(text)


_IPV4 = st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address)
_IPV6 = st.integers(0, 2**128 - 1).map(ipaddress.IPv6Address)


@given(st.one_of(_IPV4, _IPV6))
def test_no_inner_address_counts_as_public(address):
    """What Python's library calls private, local or special is never public here, mapped or not."""
    mapped = ipaddress.IPv6Address(f"::ffff:{address}") if address.version == 4 else address
    for one in (address, mapped):
        if not address.is_global or address.is_multicast or address.is_link_local or address.is_loopback:
            assert not_public(one)
            assert Policy.parse(True).refuses_address(one, 443)


@pytest.mark.parametrize(
    "text",
    """
    0.0.0.0 127.0.0.1 127.255.255.254 169.254.169.254 100.100.100.200 168.63.129.16 192.0.0.192 198.18.0.1 224.0.0.251
    198.19.255.255 255.255.255.255 240.0.0.1 :: ::1 fe80::1 fec0::1 ff02::1 fd00:ec2::254 fd20:ce::254 2001::1
    2002:7f00:1:: ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:169.254.169.254 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1
    """.split(),
)
def test_what_nothing_opens(text):
    """Loopback, link-local, metadata, multicast and tunnels to them stay closed, whatever was configured."""
    address = parse_address(text)
    assert address is not None and never(address)
    everything = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
    with pytest.raises(BadRequest):
        Policy.parse([text], private=everything)


def test_public_addresses_are_public():
    """Ordinary addresses of both versions, and their mapped form, count as public."""
    for text in ("8.8.8.8", "93.184.216.34", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert not_public(parse_address(text)) == ""


def test_secrets_are_checked_and_not_shown():
    """A secret needs a value that fits into a header and hosts that are names; no message and no repr shows it."""
    spec = SecretSpec("sk-123", ("api.example.com", "*.example.org:8443"))
    assert "sk-123" not in repr(spec)
    policy = Policy.parse([]).with_secrets({"KEY": spec})
    assert policy.refuses_name("api.example.com", 443) == "" == policy.refuses_name("a.example.org", 8443)
    assert policy.refuses_name("api.example.com", 80) and policy.refuses_name("a.example.org", 443)
    bad = [("", ("a.example",)), ("a\nb", ("a.example",)), ("a\0", ("a.example",)), ("é", ("a.example",)), ("v", ())]
    bad += [("v", ("10.0.0.1",)), ("v", ("8.8.8.8",)), ("v", ("*",)), ("v ", ("a.example",)), ("v" * 20000, ("a.b",))]
    for value, hosts in bad:
        with pytest.raises(BadRequest) as caught:
            SecretSpec(value, hosts)
        assert len(value) < 2 or value not in str(caught.value)


@given(st.text(max_size=300))
def test_any_text_is_a_name_or_refused(text):
    """Whatever is written as a host becomes a normal name of bounded length, or a BadRequest."""
    try:
        name = normal_name(text)
    except BadRequest:
        return
    assert name == normal_name(name) and len(name) <= 253 and name.isascii() and parse_address(name) is None


@given(st.text(max_size=60))
def test_any_entry_is_a_rule_or_refused(text):
    """Whatever is written as an entry makes a policy that opens no private address, or a BadRequest."""
    try:
        policy = Policy.parse([text])
    except BadRequest:
        return
    for inner in ("127.0.0.1", "10.0.0.1", "169.254.169.254", "::1"):
        assert policy.refuses_address(ipaddress.ip_address(inner), 80)
