"""What only the middleware has: files of waiting clients, raw responses, ends, forks; and old versions of clients."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import anthropic
import pytest

from anthropic_upstream import Upstream, script
from daemons import ServedDaemon
from gateways import KEY, Way
from podflare.errors import BadRequest, Conflict
from podflare.integrations.anthropic import AsyncLocalCodeExecution, LocalCodeExecution
from podflare.integrations.anthropic.containers import programs

ROOT = Path(__file__).resolve().parents[3]
OLD_PYTHON = ROOT / ".venv-client/bin/python"
OLD_VERSION = "0.125.0"
TOOL = {"type": "code_execution_20260521", "name": "code_execution"}


def say(*rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": script(*rounds)}]


def test_files_of_a_waiting_client(
    async_execution: AsyncLocalCodeExecution, upstream: Upstream, tmp_path: Path
) -> None:
    """Uploads of every kind stay here, reach the code, and what it makes is downloaded; others are the API's."""
    (tmp_path / "path.txt").write_bytes(b"by path")

    async def talk() -> None:
        async with anthropic.AsyncAnthropic(
            **Way(upstream.url, async_execution, asynchronous=True).options()
        ) as client:
            sent = [
                await client.files.upload(file=("named.txt", io.BytesIO(b"by stream"))),
                await client.files.upload(file=tmp_path / "path.txt"),
                await client.files.upload(file=b"bytes"),
            ]
            assert [file.filename for file in sent] == ["named.txt", "path.txt", "unnamed"]
            content: list[Any] = [{"type": "container_upload", "file_id": file.id} for file in sent]
            command = "cd $INPUT_DIR; cat named.txt path.txt unnamed > $OUTPUT_DIR/all"
            content.append({"type": "text", "text": script([{"bash": command}], [])})
            given: dict[str, Any] = {"model": "m", "max_tokens": 9, "tools": [TOOL]}
            message = await client.messages.create(messages=[{"role": "user", "content": content}], **given)
            (made,) = message.content[1].content.content
            downloaded = await client.files.download(made.file_id)
            assert await downloaded.read() == b"by streamby pathbytes"
            assert (await client.files.delete(made.file_id)).type == "file_deleted"
            with pytest.raises(anthropic.APIStatusError):  # the scripted API has no files
                await client.files.delete(made.file_id)

    asyncio.run(talk())


def test_a_raw_response_is_one(execution: LocalCodeExecution, upstream: Upstream) -> None:
    """Who asks for the response gets it, with the API's headers and the message in it."""
    way = Way(upstream.url, execution)
    with way.client() as client:
        given: dict[str, Any] = {"model": "m", "max_tokens": 9, "tools": [TOOL]}
        raw = client.messages.with_raw_response.create(messages=say([{"bash": "echo raw"}], []), **given)
        assert raw.headers["request-id"].startswith("req_") and raw.parse().content[1].content.stdout == "raw"
        with client.messages.with_streaming_response.create(messages=say([{"bash": "echo two"}], []), **given) as lazy:
            assert lazy.parse().content[1].content.stdout == "two"
        uploaded = client.files.with_raw_response.upload(file=("a", b"x"))
        assert uploaded.parse().filename == "a"


def test_a_stream_that_is_left_frees_its_container(execution: LocalCodeExecution, upstream: Upstream) -> None:
    """Leaving the stream early ends what it was doing; the container can be used by the next request."""
    way = Way(upstream.url, execution)
    container = way.ask(say([{"bash": "true"}], []), tools=[TOOL]).container
    assert container is not None
    given: dict[str, Any] = {"model": "m", "max_tokens": 9, "tools": [TOOL], "container": container.id}
    with way.client() as client:
        with client.messages.stream(messages=say([{"text": "a"}, {"bash": "sleep 60"}], []), **given) as stream:
            next(iter(stream))
    assert (
        way.ask(say([{"bash": "echo on"}], []), tools=[TOOL], container=container.id).content[1].content.stdout == "on"
    )


def test_a_cancelled_call_interrupts_its_code(async_execution: AsyncLocalCodeExecution, upstream: Upstream) -> None:
    """A task that is cancelled while code runs leaves a container that is free at once."""
    way = Way(upstream.url, async_execution, asynchronous=True)
    container = way.ask(say([{"bash": "true"}], []), tools=[TOOL]).container
    assert container is not None
    given: dict[str, Any] = {"model": "m", "max_tokens": 9, "tools": [TOOL], "container": container.id}

    async def talk() -> str:
        async with anthropic.AsyncAnthropic(**way.options()) as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.messages.create(messages=say([{"bash": "sleep 60"}], []), **given), 1)
            message = await client.messages.create(messages=say([{"bash": "echo on"}], []), **given)
            return str(message.content[1].content.stdout)

    assert asyncio.run(talk()) == "on"


def test_a_container_is_forked(execution: LocalCodeExecution, upstream: Upstream) -> None:
    """The copies are containers of their own; ids that are none are refused."""
    way = Way(upstream.url, execution)
    container = way.ask(say([{"bash": "echo origin > /tmp/f"}], []), tools=[TOOL]).container
    assert container is not None
    (copy,) = execution.fork_container(container.id)
    way.ask(say([{"bash": "echo copy > /tmp/f"}], []), tools=[TOOL], container=copy)
    told = way.ask(say([{"bash": "cat /tmp/f"}], []), tools=[TOOL], container=container.id)
    assert told.content[1].content.stdout == "origin"
    with pytest.raises(BadRequest):
        execution.fork_container("container_never")


QUERY = {
    "name": "query",
    "description": "Looks something up.",
    "input_schema": {"type": "object"},
    "allowed_callers": ["code_execution_20260120"],
}


def test_an_answer_that_comes_too_late(
    execution: LocalCodeExecution, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code has had its TimeoutError by then; the late answer gets what came of that."""
    monkeypatch.setattr(programs, "ANSWER_S", 1)
    way, tools = Way(upstream.url, execution), [{**TOOL, "type": "code_execution_20260120"}, QUERY]
    messages: list[Any] = say([{"code": "open('/tmp/begun', 'w'); await query(a=1)"}], [{"text": "done"}])
    first = way.ask(messages, tools=tools)
    assert first.container is not None
    # Another call of the container waits until the code has ended.
    other = way.ask(say([{"bash": "ls /tmp/begun"}], []), tools=tools, container=first.container.id)
    assert other.content[1].content.stdout == "/tmp/begun"
    messages.append({"role": "assistant", "content": first.content})
    messages.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": first.content[1].id}]})
    result = way.ask(messages, tools=tools, container=first.container.id).content[0].content
    assert "TimeoutError" in result.stderr and result.return_code == 1


def test_code_that_runs_into_its_time_limit(
    execution: LocalCodeExecution, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own time is limited as the model was told, and that is a result, not an error block."""
    monkeypatch.setattr(programs, "CELL_S", 1)
    tools = [{**TOOL, "type": "code_execution_20260120"}, QUERY]
    message = Way(upstream.url, execution).ask(say([{"code": "print('on')\nwhile True: pass"}], []), tools=tools)
    result = message.content[1].content
    assert result.return_code != 0 and result.stdout == "on" and "detection_timeout" in result.stderr


def test_a_pause_of_an_earlier_program_is_over(daemon: ServedDaemon, upstream: Upstream, tmp_path: Path) -> None:
    """Code that waited when its program ended is not begun again: the result says that it is not available."""
    tools = [{**TOOL, "type": "code_execution_20260120"}, QUERY]
    messages: list[Any] = say([{"code": "await query(a=1)"}], [{"text": "done"}])
    earlier = LocalCodeExecution(host=daemon.url, data_dir=tmp_path)
    first = Way(upstream.url, earlier).ask(messages, tools=tools)
    earlier.close()
    assert first.container is not None
    messages.append({"role": "assistant", "content": first.content})
    messages.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": first.content[1].id}]})
    later = LocalCodeExecution(host=daemon.url, data_dir=tmp_path)
    try:
        second = Way(upstream.url, later).ask(messages, tools=tools, container=first.container.id)
    finally:
        later.close()
    assert second.content[0].content.error_code == "unavailable" and second.content[1].text == "done"


def test_closed_middleware_says_so(execution: LocalCodeExecution, upstream: Upstream) -> None:
    """Requests for the sandbox fail, all others go on."""
    execution.close()
    execution.close()
    way = Way(upstream.url, execution)
    assert way.ask(say([{"text": "still"}])).content[0].text == "still"
    with pytest.raises(anthropic.APIStatusError, match="closed"):
        way.ask(say([]), tools=[TOOL])
    with pytest.raises(Conflict):
        execution.fork_container("container_never")


PROGRAM = """
    import sys, anthropic
    from podflare.integrations.anthropic import LocalCodeExecution
    client = anthropic.Anthropic(api_key="k", base_url={url!r}, middleware=[LocalCodeExecution()])
    message = client.messages.create(model="m", max_tokens=9, messages={messages!r}, tools={tools!r})
    print(message.content[1].content.stdout)
"""


def test_a_program_that_closes_nothing_ends(upstream: Upstream) -> None:
    """One line of change, a private daemon, no `close`: the program ends by itself and leaves nothing."""
    code = textwrap.dedent(PROGRAM).format(url=upstream.url, messages=say([{"bash": "echo hosted"}], []), tools=[TOOL])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "hosted\n"), done.stderr


# Versions of the client from before 1.0, with another HTTP library.


@pytest.fixture(scope="module")
def old_python() -> Path:
    """An interpreter with an old version of the client; made if it is missing."""
    probe = "from importlib.metadata import version; print(version('anthropic'))"

    def installed() -> str:
        if not OLD_PYTHON.exists():
            return "nothing"
        found = subprocess.run([str(OLD_PYTHON), "-I", "-c", probe], capture_output=True, text=True, timeout=60)
        return found.stdout.strip() or "nothing"

    if installed() != OLD_VERSION:
        subprocess.run([str(ROOT / "scripts/setup.sh"), "--real-client"], capture_output=True, timeout=300)
    if installed() != OLD_VERSION:
        reason = f"anthropic {OLD_VERSION} is not in .venv-client; run scripts/setup.sh --real-client"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return OLD_PYTHON


OLD = """
    import json, sys
    sys.path.insert(0, {source!r})
    import anthropic
    options = dict(api_key="k", base_url={url!r}, max_retries=0)
    if {local!r}:
        from podflare.integrations.anthropic import LocalCodeExecution
        options["middleware"] = [LocalCodeExecution(host={daemon!r})]
    client = anthropic.Anthropic(**options)
    uploaded = client.beta.files.upload(file=("in.txt", b"old"))
    content = [{{"type": "container_upload", "file_id": uploaded.id}}, {{"type": "text", "text": {text!r}}}]
    given = dict(model="m", max_tokens=9, tools={tools!r}, betas=["code-execution-2025-08-25", "files-api-2025-04-14"])
    messages = [{{"role": "user", "content": content}}]
    with client.beta.messages.stream(messages=messages, **given) as stream:
        first = stream.get_final_message()
    made = first.content[2].content.content[0].file_id
    messages += [{{"role": "assistant", "content": first.content}}, {{"role": "user", "content": {again!r}}}]
    second = client.beta.messages.create(messages=messages, container=first.container.id, **given)
    print(json.dumps([
        [block.type for block in first.content], first.content[2].content.stdout,
        client.beta.files.download(made).read().decode(), second.content[-1].text,
    ]))
    client.close()
"""


@pytest.mark.parametrize("local", [False, True], ids=["gateway", "middleware"])
def test_an_old_version_of_the_client(
    old_python: Path, front: Way, upstream: Upstream, daemon: ServedDaemon, local: bool
) -> None:
    """Betas in headers, another path, another HTTP library: the same blocks, files and history."""
    text = script([{"thinking": "t"}, {"bash": "cat $INPUT_DIR/in.txt | tee $OUTPUT_DIR/out"}], [{"text": "done"}])
    code = textwrap.dedent(OLD).format(
        source=str(ROOT / "src"), url=upstream.url if local else front.base_url, daemon=daemon.url, local=local,
        text=text, again=script([{"bash": "cat $INPUT_DIR/in.txt"}], [{"echo": True}]),
        tools=[{"type": "code_execution_20250825", "name": "code_execution"}],
    )  # fmt: skip
    done = subprocess.run([str(old_python), "-I", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    kinds, stdout, downloaded, told = json.loads(done.stdout)
    assert kinds == ["thinking", "server_tool_use", "bash_code_execution_tool_result", "text"]
    assert (stdout, downloaded) == ("old", "old") and "old" in told
    assert upstream.rejected == [] and KEY
