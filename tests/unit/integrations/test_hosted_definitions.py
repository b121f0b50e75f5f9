"""Tools, tool_choice and betas: what is taken out, what is put in its place, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from podflare.errors import BadRequest
from podflare.integrations.anthropic.hosted.definitions import (
    forward_betas,
    relaxed_choice,
    rewrite_choice,
    rewrite_tools,
)

NEW = {"type": "code_execution_20260521", "name": "code_execution"}
QUERY: dict[str, Any] = {
    "name": "query",
    "description": "Looks it up.",
    "input_schema": {"type": "object", "properties": {"sql": {"type": "string"}}},
    "allowed_callers": ["code_execution_20260120"],
}
PLAIN = {"name": "weather", "description": "The weather.", "input_schema": {"type": "object"}}


@pytest.mark.parametrize(
    ("version", "names"),
    [
        ("code_execution_20250522", ["code_execution"]),
        ("code_execution_20250825", ["bash_code_execution", "text_editor_code_execution"]),
        ("code_execution_20260120", ["bash_code_execution", "text_editor_code_execution"]),
        ("code_execution_20260521", ["bash_code_execution", "text_editor_code_execution"]),
    ],
)
def test_each_version_becomes_its_client_tools_in_place(version: str, names: list[str]) -> None:
    """The hosted tool's place is kept, and its cache mark goes to the last tool that stands for it."""
    mark = {"type": "ephemeral"}
    made = rewrite_tools(
        [PLAIN, {"type": version, "name": "code_execution", "cache_control": mark}, {**PLAIN, "name": "b"}]
    )
    assert [tool["name"] for tool in made.upstream] == ["weather", *names, "b"]
    assert made.upstream[len(names)]["cache_control"] == mark
    assert made.upstream[0] is PLAIN
    assert made.names == set(names)


def test_the_same_request_gives_the_same_bytes() -> None:
    """Definitions are stable, for every one of them is part of the prompt that is cached."""
    once, again = (json.dumps(rewrite_tools([NEW, QUERY]).upstream) for _ in range(2))
    assert once == again


def test_a_tool_for_code_only_is_hidden_and_described() -> None:
    """The model finds it in the description of the Python tool, with its schema, and nowhere else."""
    made = rewrite_tools([QUERY, NEW])
    assert [tool["name"] for tool in made.upstream] == [
        "bash_code_execution",
        "text_editor_code_execution",
        "code_execution",
    ]
    text = made.upstream[-1]["description"]
    assert "query" in text and "Looks it up." in text and '"sql"' in text
    assert made.functions == ("query",) and made.hidden == {"query"}


def test_a_tool_for_both_is_declared_to_the_model_without_its_callers() -> None:
    """`allowed_callers` would name a tool that the API does not have."""
    both = {**QUERY, "allowed_callers": ["direct", "code_execution_20260120"]}
    made = rewrite_tools([both, NEW])
    assert made.upstream[0] == {key: value for key, value in QUERY.items() if key != "allowed_callers"}
    assert made.functions == ("query",) and not made.hidden


def test_web_tools_bring_no_sandbox_of_their_own() -> None:
    """Newer web tools are told to be called directly; older ones are left alone."""
    new, old = (
        {"type": "web_search_20260209", "name": "web_search"},
        {"type": "web_fetch_20250910", "name": "web_fetch"},
    )
    made = rewrite_tools([new, old, NEW])
    assert made.upstream[0] == {**new, "allowed_callers": ["direct"]} and made.upstream[1] == old


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ([NEW, {**PLAIN, "name": "bash_code_execution"}], "must be unique"),
        ([NEW, NEW], "more than one"),
        ([{**NEW, "type": "code_execution_20991231"}], "not supported"),
        ([{**NEW, "name": "python"}], "must be 'code_execution'"),
        ([QUERY], "needs a code_execution tool"),
        ([QUERY, {**NEW, "type": "code_execution_20250522"}], "needs a code_execution tool"),
        ([{**QUERY, "name": "not-a-name"}, NEW], "no Python name"),
        ([{**QUERY, "name": "class"}, NEW], "no Python name"),
        ([{**QUERY, "strict": True}, NEW], "strict"),
        ([{**QUERY, "type": "bash_20250124", "name": "bash"}, NEW], "cannot be called from code"),
        ([{**QUERY, "name": f"f{n}"} for n in range(65)] + [NEW], "at most 64"),
        (["x", NEW], "must be an object"),
    ],
)
def test_definitions_that_are_refused(tools: list[Any], says: str) -> None:
    """What the hosted tool refuses is refused here, too."""
    with pytest.raises(BadRequest, match=says):
        rewrite_tools(tools)


def test_a_forced_call_is_forced_once() -> None:
    """A forced tool is forced under its new name, and no longer once it was called."""
    made = rewrite_tools([NEW, QUERY])
    forced = {"type": "tool", "name": "code_execution"}
    assert rewrite_choice(forced, made) == forced  # there is a tool of that name for programmatic calls
    assert rewrite_choice(forced, rewrite_tools([NEW])) == {"type": "tool", "name": "bash_code_execution"}
    assert relaxed_choice({**forced, "disable_parallel_tool_use": True}) == {
        "type": "auto",
        "disable_parallel_tool_use": True,
    }
    assert relaxed_choice({"type": "any"}) == {"type": "auto"}
    assert relaxed_choice({"type": "none"}) == {"type": "none"}


@pytest.mark.parametrize(
    "choice", [{"type": "tool", "name": "query"}, {"type": "auto", "disable_parallel_tool_use": True}]
)
def test_choices_that_programmatic_calling_refuses(choice: dict[str, Any]) -> None:
    """A tool for code cannot be forced, and parallel calls cannot be turned off."""
    with pytest.raises(BadRequest, match="tool_choice"):
        rewrite_choice(choice, rewrite_tools([NEW, QUERY]))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("code-execution-2025-08-25", None),
        ("files-api-2025-04-14, context-1m-2025-08-07,code-execution-2025-05-22", "context-1m-2025-08-07"),
        (None, None),
        ("", None),
        ("a,b", "a,b"),
    ],
)
def test_betas_of_what_is_done_here_are_not_passed_on(given: str | None, kept: str | None) -> None:
    """The API gets no beta header for code execution or files, and all others."""
    assert forward_betas(given) == kept
