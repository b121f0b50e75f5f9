"""A client, a model and a sandbox in memory around the pure core: every request is judged as the API would."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from anthropic_upstream import Judge, answer, events, next_round, script
from podflare.integrations.anthropic.hosted import blocks
from podflare.integrations.anthropic.hosted.request import Files, parse
from podflare.integrations.anthropic.hosted.rounds import Ask, Paused, Run, Turn
from podflare.integrations.anthropic.hosted.stream import MessageReader

NO_FILES = Files({}, {})
QUERY = {
    "name": "query",
    "description": "Looks something up.",
    "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}},
    "allowed_callers": ["code_execution_20260120"],
}
CLIENT_TOOL = {"name": "client", "description": "Done by the client.", "input_schema": {"type": "object"}}
TOOLS = [{"type": "code_execution_20260521", "name": "code_execution"}, CLIENT_TOOL, QUERY]


@dataclass
class Conversation:
    """Plays turns of a client that follows every stop reason, and keeps what it would keep."""

    tools: list[dict[str, Any]] = field(default_factory=lambda: list(TOOLS))
    streaming: bool = False
    max_rounds: int = 10
    pauses: int = 0
    """How often each code_execution calls the client's tool before it ends."""
    judge: Judge = field(default_factory=Judge)
    messages: list[dict[str, Any]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies that the model's API got."""
    ran: list[str] = field(default_factory=list)
    """Ids of calls, in the order in which they were run to their end."""
    _paused: dict[str, int] = field(default_factory=dict)

    def say(self, *rounds: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
        """The user speaks; the answers of the API until one needs nothing from the client."""
        text = {"type": "text", "text": script(*rounds)}
        if self.messages and self.messages[-1]["role"] == "user":  # the answer to tool results was empty
            self.messages[-1]["content"].append(text)
        else:
            self.messages.append({"role": "user", "content": [text]})
        answers = [self.send(**more)]
        while answers[-1]["stop_reason"] in ("tool_use", "pause_turn"):
            if answers[-1]["stop_reason"] == "tool_use":
                self.messages.append({"role": "user", "content": self.results(answers[-1]["content"])})
            answers.append(self.send(**more))
        return answers

    @staticmethod
    def results(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What the client's tools give."""
        return [
            {"type": "tool_result", "tool_use_id": block["id"], "content": f"result of {block['id']}"}
            for block in content
            if block["type"] == "tool_use"
        ]

    def send(self, **more: Any) -> dict[str, Any]:
        """One request of the client; its answer is kept in the history unless it is empty."""
        body = {"model": "m", "max_tokens": 9, "messages": self.messages, "container": "c", **more}
        if self.tools:
            body["tools"] = self.tools
        turn = Turn(parse(body), NO_FILES, "msg_own", self.max_rounds)
        shown: list[dict[str, Any]] = []
        while turn.step is not None:
            if isinstance(turn.step, Ask):
                shown += self._ask(turn, turn.step)
            else:
                shown += turn.take_result(self._run(turn, turn.step))
        told = turn.message({"id": "c"})
        if self.streaming:
            told = self._read(shown + turn.closing({"id": "c"}))
        if told["content"]:
            # As it travels: a client keeps no object of ours.
            self.messages.append({"role": "assistant", "content": json.loads(json.dumps(told["content"]))})
        return told

    def _ask(self, turn: Turn, step: Ask) -> list[dict[str, Any]]:
        body = json.loads(json.dumps({**step.body, "metadata": {"user_id": "one conversation"}}))
        self.judge.check(body)
        self.asked.append(body)
        message = answer(self.judge, body, next_round(body["messages"]))
        if not self.streaming:
            turn.take_message(message)
            return []
        return [shown for event in events(message) for shown in turn.take_event(event)]

    def _run(self, turn: Turn, step: Run) -> Any:
        call = step.calls[0]
        count = self._paused.get(call.id, 0)
        if call.name == "code_execution" and count < self.pauses:
            self._paused[call.id] = count + 1
            caller = {"type": blocks.CALLER, "tool_id": call.id}
            made = {"type": "tool_use", "name": "query", "input": {"q": "x"}, "caller": caller}
            return Paused(tuple({**made, "id": self.judge.next_id("toolu_local")} for _ in range(count + 1)))
        assert call.id not in self.ran
        self.ran.append(call.id)
        if call.name == blocks.EDITOR:
            return blocks.hosted_result(call, {"type": f"{blocks.EDITOR}_create_result", "is_file_update": False})
        return blocks.hosted_result(
            call, blocks.output_content(call.name, f"ran number {len(self.ran)}", "", 0, ["file_1"])
        )

    def _read(self, shown: list[dict[str, Any]]) -> dict[str, Any]:
        """The message that a streaming client puts together."""
        reader = MessageReader()
        for event in shown:
            reader.feed(event)
        assert reader.complete
        return {**reader.head, **reader.delta, "content": reader.content, "usage": reader.usage}
