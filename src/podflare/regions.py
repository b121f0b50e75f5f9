"""Regions, under the module path that programs for the hosted service use."""

from __future__ import annotations

from podflare.client import _config
from podflare.client._regions import (
    RegionInfo,
    detect_local_region,
    haversine_km,
    nearest_region_to,
    resolve_region,
)
from podflare.errors import UnknownRegionError

__all__ = [
    "RegionInfo",
    "UnknownRegionError",
    "default_api_base",
    "detect_local_region",
    "haversine_km",
    "nearest_region_to",
    "resolve_region",
]


def default_api_base() -> str:
    """The address that a plain `Sandbox()` uses; "" when that is the private daemon of this process."""
    address = _config.find_address(None, None)
    return "" if address is None else str(address)
