"""Machines with forks: see tests/forks.py."""

from __future__ import annotations

from forks import fork, parent, way

__all__ = ["fork", "parent", "way"]
