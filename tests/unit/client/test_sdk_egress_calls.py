"""What is sent for a sandbox's network, and how its log is read."""

from __future__ import annotations

import json

import pytest

from podflare import BadRequest, EgressEntry, Secret
from podflare.client import _egress
from podflare.errors import ProtocolError


def test_what_is_sent() -> None:
    """Flags and lists travel as they are, secrets with value and hosts; what is neither is refused, no value shown."""
    assert [_egress.reach(one) for one in (None, True, False, ("a.example", "b.example"), [])] == [
        None, True, False, ["a.example", "b.example"], [],
    ]  # fmt: skip
    assert _egress.secrets({}) is None
    assert _egress.secrets({"A": Secret("v", hosts=("h.example",))}) == {"A": {"value": "v", "hosts": ["h.example"]}}
    for wrong in ("a.example", 1, [1], {"a": 1}):
        with pytest.raises(BadRequest):
            _egress.reach(wrong)
    for secret in ("hush", Secret("hush", hosts="h.example")):
        with pytest.raises(BadRequest) as caught:
            _egress.secrets({"A": secret})  # type: ignore[dict-item]  # the point of the test
        assert "hush" not in str(caught.value)


def test_a_log_is_read_leniently() -> None:
    """Unknown keys are skipped, missing and odd ones neutral; what is no log is an error."""
    call = _egress.log("sbx_1")
    entry = {"time_ms": 5, "host": "h.example", "port": "80", "verdict": "refused", "count": True, "new": 1}
    body = {"egress": ["h.example"], "secrets": {"A": ["h.example"]}, "entries": [entry], "dropped": "many"}
    log = _egress.parse_log(call, json.dumps(body).encode())
    assert (log.egress, log.secrets, log.dropped) == (("h.example",), {"A": ("h.example",)}, 0)
    assert log.entries == (EgressEntry(5, "", "h.example", "", 0, "refused", count=0),)
    for wrong in (b"[]", b"{}", b'{"entries": [1]}'):
        with pytest.raises(ProtocolError):
            _egress.parse_log(call, wrong)
