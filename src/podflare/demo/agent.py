"""The agent loop, with the real `anthropic` package: ask, run what the model wants in the sandbox, answer, repeat.

It is the loop a user would write; only the reporting (`Start`, `Step`) is the demo's own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from podflare import Sandbox
from podflare.demo.scripted_model import MODEL as SCRIPTED_MODEL
from podflare.demo.scripted_model import ScriptedModel
from podflare.demo.task import ORDERS_PATH, QUESTION, SUMMARY_PATH, orders_csv
from podflare.errors import BadRequest, PodflareError
from podflare.integrations.anthropic import code_execution_tool, handle_code_execution_tool_use

if TYPE_CHECKING:
    import anthropic

DEFAULT_MODEL = "claude-opus-5-5"
MAX_TURNS = 20
MAX_TOKENS = 4096

RunTool = Callable[[Any, Sandbox], dict[str, Any]]


@dataclass(frozen=True)
class Start:
    """The sandbox is there and the first question goes out."""

    model: str
    scripted: bool
    address: str
    """Where the model answers."""
    sandbox_id: str
    create_s: float


@dataclass(frozen=True)
class Step:
    """One program that the model had run."""

    number: int
    said: str
    code: str
    output: str
    failed: bool
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How it ended."""

    answer: str
    summary: str
    """The file that the agent left in the sandbox; empty if it left none."""
    steps: int
    engine: str
    walls: tuple[str, ...]
    create_s: float
    cells_s: float
    total_s: float


def run_demo(
    show: Callable[[Start | Step], None],
    *,
    host: str | None = None,
    model: str | None = None,
    scripted: bool = False,
    run_tool: RunTool = handle_code_execution_tool_use,
) -> Outcome:
    """Let an agent answer the task's question in a new sandbox.

    Args:
        show: called with Start, then with each Step as it happens.
        host: daemon to use; None as in `Sandbox`.
        model: model name; only for the real API.
        scripted: use the local scripted model even if ANTHROPIC_API_KEY is set.
        run_tool: what answers a tool call.
    Raises: PodflareError, also for a model that cannot be reached or does not come to an end.
    """
    began = time.monotonic()
    scripted = scripted or not os.environ.get("ANTHROPIC_API_KEY")
    with ExitStack() as stack:
        name = SCRIPTED_MODEL if scripted else model or DEFAULT_MODEL
        client = _connect(stack, scripted)
        before = time.monotonic()
        sandbox = stack.enter_context(Sandbox(host=host))
        create_s = time.monotonic() - before
        sandbox.upload(orders_csv().encode(), ORDERS_PATH)
        show(Start(name, scripted, str(client.base_url), sandbox.id, create_s))
        answer, steps = _converse(client, name, sandbox, show, run_tool)
        info = sandbox.info()
        return Outcome(
            answer=answer,
            summary=_summary(sandbox),
            steps=len(steps),
            engine=info.engine,
            walls=tuple(info.isolation),
            create_s=create_s,
            cells_s=sum(step.seconds for step in steps),
            total_s=time.monotonic() - began,
        )


def _connect(stack: ExitStack, scripted: bool) -> anthropic.Anthropic:
    try:
        import anthropic
    except ImportError as error:
        raise BadRequest("the demo needs the anthropic package: pip install anthropic") from error
    if not scripted:
        return stack.enter_context(anthropic.Anthropic())
    server = stack.enter_context(ScriptedModel())
    # A proxy of the environment has no business between two programs of one machine.
    http = anthropic.DefaultHttpxClient(trust_env=False)
    return stack.enter_context(
        anthropic.Anthropic(base_url=server.url, api_key="not-needed", http_client=http, max_retries=0)
    )


def _converse(
    client: anthropic.Anthropic, model: str, sandbox: Sandbox, show: Callable[[Start | Step], None], run_tool: RunTool
) -> tuple[str, list[Step]]:
    """The loop: the model's last words and what was run on the way."""
    import anthropic

    tool: Any = code_execution_tool()
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    steps: list[Step] = []
    for _ in range(MAX_TURNS):
        try:
            reply = client.messages.create(model=model, max_tokens=MAX_TOKENS, tools=[tool], messages=messages)
        except anthropic.APIError as error:
            raise PodflareError(f"the model at {client.base_url} did not answer: {error}") from error
        said = "\n".join(block.text for block in reply.content if block.type == "text")
        calls = [block for block in reply.content if block.type == "tool_use"]
        if not calls:
            return said, steps
        results = []
        for call in calls:
            before = time.monotonic()
            result = run_tool(call, sandbox)
            seconds = time.monotonic() - before
            steps.append(_step(len(steps) + 1, said, call.input, result, seconds))
            show(steps[-1])
            results.append(result)
            said = ""
        messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": results}]
    raise PodflareError(f"the model came to no end in {MAX_TURNS} turns")


def _step(number: int, said: str, arguments: Any, result: dict[str, Any], seconds: float) -> Step:
    output = "\n".join(part.get("text", "") for part in result["content"] if part.get("type") == "text")
    code = str(arguments.get("code", arguments)) if isinstance(arguments, dict) else str(arguments)
    return Step(number, said, code, output, bool(result.get("is_error")), seconds)


def _summary(sandbox: Sandbox) -> str:
    try:
        return sandbox.download(SUMMARY_PATH).decode("utf-8", "replace")
    except PodflareError:
        return ""
