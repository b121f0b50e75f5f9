"""The example that ships with podflare: an agent that cleans and sums up a data set in a sandbox.

Owns the task, the agent loop and a scripted model for machines without an API key.  Prints nothing: the caller
shows each step.
"""

from __future__ import annotations

from podflare.demo.agent import Outcome, Start, Step, run_demo

__all__ = ["Outcome", "Start", "Step", "run_demo"]
