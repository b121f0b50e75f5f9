"""A client's request for a message: what of it concerns the sandbox, and the request that the model's API gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from podflare.errors import BadRequest
from podflare.integrations.anthropic.hosted import definitions, history, uploads
from podflare.integrations.anthropic.hosted.blocks import Block, Call
from podflare.integrations.anthropic.hosted.history import Message

MAX_MESSAGES = 100_000


@dataclass(frozen=True)
class HostedRequest:
    """A request of which something is done here."""

    body: Mapping[str, Any]
    messages: tuple[Message, ...]
    toolset: definitions.Toolset
    tool_choice: Any
    container_id: str | None
    pending: tuple[Call, ...]
    """Sandbox calls of an earlier turn, to be run first."""
    answers: Mapping[str, Mapping[str, str]]
    """For each pending call whose code waits for the client: what the client's tools gave, by tool_use id."""
    uploaded: tuple[str, ...]
    """Files that belong into the container."""
    referenced: tuple[str, ...]
    """Files that documents and pictures show."""

    @property
    def model(self) -> str:
        return str(self.body.get("model", ""))

    @property
    def streaming(self) -> bool:
        return self.body.get("stream") is True

    def upstream_body(self, turn: Sequence[Block], files: Files, *, relaxed: bool) -> dict[str, Any]:
        """The body for the model's API.

        Args:
            turn: what the answer holds so far, as the client sees it.
            files: the files that messages name.
            relaxed: a forced tool call was made already.
        """
        messages = [*self.messages, {"role": "assistant", "content": list(turn)}] if turn else list(self.messages)
        messages = uploads.with_notes(messages, files.names)
        messages = uploads.with_content(messages, files.contents)
        body = {key: value for key, value in self.body.items() if key not in ("container", "thread")}
        body["messages"] = history.upstream_messages(messages)
        if "tools" in body:
            body["tools"] = list(self.toolset.upstream)
        if "tool_choice" in body:
            body["tool_choice"] = definitions.relaxed_choice(self.tool_choice) if relaxed else self.tool_choice
        return body


@dataclass(frozen=True)
class Files:
    """What is known of the files that a request names."""

    names: Mapping[str, str]
    """File id -> name in the input directory."""
    contents: Mapping[str, tuple[str, bytes]]
    """File id -> media type and content."""


def thread_refusal(body: Mapping[str, Any]) -> Block | None:
    """The error body for a request on a message thread; None if it is on none.

    Threads are kept at the model's API, which knows nothing of what is run here.  This answer makes the client
    libraries send the whole conversation instead.
    """
    if body.get("thread") is None:
        return None
    return {
        "type": "invalid_request_error",
        "message": "thread: message threads cannot be combined with the code execution that runs here",
        "details": {"error_code": "thread_unsupported_request", "unsupported": ["code_execution"]},
    }


def concerns_sandbox(body: Mapping[str, Any]) -> bool:
    """Whether anything in a request is for the sandbox; everything else goes to the API as it is."""
    tools, messages = body.get("tools"), body.get("messages")
    if body.get("container") is not None:
        return True
    if isinstance(tools, list) and any(definitions.is_hosted(tool) for tool in tools):
        return True
    if not isinstance(messages, list):
        return False
    checked = [message for message in messages if isinstance(message, dict)]
    return history.touches(checked) or bool(uploads.referenced_ids(checked))


def parse(body: Mapping[str, Any]) -> HostedRequest:
    """Raises: BadRequest for what the API refuses, too, and for what only the hosted service has."""
    messages = _messages(body.get("messages"))
    tools = body.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise BadRequest("tools: must be a list")
    toolset = definitions.rewrite_tools(tools or [])
    pending = history.pending_calls(messages)
    if pending and toolset.version is None:
        raise BadRequest(f"tools: {pending[0].name} waits to be run, so the code_execution tool must be declared again")
    container_id = _container_id(body.get("container"))
    begun = [call.id for call in pending if history.inner_calls(messages, call.id)]
    if container_id is None and begun:
        raise BadRequest("container: required to go on with code that waits for the results of its tool calls")
    return HostedRequest(
        body=body,
        messages=tuple(messages),
        toolset=toolset,
        tool_choice=definitions.rewrite_choice(body.get("tool_choice"), toolset),
        container_id=container_id,
        pending=tuple(pending),
        answers={call_id: history.inner_answers(messages, call_id) for call_id in begun},
        uploaded=tuple(uploads.uploaded_ids(messages)),
        referenced=tuple(uploads.referenced_ids(messages)),
    )


def _messages(messages: object) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: at least one message is required")
    if len(messages) > MAX_MESSAGES:
        raise BadRequest(f"messages: {len(messages)} messages, the cap is {MAX_MESSAGES}")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(f"messages.{index}: must be an object with a role")
        content = message.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
            raise BadRequest(f"messages.{index}.content: must be text or a list of blocks")
    return messages


def _container_id(container: object) -> str | None:
    if container is None or isinstance(container, str):
        return container or None
    if not isinstance(container, Mapping):
        raise BadRequest("container: must be an id or an object")
    if container.get("skills"):
        raise BadRequest("container.skills: skills are not available here")
    found = container.get("id")
    if found is not None and not isinstance(found, str):
        raise BadRequest("container.id: must be a string")
    return found or None
