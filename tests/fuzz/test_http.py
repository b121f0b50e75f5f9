"""Fuzz harness for the daemon's HTTP API, with requests made from its own OpenAPI document.

Invariant: whatever a request holds, right or wrong by the document, the answer has a content type, a status and a body
that the document names; an error is one of ours, with its own status; and no answer says that something of the daemon
broke.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import content_type_conformance, response_schema_conformance
from schemathesis.openapi.checks import UndefinedStatusCode  # noqa: F401  # loads the checks of this specification

from daemons import ServedDaemon, served
from podflare.errors import BY_CODE
from podflare.host.openapi import document

SCHEMA = schemathesis.openapi.from_dict(document())
OPERATIONS = [
    (mode, path, method)
    for path, item in document()["paths"].items()
    for method in item.keys() - {"parameters"}
    for mode in GenerationMode
    # A request that holds nothing can hold nothing wrong.
    if mode is GenerationMode.POSITIVE or {"requestBody", "parameters"} & item[method].keys()
]
EXPECTED_5XX = {"not_built": 501, "no_capacity": 503, "deadline_exceeded": 504}
CHECKS = [content_type_conformance, response_schema_conformance]
ANSWER_S = 40
NOWHERE = "sbx_" + "0" * 32


@pytest.fixture(scope="module")
def daemon(private_temp: Any) -> Iterator[ServedDaemon]:
    with served(private_temp) as running:
        yield running


@pytest.fixture(scope="module")
def sandboxes(daemon: ServedDaemon) -> list[str]:
    """Two that live, one that is gone."""
    made = [requests.post(f"{daemon.url}/v1/sandboxes", timeout=ANSWER_S).json()["id"] for _ in range(3)]
    requests.delete(f"{daemon.url}/v1/sandboxes/{made[2]}", timeout=ANSWER_S)
    # What serves all ways out starts with the first of them, and stays: not to be taken for a leak of a test.
    first = requests.post(f"{daemon.url}/v1/sandboxes", json={"egress": True}, timeout=ANSWER_S).json()
    requests.delete(f"{daemon.url}/v1/sandboxes/{first.get('id', NOWHERE)}", timeout=ANSWER_S)
    return made


@pytest.mark.parametrize(("mode", "path", "method"), sorted(OPERATIONS), ids=str)
def test_answers(daemon: ServedDaemon, sandboxes: list[str], mode: GenerationMode, path: str, method: str) -> None:
    """Each operation answers as the document says, to requests that follow it and to requests that do not."""
    operation = SCHEMA[path][method.upper()]
    ends = method == "delete" or "winner" in path
    ids = [*sandboxes[2:], NOWHERE] if ends else [*sandboxes[:2] * 3, sandboxes[2], NOWHERE]

    @tries(4)
    @given(operation.as_strategy(generation_mode=mode), st.sampled_from(ids), st.sampled_from(ids))
    def attempt(case: schemathesis.Case, one: str, other: str) -> None:
        for name, value in (("id", one), ("other", other), ("winner", other)):
            if name in (case.path_parameters or {}):
                case.path_parameters[name] = value
        _bound(case.body)
        answer = case.call(base_url=daemon.url, timeout=ANSWER_S)
        case.validate_response(answer, checks=CHECKS)
        _check(answer.status_code, answer.content)
        _close_what_was_made(daemon, answer.status_code, path, method, answer.content)

    attempt()


def _bound(body: Any) -> None:
    """Few forks and short cells: what is looked at here are the answers."""
    if isinstance(body, dict):
        if isinstance(body.get("n"), int) and body["n"] > 2:
            body["n"] = 2
        if isinstance(body.get("code"), str):
            body["timeout_seconds"] = 0.3


def _check(status: int, content: bytes) -> None:
    if status < 400:
        return
    body = json.loads(content)
    assert isinstance(body["error"], str) and body["error"]
    error = BY_CODE[body["code"]]
    assert status == error.status or (body["code"] == "bad_request" and status in (404, 405)), content
    assert status < 500 or EXPECTED_5XX.get(body["code"]) == status, content


def _close_what_was_made(daemon: ServedDaemon, status: int, path: str, method: str, content: bytes) -> None:
    if status == 200 and method == "post":
        if path == "/v1/sandboxes":
            made = [json.loads(content)["id"]]
        else:
            made = json.loads(content)["children"] if path.endswith("/fork") else []
        for sandbox in made:
            requests.delete(f"{daemon.url}/v1/sandboxes/{sandbox}", timeout=ANSWER_S)
