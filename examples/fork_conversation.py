"""One conversation with Claude, several ways it could go on: ask "what if" in forks, keep the best way.

    python examples/fork_conversation.py [--host URL] [--scripted]

Claude cleans a table of orders in a sandbox and gets as far as a list of orders in memory.  There the conversation
branches: each branch is a fork of the sandbox, memory included, with a copy of the messages.  In each the orders are
changed by another plan of the shop and the model finishes its analysis on them; nothing of the work before is done
again.  The plan that brings most is committed: the sandbox is then what that branch's was, the messages are its own,
and the conversation goes on from there.

With ANTHROPIC_API_KEY it asks Claude; without it, or with --scripted, a scripted model on this machine answers.
Needs the package `anthropic`.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from typing import Any

import anthropic

from podflare import Sandbox
from podflare.demo.scripted_model import MODEL as SCRIPTED_MODEL
from podflare.demo.scripted_model import ScriptedModel
from podflare.demo.task import ORDERS_PATH, QUESTION, orders_csv
from podflare.integrations.anthropic import branch, code_execution_tool, commit, run_tool_uses

MODEL = "claude-opus-5-5"
MAX_TURNS = 20

HINT = " Keep the cleaned orders in a list `orders` of dicts, whose key `revenue` is a number."

PLANS = {
    "as it is": "",
    "lamps at half the price, sold three times as often": """
for order in orders:
    if order["product"] == "lamp":
        order["revenue"] = round(order["revenue"] * 0.5 * 3, 2)
""",
    "no more sales in the North": "orders = [order for order in orders if order['region'] != 'North']",
}
"""What the shop could do, and what that does to the orders."""

REVENUE = "round(sum(order['revenue'] for order in orders), 2)"


def connect(stack: ExitStack, scripted: bool) -> tuple[anthropic.Anthropic, str]:
    """A client, and the model to ask."""
    if not scripted:
        return stack.enter_context(anthropic.Anthropic()), MODEL
    server = stack.enter_context(ScriptedModel())
    http = anthropic.DefaultHttpxClient(trust_env=False)
    client = anthropic.Anthropic(base_url=server.url, api_key="not-needed", max_retries=0, http_client=http)
    return stack.enter_context(client), SCRIPTED_MODEL


def converse(client: anthropic.Anthropic, model: str, sandbox: Sandbox, messages: list[Any]) -> str:
    """Let the model work until it has an answer, or until the orders are in memory; its last words."""
    tools: Any = [code_execution_tool()]
    before = len(messages) == 1
    for _ in range(MAX_TURNS):
        reply = client.messages.create(model=model, max_tokens=4096, tools=tools, messages=messages)
        said = "".join(block.text for block in reply.content if block.type == "text")
        messages.append({"role": "assistant", "content": reply.content})
        if reply.stop_reason != "tool_use":
            return said
        messages.append(run_tool_uses(reply, sandbox))
        if before and sandbox.run_code(REVENUE).ok:
            return said
    raise SystemExit(f"the model came to no end in {MAX_TURNS} turns")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    words.add_argument("--host", help="a daemon's address; without it a private one is started")
    words.add_argument("--scripted", action="store_true", help="ask the scripted model even if there is an API key")
    given = words.parse_args()
    scripted = given.scripted or not os.environ.get("ANTHROPIC_API_KEY")
    with ExitStack() as stack:
        client, model = connect(stack, scripted)
        sandbox = stack.enter_context(Sandbox(host=given.host))
        sandbox.upload(orders_csv().encode(), ORDERS_PATH)
        messages: list[Any] = [{"role": "user", "content": QUESTION + HINT}]
        converse(client, model, sandbox, messages)
        print(f"shared    {len(messages)} messages, orders worth {sandbox.run_code(REVENUE).results[0].text} EUR")

        revenues = {}
        with branch(sandbox, messages, len(PLANS)) as branches:
            for one, (plan, change) in zip(branches, PLANS.items(), strict=True):
                one.sandbox.run_code(change)
                note = f"Go on under this plan: {plan}. `orders` has been changed for it already."
                one.messages[-1]["content"].append({"type": "text", "text": note})
                answer = converse(client, model, one.sandbox, one.messages)
                revenues[one] = float(one.sandbox.run_code(REVENUE).results[0].text)
                print(f"branch    {plan}: {revenues[one]} EUR. {answer}")
            winner = max(branches, key=lambda one: revenues[one])
            messages = commit(winner)

        kept = sandbox.run_code(f"print({REVENUE}); print(open('/root/summary.md').read().strip())").stdout
        print(f"kept      {len(messages)} messages, {' EUR. '.join(kept.splitlines())}")


if __name__ == "__main__":
    main()
