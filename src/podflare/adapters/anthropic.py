"""The same as podflare.integrations.anthropic, under a path that documentation of the hosted service names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from podflare.integrations import anthropic as _home

if TYPE_CHECKING:
    from podflare.integrations.anthropic import *  # noqa: F403  # each on its first use, for some need more packages

__all__ = _home.__all__


def __getattr__(name: str) -> Any:
    return getattr(_home, name)


def __dir__() -> list[str]:
    return list(__all__)
