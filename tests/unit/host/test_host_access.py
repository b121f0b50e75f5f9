"""Keys, web origins, states and trace ids: the small pure rules."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podflare.errors import Conflict, Forbidden, Unauthorized
from podflare.host import telemetry
from podflare.host.auth import LOCAL, Keyring, digest
from podflare.host.lifecycle import TABLE, State, Step, step
from podflare.host.origin import check_origin, is_loopback_name
from podflare.host.telemetry import NO_TRACE, parse_traceparent

GOOD_TRACE = f"00-{'a' * 32}-{'b' * 16}-01"


def test_no_keys_means_one_local_owner():
    """Without keys everybody who can connect is the same owner."""
    assert Keyring(()).owner(None) == Keyring(()).owner("Bearer x") == LOCAL


def test_each_key_is_its_own_owner():
    """Owners of two keys differ, stay the same from start to start, and do not reveal the key."""
    keys = Keyring((digest("a"), digest("b")))
    assert keys.owner("Bearer a") == Keyring((digest("a"),)).owner("bearer  a") != keys.owner("Bearer b")
    assert keys.owner("Bearer a") != "a" and len(keys.owner("Bearer a")) == 32


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic a", "a", "Bearer a b", "Bearer \udcff"])
def test_other_headers_are_unauthorized(header):
    """A missing, malformed or unknown token is refused with one of the two known texts."""
    with pytest.raises(Unauthorized, match=r"^(missing Authorization: Bearer <key>|invalid api key)$"):
        Keyring((digest("a"),)).owner(header)


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST:7070", "127.0.0.1", "127.9.9.9:1", "[::1]", "[::1]:7070"])
def test_loopback_names(name):
    """Names of this computer, with and without port."""
    assert is_loopback_name(name)


@pytest.mark.parametrize(
    "name", ["", "example.com", "127.0.0.1.example.com", "localhost.example.com", "10.0.0.1:80", "[::2]", "::1.x:1"]
)
def test_other_names(name):
    """Anything else may be a rebound name."""
    assert not is_loopback_name(name)


@given(st.text(), st.text(), st.text())
def test_foreign_origin_never_passes(host, origin, fetch_site):
    """Whatever the headers hold: they pass only if the origin is this very host, or absent."""
    try:
        check_origin(host=host, origin=origin, fetch_site=fetch_site, loopback_names_only=True)
    except Forbidden:
        return
    assert is_loopback_name(host) and origin.strip().lower().endswith("://" + host.lower())


def test_plain_clients_pass():
    """Clients that are no browsers send neither Origin nor Sec-Fetch-Site."""
    check_origin(host="127.0.0.1:7070", origin=None, fetch_site=None, loopback_names_only=True)
    check_origin(host="localhost:1", origin="http://localhost:1", fetch_site="same-origin", loopback_names_only=True)


def test_every_state_but_the_last_can_end_and_gone_is_final():
    """From any living state a sandbox can end; nothing leads out of gone, or back from closing."""
    for state in (State.STARTING, State.READY, State.BUSY):
        assert step(state, Step.END) is State.CLOSING
    assert [what for state, what in TABLE if state is State.CLOSING] == [Step.RELEASED]
    assert not [what for state, what in TABLE if state is State.GONE]


def test_forbidden_step_is_a_conflict():
    """A step that the table lacks is refused, not guessed."""
    with pytest.raises(Conflict):
        step(State.READY, Step.CELL_ENDED)


def test_traceparent_is_read_leniently():
    """Proper ids are read, with later versions' extra fields; anything else gives no ids."""
    assert parse_traceparent(GOOD_TRACE).trace_id == "a" * 32
    assert parse_traceparent(GOOD_TRACE.upper() + "-more").parent_span_id == "b" * 16
    for bad in (None, "", "junk", GOOD_TRACE[:-4], GOOD_TRACE.replace("a", "0"), GOOD_TRACE.replace("b", "g")):
        assert parse_traceparent(bad) == NO_TRACE


@given(st.text())
def test_any_traceparent_is_survived(header):
    """No header value fails a request."""
    parse_traceparent(header)


def test_log_fields_cannot_forge_lines(capsys):
    """Newlines and quotes in a field stay within its line, in both formats."""
    logger = logging.getLogger("podflare")
    before = (logger.handlers[:], logger.propagate, logger.level)
    try:
        for style in ("text", "json"):
            telemetry.configure(style, "info")
            telemetry.event("evil", path="/x\n2026 ERROR forged\r a=1")
            out = capsys.readouterr().err
            assert out.count("\n") == 1 and "\r" not in out
            if style == "json":
                assert json.loads(out)["path"].startswith("/x\n")
    finally:
        logger.handlers[:], logger.propagate = before[0], before[1]
        logger.setLevel(before[2])
        logging.captureWarnings(False)
        for name in ("uvicorn", "py.warnings"):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True
