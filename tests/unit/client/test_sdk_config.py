"""client/_config.py and _regions.py: where the SDK goes, and never to a vendor by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import podflare
from podflare.client import _config, _regions
from podflare.client._config import find_address
from podflare.errors import BadRequest, UnknownRegionError

TABLE = {"eu": "https://eu.example.com/", "moon": {"url": "https://moon.example.com", "lat": 0.0, "lon": 0.0}}


def test_address_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Explicit host, then PODFLARE_HOSTD_URL, PODFLARE_HOST, PODFLARE_API_URL, then the private daemon."""
    assert find_address(None, None) is None
    seen = []
    for name in reversed(_config.HOST_VARIABLES):
        monkeypatch.setenv(name, f"http://{name.lower()}.test:1/")
        seen.append(str(find_address(None, None)))
    assert seen == [f"http://{name}.test:1" for name in ("podflare_api_url", "podflare_host", "podflare_hostd_url")]
    assert str(find_address("http://mine.test/prefix/", None)) == "http://mine.test/prefix"


def test_blank_variables_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty address variable does not hide a weaker one."""
    monkeypatch.setenv("PODFLARE_HOSTD_URL", "  ")
    monkeypatch.setenv("PODFLARE_HOST", "http://b.test")
    assert str(find_address(None, None)) == "http://b.test"


def test_unix_addresses() -> None:
    """`unix:/path` and `unix:///path` name a socket."""
    for text in ("unix:/run/p.sock", "unix:///run/p.sock"):
        address = _config.parse_address(text)
        assert (address.uds, str(address)) == ("/run/p.sock", "unix:/run/p.sock")


@pytest.mark.parametrize("text", ["127.0.0.1:7070", "ftp://x", "localhost"])
def test_an_address_without_scheme_is_refused(text: str) -> None:
    """What cannot be an address is a ValueError at once, with the allowed forms."""
    with pytest.raises(ValueError, match="http://"):
        find_address(text, None)


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which variable is wrong."""
    monkeypatch.setenv("PODFLARE_HOST", "nonsense")
    with pytest.raises(BadRequest, match="PODFLARE_HOST"):
        find_address(None, None)


def test_region_without_table_is_a_clear_error() -> None:
    """A region never falls back to some address: the error says how to name one."""
    with pytest.raises(UnknownRegionError, match=r"host=.*PODFLARE_REGIONS"):
        find_address("http://mine.test", "eu")
    assert podflare.REGIONS == {}


def test_configured_region_beats_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a table, region= decides, whatever its case and blanks."""
    monkeypatch.setenv("PODFLARE_REGIONS", json.dumps(TABLE))
    assert str(find_address("http://mine.test", " EU ")) == "https://eu.example.com"
    assert podflare.REGIONS == {"eu": "https://eu.example.com/", "moon": "https://moon.example.com"}
    assert podflare.resolve_region("europe") == "https://eu.example.com"
    assert podflare.resolve_region("") is None and podflare.resolve_region(None) is None
    with pytest.raises(ValueError, match="mars"):
        podflare.resolve_region("mars")


@pytest.mark.parametrize("text", ["{", "[]", '{"eu": 5}', '{"eu": {"lat": 1}}'])
def test_a_broken_table_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """PODFLARE_REGIONS that is no table of URLs is a ValueError that shows the form."""
    monkeypatch.setenv("PODFLARE_REGIONS", text)
    with pytest.raises(BadRequest, match="PODFLARE_REGIONS"):
        podflare.resolve_region("eu")


def test_nothing_of_the_package_names_a_vendor_host() -> None:
    """No address of the hosted service is in the source: code cannot be sent there by default."""
    package = Path(podflare.__file__).parent
    found = [
        path
        for path in package.rglob("*.py")
        if "podflare.ai" in path.read_text() or "podflare.dev" in path.read_text()
    ]
    assert found == []


def test_key_and_trace_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments come before PODFLARE_API_KEY and PODFLARE_TRACEPARENT; blanks around them are dropped."""
    monkeypatch.setenv("PODFLARE_API_KEY", " pf_env\n")
    monkeypatch.setenv("PODFLARE_TRACEPARENT", "00-1-1-01")
    assert (_config.find_api_key(None), _config.find_api_key("pf_arg")) == ("pf_env", "pf_arg")
    assert (_config.find_traceparent(None), _config.find_traceparent("00-2-2-00")) == ("00-1-1-01", "00-2-2-00")
    with pytest.raises(BadRequest, match="API key"):
        _config.find_api_key("a\nb")


def test_private_daemon_gets_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its environment is an allow-list: no keys of other services, nothing meant for a shared daemon."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("PODFLARE_API_KEY", "secret")
    monkeypatch.setenv("PODFLARE_API_KEYS", "secret")
    monkeypatch.setenv("PODFLARE_REQUIRE", "seccomp")
    env = _config.daemon_environment(tmp_path)
    assert "secret" not in env.values()
    assert env["PODFLARE_REQUIRE"] == "seccomp" and "PATH" in env


def test_private_daemon_runs_this_very_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package known to this process only is put on the daemon's path; site-packages never is."""
    monkeypatch.setenv("PYTHONPATH", "/other")
    assert _config.daemon_environment(tmp_path)["PYTHONPATH"] == f"{tmp_path}:/other"
    assert _config.daemon_environment(tmp_path / "site-packages")["PYTHONPATH"] == "/other"


def test_distance_on_the_globe() -> None:
    """One degree on the equator is 111.19 km, and half the globe is pi times its radius."""
    assert podflare.haversine_km(0, 0, 0, 1) == pytest.approx(111.1949, abs=1e-3)
    assert podflare.haversine_km(0, 0, 0, 180) == pytest.approx(6371 * 3.14159265, rel=1e-6)


def test_nearest_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """Munich is nearest to eu; with a table, only what it configures counts."""
    assert podflare.nearest_region_to(48, 11)[:2] == ("eu", "")
    monkeypatch.setenv("PODFLARE_REGIONS", json.dumps({"moon": TABLE["moon"], "nowhere": "https://n.example.com"}))
    assert podflare.nearest_region_to(48, 11) == podflare.RegionInfo("moon", "https://moon.example.com", 0.0, 0.0)


@pytest.mark.parametrize(
    ("zone", "expected"),
    [("Europe/Berlin", "eu"), ("America/Los_Angeles", "us-west"), ("Asia/Singapore", "sg"), ("Europe/Nowhere", "eu")],
)
def test_local_region_from_the_time_zone(monkeypatch: pytest.MonkeyPatch, zone: str, expected: str) -> None:
    """The zone's position decides; a zone the system does not know counts by its continent."""
    monkeypatch.setenv("TZ", zone)
    found = podflare.detect_local_region()
    assert found is not None and found.name == expected


def test_no_time_zone_no_guess(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """UTC says nothing about the place."""
    monkeypatch.setenv("TZ", "UTC")
    assert podflare.detect_local_region() is None
    monkeypatch.delenv("TZ")
    monkeypatch.setattr(_regions, "_LOCALTIME", tmp_path / "none")
    monkeypatch.setattr(_regions, "_TIMEZONE", tmp_path / "none")
    assert podflare.detect_local_region() is None


def test_positions_of_the_zone_tables() -> None:
    """Degrees, minutes and seconds of both hemispheres are read."""
    assert _regions._iso6709("+5230+01322") == pytest.approx((52.5, 13.3667), abs=1e-3)
    assert _regions._iso6709("-333000-0704000") == pytest.approx((-33.5, -70.6667), abs=1e-3)


def test_default_api_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """podflare.regions.default_api_base tells the configured address, "" for the private daemon."""
    from podflare.regions import default_api_base

    assert default_api_base() == ""
    monkeypatch.setenv("PODFLARE_API_URL", "http://x.test/")
    assert default_api_base() == "http://x.test"
