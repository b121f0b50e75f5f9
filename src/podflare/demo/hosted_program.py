"""A program for the code execution tool of Anthropic's API.  It knows nothing of podflare."""

from __future__ import annotations

import sys

import anthropic

QUESTION = "What is the 10,000th prime number, and what is the sum of all primes up to it? Let a program find out."


def main(model: str) -> None:
    client = anthropic.Anthropic()  # takes address and key from the environment
    message = client.messages.create(
        model=model,
        max_tokens=4096,
        tools=[{"type": "code_execution_20260521", "name": "code_execution"}],
        messages=[{"role": "user", "content": QUESTION}],
    )
    for block in message.content:
        told = block.to_dict()
        print(f"{block.type}: {told.get('text') or told.get('input') or told.get('content')}")


if __name__ == "__main__":
    main(sys.argv[1])
