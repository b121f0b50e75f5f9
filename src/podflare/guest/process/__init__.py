"""The process engine inside: from a fresh interpreter to a confined agent, step by step."""
