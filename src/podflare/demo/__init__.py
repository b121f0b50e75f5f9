"""The examples that ship with podflare: an agent loop of one's own, and a program for the hosted tool as it is.

Owns the task, the agent loop, the run behind a gateway, and a scripted model for machines without an API key.
Prints nothing: the caller shows each step.
"""

from __future__ import annotations

from podflare.demo.agent import Outcome, Start, Step, run_demo
from podflare.demo.hosted import HostedStart, run_hosted

__all__ = ["HostedStart", "Outcome", "Start", "Step", "run_demo", "run_hosted"]
