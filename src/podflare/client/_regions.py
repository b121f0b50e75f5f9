"""Names of places and which one is near.  The URLs come from PODFLARE_REGIONS only; none is built in.

The names and coordinates below are those that programs written for the hosted service use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from podflare.client import _config

EARTH_RADIUS_KM = 6371.0


class RegionInfo(NamedTuple):
    """One place.  `direct_url` is "" when no daemon is configured for it."""

    name: str
    direct_url: str
    lat: float
    lon: float


_PLACES: dict[str, tuple[float, float]] = {
    "us-west": (37.4, -121.9),
    "us-central": (32.8, -96.8),
    "us-east": (39.0, -77.5),
    "eu": (60.2, 24.9),
    "sg": (1.4, 103.8),
}

_ALIASES: dict[str, str] = {
    "us": "us-west",
    "usa": "us-west",
    "america": "us-west",
    "central": "us-central",
    "us-cen": "us-central",
    "east": "us-east",
    "us-e": "us-east",
    "europe": "eu",
    "asia": "sg",
    "singapore": "sg",
    "apac": "sg",
}

_ZONE_TABLES = (Path("/usr/share/zoneinfo/zone1970.tab"), Path("/usr/share/zoneinfo/zone.tab"))
_LOCALTIME = Path("/etc/localtime")
_TIMEZONE = Path("/etc/timezone")

_CONTINENTS: dict[str, tuple[float, float]] = {
    "Africa": (1.0, 17.0),
    "America": (39.0, -95.0),
    "Antarctica": (-80.0, 0.0),
    "Arctic": (78.0, 16.0),
    "Asia": (34.0, 100.0),
    "Atlantic": (38.0, -28.0),
    "Australia": (-25.0, 134.0),
    "Europe": (50.0, 10.0),
    "Indian": (-7.0, 72.0),
    "Pacific": (21.0, -158.0),
    "US": (39.0, -95.0),
}
"""For a zone that the system's table does not have."""


def configured_urls() -> dict[str, str]:
    """The value of `podflare.REGIONS`: name -> URL of what PODFLARE_REGIONS configures; {} by default."""
    return {name: str(entry["url"]) for name, entry in _config.region_table().items()}


def resolve_region(region: str | None) -> str | None:
    """URL of a configured region; None for None or "".  Blanks and case do not matter, common aliases are known.

    Raises: UnknownRegionError if it is not configured.
    """
    if region is None or not region.strip():
        return None
    name = region.strip().lower()
    table = _config.region_table()
    if name not in table and _ALIASES.get(name) in table:
        name = _ALIASES[name]
    return _config.region_url(name).rstrip("/")


def haversine_km(lat1: float, lon1: float, lat2: float, lon2: float) -> float:
    """Distance on the globe."""
    phi1, phi2 = math.radians(lat1), math.radians(lat2)
    half_lat, half_lon = (phi2 - phi1) / 2, math.radians(lon2 - lon1) / 2
    chord = math.sin(half_lat) ** 2 + math.cos(phi1) * math.cos(phi2) * math.sin(half_lon) ** 2
    return 2 * EARTH_RADIUS_KM * math.asin(min(1.0, math.sqrt(chord)))


def _known_regions() -> list[RegionInfo]:
    """The configured regions whose place is known; the named places without URL if there is none."""
    regions = []
    for name, entry in _config.region_table().items():
        place = _place(name, entry)
        if place is not None:
            regions.append(RegionInfo(name, str(entry["url"]).rstrip("/"), *place))
    return regions or [RegionInfo(name, "", *place) for name, place in _PLACES.items()]


def _place(name: str, entry: Mapping[str, Any]) -> tuple[float, float] | None:
    lat, lon = entry.get("lat"), entry.get("lon")
    if isinstance(lat, (int, float)) and isinstance(lon, (int, float)):
        return float(lat), float(lon)
    return _PLACES.get(_ALIASES.get(name, name))


def nearest_region_to(lat: float, lon: float) -> RegionInfo:
    """The nearest configured region (the nearest named place if none is configured)."""
    return min(_known_regions(), key=lambda region: haversine_km(lat, lon, region.lat, region.lon))


def detect_local_region() -> RegionInfo | None:
    """A guess from this machine's time zone; None if it has none that says where."""
    zone = _config.local_timezone() or _linked_zone() or _written_zone()
    place = _zone_place(zone) if zone else None
    return nearest_region_to(*place) if place else None


def _linked_zone() -> str | None:
    _, found, zone = str(_LOCALTIME.resolve()).partition("/zoneinfo/")
    return zone if found else None


def _written_zone() -> str | None:
    try:
        return _TIMEZONE.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _zone_place(zone: str) -> tuple[float, float] | None:
    for table in _ZONE_TABLES:
        try:
            text = table.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        for line in text.splitlines():
            columns = line.split("\t")
            if len(columns) >= 3 and columns[2] == zone:
                return _iso6709(columns[1])
    return _CONTINENTS.get(zone.partition("/")[0])


def _iso6709(text: str) -> tuple[float, float]:
    """`+DDMM+DDDMM` or `+DDMMSS+DDDMMSS`, as the tz tables write a position."""
    split = max(text.rfind("+"), text.rfind("-"))
    return _degrees(text[:split], 2), _degrees(text[split:], 3)


def _degrees(text: str, width: int) -> float:
    digits = text[1:]
    value = float(digits[:width])
    for index, start in enumerate(range(width, len(digits), 2), start=1):
        value += float(digits[start : start + 2]) / 60**index
    return -value if text[0] == "-" else value
