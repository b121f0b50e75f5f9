"""How fast output may come: a burst, then a rate."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from podflare.host.pace import BURST_S, Pace


@given(st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 3)), max_size=40))
def test_never_more_than_burst_and_rate(steps):
    """Whoever waits as it is told passes at most a burst, the rate, and its last piece."""
    pace, now, spent, last = Pace(1000.0), 0.0, 0, 0
    for cost, pause in steps:
        now += pause
        spent, last = spent + cost, cost
        assert spent - last <= 1000 * (BURST_S + now) + 1
        now += pace.spend(cost, now)
        assert pace.owed_s(now) < 1e-6


def test_waiting_pays_back_exactly():
    """After a burst each piece waits for its own time at the rate; a pause fills the bucket, once."""
    pace = Pace(100.0)
    assert pace.spend(200, 5.0) == 0
    assert pace.spend(50, 5.0) == 0.5
    assert pace.spend(50, 5.5) == 0.5
    assert pace.owed_s(5.75) == 0.25
    assert pace.spend(200, 1000.0) == 0 < pace.spend(1, 1000.0)


def test_no_limit():
    """A rate of 0 never makes anybody wait."""
    pace = Pace(0)
    assert pace.spend(1 << 50, 0.0) == pace.owed_s(0.0) == 0
