"""Flows, names and the journal: bounded, and right after anything was added."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podflare.egress import flows
from podflare.egress.addresses import is_synthetic
from podflare.egress.flows import LET_IN, MAX_FLOWS, MAX_LIVE, Flows
from podflare.egress.journal import KEPT_ENTRIES, MEMORY_BYTES, Journal, entry_from_json, printable
from podflare.egress.names import MAX_NAMES, NameTable
from podflare.wire.egress import ALLOWED, REFUSED, EgressEntry


@pytest.fixture
def memory() -> Iterator[int]:
    """Shared memory of a machine's flows."""
    fd = os.memfd_create("flows")
    yield fd
    os.close(fd)


def _future() -> asyncio.Future:
    loop = asyncio.new_event_loop()
    try:
        return loop.create_future()
    finally:
        loop.close()


def test_flows_are_bounded_and_found(memory):
    """So many flows live at a time; those that are over stay for a while, and make room for others."""
    table = Flows(4000, memory)
    future = _future()
    live = [table.open((number, 5, 80), b"", future, 0.0) for number in range(MAX_LIVE)]
    assert all(live) and len({flow.port for flow in live}) == MAX_LIVE
    assert table.open((9999, 5, 80), b"", future, 0.0) is None
    for flow in live:
        assert table.by_key[flow.key] is flow and table.by_port[flow.port] is flow
        flow.state = LET_IN
        table.end(flow, 1.0)
        table.end(flow, 1.0)
    again = table.open(live[0].key, b"", future, 2.0)
    assert again is not live[0] and table.by_key[again.key] is again
    for number in range(5000):
        flow = table.open((number % 60000, 6 + number, 80), b"", future, 2.0)
        flow.state = LET_IN
        table.end(flow, 2.0)
        assert len(table.by_key) <= MAX_FLOWS and len(table.by_port) == len(table.by_key)
    last = table.open((1, 1, 1), b"", future, 2.0 + flows.LINGER_S)
    assert set(table.by_key.values()) == {again, last}
    waiting = table.open((2, 2, 2), b"", future, 13.0)
    table.end(waiting, 13.0)
    assert waiting.key not in table.by_key
    table.close()


def test_a_new_table_knows_what_an_old_one_left(memory):
    """What was open when a gate died, or over for a moment only, is told to the next one, once; older ones are not."""
    old = Flows(4000, memory)
    future = _future()
    kept = old.open((1111, 0x5DB8D822, 443), b"", future, 0.0)
    gone = old.open((2222, 0x5DB8D822, 443), b"", future, 0.0)
    ended = old.open((3333, 0x5DB8D822, 443), b"", future, 0.0)
    kept.state = gone.state = ended.state = LET_IN
    old.end(gone, 0.0)
    old.end(ended, flows.LINGER_S)
    waiting = old.open((4444, 0x5DB8D822, 443), b"", future, flows.LINGER_S)
    old.end(waiting, flows.LINGER_S)
    old.close()
    new = Flows(4000, memory)
    assert list(new.lost()) == [kept.key, ended.key]
    assert list(new.lost()) == []
    new.close()


def test_names_have_addresses_of_their_own():
    """Each name has one address that nobody has outside, the same in every life; old names give way to new ones."""
    table = NameTable("family")
    names = [f"n{number}.example.org" for number in range(MAX_NAMES + 100)]
    addresses = [table.address_of(name) for name in names]
    assert len(set(addresses[100:])) == MAX_NAMES and all(map(is_synthetic, addresses))
    assert table.name_of(addresses[-1]) == names[-1] and table.name_of(addresses[0]) is None
    assert table.name_of(IPv4Address("198.18.0.1")) is None
    assert NameTable("family").address_of("n5.example.org") == addresses[5]
    table.name_of(addresses[100])  # used: the newest now
    table.address_of("one.more.example.org")
    assert table.name_of(addresses[100]) == names[100] and table.name_of(addresses[101]) is None


def test_the_journal_is_bounded_and_merges():
    """It keeps the newest entries, counts those it dropped, and makes one of what repeats within a second."""
    now = [100.0]
    journal = Journal(lambda: now[0])
    for _ in range(50):
        journal.note("tcp", REFUSED, "no", address="10.0.0.1", port=80)
        now[0] += 0.25
    assert [(entry.count, entry.time_ms) for entry in journal.entries()] == [(50, 112_250)]
    now[0] += 2
    journal.note("tcp", REFUSED, "no", address="10.0.0.1", port=80)
    first = journal.note("tcp", ALLOWED, address="8.8.8.8", port=80)
    assert journal.note("tcp", ALLOWED, address="8.8.8.8", port=80) is not first
    assert len(journal.entries()) == 4
    for number in range(KEPT_ENTRIES + 6):
        journal.note("tcp", REFUSED, host=f"h{number}")
    assert len(journal.entries()) == KEPT_ENTRIES and journal.dropped == 10
    assert journal.note("dns", REFUSED, host="\x1b[31m\u202e" + "x" * 9999).host.startswith("?[31m?xxx")


def test_a_new_journal_has_what_an_old_one_left():
    """Entries and their bytes outlive whoever wrote them; what was half written, or is none, is left out."""
    memory = memoryview(bytearray(MEMORY_BYTES))
    old = Journal(lambda: 1.0, memory)
    counting = old.note("tcp", ALLOWED, address="8.8.8.8", port=443)
    for number in range(KEPT_ENTRIES + 4):
        last = old.note("tcp", REFUSED, "\\" * 300, host='"' * 300, port=number)
    counting.count_in(5)  # its slot is another's now
    last.count_in(7)
    last.count_out(8)
    new = Journal(lambda: 2.0, memory)
    assert len(new.entries()) == KEPT_ENTRIES and new.dropped == old.dropped == 5
    assert [one.port for one in new.entries()] == list(range(4, KEPT_ENTRIES + 4))
    assert {one.bytes_in for one in new.entries()[:-1]} == {0}
    assert (new.entries()[-1].bytes_in, new.entries()[-1].bytes_out) == (7, 8)
    assert new.note("tcp", ALLOWED, port=1).number == last.number + 1
    memory[:4096] = os.urandom(4096)
    assert len(Journal(lambda: 3.0, memory).entries()) >= KEPT_ENTRIES - 5
    memory[:] = b"\xff" * MEMORY_BYTES
    assert Journal(lambda: 3.0, memory).note("tcp", ALLOWED).number == 1


@given(st.text())
def test_names_in_the_journal_are_printable(text):
    """Whatever a guest calls a host becomes bounded, printable ASCII."""
    shown = printable(text)
    assert len(shown) <= 300 and all(" " <= char <= "~" for char in shown)


def test_entries_of_another_process_are_checked():
    """An entry comes back as it was; anything else that a gate might say is refused."""
    good = Journal(lambda: 1.5).note("tcp", ALLOWED, host="a.example", address="8.8.8.8", port=443).to_json()
    assert entry_from_json(good) == EgressEntry(1500, "tcp", "a.example", "8.8.8.8", 443, ALLOWED)
    bad = [
        None,
        [],
        {},
        {**good, "more": 1},
        {**good, "host": 5},
        {**good, "port": "x"},
        {**good, "count": True},
        {**good, "time_ms": 1.5},
    ]
    for one in bad:
        with pytest.raises(ValueError, match="entry"):
            entry_from_json(one)
    assert entry_from_json({**good, "host": "\x1b" * 1000}).host == "?" * 300
