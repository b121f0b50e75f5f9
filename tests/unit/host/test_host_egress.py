"""The log of a sandbox over the machines that it had."""

from __future__ import annotations

from podflare.host.egress import KEPT_ENTRIES, join_logs
from podflare.wire.egress import EgressEntry, EgressLog


def log(first: int, count: int, dropped: int = 0, *names: str) -> EgressLog:
    """A log whose entries are told apart by their time."""
    entries = tuple(EgressEntry(n, "tcp", "", "192.0.2.1", 80, "refused") for n in range(first, first + count))
    return EgressLog(names, {}, entries, dropped)


def test_joined_logs_keep_order_terms_and_count() -> None:
    """Entries stay in order, the later log's terms hold, what is dropped is counted; the oldest go first."""
    joined = join_logs(log(0, 3, 1, "old.example"), log(3, 2, 4, "new.example"))
    assert [entry.time_ms for entry in joined.entries] == [0, 1, 2, 3, 4]
    assert (joined.egress, joined.dropped) == (("new.example",), 5)
    full = join_logs(log(0, KEPT_ENTRIES), log(KEPT_ENTRIES, 10, 2))
    assert [full.entries[0].time_ms, full.entries[-1].time_ms] == [10, KEPT_ENTRIES + 9]
    assert (len(full.entries), full.dropped) == (KEPT_ENTRIES, 12)
