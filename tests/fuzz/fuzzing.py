"""How many examples a fuzz harness tries: few in `make test`, many in `make fuzz` (FUZZ_FACTOR times as many)."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))

json_value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)


def tries(examples: int) -> settings:
    """A profile with so many examples, times FUZZ_FACTOR.  Machines are shared: no deadline for one example."""
    return settings(
        max_examples=examples * FACTOR,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


def objects_near(keys: list[str], value: st.SearchStrategy[Any] = json_value) -> st.SearchStrategy[dict[str, Any]]:
    """JSON objects with these keys, right and wrong."""
    return st.dictionaries(st.one_of(st.sampled_from(keys), st.text(max_size=4)), value, max_size=8)
