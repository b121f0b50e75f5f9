"""Promise: what a guest says of variables is within its bounds, or one kind of error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podflare.errors import ProtocolError
from podflare.wire import messages, variables

PRINT = "0123456789abcdef" * 2
ROW = ["int", 5, PRINT, "", ""]
TABLE: dict[str, Any] = {"variables": {"x": ROW}, "bases": ["a"], "present": [], "left_out": 0}


def decode(op: str, **keys: Any) -> messages.GuestMessage:
    return messages.from_guest(json.dumps({"op": op, **keys}).encode())


def test_a_table_in_bounds_is_taken() -> None:
    """The table that the cases below spoil is a good one."""
    assert decode("variables_table", **TABLE).variables == {"x": variables.Variable(*ROW)}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "spoilt",
    [
        {"variables": None},
        {"variables": []},
        {"variables": {"x y": ROW}},
        {"variables": {"__x__": ROW}},
        {"variables": {"": ROW}},
        {"variables": {"x" * 256: ROW}},
        {"variables": {f"x{number}": ROW for number in range(variables.MAX_VARIABLES + 1)}},
        {"variables": {"x": ROW[:4]}},
        {"variables": {"x": [*ROW, ""]}},
        {"variables": {"x": [5, 5, PRINT, "", ""]}},
        {"variables": {"x": ["t" * 101, 5, PRINT, "", ""]}},
        {"variables": {"x": ["int", -1, PRINT, "", ""]}},
        {"variables": {"x": ["int", True, PRINT, "", ""]}},
        {"variables": {"x": ["int", 1.5, PRINT, "", ""]}},
        {"variables": {"x": ["int", 5, PRINT[:-1], "", ""]}},
        {"variables": {"x": ["int", 5, "G" * 32, "", ""]}},
        {"variables": {"x": ["int", 5, PRINT, "r" * 201, ""]}},
        {"variables": {"x": ["int", 5, PRINT, "", None]}},
        {"bases": "a"},
        {"bases": ["a b"]},
        {"bases": ["x" * 33]},
        {"bases": [f"a{number}" for number in range(33)]},
        {"present": ["b"]},
        {"left_out": -1},
    ],
)
def test_a_table_out_of_bounds_is_refused(spoilt: dict[str, Any]) -> None:
    """Names, sizes, fingerprints, reasons, tokens and their numbers beyond the bounds break the protocol."""
    with pytest.raises(ProtocolError):
        decode("variables_table", **{**TABLE, **spoilt})


@pytest.mark.parametrize(
    ("op", "keys"),
    [
        ("variables_base", {"fingerprints": {"x": 5}, "replaced": []}),
        ("variables_base", {"fingerprints": {}, "replaced": ["x y"]}),
        ("variables_base", {"fingerprints": {}, "replaced": "x"}),
        ("variables_parcel", {"names": ["x"], "refused": {"y": 5}}),
        ("variables_parcel", {"names": [["x"]], "refused": {}}),
        ("variables_failed", {"reason": "other", "message": "", "name": ""}),
        ("variables_failed", {"reason": "too_large", "message": "", "name": "x y"}),
        ("variables_failed", {"reason": "too_large", "message": "m" * 201, "name": "x"}),
    ],
)
def test_other_answers_out_of_bounds_are_refused(op: str, keys: dict[str, Any]) -> None:
    """So it is with the answers to the other operations."""
    with pytest.raises(ProtocolError):
        decode(op, **keys)


def test_a_message_too_large_to_decode_is_refused() -> None:
    """The host looks at the size of a message on variables before it decodes it."""
    variables.check_size(b"x" * variables.MAX_TABLE_BYTES)
    with pytest.raises(ProtocolError):
        variables.check_size(b"x" * (variables.MAX_TABLE_BYTES + 1))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("x"), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("variables", "bases", "present", "left_out", "fingerprints", "replaced", "names", "refused", "reason", "name")


@given(st.sampled_from([kind.op for kind in variables.ANSWERS]), st.dictionaries(st.sampled_from(KEYS), JSON))
def test_any_json_is_a_message_or_one_kind_of_error(op: str, keys: dict[str, Any]) -> None:
    """Whatever a guest puts into an answer, decoding gives a message that can be encoded, or ProtocolError."""
    try:
        message = decode(op, **keys)
    except ProtocolError:
        return
    assert messages.from_guest(messages.to_payload(message)) == message


@pytest.mark.parametrize(
    ("name", "told"),
    [("x", True), ("_x", True), ("ü", True), ("__x", True), ("__x__", False), ("x y", False), ("", False), (5, False)],
)
def test_which_names_are_variables(name: object, told: bool) -> None:
    """Identifiers that are not framed by double underscores are the user's variables."""
    assert variables.is_told(name) is told
